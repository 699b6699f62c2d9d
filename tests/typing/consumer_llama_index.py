"""What a user of LlamaIndex writes; type-checked, never run."""

from __future__ import annotations

from typing import Any

from llama_index.core import VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.callbacks import CallbackManager
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters
from pydantic import SecretStr
from typing_extensions import assert_type

from milvus_vllm_retrievers.llama_index import (
    MilvusVLLMRerank,
    MilvusVLLMRetriever,
    VLLMRanker,
    VLLMRerank,
)


def retrieving(embed_model: BaseEmbedding, index: VectorStoreIndex, store: object) -> None:
    """Make retrievers in each way, ask them and set their attributes."""
    ranker = VLLMRanker("http://localhost:8000")
    filters = MetadataFilters(filters=[MetadataFilter(key="tenant", value="a")])
    MilvusVLLMRetriever("docs", None)
    MilvusVLLMRetriever("docs", ranker=ranker, token=SecretStr("user:password"))
    retriever = MilvusVLLMRetriever(
        "docs",
        ranker,
        uri="http://localhost:19530",
        token="user:password",
        embed_model={"dense": embed_model},
        similarity_top_k=4,
        fetch_k=100,
        filters=filters,
        score_threshold=0.5,
        timeout=None,
        callback_manager=CallbackManager(),
        object_map={},
        verbose=True,
    )
    assert_type(MilvusVLLMRetriever.from_vector_store(store, ranker), MilvusVLLMRetriever)
    assert_type(
        MilvusVLLMRetriever.from_index(index, ranker=ranker, similarity_top_k=3, timeout=5),
        MilvusVLLMRetriever,
    )

    assert_type(retriever.retrieve("whales"), list[NodeWithScore])
    assert_type(
        retriever.retrieve_many(["whales", QueryBundle("bread")], num_workers=2),
        list[list[NodeWithScore]],
    )
    assert_type(retriever.explain("whales").candidates, int)
    retriever.refresh()
    retriever.similarity_top_k += 1
    retriever.fetch_k = None
    retriever.filters = filters
    retriever.expr = "page > 1"
    retriever.expr_params = {"page": 1}
    retriever.timeout = 5
    retriever.score_threshold = None

    with retriever.within(filters=filters, expr="page > 1", partition_names=["a"]) as narrowed:
        assert_type(narrowed, MilvusVLLMRetriever)
        RetrieverQueryEngine.from_args(narrowed)
    retriever.close()


async def retrieving_async(retriever: MilvusVLLMRetriever) -> None:
    """Ask in an event loop."""
    async with retriever.within(instruction="find the newest") as narrowed:
        assert_type(await narrowed.aretrieve("whales"), list[NodeWithScore])
        assert_type(await narrowed.aretrieve_many(["whales"]), list[list[NodeWithScore]])
        assert_type((await narrowed.aexplain("whales")).query, str)
    await retriever.arefresh()
    await retriever.aclose()


def reranking(nodes: list[NodeWithScore]) -> None:
    """Make postprocessors in each way and use them."""
    ranker = VLLMRanker("http://localhost:8000")
    VLLMRerank(endpoint="http://localhost:8000", model="bge", top_n=3)
    straight = VLLMRerank(ranker, metadata_mode=MetadataMode.EMBED, timeout=5)
    by_key = MilvusVLLMRerank("docs", ranker=ranker, token="user:password", on_missing="keep")
    for reranker in (straight, by_key):
        reranker.top_n = 2
        reranker.timeout = None
        reranker.keep_retrieval_score = False
        assert_type(reranker.postprocess_nodes(nodes, query_str="whales"), list[NodeWithScore])


def wrong(retriever: MilvusVLLMRetriever, anything: Any) -> None:
    """Write what is an error already to a type checker: each line is one that it must find."""
    MilvusVLLMRetriever("docs", None, top_k=3)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    retriever.retrieve("whales", k=3)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    retriever.retrieve_many(["whales"], top_k=3)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    retriever.within(filter=anything)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    VLLMRerank(api_key="sk-mine")  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
