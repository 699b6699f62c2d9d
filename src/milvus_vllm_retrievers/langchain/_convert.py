"""LangChain's values to the core's and back: documents, embedding models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings

from milvus_vllm_retrievers._core.hits import Hit, Ranking, rescored
from milvus_vllm_retrievers._core.query import (
    Encoder,
    Encoders,
    Item,
    Query,
    sparse_encoder,
)


def to_items(documents: Sequence[Document]) -> list[Item]:
    """Read the documents that are to be reranked."""
    return [Item(text=d.page_content, id=d.id, metadata=d.metadata) for d in documents]


def to_document(hit: Hit) -> Document:
    """Make a document of a hit."""
    metadata = {**hit.fields, **hit.scores()}
    # LlamaIndex stores a whole node in here, beside the metadata that it also stores flat.
    metadata.pop("_node_content", None)
    metadata.pop("_node_type", None)
    return Document(id=str(hit.pk), page_content=hit.text or "", metadata=metadata)


def ranked_copy(document: Document, ranking: Ranking) -> Document:
    """Copy a document with the scores of its new place."""
    metadata = rescored(document.metadata, ranking.scores())
    return document.model_copy(update={"metadata": metadata})


def to_encoders(
    embedding: Embeddings | Mapping[str, Any] | None, sparse_embedding: Any
) -> Encoders:
    """Wrap embedding models."""
    by_field = embedding if isinstance(embedding, Mapping) else {}
    return Encoders(
        dense=_encoder(embedding) if isinstance(embedding, Embeddings) else None,
        sparse=None if sparse_embedding is None else sparse_encoder(sparse_embedding),
        by_field={name: _encoder(model) for name, model in by_field.items()},
    )


def _encoder(embedding: Any) -> Encoder:
    if not isinstance(embedding, Embeddings):
        return sparse_encoder(embedding)

    async def aencode(query: Query) -> list[float]:
        return await embedding.aembed_query(query.text)

    return Encoder(lambda query: embedding.embed_query(query.text), aencode)
