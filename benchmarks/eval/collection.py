"""The Milvus collection that a labelled set is searched in, and the embeddings of its texts."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from langchain_core.embeddings import Embeddings
from langchain_openai import OpenAIEmbeddings
from pymilvus import DataType, Function, FunctionType, MilvusClient

from benchmarks.eval.datasets import Dataset
from benchmarks.eval.progress import Progress, say

T = TypeVar("T")

_BATCH = 64
_MAX_VARCHAR_BYTES = 65_535


class RememberedEmbeddings(Embeddings):
    """Has every text embedded once, in batches: all systems then search with the same vectors.

    Args:
        endpoint: vLLM's base URL.
        model: The embedding model's name.
    """

    def __init__(self, endpoint: str, model: str) -> None:
        self._model = OpenAIEmbeddings(
            model=model,
            base_url=f"{endpoint}/v1",
            api_key="unused",
            check_embedding_ctx_length=False,
            chunk_size=_BATCH,
            model_kwargs={"extra_body": {"truncate_prompt_tokens": -1}},
        )
        self._vectors: dict[str, list[float]] = {}

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return a vector for each text."""
        unknown = [text for text in dict.fromkeys(texts) if text not in self._vectors]
        if unknown:
            vectors = self._model.embed_documents(unknown)
            self._vectors.update(zip(unknown, vectors, strict=True))
        return [self._vectors[text] for text in texts]

    def embed_query(self, text: str) -> list[float]:
        """Return the vector of a query."""
        return self.embed_documents([text])[0]


@dataclass(frozen=True)
class Collection:
    """A filled collection: its name, where it is, and what embeds queries for it.

    It has a BM25 field ``sparse``, a dense field ``dense``, ``text``, and ``id`` as primary key.
    """

    name: str
    uri: str
    token: str
    embedding: Embeddings


@contextmanager
def filled_collection(
    dataset: Dataset, uri: str, token: str, embedding: Embeddings
) -> Iterator[Collection]:
    """Make a collection of the set's documents, embed its queries, and remove it in the end."""
    name = f"quality_{uuid.uuid4().hex}"  # on a server of the user's, no other's collection
    client = MilvusClient(uri=uri, token=token)
    try:
        _create(client, name, dataset, dimensions=len(embedding.embed_query("How many?")))
        _fill(client, name, dataset.documents, embedding)
        _embed(embedding, list(dataset.queries.values()))
        yield Collection(name, uri, token, embedding)
    finally:
        client.drop_collection(name)
        client.close()


def _create(client: MilvusClient, name: str, dataset: Dataset, dimensions: int) -> None:
    longest_id = max(len(id_.encode()) for id_ in dataset.documents)
    schema = client.create_schema()
    schema.add_field("id", DataType.VARCHAR, max_length=longest_id, is_primary=True)
    schema.add_field("text", DataType.VARCHAR, max_length=_MAX_VARCHAR_BYTES, enable_analyzer=True)
    schema.add_field("dense", DataType.FLOAT_VECTOR, dim=dimensions)
    schema.add_field("sparse", DataType.SPARSE_FLOAT_VECTOR)
    schema.add_function(Function("bm25", FunctionType.BM25, ["text"], ["sparse"]))
    indexes = client.prepare_index_params()
    # Exact: what an approximate index misses is not what is measured here.
    indexes.add_index("dense", index_type="FLAT", metric_type="COSINE")
    indexes.add_index("sparse", index_type="SPARSE_INVERTED_INDEX", metric_type="BM25")
    client.create_collection(name, schema=schema, index_params=indexes, consistency_level="Strong")


def _fill(
    client: MilvusClient, name: str, documents: Mapping[str, str], embedding: Embeddings
) -> None:
    items = [(id_, text) for id_, text in documents.items() if text]
    if empty := len(documents) - len(items):
        say(f"{empty:,} documents without a text are left out: no search can find them")
    progress = Progress("documents embedded and inserted", len(items))
    for batch in batches(items, _BATCH):
        texts = [_fitting(text) for _, text in batch]
        vectors = embedding.embed_documents(texts)
        rows = [
            {"id": id_, "text": text, "dense": vector}
            for (id_, _), text, vector in zip(batch, texts, vectors, strict=True)
        ]
        client.insert(name, rows)
        progress.advance(len(batch))


def _embed(embedding: Embeddings, queries: Sequence[str]) -> None:
    """Embed queries in batches now, instead of one by one when they are asked."""
    progress = Progress("queries embedded", len(queries))
    for batch in batches(queries, _BATCH):
        embedding.embed_documents(list(batch))
        progress.advance(len(batch))


def _fitting(text: str) -> str:
    """Cut a text to what Milvus can store."""
    return text.encode("utf-8", "replace")[:_MAX_VARCHAR_BYTES].decode("utf-8", "ignore")


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Yield the items in order, `size` at a time."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
