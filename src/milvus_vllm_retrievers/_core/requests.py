"""Pure: from a collection, its search legs and the options to pymilvus's keyword arguments."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from milvus_vllm_retrievers._core.expressions import literal
from milvus_vllm_retrievers._core.layout import CollectionLayout, FieldType, VectorField
from milvus_vllm_retrievers._core.query import MAX_LIMIT, SearchOptions
from milvus_vllm_retrievers.errors import ConfigurationError, MissingDependencyError, did_you_mean

if TYPE_CHECKING:
    from pymilvus import AnnSearchRequest, Function

Method = Literal["search", "hybrid_search"]
# What Milvus allows as nq, queries of one search.
MAX_QUERIES = 16_384


class Leg(NamedTuple):
    """One vector field's part of a search.

    Attributes:
        field: The vector field.
        data: One entry for each query: a text, a dense or a sparse vector.
    """

    field: VectorField
    data: list[Any]


class SearchCall(NamedTuple):
    """One call of a pymilvus client.

    Attributes:
        method: The client's method.
        arguments: Its keyword arguments, but for the timeout.
    """

    method: Method
    arguments: Mapping[str, Any]


def make_leg(vector: VectorField, vectors: Sequence[Any]) -> Leg:
    """Check and convert query vectors for a field.

    Raises:
        ConfigurationError: A dense vector has not the field's dimensions, or is none.
    """
    if vector.is_sparse:
        return Leg(vector, [{int(i): float(w) for i, w in dict(v).items()} for v in vectors])
    for values in vectors:
        if not _is_finite(values):
            made = "one with NaN or infinity" if hasattr(values, "__len__") else repr(values)
            raise ConfigurationError(
                f"field {vector.name!r} needs a query vector of finite numbers, not {made:.200}: "
                "look at what the embedding model returns"
            )
        if vector.dim is not None and len(values) != vector.dim:
            raise ConfigurationError(
                f"the embedding model made {len(values)} dimensions, but field "
                f"{vector.name!r} has {vector.dim}: use the model the collection was filled "
                "with, or name the fields to search with vector_field="
            )
    return Leg(vector, [_dense(vector.type, values) for values in vectors])


def _is_finite(values: Any) -> bool:
    try:
        return math.isfinite(sum(values))  # NaN and infinity stay in a sum
    except TypeError:
        return False


def _dense(type_: int, values: Sequence[float]) -> Any:
    if type_ == FieldType.FLOAT_VECTOR:
        if type(values) is list:
            return values
        return values.tolist() if hasattr(values, "tolist") else list(values)
    import numpy as np  # noqa: PLC0415 - pymilvus brings it; half precision only

    if type_ == FieldType.FLOAT16_VECTOR:
        return np.asarray(values, dtype=np.float16)
    try:
        import ml_dtypes  # noqa: PLC0415 - pymilvus does not bring it
    except ImportError as error:
        raise MissingDependencyError(
            "searching a BFLOAT16_VECTOR field needs ml_dtypes: pip install ml-dtypes"
        ) from error
    return np.asarray(values, dtype=ml_dtypes.bfloat16)


def plain_call(
    collection: str,
    legs: Sequence[Leg],
    options: SearchOptions,
    output_fields: Sequence[str],
    *,
    limit: int,
) -> SearchCall:
    """Build the search without a rerank model; several legs are fused by RRF.

    Args:
        collection: The collection's name.
        legs: At least one.
        options: What was asked.
        output_fields: What to fetch of each hit.
        limit: Hits per query; over several legs, at most what they can yield together.
    """
    if len(legs) == 1:
        return _search(collection, legs[0], options, output_fields, limit=limit, function=None)
    from pymilvus import RRFRanker  # noqa: PLC0415 - seconds of import time

    return _hybrid_search(collection, legs, options, output_fields, limit, RRFRanker())


def reranked_call(
    collection: str,
    legs: Sequence[Leg],
    options: SearchOptions,
    output_fields: Sequence[str],
    *,
    function: Function,
    limit: int,
    search_reranks_exactly: bool,
) -> SearchCall:
    """Build the search that Milvus reranks itself.

    `search` reranks just the hits it returns, so it serves one leg with ``fetch_k == k`` only;
    a `hybrid_search`, even of one leg, reranks ``fetch_k`` candidates and returns ``k``.

    Args:
        collection: The collection's name.
        legs: At least one.
        options: What was asked.
        output_fields: What to fetch of each hit.
        function: The rerank Function, bound to the legs' queries.
        limit: Hits per query to return.
        search_reranks_exactly: Whether `search` reranks its `limit` hits and no more (Milvus
            does, Milvus Lite takes ten times as many).
    """
    if len(legs) == 1 and options.pool == limit and search_reranks_exactly:
        return _search(collection, legs[0], options, output_fields, limit=limit, function=function)
    return _hybrid_search(collection, legs, options, output_fields, limit, function)


def rows_call(
    layout: CollectionLayout,
    expr: str,
    limit: int,
    options: SearchOptions,
    function: Function,
) -> SearchCall:
    """Build the search that reranks just the rows with certain keys.

    The filter and the limit leave exactly these rows, so the query vector does not matter.

    Args:
        layout: The collection; it needs a dense field.
        expr: What just these rows match: see `has_key_in`.
        limit: How many rows these are, at most 16,384.
        options: Partitions, consistency level and search parameters.
        function: The rerank Function, bound to one query.
    """
    vector = layout.vector_for_keys()
    any_vector = [1.0] + [0.0] * ((vector.dim or 1) - 1)
    leg = Leg(vector, [_dense(vector.type, any_vector)])
    arguments = {
        **_shared(layout.name, options, [layout.primary_key], limit),
        "data": leg.data,
        "anns_field": vector.name,
        "search_params": _params(leg, options) or None,
        "filter": expr,
        "ranker": function,
    }
    return SearchCall("search", arguments)


def lookup_arguments(
    layout: CollectionLayout, expr: str, limit: int, options: SearchOptions
) -> dict[str, Any]:
    """Build the arguments of the `query` that tells which of the rows are there."""
    return {**_shared(layout.name, options, [layout.primary_key], limit), "filter": expr}


def has_key_in(layout: CollectionLayout, keys: Sequence[int | str]) -> str:
    """Write the expression that just the rows with these keys match."""
    return f"{layout.primary_key} in {literal(list(keys))}"


def candidate_limit(legs: Sequence[Leg], options: SearchOptions) -> int:
    """Return how many candidates the legs can yield together, within what Milvus allows."""
    return min(len(legs) * options.pool, MAX_LIMIT)


def _search(
    collection: str,
    leg: Leg,
    options: SearchOptions,
    output_fields: Sequence[str],
    *,
    limit: int,
    function: Function | None,
) -> SearchCall:
    arguments = {
        **_shared(collection, options, output_fields, limit),
        "data": leg.data,
        "anns_field": leg.field.name,
        "search_params": _params(leg, options) or None,
        "filter": options.expr or "",
    }
    if options.expr_params:
        arguments["filter_params"] = dict(options.expr_params)
    if function is not None:
        arguments["ranker"] = function
    return SearchCall("search", arguments)


def _hybrid_search(
    collection: str,
    legs: Sequence[Leg],
    options: SearchOptions,
    output_fields: Sequence[str],
    limit: int,
    ranker: Any,
) -> SearchCall:
    arguments = {
        **_shared(collection, options, output_fields, limit),
        "reqs": [_sub_request(leg, options) for leg in legs],
        "ranker": ranker,
    }
    return SearchCall("hybrid_search", arguments)


def _sub_request(leg: Leg, options: SearchOptions) -> AnnSearchRequest:
    return _sub_request_class()(
        data=leg.data,
        anns_field=leg.field.name,
        param=_params(leg, options),
        limit=options.pool,
        expr=options.expr,
        expr_params=dict(options.expr_params) if options.expr_params else None,
    )


@cache
def _sub_request_class() -> type[AnnSearchRequest]:
    from pymilvus import AnnSearchRequest  # noqa: PLC0415 - seconds of import time

    return AnnSearchRequest  # type: ignore[no-any-return]


def _shared(
    collection: str, options: SearchOptions, output_fields: Sequence[str], limit: int
) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "collection_name": collection,
        "limit": limit,
        "output_fields": list(output_fields),
    }
    if options.partition_names is not None:
        arguments["partition_names"] = list(options.partition_names)
    if options.consistency_level is not None:
        arguments["consistency_level"] = options.consistency_level
    return arguments


def _params(leg: Leg, options: SearchOptions) -> dict[str, Any]:
    """Return the leg's own parameters where the options give them by field, else the common."""
    params = options.search_params
    if not params:
        return {}
    if leg.field.name in params:
        return dict(params[leg.field.name])
    return {} if _is_by_field(params) else dict(params)


def check_search_params(params: Mapping[str, Any] | None, layout: CollectionLayout) -> None:
    """Refuse parameters for a vector field that is not there.

    Raises:
        ConfigurationError: Parameters are given by field, and one is no vector field.
    """
    if not params or not _is_by_field(params):
        return
    known = [vector.name for vector in layout.vector_fields]
    for name in params:
        if name not in known:
            raise ConfigurationError(
                f"search_params name {name!r}, which is no vector field of collection "
                f"{layout.name!r}{did_you_mean(name, known)}"
            )


def _is_by_field(params: Mapping[str, Any]) -> bool:
    """Tell ``{"dense": {"params": ...}}`` from ``{"metric_type": ..., "params": {...}}``."""
    return not {"metric_type", "params"} & set(params) and all(
        isinstance(value, Mapping) for value in params.values()
    )
