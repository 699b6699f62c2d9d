"""Both front ends behind one interface, and the check of what a call brought."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, TypeVar

from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode

from milvus_vllm_retrievers import MilvusVLLMError, VLLMRanker, langchain, llama_index
from tests.faults.table import Outcome, Raises, Reranked, Unranked

T = TypeVar("T")
How = Literal["sync", "async"]
HOWS: tuple[How, ...] = ("sync", "async")

QUERY = "key"
TEXTS = [" ".join(["key"] * (5 - i) + ["door"] * i) for i in range(5)]
"""Text i is the (i + 1)-th that a full-text search for the query finds."""

K = 3
THRESHOLD = 0.6
"""Between the second and the third best; above the scores that a search itself gives."""
MARGIN = 5.0  # seconds beyond a deadline, for a machine that is busy: a bound against hanging


@dataclass(frozen=True)
class Item:
    """What a front end says of one document or node."""

    id: int
    text: str
    score: float | None
    relevance_score: float | None
    reranked_by: str | None
    rerank_error: str | None
    retrieval_score: float | None


@dataclass(frozen=True)
class FrontEnd:
    """One framework's side of the package."""

    name: str
    module: ModuleType

    def __str__(self) -> str:
        return self.name

    def retriever(
        self, collection: str, uri: str, ranker: VLLMRanker | None, *, k: int = K, **more: Any
    ) -> Any:
        """Make a retriever that finds the texts by full-text search."""
        limit = {"k" if self.module is langchain else "similarity_top_k": k}
        return self.module.MilvusVLLMRetriever(
            collection, ranker=ranker, uri=uri, vector_field="sparse", **limit, **more
        )

    async def call(self, subject: Any, how: How) -> list[Item]:
        """Ask a retriever, or have a reranker rerank."""
        is_retriever = isinstance(subject, self.module.MilvusVLLMRetriever)
        return await (self.retrieve if is_retriever else self.rerank)(subject, how)

    async def retrieve(self, retriever: Any, how: How, query: str = QUERY) -> list[Item]:
        """Ask a retriever, blocking or async."""
        sync = how == "sync"
        if self.module is langchain:
            return items_of(retriever.invoke(query) if sync else await retriever.ainvoke(query))
        return items_of(retriever.retrieve(query) if sync else await retriever.aretrieve(query))

    async def rerank(self, reranker: Any, how: How) -> list[Item]:
        """Have the texts reranked, blocking or async."""
        if self.module is langchain:
            documents = [Document(id=str(i), page_content=text) for i, text in enumerate(TEXTS)]
            if how == "sync":
                return items_of(reranker.compress_documents(documents, QUERY))
            return items_of(await reranker.acompress_documents(documents, QUERY))
        nodes = [NodeWithScore(node=TextNode(id_=str(i), text=t)) for i, t in enumerate(TEXTS)]
        if how == "sync":
            return items_of(reranker.postprocess_nodes(nodes, query_str=QUERY))
        return items_of(await reranker.apostprocess_nodes(nodes, query_str=QUERY))


FRONT_ENDS = (FrontEnd("LangChain", langchain), FrontEnd("LlamaIndex", llama_index))


def items_of(found: Sequence[Document | NodeWithScore]) -> list[Item]:
    """Read what a front end returned."""
    return [_item(each) for each in found]


def _item(found: Document | NodeWithScore) -> Item:
    if isinstance(found, Document):
        identity, text, metadata = found.id, found.page_content, found.metadata
        score = metadata["relevance_score"]
    else:
        identity, text, metadata = found.node.node_id, found.node.get_content(), found.node.metadata
        score = found.score
    return Item(
        id=int(identity or -1),
        text=text,
        score=score,
        relevance_score=metadata["relevance_score"],
        reranked_by=metadata["reranked_by"],
        rerank_error=metadata.get("rerank_error"),
        retrieval_score=metadata.get("retrieval_score"),
    )


Got = list[Item] | MilvusVLLMError


async def got(call: Awaitable[list[Item]]) -> tuple[Got, float]:
    """Return what an awaitable call brought, an error of the package included, and its seconds."""
    started = time.monotonic()
    try:
        result: Got = await call
    except MilvusVLLMError as error:
        result = error
    return result, time.monotonic() - started


async def at_once(how: How, calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Make calls beside each other: those that block in a thread each."""
    if how == "async":
        return list(await asyncio.gather(*calls))
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(max(len(calls), 1)) as threads:
        futures = [loop.run_in_executor(threads, asyncio.run, call) for call in calls]
        return list(await asyncio.gather(*futures))


def check(
    result: Got,
    expected: Outcome,
    *,
    least: float | None = None,
    k: int = K,
    texts: Sequence[str] = TEXTS,
) -> None:
    """Assert that a call brought exactly what was expected.

    Args:
        result: What it brought.
        expected: What it should.
        least: The score threshold that applies to scored items.
        k: How many items were asked for.
        texts: The documents, in retrieval order.
    """
    match expected:
        case Raises():
            check_error(result, expected)
        case Reranked():
            check_reranked(result, expected, least, k, texts)
        case Unranked(phrase):
            check_unranked(result, phrase, k, texts)


def check_error(result: Got, expected: Raises) -> None:
    assert type(result) is expected.error, result
    assert expected.phrase in str(result)
    if expected.status is not None:
        assert getattr(result, "status_code", None) == expected.status


def check_reranked(
    result: Got, expected: Reranked, least: float | None, k: int, texts: Sequence[str]
) -> None:
    assert isinstance(result, list), result
    scores = expected.scores
    best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    ids = [i for i in best[:k] if least is None or scores[i] >= least]
    assert [(item.id, item.text) for item in result] == [(i, texts[i]) for i in ids]
    assert [item.relevance_score for item in result] == [scores[i] for i in ids]
    assert [item.score for item in result] == [scores[i] for i in ids]
    assert {(item.reranked_by, item.rerank_error) for item in result} == {(expected.by, None)}
    if expected.by == "milvus":  # it has replaced what the search gave
        assert {item.retrieval_score for item in result} == {None}


def check_unranked(result: Got, phrase: str, k: int, texts: Sequence[str]) -> None:
    assert isinstance(result, list), result
    assert [(item.id, item.text) for item in result] == list(enumerate(texts))[:k]
    assert {(item.relevance_score, item.reranked_by) for item in result} == {(None, None)}
    assert all(phrase in (item.rerank_error or "") for item in result), result
