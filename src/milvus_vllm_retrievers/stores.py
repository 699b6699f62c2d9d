"""What a vector store that the user already has says about its collection.

The stores are read by their attributes, so neither of their packages is imported here. Measured on
langchain-milvus 0.3 and 0.4 and llama-index-vector-stores-milvus 1.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from milvus_vllm_retrievers.errors import ConfigurationError


def langchain_arguments(store: Any) -> dict[str, Any]:
    """Read a langchain_milvus.Milvus into arguments of the LangChain retriever.

    The store's blocking client is borrowed. Its async client is not, since it works only in the
    event loop it first ran in; async clients are made for the same server.

    Raises:
        ConfigurationError: It is something else.
    """
    try:
        fields = _as_list(store._vector_field)
        embedded = zip(
            store._vector_fields_from_embedding, _as_list(store.embedding_func), strict=False
        )
        return {
            "collection_name": store.collection_name,
            "client": store.client,
            "text_field": store._text_field,
            "vector_field": fields,
            "embedding": dict(embedded),
            "search_params": _by_field(fields, store.search_params),
            "consistency_level": store.consistency_level,
            "partition_names": store.partition_names,
            "timeout": store.timeout,
        }
    except AttributeError as error:
        raise ConfigurationError(_not_a_store(store, "langchain_milvus.Milvus", error)) from error


def llama_index_arguments(store: Any) -> dict[str, Any]:
    """Read a llama_index MilvusVectorStore into arguments of the LlamaIndex retriever.

    The store's blocking client is borrowed, its async client is not: see `langchain_arguments`.

    Raises:
        ConfigurationError: It is something else.
    """
    try:
        fields = [store.embedding_field] if store.enable_dense else []
        sparse = None
        if store.enable_sparse:
            fields.append(store.sparse_embedding_field)
            sparse = store.sparse_embedding_function
        return {
            "collection_name": store.collection_name,
            "client": store.client,
            "text_field": store.text_key,
            "vector_field": fields,
            # A function of Milvus's own, such as BM25, has nothing to encode with.
            "sparse_embedding": sparse if hasattr(sparse, "encode_queries") else None,
            "consistency_level": store.consistency_level,
        }
    except AttributeError as error:
        raise ConfigurationError(_not_a_store(store, "MilvusVectorStore", error)) from error


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _by_field(fields: list[str], params: Any) -> dict[str, Any] | None:
    """Give each vector field its search parameters; the store has one, or a list of them."""
    if params is None or isinstance(params, Mapping):
        return None if params is None else dict.fromkeys(fields, params)
    return dict(zip(fields, params, strict=False))


def _not_a_store(store: Any, wanted: str, error: AttributeError) -> str:
    return f"a {wanted} is needed, not a {type(store).__name__} ({error})"
