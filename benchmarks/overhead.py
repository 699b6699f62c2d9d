"""Target 1: what our retrievers cost the client, beside the shortest retriever written by hand.

    python -m benchmarks overhead

Two vector fields (dense and BM25), 50 candidates each, 5 results, reranked inside Milvus. The
retriever written by hand makes the same one call of pymilvus, with Functions that were built
before, and the same Documents or nodes of the answer. Both are asked through their framework
(`invoke`, `retrieve`), over the same client. CPU time of this process; the servers have their own,
and their answers are replayed, so that their work in between does not chill this one's caches.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from langchain_core.callbacks import (
    AsyncCallbackManagerForRetrieverRun,
    CallbackManagerForRetrieverRun,
)
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.retrievers import BaseRetriever
from llama_index.core.base.base_retriever import BaseRetriever as LlamaIndexRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from pymilvus import AnnSearchRequest, AsyncMilvusClient, Function, MilvusClient

from benchmarks.corpus import QUERIES, make_collection, query_vector
from benchmarks.harness import (
    Result,
    Timing,
    ainterleaved,
    behind,
    interleaved,
    milvus_process,
    replaying,
    rerank_process,
    say,
)
from milvus_vllm_retrievers import langchain, llama_index
from milvus_vllm_retrievers.ranker import VLLMRanker

COLLECTION = "overhead"
ROWS = 60
FETCH_K = 50
K = 5
LIMIT = 1.10
HIDDEN = ["pk", "relevance_score", "reranked_by"]


class ReadyMade(Embeddings):
    """An embedding that costs nothing: the vectors are there."""

    def embed_query(self, text: str) -> list[float]:
        """Return the query's vector."""
        return query_vector(text)

    async def aembed_query(self, text: str) -> list[float]:
        """Return the query's vector, on the event loop."""
        return query_vector(text)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Not needed here."""
        raise NotImplementedError


def arguments(query: str, function: Function) -> dict[str, Any]:
    """Return what both retrievers ask of Milvus."""
    return {
        "collection_name": COLLECTION,
        "reqs": [
            AnnSearchRequest([query_vector(query)], "dense_1", {}, FETCH_K),
            AnnSearchRequest([query], "sparse", {}, FETCH_K),
        ],
        "ranker": function,
        "limit": K,
        "output_fields": ["pk", "text", "source", "page"],
    }


class ByHandLangChain(BaseRetriever):
    """The shortest LangChain retriever that does it."""

    client: Any
    async_client: Any
    functions: Mapping[str, Any]

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,  # noqa: ARG002 - LangChain's interface
    ) -> list[Document]:
        rows = self.client.hybrid_search(**arguments(query, self.functions[query]))[0]
        return [document(row) for row in rows]

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,  # noqa: ARG002 - LangChain's interface
    ) -> list[Document]:
        rows = await self.async_client.hybrid_search(**arguments(query, self.functions[query]))
        return [document(row) for row in rows[0]]


def document(row: Mapping[str, Any]) -> Document:
    """Make the Document of a row that Milvus reranked."""
    entity = row["entity"]
    return Document(
        id=str(row["pk"]),
        page_content=entity["text"],
        metadata={
            "source": entity["source"],
            "page": entity["page"],
            "pk": row["pk"],
            "relevance_score": row["distance"],
            "reranked_by": "milvus",
        },
    )


class ByHandLlamaIndex(LlamaIndexRetriever):
    """The shortest LlamaIndex retriever that does it."""

    def __init__(
        self, client: MilvusClient, async_client: Any, functions: Mapping[str, Function]
    ) -> None:
        self._client = client
        self._async_client = async_client
        self._functions = functions
        super().__init__()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        query = query_bundle.query_str
        rows = self._client.hybrid_search(**arguments(query, self._functions[query]))[0]
        return [node(row) for row in rows]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        query = query_bundle.query_str
        rows = await self._async_client.hybrid_search(**arguments(query, self._functions[query]))
        return [node(row) for row in rows[0]]


def node(row: Mapping[str, Any]) -> NodeWithScore:
    """Make the node of a row that Milvus reranked; scores and key hidden from the model."""
    entity = row["entity"]
    text_node = TextNode(
        id_=str(row["pk"]),
        text=entity["text"],
        metadata={
            "source": entity["source"],
            "page": entity["page"],
            "pk": row["pk"],
            "relevance_score": row["distance"],
            "reranked_by": "milvus",
        },
        excluded_llm_metadata_keys=HIDDEN,
        excluded_embed_metadata_keys=HIDDEN,
    )
    return NodeWithScore(node=text_node, score=row["distance"])


@dataclass(frozen=True)
class Pair:
    """The two retrievers of one framework, and how each is asked one query.

    Attributes:
        framework: Its name.
        ours: Our retriever, blocking.
        by_hand: The one written by hand, blocking.
        aours: Our retriever, async.
        aby_hand: The one written by hand, async.
    """

    framework: str
    ours: Callable[[str], Any]
    by_hand: Callable[[str], Any]
    aours: Callable[[str], Awaitable[Any]]
    aby_hand: Callable[[str], Awaitable[Any]]


def pairs(
    client: MilvusClient,
    async_client: AsyncMilvusClient,
    ranker: VLLMRanker,
    functions: Mapping[str, Function],
) -> list[Pair]:
    """Return the retrievers to compare, all over the same clients."""
    clients = {"client": client, "async_client": async_client}
    ours = langchain.MilvusVLLMRetriever(
        collection_name=COLLECTION,
        ranker=ranker,
        embedding=ReadyMade(),
        k=K,
        fetch_k=FETCH_K,
        **clients,
    )
    by_hand = ByHandLangChain(functions=functions, **clients)
    ours_llama = llama_index.MilvusVLLMRetriever(
        COLLECTION, ranker, similarity_top_k=K, fetch_k=FETCH_K, **clients
    )
    by_hand_llama = ByHandLlamaIndex(client, async_client, functions)
    return [
        Pair("LangChain", ours.invoke, by_hand.invoke, ours.ainvoke, by_hand.ainvoke),
        Pair(
            "LlamaIndex",
            lambda query: ours_llama.retrieve(bundle(query)),
            lambda query: by_hand_llama.retrieve(bundle(query)),
            lambda query: ours_llama.aretrieve(bundle(query)),
            lambda query: by_hand_llama.aretrieve(bundle(query)),
        ),
    ]


def bundle(query: str) -> QueryBundle:
    """Return a query of LlamaIndex that brings its embedding."""
    return QueryBundle(query, embedding=query_vector(query))


def plain(item: Any) -> list[Any]:
    """Return a Document or a node as plain values, to compare it."""
    if isinstance(item, Document):
        return [item.id, item.page_content, item.metadata]
    given = item.node
    hidden = [given.excluded_llm_metadata_keys, given.excluded_embed_metadata_keys]
    return [item.score, given.node_id, given.text, given.metadata, hidden]


@dataclass(frozen=True)
class Setting:
    """Servers and clients that are up, and what asks them.

    Attributes:
        async_client: The client that the retrievers use.
        functions: The ready-made Functions, by query.
        pairs: The retrievers of both frameworks.
    """

    async_client: AsyncMilvusClient
    functions: Mapping[str, Function]
    pairs: list[Pair]


@asynccontextmanager
async def setting(
    *, replay: bool, rerank_ms: float = 0, workers: int = 10
) -> AsyncIterator[Setting]:
    """Start the servers, fill the collection and make the retrievers.

    Args:
        replay: Whether a search that was answered before is answered from memory, after
            `rerank_ms`, so that the server costs next to nothing.
        rerank_ms: How long a rerank request takes.
        workers: Searches that the Milvus stand-in does at once.
    """
    with ExitStack() as servers:
        data = servers.enter_context(tempfile.TemporaryDirectory())
        uri = servers.enter_context(milvus_process(data, workers=workers))
        vllm = servers.enter_context(rerank_process(rerank_ms))
        if replay:
            uri = servers.enter_context(replaying(uri, rerank_ms))
        client, async_client = MilvusClient(uri), AsyncMilvusClient(uri)
        ranker = VLLMRanker(vllm, mode="server")
        functions = {query: ranker.to_function(query, "text") for query in QUERIES}
        try:
            make_collection(client, COLLECTION, rows=ROWS)
            both = pairs(client, async_client, ranker, functions)
            for pair in both:
                await compare(pair)
            yield Setting(async_client, functions, both)
        finally:
            client.close()
            await async_client.close()


async def compare(pair: Pair) -> None:
    """Check that both retrievers give the same list, both ways of asking."""
    for query in QUERIES:
        expected = [plain(item) for item in pair.by_hand(query)]
        assert len(expected) == K, f"{len(expected)} results in place of {K}"
        for found in (pair.ours(query), await pair.aours(query), await pair.aby_hand(query)):
            same = [plain(item) for item in found] == expected
            assert same, f"{pair.framework}: not the same list for {query!r}"


def asked_in_turn(ask: Callable[[str], Any]) -> Callable[[], Any]:
    """Return a call that asks the next query each time."""
    queries = cycle(QUERIES)
    return lambda: ask(next(queries))


def result(pair: Pair, how: str, timings: Mapping[str, Timing]) -> Result:
    """Return the figure of one framework and one way of asking."""
    ours, by_hand = timings["ours"], timings["by hand"]
    return Result(
        what=f"{pair.framework} {how}: client CPU per query, ours / written by hand",
        figure=ours.cpu_ratio(by_hand),
        limit=LIMIT,
        behind=behind(ours.cpu_ms, by_hand.cpu_ms, "ms"),
        details={
            "ours_cpu_ms": ours.cpu_ms,
            "by_hand_cpu_ms": by_hand.cpu_ms,
            "ours_wall_ms": ours.wall_ms,
            "by_hand_wall_ms": by_hand.wall_ms,
            "rounds": len(ours.cpu),
        },
    )


async def measure(quick: bool) -> list[Result]:
    """Measure both frameworks, sync and async."""
    rounds, repeat = (100 if quick else 1_500), 1
    results = []
    async with setting(replay=True) as up:
        for pair in up.pairs:
            say(f"  {pair.framework}: {rounds:,} queries each, in turn, sync and async")
            blocking = {"ours": pair.ours, "by hand": pair.by_hand}
            timings = interleaved(
                {n: asked_in_turn(a) for n, a in blocking.items()}, rounds, repeat
            )
            results.append(result(pair, "sync", timings))
            of_async = {"ours": pair.aours, "by hand": pair.aby_hand}
            timings = await ainterleaved(
                {n: asked_in_turn(a) for n, a in of_async.items()}, rounds, repeat
            )
            results.append(result(pair, "async", timings))
    return results


def run(quick: bool) -> list[Result]:
    """Return the figures of target 1."""
    return asyncio.run(measure(quick))
