"""Arguments that both front ends take, typed once for their constructors.

Their meaning is documented on the classes that take them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import SecretStr
from typing_extensions import TypedDict

# The default of an argument for which None means something.
NOT_GIVEN: Any = ...


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


def given_ranker(ranker: Any, *, stacklevel: int = 2) -> Any:
    """Return the ranker of a retriever, and warn where none was given.

    Args:
        ranker: What was given; `NOT_GIVEN` counts as None, but for the warning.
        stacklevel: Whose line the warning shows: 2 is that of the caller of our caller.
    """
    if ranker is not NOT_GIVEN:
        return ranker
    warnings.warn(
        "a retriever without a ranker returns results as they were found, not reranked: pass "
        "ranker=VLLMRanker('http://localhost:8000'), or write ranker=None if that is meant",
        stacklevel=stacklevel + 1,
    )
    return None
