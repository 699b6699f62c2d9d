"""While a slow vLLM is awaited, other tasks of the event loop go on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode
from pymilvus import MilvusClient

from milvus_vllm_retrievers import langchain, llama_index
from milvus_vllm_retrievers.ranker import VLLMRanker
from tests.corpus import TEXTS, create_collection
from tests.fakes import FakeVLLM

NAME = "event_loop_docs"
SECONDS = 0.3  # how long the model takes
BEAT = 0.01  # seconds; about 30 beats fit in, and 0 or 1 if the loop is held up
LEAST_BEATS = 5

Call = Callable[[Any], Awaitable[Any]]

DOCUMENTS = [Document(id=str(i), page_content=text) for i, text in enumerate(TEXTS)]
NODES = [NodeWithScore(node=TextNode(id_=str(i), text=text)) for i, text in enumerate(TEXTS)]
CALLS: dict[str, tuple[type, Call]] = {
    "LangChain's ainvoke": (
        langchain.MilvusVLLMRetriever,
        lambda retriever: retriever.ainvoke("whales"),
    ),
    "LangChain's acompress_documents": (
        langchain.VLLMRerank,
        lambda reranker: reranker.acompress_documents(DOCUMENTS, "whales"),
    ),
    "LangChain's acompress_documents, through Milvus": (
        langchain.MilvusVLLMRerank,
        lambda reranker: reranker.acompress_documents(DOCUMENTS, "whales"),
    ),
    "LlamaIndex's aretrieve": (
        llama_index.MilvusVLLMRetriever,
        lambda retriever: retriever.aretrieve("whales"),
    ),
    "LlamaIndex's apostprocess_nodes": (
        llama_index.VLLMRerank,
        lambda reranker: reranker.apostprocess_nodes(NODES, query_str="whales"),
    ),
    "LlamaIndex's apostprocess_nodes, through Milvus": (
        llama_index.MilvusVLLMRerank,
        lambda reranker: reranker.apostprocess_nodes(NODES, query_str="whales"),
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _collection(milvus26: MilvusClient) -> None:
    create_collection(milvus26, NAME)


class Pause(threading.Barrier):
    """A gate that opens some time after a request has come to it."""

    def __init__(self) -> None:
        super().__init__(2)

    def wait(self, timeout: float | None = None) -> int:
        threading.Timer(SECONDS, super().wait).start()
        return super().wait(timeout)


@pytest.fixture
def slow_vllm(fake_vllm: FakeVLLM) -> FakeVLLM:
    """Takes its time for every request."""
    fake_vllm.gate = Pause()
    return fake_vllm


def made(class_: type, vllm: str, milvus: str, mode: Any) -> Any:
    if class_.__name__ == "VLLMRerank":
        return class_(endpoint=vllm)
    return class_(NAME, ranker=VLLMRanker(vllm, mode=mode), uri=milvus)


def cases() -> list[Any]:
    return [
        pytest.param(class_, call, mode, id=f"{name}, {mode}")
        for name, (class_, call) in CALLS.items()
        for mode in (("server", "client") if "Retriever" in class_.__name__ else ("auto",))
    ]


@pytest.mark.parametrize(("class_", "call", "mode"), cases())
async def test_a_slow_vllm_does_not_hold_up_the_event_loop(
    milvus26_uri: str, slow_vllm: FakeVLLM, class_: type, call: Call, mode: str
) -> None:
    subject = made(class_, slow_vllm.url, milvus26_uri, mode)
    beats = 0

    async def heart() -> None:
        nonlocal beats
        while True:
            await asyncio.sleep(BEAT)
            beats += slow_vllm.in_flight

    beside = asyncio.create_task(heart())
    async with subject:
        results = await call(subject)
    beside.cancel()

    assert len(results) >= 1
    assert len(slow_vllm.received) == 1
    assert beats >= LEAST_BEATS
