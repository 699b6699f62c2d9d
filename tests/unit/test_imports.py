"""What an import brings along, each in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys

import pytest

import milvus_vllm_retrievers

WITH_LANGCHAIN = """
import httpx
from langchain_core.documents import Document
from milvus_vllm_retrievers.langchain import VLLMRerank

scores = {"results": [{"index": 0, "relevance_score": 0.5}]}
httpx.Client.send = lambda *_, **__: httpx.Response(200, json=scores)
(document,) = VLLMRerank(endpoint="http://vllm").compress_documents([Document("a")], "q")
assert document.metadata["relevance_score"] == 0.5
"""

WITH_LLAMA_INDEX = """
import httpx
from llama_index.core.schema import NodeWithScore, TextNode
from milvus_vllm_retrievers.llama_index import VLLMRerank

scores = {"results": [{"index": 0, "relevance_score": 0.5}]}
httpx.Client.send = lambda *_, **__: httpx.Response(200, json=scores)
given = [NodeWithScore(node=TextNode(text="a"))]
(node,) = VLLMRerank(endpoint="http://vllm").postprocess_nodes(given, query_str="q")
assert node.score == 0.5
"""


def run(code: str) -> str:
    """Run code in an interpreter of its own and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        (
            "import milvus_vllm_retrievers as package; package.VLLMRanker, package.SearchError",
            {"langchain_core", "llama_index", "pymilvus"},
        ),
        (WITH_LANGCHAIN, {"llama_index", "pymilvus"}),
        (WITH_LLAMA_INDEX, {"langchain_core", "pymilvus"}),
    ],
    ids=["the package", "LangChain's direct reranker", "LlamaIndex's direct reranker"],
)
def test_only_what_is_used_is_imported(code: str, unwanted: set[str]) -> None:
    modules = run(f"{code}\nimport sys; print(*sys.modules)").split()

    assert not unwanted & set(modules)
    assert "milvus_vllm_retrievers" in modules


@pytest.mark.parametrize(
    ("framework", "side", "extra"),
    [
        ("langchain_core", "langchain", "milvus-vllm-retrievers[langchain]"),
        ("llama_index.core", "llama_index", "milvus-vllm-retrievers[llama-index]"),
    ],
)
def test_a_missing_framework_is_reported_with_the_extra_that_brings_it(
    framework: str, side: str, extra: str
) -> None:
    message = run(
        f"""
import sys
sys.modules["{framework}"] = None
from milvus_vllm_retrievers import MissingDependencyError
try:
    import milvus_vllm_retrievers.{side}
except MissingDependencyError as error:
    print(error)
"""
    )

    assert f"pip install '{extra}'" in message


def test_every_public_name_can_be_imported_and_no_other() -> None:
    names = milvus_vllm_retrievers.__all__

    assert dir(milvus_vllm_retrievers) == sorted(names)
    assert all(getattr(milvus_vllm_retrievers, name) for name in names)
    with pytest.raises(AttributeError, match="no attribute 'Ranker'"):
        milvus_vllm_retrievers.Ranker  # noqa: B018
