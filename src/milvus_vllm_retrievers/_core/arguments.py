"""Arguments that both front ends take, typed once for their constructors.

Their meaning is documented on the classes that take them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from pydantic import BaseModel, SecretStr, ValidationError
from typing_extensions import TypedDict

from milvus_vllm_retrievers.errors import ConfigurationError, described, refuse_unknown
from milvus_vllm_retrievers.ranker import VLLMRanker

# The default of an argument for which None means something.
NOT_GIVEN: Any = ...

Model = TypeVar("Model", bound=BaseModel)

_COUNTS = ("k", "top_k", "similarity_top_k", "top_n", "num_results", "n_results", "limit")
_FILTERS = ("filter", "where", "metadata_filter", "metadata_filters", "vector_store_kwargs")
_EMBEDDINGS = ("embed_model", "embedding", "embeddings", "embed", "embedding_function")


class MilvusArguments(TypedDict, total=False):
    """How Milvus is reached."""

    uri: str
    token: str | SecretStr
    db_name: str
    connection_args: Mapping[str, Any]
    client: Any
    async_client: Any


class RetrieverArguments(MilvusArguments, total=False):
    """How a collection is searched."""

    sparse_embedding: Any
    vector_field: str | Sequence[str] | None
    text_field: str | None
    output_fields: Sequence[str] | None
    fetch_k: int | None
    expr: str | None
    expr_params: Mapping[str, Any] | None
    partition_names: Sequence[str] | None
    consistency_level: str | int | None
    search_params: Mapping[str, Any] | None
    score_threshold: float | None
    timeout: float | None


class RowRerankArguments(MilvusArguments, total=False):
    """How Milvus reranks the rows of given items."""

    text_field: str | None
    partition_names: Sequence[str] | None
    consistency_level: str | int | None
    search_params: Mapping[str, Any] | None
    timeout: float | None
    top_n: int | None


def other_names(count: str, filters: str = "", embedding: str = "") -> dict[str, str]:
    """Say what to write in place of arguments that others use for the same things.

    Args:
        count: What the number of results is called.
        filters: How filters are passed; empty where there are none.
        embedding: What the embedding model is called; empty where there is none.
    """
    meant = {
        each.name: f"give it to the ranker: ranker=VLLMRanker(endpoint, {each.name}=...)"
        for each in fields(VLLMRanker)
    }
    meant["endpoint"] = "give it to the ranker: ranker=VLLMRanker(endpoint)"
    meant |= dict.fromkeys(_COUNTS, f"it is {count}= here")
    if filters:
        how = f"pass values to match as {filters}, or a Milvus expression as expr="
        meant |= dict.fromkeys(_FILTERS, how)
    if embedding:
        meant |= dict.fromkeys(_EMBEDDINGS, f"it is {embedding}= here")
    return meant


def remade(model: Model, update: Mapping[str, Any] | None) -> Model:
    """Make another of a model's class, with some arguments changed and all of them checked.

    The constructor of a subclass of the user's, which may take other arguments, is not called.

    Raises:
        ConfigurationError: An argument is unknown or wrong.
    """
    cls = type(model)
    refuse_unknown(cls.__name__, update or {}, cls.model_fields)
    arguments = {name: getattr(model, name) for name in cls.model_fields}
    made = cls.__new__(cls)
    try:
        BaseModel.__init__(made, **{**arguments, **(update or {})})
    except ValidationError as error:
        raise ConfigurationError(described(cls, error)) from None
    return made


def given_ranker(ranker: Any, *, stacklevel: int = 2) -> Any:
    """Return the ranker of a retriever, and warn where none was given.

    Args:
        ranker: What was given; `NOT_GIVEN` counts as None, but for the warning.
        stacklevel: Whose line the warning shows: 2 is that of the caller of our caller.
    """
    if ranker is not NOT_GIVEN:
        return ranker
    warnings.warn(
        "no ranker was given, so nothing is reranked: pass "
        "ranker=VLLMRanker('http://localhost:8000'), or ranker=None where the order of the search "
        "is meant",
        stacklevel=stacklevel + 1,
    )
    return None
