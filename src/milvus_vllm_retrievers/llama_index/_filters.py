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

A value None asks for rows that lack the key (EQ) or have it (NE). Dates are compared as the
texts that LlamaIndex stores. Nothing is dropped in silence but empty groups.

Milvus Lite has two limits that Milvus has not: inside a JSON field, ``%`` and ``_`` in a
TEXT_MATCH find nothing, and CONTAINS, ANY and ALL cannot reach a dynamic field whose key is
not a plain identifier (Lite answers with an error).
"""

from __future__ import annotations

from datetime import date
from typing import Any

from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
)
from pydantic_core import to_jsonable_python

from milvus_vllm_retrievers._core.expressions import literal
from milvus_vllm_retrievers._core.layout import CollectionLayout, FieldRef, FieldType
from milvus_vllm_retrievers.errors import ConfigurationError

Op = FilterOperator

_COMPLEMENTS = {Op.NE: Op.EQ, Op.NIN: Op.IN}
# What finds the rows that match, and what finds those that have a value and do not match.
_TEMPLATES = {
    Op.EQ: ("{field} == {value}", "{field} != {value}"),
    Op.GT: ("{field} > {value}", "not ({field} > {value})"),
    Op.GTE: ("{field} >= {value}", "not ({field} >= {value})"),
    Op.LT: ("{field} < {value}", "not ({field} < {value})"),
    Op.LTE: ("{field} <= {value}", "not ({field} <= {value})"),
    Op.IN: ("{field} in {value}", "{field} not in {value}"),
    Op.TEXT_MATCH: ("{field} like {value}", "not ({field} like {value})"),
    Op.CONTAINS: ("{kind}_contains({field}, {value})", "not {kind}_contains({field}, {value})"),
    Op.ANY: ("{kind}_contains_any({field}, {value})", "not {kind}_contains_any({field}, {value})"),
    Op.ALL: ("{kind}_contains_all({field}, {value})", "not {kind}_contains_all({field}, {value})"),
}

_TAKES_LIST = {Op.IN, Op.ANY, Op.ALL}
_CONTAINMENT = {Op.CONTAINS, Op.ANY, Op.ALL}
_COMPARISON = {Op.EQ, Op.GT, Op.GTE, Op.LT, Op.LTE, Op.IN}

_WHOLE = {FieldType.INT8, FieldType.INT16, FieldType.INT32, FieldType.INT64}
_NUMBERS = {*_WHOLE, FieldType.FLOAT, FieldType.DOUBLE}
# What Milvus can ask of a schema field; of a value inside JSON it can ask everything.
_OPERATORS: dict[int, set[FilterOperator]] = {
    **dict.fromkeys(_NUMBERS, _COMPARISON),
    FieldType.BOOL: {Op.EQ, Op.IN},
    FieldType.VARCHAR: _COMPARISON | {Op.TEXT_MATCH},
    FieldType.ARRAY: _CONTAINMENT,
    FieldType.JSON: _CONTAINMENT,
}

_LIKE_WILDCARDS = str.maketrans({"%": r"\%", "_": r"\_"})


def to_expr(filters: MetadataFilters | None, layout: CollectionLayout) -> str | None:
    """Translate filters for a collection; None if they hold no filter.

    Args:
        filters: The filters, nested to any depth.
        layout: The collection; it decides which field a filter's key stands for.

    Raises:
        ConfigurationError: Milvus cannot express a filter; the message names its operator and
            key.
    """
    return None if filters is None else _group(filters, layout, negate=False)


def _group(filters: MetadataFilters, layout: CollectionLayout, *, negate: bool) -> str | None:
    # Negation is pushed down to the single filters, where what a missing key means is known.
    condition = filters.condition or FilterCondition.AND
    negate_each = negate ^ (condition == FilterCondition.NOT)
    parts = [
        _group(part, layout, negate=negate_each)
        if isinstance(part, MetadataFilters)
        else _filter(part, layout, negate=negate_each)
        for part in filters.filters
    ]
    given = [part for part in parts if part is not None]
    joint = " or " if negate ^ (condition == FilterCondition.OR) else " and "
    return f"({joint.join(given)})" if len(given) > 1 else next(iter(given), None)


def _filter(filter_: MetadataFilter, layout: CollectionLayout, *, negate: bool) -> str:
    try:
        return _test(filter_, layout, negate=negate)
    except ConfigurationError as error:
        message = f"filter {filter_.operator.name} on {filter_.key!r}: {error}"
        raise ConfigurationError(message) from error


def _test(filter_: MetadataFilter, layout: CollectionLayout, *, negate: bool) -> str:
    field = layout.field_ref(filter_.key)
    operator = _COMPLEMENTS.get(filter_.operator, filter_.operator)
    negate ^= operator != filter_.operator
    if operator == Op.IS_EMPTY:
        return f"not {_is_empty(field)}" if negate else _is_empty(field)
    if operator == Op.EQ and filter_.value is None:
        return f"{field} is {'not ' if negate else ''}null"
    value = _checked(operator, field, filter_.value)
    if value == []:
        return f"{layout.primary_key} {'not ' if negate else ''}in []"
    matching, other = _tests(operator, field, value)
    if not negate:
        return matching
    return f"({field} is null or {other})" if field.nullable else other


def _tests(operator: FilterOperator, field: FieldRef, value: Any) -> tuple[str, str]:
    if operator == Op.IN and field.expr.endswith("]"):
        # Milvus Lite knows `in` after plain names only.
        chain = " or ".join(f"{field} == {literal(each)}" for each in value)
        return f"({chain})", f"not ({chain})"
    kind = "array" if field.field and field.field.type == FieldType.ARRAY else "json"
    matching, other = _TEMPLATES[operator]
    parts = {"field": field, "value": literal(value), "kind": kind}
    return matching.format(**parts), other.format(**parts)


def _is_empty(field: FieldRef) -> str:
    if field.field is None or field.field.type == FieldType.VARCHAR:
        return f'({field} is null or {field} == "")'
    if field.field.type == FieldType.ARRAY:
        return f"({field} is null or array_length({field}) == 0)"
    return f"({field} is null)"


def _checked(operator: FilterOperator, field: FieldRef, value: Any) -> Any:
    """Return the value as it is stored, or say why the filter cannot be asked."""
    if operator not in _TEMPLATES:
        raise ConfigurationError(
            "Milvus has no such operator"
            + ("; use TEXT_MATCH" if operator == Op.TEXT_MATCH_INSENSITIVE else "")
        )
    if field.field is not None and operator not in _OPERATORS.get(field.field.type, ()):
        raise ConfigurationError(
            f"Milvus cannot ask this of a field of type {_type_name(field.field.type)}"
        )
    if (operator in _TAKES_LIST) != isinstance(value, (list, tuple)):
        wanted = "a list of values" if operator in _TAKES_LIST else "one value"
        raise ConfigurationError(f"it takes {wanted}, not {type(value).__name__}")
    if operator == Op.ALL and not value:
        raise ConfigurationError("it takes at least one value")
    if operator == Op.TEXT_MATCH:
        return _anywhere(value)
    stored_as = (field.field.element_type or field.field.type) if field.field else None
    if operator in _TAKES_LIST:
        return [_as_stored(each, stored_as) for each in value]
    return _as_stored(value, stored_as)


def _anywhere(value: Any) -> str:
    if not isinstance(value, str):
        raise ConfigurationError(f"it takes a text, not {type(value).__name__}")
    if "\\" in value:
        raise ConfigurationError(
            "Milvus versions disagree on what a backslash in a LIKE pattern means; "
            "search for a part of the text without it"
        )
    return f"%{value.translate(_LIKE_WILDCARDS)}%"


def _as_stored(value: Any, field_type: int | None) -> Any:
    if isinstance(value, date):
        value = to_jsonable_python(value)  # as LlamaIndex writes metadata: UTC is "Z"
    if value is None:
        raise ConfigurationError("only EQ and NE take None")
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if field_type in {None, FieldType.JSON}:
        return value
    if field_type == FieldType.VARCHAR and isinstance(value, str):
        return value
    if field_type == FieldType.BOOL and value in (0, 1):  # MetadataFilter refuses True and False
        return bool(value)
    if field_type in _WHOLE and (is_whole or (isinstance(value, float) and value.is_integer())):
        return int(value)
    if field_type in _NUMBERS - _WHOLE and (is_whole or isinstance(value, float)):
        return value
    raise ConfigurationError(f"a field of type {_type_name(field_type)} cannot hold {value!r:.200}")


def _type_name(field_type: int) -> str:
    return FieldType(field_type).name if field_type in list(FieldType) else str(field_type)
