"""What is said of something that is no store of Milvus."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from milvus_vllm_retrievers import ConfigurationError
from milvus_vllm_retrievers._core.stores import langchain_arguments, llama_index_arguments

OF_LANGCHAIN = type("Milvus", (), {"__module__": "langchain_milvus.vectorstores.milvus"})
OF_LLAMA_INDEX = type("Store", (), {"__module__": "llama_index.vector_stores.milvus.base"})


@pytest.mark.parametrize("read", [langchain_arguments, llama_index_arguments])
@pytest.mark.parametrize(
    ("given", "named"), [(object(), "an object"), (None, "None"), ("docs", "a str")]
)
def test_what_is_no_store_is_named(read: Callable[[Any], Any], given: Any, named: str) -> None:
    with pytest.raises(ConfigurationError, match=f"is needed, not {named}$"):
        read(given)


@pytest.mark.parametrize(
    ("read", "given", "module"),
    [
        (langchain_arguments, OF_LLAMA_INDEX(), "llama_index"),
        (llama_index_arguments, OF_LANGCHAIN(), "langchain"),
    ],
)
def test_a_store_of_the_other_framework_is_sent_there(
    read: Callable[[Any], Any], given: Any, module: str
) -> None:
    with pytest.raises(ConfigurationError, match="that one goes to") as caught:
        read(given)

    assert f"goes to milvus_vllm_retrievers.{module}" in str(caught.value)
