"""LlamaIndex's own parts against this package; `benchmarks.peers` runs it where both are installed.

The peer is what LlamaIndex's documentation leads to: the retriever of a VectorStoreIndex over
llama-index-vector-stores-milvus with a dense and a BM25 field, asked in hybrid mode, and
llama-index-postprocessor-cohere-rerank, pointed at vLLM's Cohere-compatible `/v2/rerank`.
"""

from __future__ import annotations

import logging
import sys

from llama_index.core import VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.postprocessor.cohere_rerank import CohereRerank
from llama_index.vector_stores.milvus import MilvusVectorStore
from llama_index.vector_stores.milvus.utils import BM25BuiltInFunction

from benchmarks import peers_common as common
from milvus_vllm_retrievers.llama_index import MilvusVLLMRetriever, VLLMRanker


class WordEmbedding(BaseEmbedding):
    """`peers_common.embed` as LlamaIndex's model."""

    def _get_text_embedding(self, text: str) -> list[float]:
        return common.embed(text)

    def _get_query_embedding(self, query: str) -> list[float]:
        return common.embed_query(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return common.embed_query(query)


def store(uri: str, *, overwrite: bool = False) -> MilvusVectorStore:
    """Open the store, dense and BM25."""
    return MilvusVectorStore(
        uri=uri,
        collection_name=common.COLLECTION,
        dim=common.DIM,
        similarity_metric="COSINE",
        consistency_level="Strong",
        enable_sparse=True,
        sparse_embedding_function=BM25BuiltInFunction(),
        overwrite=overwrite,
        use_async_client=False,
    )


def fill(uri: str, rows: int) -> None:
    """Write the collection."""
    nodes = [
        TextNode(
            id_=f"doc-{i:03}",
            text=text,
            metadata={"source": f"part-{i}", "page": i},
            # The peer would score these in front of the text; Milvus scores the text alone.
            excluded_embed_metadata_keys=["source", "page"],
            embedding=common.embed(text),
        )
        for i, text in enumerate(common.texts(rows))
    ]
    store(uri, overwrite=True).add(nodes)


def build(servers: common.Servers) -> common.Contest:
    """Make both retrievers over the same collection."""
    ours = MilvusVLLMRetriever(
        common.COLLECTION,
        uri=servers.milvus,
        embed_model=WordEmbedding(),
        ranker=VLLMRanker(
            servers.rerank, server_endpoint=servers.rerank_from_milvus, mode="server"
        ),
        similarity_top_k=common.K,
        fetch_k=common.FETCH_K,
    )
    index = VectorStoreIndex.from_vector_store(store(servers.milvus), embed_model=WordEmbedding())
    retriever = index.as_retriever(
        vector_store_query_mode="hybrid", similarity_top_k=common.FETCH_K
    )
    reranker = CohereRerank(api_key="unused", model=common.MODEL, top_n=common.K)
    reranker._client = common.TruncatingCohere("unused", base_url=servers.rerank)

    def theirs(query: str) -> common.Ranked:
        return _ranked(reranker.postprocess_nodes(retriever.retrieve(query), query_str=query))

    return common.Contest(ours=lambda query: _ranked(ours.retrieve(query)), theirs=theirs)


def _ranked(nodes: list[NodeWithScore]) -> common.Ranked:
    return [(node.text, float(node.score or 0.0)) for node in nodes]


if __name__ == "__main__":
    logging.disable(
        logging.WARNING
    )  # the store warns of what it cannot make before there is a loop
    common.main(sys.modules[__name__])
