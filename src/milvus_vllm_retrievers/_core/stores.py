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
        # langchain-milvus 0.4.0 lists a BM25 field once more with every search.
        fields = list(dict.fromkeys(store.vector_fields))
        embedded = zip(
            store._vector_fields_from_embedding, _as_list(store.embedding_func), strict=False
        )
        return {
            "collection_name": store.collection_name,
            "client": store.client,
            # For async calls: a client of pymilvus before 2.6.10 does not tell its server.
            **_connection(store._connection_args),
            "text_field": store._text_field,
            "vector_field": fields,
            "embedding": dict(embedded),
            "search_params": _given_search_params(store, fields),
            "partition_names": store.partition_names,
            "timeout": store.timeout,
        }
    except AttributeError as error:
        raise ConfigurationError(
            _not_a_store(store, "langchain_milvus.Milvus", "llama_index")
        ) from error


def llama_index_arguments(store: Any) -> dict[str, Any]:
    """Read a llama_index MilvusVectorStore into arguments of the LlamaIndex retriever.

    The store's blocking client is borrowed, its async client is not: see `langchain_arguments`.

    Raises:
        ConfigurationError: It is something else.
    """
    try:
        fields = [store.embedding_field] if store.enable_dense else []
        sparse = None
        config = dict(store.search_config or {})
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
            "search_params": {store.embedding_field: {"params": config}} if config else None,
        }
    except AttributeError as error:
        raise ConfigurationError(_not_a_store(store, "MilvusVectorStore", "langchain")) from error


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _connection(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Sort a pymilvus client's arguments into those of a retriever."""
    own = {name: arguments[name] for name in ("uri", "token", "db_name") if arguments.get(name)}
    others = {name: value for name, value in arguments.items() if name not in own}
    return {**own, "connection_args": others}


def _given_search_params(store: Any, fields: list[str]) -> dict[str, Any] | None:
    """Return the search parameters that the user gave the store, by vector field.

    The others it has made up for four results, such as ``{"ef": 10}``, with which Milvus refuses
    to look for 50 candidates; without parameters Milvus takes what fits.
    """
    made_up = [params["params"] for params in store.default_search_params.values()]
    by_field = zip(fields, _as_list(store.search_params), strict=False)
    return {f: params for f, params in by_field if params.get("params") not in made_up} or None


def _not_a_store(store: Any, wanted: str, other: str) -> str:
    """Say what is needed, and where to take a store of the other framework."""
    is_of_other = type(store).__module__.startswith(other)
    hint = f": that one goes to milvus_vllm_retrievers.{other}" if is_of_other else ""
    return f"a {wanted} is needed, not {with_article(store)}{hint}"


def with_article(value: object) -> str:
    """Name what something is, such as ``an object``."""
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'AEIOaeio' else 'a'} {name}"
