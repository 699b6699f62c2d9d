"""LangChain's own parts against this package; `benchmarks.peers` runs it where both are installed.

The peer is what LangChain's documentation leads to: hybrid search of a langchain-milvus store
with a dense and a BM25 field, in a ContextualCompressionRetriever with langchain-cohere's
CohereRerank, whose client is pointed at vLLM's Cohere-compatible `/v2/rerank`.
"""

from __future__ import annotations

import sys
from copy import copy
from typing import Any

from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_cohere import CohereRerank
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.retrievers import BaseRetriever
from langchain_milvus import BM25BuiltInFunction, Milvus
from pymilvus import Function, FunctionType

from benchmarks import peers_common as common
from milvus_vllm_retrievers.langchain import MilvusVLLMRetriever, VLLMRanker


class WordEmbeddings(Embeddings):
    """`peers_common.embed` as LangChain's model."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return the texts' vectors."""
        return [common.embed(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        """Return a query's vector."""
        return common.embed_query(text)

    async def aembed_query(self, text: str) -> list[float]:
        """Return a query's vector, on the event loop."""
        return common.embed_query(text)


class Store(Milvus):
    """langchain-milvus's store without a mistake in 0.4.0 that is no part of the comparison.

    Every search adds the BM25 field once more to the list of vector fields, which is gone through
    for every hit; that would soon dominate, and a store with no other field cannot search again.
    """

    def _get_output_fields(self) -> list[str]:
        vector_fields = copy(self._vector_field)
        fields = super()._get_output_fields()
        self._vector_field = vector_fields
        return fields


# The stand-in for Milvus stores in Milvus Lite, which knows these indexes.
DENSE_INDEX = {"index_type": "AUTOINDEX", "metric_type": "COSINE", "params": {}}
BM25_INDEX = {"index_type": "SPARSE_INVERTED_INDEX", "metric_type": "BM25", "params": {}}


def store(uri: str, **more: Any) -> Milvus:
    """Open the store, dense and BM25."""
    return Store(
        WordEmbeddings(),
        builtin_function=BM25BuiltInFunction(),
        vector_field=["dense", "sparse"],
        collection_name=common.COLLECTION,
        connection_args={"uri": uri},
        consistency_level="Strong",
        index_params=[DENSE_INDEX, BM25_INDEX],
        search_params=[{"metric_type": "COSINE"}, {"metric_type": "BM25"}],
        **more,
    )


def fill(uri: str, rows: int) -> None:
    """Write the collection."""
    add_texts(store(uri, drop_old=True), rows)


def add_texts(to: Milvus, rows: int) -> None:
    """Write so many rows."""
    metadata = [{"source": f"part-{i}", "page": i} for i in range(rows)]
    to.add_texts(common.texts(rows), metadata, ids=[f"doc-{i:03}" for i in range(rows)])


def build(servers: common.Servers) -> common.Contest:
    """Make both retrievers over the same collection."""
    ranker = VLLMRanker(servers.rerank, server_endpoint=servers.rerank_from_milvus, mode="server")
    retrievers = ours(servers.milvus, ranker), theirs(servers)
    return common.Contest(*(lambda query, r=r: _ranked(r.invoke(query)) for r in retrievers))


def ours(uri: str, ranker: VLLMRanker) -> MilvusVLLMRetriever:
    """Make this package's retriever."""
    return MilvusVLLMRetriever(
        collection_name=common.COLLECTION,
        uri=uri,
        embedding=WordEmbeddings(),
        ranker=ranker,
        k=common.K,
        fetch_k=common.FETCH_K,
    )


def theirs(servers: common.Servers) -> BaseRetriever:
    """Make the peer's retriever."""
    fuse = Function("rrf", FunctionType.RERANK, [], params={"reranker": "rrf"})
    search = {"k": common.FETCH_K, "fetch_k": common.FETCH_K, "reranker": fuse}
    return reranked(store(servers.milvus), search, servers.rerank, common.K)


def by_bm25(uri: str, rerank: str, name: str, *, rows: int, k: int) -> BaseRetriever:
    """Fill a collection with a BM25 field alone, and make the peer's retriever of all its rows."""
    opened = Store(
        None,
        builtin_function=BM25BuiltInFunction(output_field_names="sparse"),
        vector_field="sparse",
        collection_name=name,
        connection_args={"uri": uri},
        index_params=BM25_INDEX,
        search_params={"metric_type": "BM25"},
        drop_old=True,
    )
    add_texts(opened, rows)
    return reranked(opened, {"k": rows}, rerank, k)


def reranked(opened: Milvus, search: dict[str, Any], rerank: str, k: int) -> BaseRetriever:
    """Make a retriever that reranks what the store finds."""
    return ContextualCompressionRetriever(
        base_retriever=opened.as_retriever(search_kwargs=search),
        base_compressor=CohereRerank(
            client=common.TruncatingCohere("unused", base_url=rerank), model=common.MODEL, top_n=k
        ),
    )


def _ranked(documents: list[Document]) -> common.Ranked:
    return [(d.page_content, float(d.metadata["relevance_score"])) for d in documents]


if __name__ == "__main__":
    common.main(sys.modules[__name__])
