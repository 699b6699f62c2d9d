"""The public classes belong to the packages they are imported from, for every tool that asks."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.load import dumpd
from pydantic import BaseModel, TypeAdapter
from pydantic_core import PydanticUndefined

from milvus_vllm_retrievers import VLLMRanker, langchain
from milvus_vllm_retrievers import llama_index as li

PUBLIC = [
    pytest.param(module, name, id=f"{module.__name__.rpartition('.')[2]}.{name}")
    for module in (langchain, li)
    for name in module.__all__
    if name.startswith("Milvus") or name == "VLLMRerank"
]
MODELS = [each for each in PUBLIC if issubclass(getattr(*each.values), BaseModel)]


@pytest.mark.parametrize(("module", "name"), PUBLIC)
def test_a_class_says_that_it_is_of_the_package_it_is_imported_from(module: Any, name: str) -> None:
    class_ = getattr(module, name)

    assert class_.__module__ == module.__name__
    assert repr(class_) == f"<class '{module.__name__}.{name}'>"


@pytest.mark.parametrize(("module", "name"), MODELS)
def test_pydantic_rebuilds_a_class_and_builds_on_it(module: Any, name: str) -> None:
    class_ = getattr(module, name)
    fields = {field: repr(info) for field, info in class_.model_fields.items()}

    assert class_.model_rebuild(force=True)

    class Mine(class_):  # type: ignore[misc, valid-type]
        mine: int = 3

    assert {field: repr(info) for field, info in class_.model_fields.items()} == fields
    assert Mine.model_fields.keys() == {*fields, "mine"}
    assert TypeAdapter(class_ | None).validate_python(None) is None
    needed = {
        field: "docs"
        for field, info in Mine.model_fields.items()
        if info.default is PydanticUndefined and info.default_factory is None
    }
    assert Mine(**{**needed, "ranker": VLLMRanker("http://localhost:8000")}).mine == 3


def test_langchain_names_the_retriever_by_its_public_path() -> None:
    with langchain.MilvusVLLMRetriever("docs", ranker=None) as retriever:
        path = ["milvus_vllm_retrievers", "langchain", "MilvusVLLMRetriever"]
        assert retriever.lc_id() == path
        assert dumpd(retriever)["id"] == path
