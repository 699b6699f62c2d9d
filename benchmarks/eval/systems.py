"""The ways to search, all through the package's own LangChain retriever, and their lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from langchain_core.documents import Document

from benchmarks.eval.agreement import Ranked
from benchmarks.eval.collection import Collection, batches
from benchmarks.eval.progress import Progress
from milvus_vllm_retrievers.langchain import MilvusVLLMRetriever, VLLMRanker

# What finds the candidates, by the vector fields it searches.
SEARCHES: Mapping[str, Sequence[str]] = {
    "BM25": ("sparse",),
    "dense": ("dense",),
    "hybrid (RRF)": ("sparse", "dense"),
}
# What recall@50 needs; every candidate of a search over one field is returned, and reranked.
K = FETCH_K = 50
# Enough queries a call to keep vLLM busy most of the time, few enough to show progress.
_QUERIES_A_CALL = 48


def rank(
    collection: Collection,
    search: str,
    queries: Sequence[str],
    ranker: VLLMRanker | None = None,
    *,
    k: int = K,
    fetch_k: int = FETCH_K,
) -> list[Ranked]:
    """Retrieve for all queries, several in one call.

    Args:
        collection: Where to search.
        search: A key of `SEARCHES`.
        queries: Query texts.
        ranker: How candidates are reranked; None leaves the retrieval order.
        k: Documents for each query.
        fetch_k: Candidates per vector field.
    """
    how = f"reranked ({ranker.mode})" if ranker else "not reranked"
    progress = Progress(f"{search} {how}, fetch_k {fetch_k}, queries", len(queries))
    ranked = []
    with _retriever(collection, search, ranker, k, fetch_k) as retriever:
        for batch in batches(queries, _QUERIES_A_CALL):
            ranked += [_ranked(documents) for documents in retriever.batch(list(batch))]
            progress.advance(len(batch))
    return ranked


def _retriever(
    collection: Collection, search: str, ranker: VLLMRanker | None, k: int, fetch_k: int
) -> MilvusVLLMRetriever:
    return MilvusVLLMRetriever(
        collection_name=collection.name,
        uri=collection.uri,
        token=collection.token,
        embedding=collection.embedding,
        vector_field=list(SEARCHES[search]),
        output_fields=[],
        ranker=ranker,
        k=k,
        fetch_k=fetch_k,
    )


def _ranked(documents: Sequence[Document]) -> Ranked:
    return Ranked(
        ids=tuple(str(document.id) for document in documents),
        scores=tuple(document.metadata["relevance_score"] for document in documents),
    )
