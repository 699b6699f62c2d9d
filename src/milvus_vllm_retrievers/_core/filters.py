"""Filters as values: what may be asked of a field, checked and written for both frameworks alike.

Nothing is dropped in silence: what cannot be asked is refused, with the field named.

- A row that lacks a field, or holds null, matches `ne`, `nin` and what is negated, nothing else.
- A list means any of its values. In an ARRAY field a value is looked for among the elements.
- Milvus tells true from 1 inside JSON and in dynamic fields; Milvus Lite does not.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from datetime import date
from enum import Enum
from typing import Any
from uuid import UUID

from pydantic_core import to_jsonable_python

from milvus_vllm_retrievers._core.expressions import is_reserved, literal
from milvus_vllm_retrievers._core.layout import CollectionLayout, FieldRef, FieldType
from milvus_vllm_retrievers.errors import ConfigurationError, did_you_mean, excerpt

OPERATORS = ("eq", "ne", "gt", "gte", "lt", "lte", "in", "nin")
"""What a mapping may ask a field by its name."""

_COMPLEMENTS = {"ne": "eq", "nin": "in"}
# What a mapping asks of an ARRAY field, and whether for the rows that do not match.
_IN_ARRAYS = {
    "eq": ("contains", False),
    "ne": ("contains", True),
    "in": ("contains_any", False),
    "nin": ("contains_any", True),
}
# What finds the rows that match, and what finds those that have a value and do not match.
_TEMPLATES = {
    "eq": ("{field} == {value}", "{field} != {value}"),
    "gt": ("{field} > {value}", "not ({field} > {value})"),
    "gte": ("{field} >= {value}", "not ({field} >= {value})"),
    "lt": ("{field} < {value}", "not ({field} < {value})"),
    "lte": ("{field} <= {value}", "not ({field} <= {value})"),
    "in": ("{field} in {value}", "{field} not in {value}"),
    "like": ("{field} like {value}", "not ({field} like {value})"),
    "contains_any": (
        "{kind}_contains_any({field}, {value})",
        "not {kind}_contains_any({field}, {value})",
    ),
    "contains_all": (
        "{kind}_contains_all({field}, {value})",
        "not {kind}_contains_all({field}, {value})",
    ),
}
_ORDER = {"gt", "gte", "lt", "lte"}
_CONTAINMENT = {"contains", "contains_any", "contains_all"}
_TAKES_LIST = {"in", "nin", "contains_any", "contains_all"}
_COMPARISON = {"eq", "in", *_ORDER}

_WHOLE = {FieldType.INT8, FieldType.INT16, FieldType.INT32, FieldType.INT64}
_NUMBERS = {*_WHOLE, FieldType.FLOAT, FieldType.DOUBLE}
# What Milvus can ask of a schema field; of a value inside JSON it can ask everything.
_ASKABLE: dict[int, set[str]] = {
    **dict.fromkeys(_NUMBERS, _COMPARISON),
    FieldType.BOOL: {"eq", "in"},
    FieldType.VARCHAR: _COMPARISON | {"like"},
    FieldType.ARRAY: _CONTAINMENT,
    FieldType.JSON: _CONTAINMENT,
}


def checked_filters(filters: Mapping[str, Any]) -> dict[str, Any]:
    """Check what can be checked of filters before the collection is known.

    Args:
        filters: By field a value, a list of values (one of them), or a mapping of `OPERATORS`
            to values. All of them must match.

    Returns:
        A copy that holds nothing of the caller's and no value that can change.

    Raises:
        ConfigurationError: A filter is empty, or holds what Milvus cannot compare.
    """
    if not isinstance(filters, Mapping):
        raise ConfigurationError(
            f"filters must be a mapping of fields to values, not {type(filters).__name__}"
        )
    if not filters:
        raise ConfigurationError("filters is empty: leave it out, or name a field")
    return {name: _checked_field(name, asked) for name, asked in filters.items()}


def from_mapping(filters: Mapping[str, Any], layout: CollectionLayout) -> str:
    """Write filters as an expression for a collection.

    Args:
        filters: As `checked_filters` takes them.
        layout: The collection; it decides which field a name stands for.

    Raises:
        ConfigurationError: A filter cannot be asked of this collection.
    """
    parts = []
    for name, asked in checked_filters(filters).items():
        by_operator = asked if isinstance(asked, Mapping) else {_operator_for(asked): asked}
        for operator, value in by_operator.items():
            try:
                parts.append(_from_mapping(layout, name, operator, value))
            except ConfigurationError as error:
                raise ConfigurationError(f"filters[{excerpt(name)!r}]: {error}") from error
    return " and ".join(parts)


def _from_mapping(layout: CollectionLayout, name: str, operator: str, value: Any) -> str:
    field = named(layout, name)
    of_type = field.field.type if field.field else None
    if of_type == FieldType.JSON:
        alone = not layout.dynamic and layout.json_fields == (name,)
        raise ConfigurationError(
            "it holds JSON; filter by one of its keys, "
            + (
                "by the key's name alone"
                if alone
                else f"with expr='{name}[\"key\"] == {{value}}' and expr_params={{'value': ...}}"
            )
        )
    negate = False
    if of_type == FieldType.ARRAY:
        operator, negate = _IN_ARRAYS.get(operator, (operator, False))
    return condition(field, operator, value, negate=negate)


def _checked_field(name: Any, asked: Any) -> Any:
    if not isinstance(name, str):
        raise ConfigurationError(f"filters: a field's name is a text, not {type(name).__name__}")
    try:
        if asked is None:
            raise ConfigurationError(
                "None is no value; leave the field out, or find rows without one by an expr like "
                "'color is null'"
            )
        if not isinstance(asked, Mapping):
            return plain(_operator_for(asked), asked)
        if not asked:
            raise ConfigurationError(f"names no operator; it takes {', '.join(OPERATORS)}")
        for operator in asked:
            if operator not in OPERATORS:
                raise ConfigurationError(
                    f"unknown operator {excerpt(str(operator))!r}"
                    f"{did_you_mean(str(operator), list(OPERATORS))}; "
                    f"it takes {', '.join(OPERATORS)}"
                )
        return {operator: plain(operator, value) for operator, value in asked.items()}
    except ConfigurationError as error:
        raise ConfigurationError(f"filters[{excerpt(name)!r}]: {error}") from error


def _operator_for(value: Any) -> str:
    return "in" if isinstance(value, (list, tuple, set, frozenset)) else "eq"


def plain(operator: str, value: Any) -> Any:
    """Return what an operator compares with: a text, a number or a bool, or a tuple of them.

    Raises:
        ConfigurationError: It is empty, or Milvus cannot compare with it.
    """
    is_list = isinstance(value, (list, tuple, set, frozenset))
    if (operator in _TAKES_LIST) != is_list:
        wanted = "a list of values" if operator in _TAKES_LIST else "one value"
        raise ConfigurationError(f"it takes {wanted}, not {type(value).__name__}")
    if not is_list:
        return _plain(value)
    if not value:
        raise ConfigurationError(
            "an empty list leaves open what is meant: name at least one value, or leave it out"
        )
    in_order = value if isinstance(value, (list, tuple)) else sorted(value, key=repr)
    return tuple(_plain(each) for each in in_order)


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        value = value.value
    if getattr(value, "ndim", None) == 0 and getattr(value.dtype, "kind", "?") in "biufU":
        value = value.item()  # a number or text of numpy's
    if isinstance(value, date):
        value = to_jsonable_python(value)  # as LlamaIndex writes metadata: UTC is "Z"
    if isinstance(value, UUID):
        value = str(value)
    if value is None:
        raise ConfigurationError("None is no value to compare with; leave it out")
    if isinstance(value, (list, tuple)):
        raise ConfigurationError("a list cannot stand in a list; Milvus compares single values")
    literal(value)
    return value


def named(layout: CollectionLayout, name: str) -> FieldRef:
    """Return the field that a name stands for.

    Raises:
        ConfigurationError: There is no such field, or no filter can reach it.
    """
    field = layout.field_ref(name)
    if field.field is not None and is_reserved(name):
        raise ConfigurationError(
            f"{name!r} is a word of Milvus's filter language, so that no filter can name the "
            "field; store it under another name"
        )
    return field


def condition(field: FieldRef, operator: str, value: Any, *, negate: bool = False) -> str:
    """Write what a field is asked.

    Args:
        field: The field.
        operator: One of `OPERATORS`, or ``"like"`` (with a pattern), ``"contains"``,
            ``"contains_any"``, ``"contains_all"``.
        value: What it is compared with.
        negate: Ask for the rows that do not match, those without a value included.

    Raises:
        ConfigurationError: Milvus cannot ask this of the field.
    """
    value = plain(operator, value)
    positive = _COMPLEMENTS.get(operator, operator)
    negate ^= positive != operator
    of_type = field.field.type if field.field else None
    if of_type is not None and positive not in _ASKABLE.get(of_type, ()):
        raise ConfigurationError(f"Milvus cannot ask this of a field of type {_type_name(of_type)}")
    stored_as = (field.field.element_type or of_type) if field.field else None
    stored = [
        _as_stored(one, stored_as) for one in (value if isinstance(value, tuple) else [value])
    ]
    if positive in _ORDER and isinstance(stored[0], bool):
        raise ConfigurationError("true and false have no order; compare with eq or ne")
    matching, other = _tests(field, positive, stored)
    if not negate:
        return matching
    return f"({field} is null or {other})" if field.nullable else other


def _tests(field: FieldRef, operator: str, values: list[Any]) -> tuple[str, str]:
    mixed = len({type(value) for value in values}) > 1
    if operator == "in" and (mixed or field.expr.endswith("]")):
        # Neither Milvus takes a list of several types, and Milvus Lite no list after a path.
        chain = " or ".join(f"{field} == {literal(each)}" for each in values)
        return f"({chain})", f"not ({chain})"
    kind = "array" if field.field and field.field.type == FieldType.ARRAY else "json"
    if operator == "contains":
        operator = "contains_any"  # Milvus Lite takes a negative number in a list alone
    value = literal(values if operator in _TAKES_LIST else values[0])
    matching, other = _TEMPLATES[operator]
    parts = {"field": field, "value": value, "kind": kind}
    return matching.format(**parts), other.format(**parts)


def _as_stored(value: Any, field_type: int | None) -> Any:
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
        return _as_float32(value) if field_type == FieldType.FLOAT else float(value)
    raise ConfigurationError(f"a field of type {_type_name(field_type)} cannot hold {value!r:.200}")


def _as_float32(value: float) -> float:
    """Round as a FLOAT field does: Milvus Lite compares its values with unrounded ones."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        raise ConfigurationError(f"a field of type FLOAT cannot hold {value!r:.200}") from None


def _type_name(field_type: int | None) -> str:
    return FieldType(field_type).name if field_type in list(FieldType) else str(field_type)
