"""What every example needs: where vLLM and Milvus are, and a filled collection."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import httpx
import stdlib_docs
from langchain_openai import OpenAIEmbeddings
from openai import OpenAIError
from pymilvus import DataType, Function, FunctionType, MilvusClient, MilvusException
from rich.progress import track

if TYPE_CHECKING:
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding

COLLECTION = "python_stdlib_docs"
BATCH = 64


def vllm_endpoint() -> str:
    """Return vLLM's base URL, or say how to get one."""
    endpoint = os.environ.get("VLLM_ENDPOINT")
    if not endpoint:
        sys.exit(
            "Set VLLM_ENDPOINT to a vLLM server that embeds and reranks, such as "
            "http://localhost:8000, or run `make demo`, which starts one."
        )
    return endpoint


def embeddings() -> OpenAIEmbeddings:
    """Return the embedding model that vLLM serves, in LangChain's terms."""
    return OpenAIEmbeddings(
        model=_embedding_model(),
        base_url=f"{vllm_endpoint()}/v1",
        api_key="unused",
        check_embedding_ctx_length=False,
    )


def llama_index_embeddings() -> OpenAILikeEmbedding:
    """Return the embedding model that vLLM serves, in LlamaIndex's terms."""
    from llama_index.embeddings.openai_like import (  # noqa: PLC0415 - not every example needs it
        OpenAILikeEmbedding,
    )

    return OpenAILikeEmbedding(
        model_name=_embedding_model(),
        api_base=f"{vllm_endpoint()}/v1",
        api_key="unused",
        embed_batch_size=BATCH,
    )


@cache
def _embedding_model() -> str:
    """Return the model named by VLLM_MODEL, or the only one that vLLM serves."""
    if name := os.environ.get("VLLM_MODEL"):
        return name
    url = f"{vllm_endpoint()}/v1/models"
    try:
        served = [model["id"] for model in httpx.get(url).raise_for_status().json()["data"]]
    except (httpx.HTTPError, ValueError, KeyError) as error:
        sys.exit(f"{url} does not say which models are served ({error}): is vLLM running there?")
    if len(served) != 1:
        sys.exit(
            f"{url} lists {', '.join(served) or 'no model'}: set VLLM_MODEL to one that embeds."
        )
    return str(served[0])


def _dimensions(model: OpenAIEmbeddings) -> int:
    try:
        return len(model.embed_query("How many dimensions?"))
    except OpenAIError as error:
        sys.exit(
            f"{vllm_endpoint()}/v1/embeddings with the model {model.model!r} failed: {error}. The "
            "examples need a vLLM that embeds and reranks, such as one that serves "
            f"all-MiniLM-L6-v2; VLLM_MODEL names one that {vllm_endpoint()}/v1/models lists."
        )


def _milvus(uri: str, token: str) -> MilvusClient:
    try:
        return MilvusClient(uri=uri, token=token)
    except MilvusException as error:
        sys.exit(f"cannot connect to Milvus at MILVUS_URI={uri!r}: {error.message}")


@dataclass(frozen=True)
class Docs:
    """A filled collection: its name, and how to reach Milvus."""

    collection: str
    uri: str
    token: str
    entries: int


def stdlib_entries() -> list[stdlib_docs.Entry]:
    """Read as many standard library docstrings as EXAMPLE_ENTRIES says, 840 by default."""
    return stdlib_docs.load(int(os.environ.get("EXAMPLE_ENTRIES", "840")))


@contextmanager
def stdlib_collection(entries: list[stdlib_docs.Entry] | None = None) -> Iterator[Docs]:
    """Fill a collection with standard library docstrings, and remove it in the end.

    It has the text, a BM25 field that Milvus fills itself, and a dense field. Milvus is the
    server at MILVUS_URI, or else Milvus Lite in a temporary folder.

    Args:
        entries: What to fill it with; None is `stdlib_entries`.
    """
    with tempfile.TemporaryDirectory() as folder:
        uri = os.environ.get("MILVUS_URI") or f"{folder}/examples.db"
        token = os.environ.get("MILVUS_TOKEN", "")
        client = _milvus(uri, token)
        try:
            count = _fill(client, entries or stdlib_entries())
            yield Docs(COLLECTION, uri, token, count)
        finally:
            client.drop_collection(COLLECTION)
            client.close()


def _fill(client: MilvusClient, entries: list[stdlib_docs.Entry]) -> int:
    model = embeddings()
    texts = [entry.text for entry in entries]
    dimensions = _dimensions(model)
    client.drop_collection(COLLECTION)

    schema = client.create_schema()
    schema.add_field("id", DataType.VARCHAR, max_length=200, is_primary=True)
    schema.add_field("module", DataType.VARCHAR, max_length=200)
    schema.add_field("text", DataType.VARCHAR, max_length=4000, enable_analyzer=True)
    schema.add_field("dense", DataType.FLOAT_VECTOR, dim=dimensions)
    schema.add_field("sparse", DataType.SPARSE_FLOAT_VECTOR)
    schema.add_function(Function("bm25", FunctionType.BM25, ["text"], ["sparse"]))
    indexes = client.prepare_index_params()
    indexes.add_index("dense", index_type="AUTOINDEX", metric_type="COSINE")
    indexes.add_index("sparse", index_type="SPARSE_INVERTED_INDEX", metric_type="BM25")
    client.create_collection(
        COLLECTION, schema=schema, index_params=indexes, consistency_level="Strong"
    )

    for start in track(range(0, len(entries), BATCH), "Embedding and inserting"):
        batch = entries[start : start + BATCH]
        vectors = model.embed_documents(texts[start : start + BATCH])
        rows = [
            {"id": entry.id, "module": entry.module, "text": entry.text, "dense": vector}
            for entry, vector in zip(batch, vectors, strict=True)
        ]
        client.insert(COLLECTION, rows)
    return len(entries)
