"""LlamaIndex's MetadataFilters as a Milvus filter expression.

The meaning of each operator is that of LlamaIndex's own in-memory store (`SimpleVectorStore`),
on every Milvus alike:

- A row that lacks the key, or holds null, matches NE and NIN and no other comparison. (Bare
  ``!=`` would find such rows on Milvus 2.6 and not on Milvus Lite.)
- A group with condition NOT matches where none of its filters does.
- TEXT_MATCH finds the value anywhere in the text, upper and lower case told apart. (Milvus's
  own ``TEXT_MATCH`` compares analyzed words, and only in fields that were made for it.)
- IS_EMPTY finds missing, null, ``""`` and ``[]``. A ``[]`` inside JSON is found by Milvus,
  where it counts as null, and not by Milvus Lite.

Dates are compared as the texts that LlamaIndex stores. Nothing is dropped in silence: None, NaN,
``[]``, groups without a filter and fields that the collection cannot have are refused.

Milvus Lite has two limits that Milvus has not: inside a JSON field, ``%`` and ``_`` in a
TEXT_MATCH find nothing, and CONTAINS, ANY and ALL cannot reach a dynamic field whose key is
not a plain identifier (Lite answers with an error).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
)

from milvus_vllm_retrievers._core.filters import condition, named, plain
from milvus_vllm_retrievers._core.layout import CollectionLayout, FieldRef, FieldType
from milvus_vllm_retrievers.errors import ConfigurationError, excerpt

Op = FilterOperator

_OPERATORS = {
    Op.EQ: "eq",
    Op.NE: "ne",
    Op.GT: "gt",
    Op.GTE: "gte",
    Op.LT: "lt",
    Op.LTE: "lte",
    Op.IN: "in",
    Op.NIN: "nin",
    Op.TEXT_MATCH: "like",
    Op.CONTAINS: "contains",
    Op.ANY: "contains_any",
    Op.ALL: "contains_all",
}
_LIKE_WILDCARDS = str.maketrans({"%": r"\%", "_": r"\_"})


def checked_filters(filters: MetadataFilters) -> MetadataFilters:
    """Check what can be checked of filters before the collection is known.

    Returns:
        A copy that later changes of the caller's do not reach.

    Raises:
        ConfigurationError: A group holds no filter, or a filter asks what Milvus cannot.
    """
    if not isinstance(filters, MetadataFilters):
        raise ConfigurationError(f"filters must be MetadataFilters, not {type(filters).__name__}")
    _check(filters)
    return filters.model_copy(deep=True)


def to_expr(filters: MetadataFilters, layout: CollectionLayout) -> str:
    """Translate filters for a collection.

    Args:
        filters: The filters, nested to any depth.
        layout: The collection; it decides which field a filter's key stands for.

    Raises:
        ConfigurationError: Milvus cannot express a filter; the message names its operator and
            key.
    """
    return _group(filters, layout, negate=False)


def _check(filters: MetadataFilters) -> None:
    for part in _parts(filters):
        if isinstance(part, MetadataFilters):
            _check(part)
        else:
            with _named(part):
                _asked(part)


def _parts(filters: MetadataFilters) -> list[MetadataFilter | MetadataFilters]:
    if not filters.filters:
        raise ConfigurationError(
            "a group of filters holds none: leave it out, or name a field in it"
        )
    return list(filters.filters)


def _group(filters: MetadataFilters, layout: CollectionLayout, *, negate: bool) -> str:
    # Negation is pushed down to the single filters, where what a missing key means is known.
    joined = filters.condition or FilterCondition.AND
    negate_each = negate ^ (joined == FilterCondition.NOT)
    parts = [
        _group(part, layout, negate=negate_each)
        if isinstance(part, MetadataFilters)
        else _filter(part, layout, negate=negate_each)
        for part in _parts(filters)
    ]
    joint = " or " if negate ^ (joined == FilterCondition.OR) else " and "
    return f"({joint.join(parts)})" if len(parts) > 1 else parts[0]


@contextmanager
def _named(filter_: MetadataFilter) -> Iterator[None]:
    try:
        yield
    except ConfigurationError as error:
        message = f"filter {filter_.operator.name} on {excerpt(filter_.key)!r}: {error}"
        raise ConfigurationError(message) from error


def _filter(filter_: MetadataFilter, layout: CollectionLayout, *, negate: bool) -> str:
    with _named(filter_):
        field = named(layout, filter_.key)
        if filter_.operator == Op.IS_EMPTY:
            return f"not {_is_empty(field)}" if negate else _is_empty(field)
        return condition(field, *_asked(filter_), negate=negate)


def _is_empty(field: FieldRef) -> str:
    if field.field is None or field.field.type == FieldType.VARCHAR:
        return f'({field} is null or {field} == "")'
    if field.field.type == FieldType.ARRAY:
        return f"({field} is null or array_length({field}) == 0)"
    return f"({field} is null)"


def _asked(filter_: MetadataFilter) -> tuple[str, Any]:
    """Return the operator and what it compares with, or say why the filter cannot be asked."""
    if filter_.operator == Op.IS_EMPTY:
        return "is_empty", None
    if filter_.operator not in _OPERATORS:
        raise ConfigurationError(
            "Milvus has no such operator"
            + ("; use TEXT_MATCH" if filter_.operator == Op.TEXT_MATCH_INSENSITIVE else "")
        )
    if filter_.value is None:
        raise ConfigurationError(
            "None is no value; for rows that lack the key use the operator IS_EMPTY, for those "
            "that have it a group with condition NOT around that"
        )
    operator = _OPERATORS[filter_.operator]
    value = plain(operator, filter_.value)
    return operator, _anywhere(value) if operator == "like" else value


def _anywhere(value: Any) -> str:
    if not isinstance(value, str):
        raise ConfigurationError(f"it takes a text, not {type(value).__name__}")
    if "\\" in value:
        raise ConfigurationError(
            "Milvus versions disagree on what a backslash in a LIKE pattern means; "
            "search for a part of the text without it"
        )
    return f"%{value.translate(_LIKE_WILDCARDS)}%"
