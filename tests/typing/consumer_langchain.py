"""What a user of LangChain writes; type-checked, never run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import ConfigurableField, RunnablePassthrough
from langchain_core.tools import create_retriever_tool
from pydantic import SecretStr
from typing_extensions import assert_type

from milvus_vllm_retrievers.langchain import (
    MilvusVLLMRerank,
    MilvusVLLMRetriever,
    VLLMRanker,
    VLLMRerank,
)


def retrieving(embedding: Embeddings, store: object) -> None:
    """Make retrievers in each way, ask them and set their attributes."""
    ranker = VLLMRanker("http://localhost:8000")
    MilvusVLLMRetriever("docs", None)
    MilvusVLLMRetriever("docs", ranker=ranker, token=SecretStr("user:password"))
    MilvusVLLMRetriever(collection_name="docs", ranker=ranker, uri="./notes.db", k=2)
    retriever = MilvusVLLMRetriever(
        "docs",
        ranker,
        uri="http://localhost:19530",
        token="user:password",
        db_name="mine",
        connection_args={"secure": True},
        embedding={"dense": embedding},
        sparse_embedding=lambda text: {len(text): 1.0},
        vector_field=["dense", "sparse"],
        output_fields=["page"],
        k=4,
        fetch_k=100,
        filters={"tenant": "a", "year": {"gte": 2024}, "topic": ["x", "y"]},
        expr="page > {page}",
        expr_params={"page": 1},
        partition_names=["a"],
        consistency_level="Strong",
        search_params={"dense": {"params": {"ef": 100}}},
        score_threshold=0.5,
        timeout=None,
        tags=["mine"],
        metadata={"team": "a"},
    )
    assert_type(MilvusVLLMRetriever.from_vectorstore(store, ranker), MilvusVLLMRetriever)
    assert_type(
        MilvusVLLMRetriever.from_vectorstore(store, ranker=None, k=3, timeout=5),
        MilvusVLLMRetriever,
    )

    assert_type(retriever.invoke("whales", k=3, filters={"page": 1}), list[Document])
    assert_type(retriever.batch(["whales"], {"max_concurrency": 2}), list[list[Document]])
    assert_type(retriever.explain("whales", k=2).candidates, int)
    retriever.refresh()
    retriever.k += 1
    retriever.fetch_k = None
    retriever.filters = {"tenant": "b"}
    retriever.expr = "page > 1"
    retriever.expr_params = None
    retriever.timeout = 5
    retriever.score_threshold = None
    assert_type(retriever.model_copy(update={"k": 2}), MilvusVLLMRetriever)

    with retriever.within(
        filters={"tenant": "a"}, expr="page > 1", partition_names=["a"], instruction="newest"
    ) as narrowed:
        assert_type(narrowed, MilvusVLLMRetriever)
        create_retriever_tool(narrowed, "search", "Search the notes.")
        _ = {"context": narrowed, "question": RunnablePassthrough[str]()} | RunnablePassthrough[
            Any
        ]()
        narrowed.configurable_fields(k=ConfigurableField(id="k")).invoke("whales")
    as_any: BaseRetriever = retriever
    as_any.invoke("whales")
    retriever.close()


async def retrieving_async(retriever: MilvusVLLMRetriever) -> None:
    """Ask in an event loop."""
    async with retriever.within(instruction="find the newest") as narrowed:
        assert_type(await narrowed.ainvoke("whales", fetch_k=20), list[Document])
        assert_type(await narrowed.abatch(["whales"]), list[list[Document]])
        assert_type((await narrowed.aexplain("whales")).query, str)
    await retriever.arefresh()
    await retriever.aclose()


async def reranking(documents: list[Document]) -> None:
    """Make compressors in each way and use them."""
    ranker = VLLMRanker("http://localhost:8000", api_key="sk-mine", on_error="skip")
    VLLMRerank(endpoint="http://localhost:8000", model="bge", top_n=3)
    straight = VLLMRerank(ranker, timeout=5)
    by_key = MilvusVLLMRerank(
        "docs", ranker, token="user:password", timeout=None, on_missing="keep", top_n=3
    )
    for reranker in (straight, by_key):
        reranker.top_n = 2
        reranker.timeout = None
        assert_type(reranker.compress_documents(documents, "whales"), Sequence[Document])
        assert_type(await reranker.acompress_documents(documents, "whales"), Sequence[Document])
        reranker.close()


def wrong(retriever: MilvusVLLMRetriever, anything: Any) -> None:
    """Write what is an error already to a type checker: each line is one that it must find."""
    MilvusVLLMRetriever("docs", None, top_k=3)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    MilvusVLLMRetriever("docs", "http://vllm")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    MilvusVLLMRetriever("docs", None, k="3")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    MilvusVLLMRetriever(ranker=None)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    retriever.within(filter=anything)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    retriever.top_k = 3  # type: ignore[attr-defined] # pyright: ignore[reportAttributeAccessIssue]
    VLLMRerank(api_key="sk-mine")  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    MilvusVLLMRerank("docs")  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
