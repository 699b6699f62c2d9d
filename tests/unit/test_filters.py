"""Filters as a mapping: their expression, what is refused, and what they find on Milvus Lite."""

from __future__ import annotations

import copy
import enum
import json
import math
import pickle
import uuid
from collections.abc import Iterator
from datetime import date, datetime, timezone
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pymilvus import MilvusClient

from milvus_vllm_retrievers import ConfigurationError
from milvus_vllm_retrievers._core.expressions import checked_expr
from milvus_vllm_retrievers._core.filters import OPERATORS, checked_filters, from_mapping
from milvus_vllm_retrievers._core.layout import CollectionLayout, FieldType
from tests.unit.builders import DENSE, KEY, description, field, layout

BOOKS = layout(
    KEY,
    DENSE,
    field("title", FieldType.VARCHAR, params={"max_length": 1000}),
    field("shelf", FieldType.VARCHAR, nullable=True),
    field("sold", FieldType.BOOL),
    field("pages", FieldType.INT32),
    field("weight", FieldType.FLOAT),
    field("price", FieldType.DOUBLE),
    field("authors", FieldType.ARRAY, element_type=FieldType.VARCHAR),
    field("years", FieldType.ARRAY, element_type=FieldType.INT64, nullable=True),
    field("extra", FieldType.JSON),
    field("place", 24),  # GEOMETRY
    field("In", FieldType.INT64),
    field("true", FieldType.BOOL),
    field("threshold", FieldType.INT64),
    dynamic=True,
)
FIXED = layout(KEY, DENSE, field("title", FieldType.VARCHAR))
JSON = layout(KEY, DENSE, field("metadata", FieldType.JSON))


class Color(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    LOW = 1


# --- the text of an expression


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"color": "red"}, 'color == "red"'),
        ({"color": ["red", "blue"]}, 'color in ["red", "blue"]'),
        ({"color": ("red",)}, 'color in ["red"]'),
        ({"color": {"blue", "red"}}, "set"),
        ({"color": frozenset({"red"})}, 'color in ["red"]'),
        ({"color": "red", "pages": 3}, 'color == "red" and pages == 3'),
        ({"pages": {"gte": 1, "lt": 9}}, "pages >= 1 and pages < 9"),
        ({"pages": {"gt": 1, "lte": 9}}, "pages > 1 and pages <= 9"),
        ({"pages": {"eq": 1}}, "pages == 1"),
        ({"pages": {"ne": 1}}, "pages != 1"),
        ({"shelf": {"ne": "a"}}, '(shelf is null or shelf != "a")'),
        ({"color": {"ne": "red"}}, '(color is null or color != "red")'),
        ({"color": {"in": ["red"]}}, 'color in ["red"]'),
        ({"color": {"nin": ["red"]}}, '(color is null or color not in ["red"])'),
        ({"any key": "x"}, '$meta["any key"] == "x"'),
        ({"like": "x"}, '$meta["like"] == "x"'),
        ({"any key": ["x", "y"]}, '($meta["any key"] == "x" or $meta["any key"] == "y")'),
        ({"color": ["red", 1, True]}, '(color == "red" or color == 1 or color == true)'),
        ({"color": [1, 2.5]}, "(color == 1 or color == 2.5)"),
        ({"threshold": 1}, "threshold == 1"),
        ({"authors": "x"}, 'array_contains_any(authors, ["x"])'),
        ({"authors": ["x", "y"]}, 'array_contains_any(authors, ["x", "y"])'),
        ({"authors": {"ne": "x"}}, 'not array_contains_any(authors, ["x"])'),
        ({"years": {"nin": [1]}}, "(years is null or not array_contains_any(years, [1]))"),
    ],
)
def test_every_form_of_a_filter_has_its_expression(filters, expected):
    if expected == "set":
        expected = 'color in ["blue", "red"]'  # in one order, so that Milvus may cache it

    assert from_mapping(filters, BOOKS) == expected


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"sold": True}, "sold == true"),
        ({"sold": 0}, "sold == false"),
        ({"sold": [True, 0]}, "sold in [true, false]"),
        ({"pages": 3.0}, "pages == 3"),
        ({"pages": -3}, "pages == -3"),
        ({"price": 3}, "price == 3.0"),
        ({"price": [3, 2.5]}, "price in [3.0, 2.5]"),
        ({"weight": 0.1}, "weight == 0.10000000149011612"),
        ({"pk": 7}, "pk == 7"),
        ({"color": Color.RED}, 'color == "red"'),
        ({"pages": Level.LOW}, "pages == 1"),
        ({"color": [Color.RED]}, 'color in ["red"]'),
        ({"at": date(2024, 5, 6)}, 'at == "2024-05-06"'),
        ({"at": {"lt": datetime(2024, 5, 6, tzinfo=timezone.utc)}}, 'at < "2024-05-06T00:00:00Z"'),
        ({"id": uuid.UUID(int=1)}, 'id == "00000000-0000-0000-0000-000000000001"'),
        ({"pages": np.int64(3)}, "pages == 3"),
        ({"price": np.float64(0.5)}, "price == 0.5"),
        ({"sold": np.bool_(True)}, "sold == true"),
        ({"color": np.str_("red")}, 'color == "red"'),
        ({"pages": [np.int8(3)]}, "pages in [3]"),
        ({"flag": True}, "flag == true"),
        ({"flag": 1}, "flag == 1"),
    ],
)
def test_a_value_is_compared_as_its_field_stores_it(filters, expected):
    assert from_mapping(filters, BOOKS) == expected


def test_a_name_is_looked_up_in_the_only_json_field_of_a_collection_without_dynamic_fields():
    assert from_mapping({"pk": 1}, JSON) == "pk == 1"
    assert from_mapping({"color": "red"}, JSON) == 'metadata["color"] == "red"'
    assert from_mapping({"year": {"gte": 1, "lt": 9}}, JSON) == (
        'metadata["year"] >= 1 and metadata["year"] < 9'
    )


# --- what is refused


UNUSABLE = [
    ({}, "filters is empty: leave it out, or name a field"),
    (None, "must be a mapping of fields to values, not NoneType"),
    ([("color", "red")], "must be a mapping of fields to values, not list"),
    ('color == "red"', "must be a mapping of fields to values, not str"),
    ({1: "red"}, "a field's name is a text, not int"),
    (
        {"color": None},
        "filters['color']: None is no value; leave the field out, or find rows without",
    ),
    ({"color": [None]}, "filters['color']: None is no value to compare with"),
    ({"color": {"ne": None}}, "filters['color']: None is no value to compare with"),
    ({"color": []}, "filters['color']: an empty list"),
    ({"color": ()}, "filters['color']: an empty list"),
    ({"color": set()}, "filters['color']: an empty list"),
    ({"color": {"nin": []}}, "filters['color']: an empty list"),
    ({"color": {}}, "filters['color']: names no operator; it takes eq, ne, gt, gte, lt, lte, in"),
    ({"color": {"$gte": 1}}, "unknown operator '$gte' (did you mean 'gte'?); it takes eq, ne, gt"),
    ({"color": {"like": "a"}}, "unknown operator 'like'"),
    ({"color": {1: 1}}, "unknown operator '1'"),
    ({"color": {"gte": [1]}}, "it takes one value, not list"),
    ({"color": {"in": "red"}}, "it takes a list of values, not str"),
    ({"color": [["red"]]}, "a list cannot stand in a list"),
    ({"$or": [{"color": "red"}]}, "filter by a dict"),
    ({"color": math.nan}, "filter by nan"),
    ({"color": [1, -math.inf]}, "filter by -inf"),
    ({"color": np.float32("nan")}, "filter by nan"),
    ({"color": 2**63}, "64 bits"),
    ({"color": -(2**63)}, "64 bits"),
    ({"color": b"red"}, "filter by a bytes"),
    ({"color": Decimal(1)}, "filter by a Decimal"),
    ({"color": np.array([1])}, "filter by a ndarray"),
    ({"color": np.datetime64("2024-05-06", "ns")}, "filter by a datetime64"),
    ({"color": object()}, "filter by a object"),
    ({"color": "a\ud800"}, "lone surrogate at character 1"),
    ({"color": ["\udc00"]}, "lone surrogate at character 0"),
]


@pytest.mark.parametrize(("filters", "problem"), UNUSABLE)
def test_what_no_collection_could_answer_is_refused_before_one_is_known(filters, problem):
    for check in (checked_filters, lambda given: from_mapping(given, BOOKS)):
        with pytest.raises(ConfigurationError) as refusal:
            check(filters)

        assert problem in str(refusal.value)


@pytest.mark.parametrize(
    ("filters", "problem"),
    [
        ({"title": 1}, "filters['title']: a field of type VARCHAR cannot hold 1"),
        ({"title": ["a", 1]}, "VARCHAR cannot hold 1"),
        ({"pages": "3"}, "filters['pages']: a field of type INT32 cannot hold '3'"),
        ({"pages": 1.5}, "INT32 cannot hold 1.5"),
        ({"pages": True}, "INT32 cannot hold True"),
        ({"pages": {"gte": "a"}}, "INT32 cannot hold 'a'"),
        ({"price": "a"}, "DOUBLE cannot hold 'a'"),
        ({"price": True}, "DOUBLE cannot hold True"),
        ({"weight": 1e39}, "FLOAT cannot hold 1e+39"),
        ({"sold": 2}, "BOOL cannot hold 2"),
        ({"sold": {"gt": 0}}, "cannot ask this of a field of type BOOL"),
        ({"flag": {"gt": False}}, "true and false have no order"),
        ({"authors": 1}, "VARCHAR cannot hold 1"),
        ({"authors": {"gt": "a"}}, "cannot ask this of a field of type ARRAY"),
        ({"place": "a"}, "cannot ask this of a field of type 24"),
        ({"dense": 1}, "holds vectors"),
        ({"extra": "a"}, 'it holds JSON; filter by one of its keys, with expr=\'extra["key"]'),
        ({"": "a"}, "by the key ''"),
        ({"a\\b": "a"}, "by the key"),
        ({"a\U00020bb7": "a"}, "no Chinese character beyond U+FFFF"),
        ({"In": 1}, "filters['In']: 'In' is a word of Milvus's filter language"),
        ({"true": True}, "'true' is a word of Milvus's filter language"),
    ],
)
def test_what_does_not_fit_the_collection_is_refused_by_name(filters, problem):
    with pytest.raises(ConfigurationError) as refusal:
        from_mapping(filters, BOOKS)

    assert problem in str(refusal.value)
    assert checked_filters(filters)


def test_a_field_that_no_row_can_have_is_refused():
    with pytest.raises(ConfigurationError, match=r"has no field 'titel' \(did you mean 'title'"):
        from_mapping({"title": "a", "titel": "a"}, FIXED)


def test_a_json_field_as_a_whole_is_refused_with_its_keys_as_the_way_out():
    with pytest.raises(ConfigurationError, match="by one of its keys, by the key's name alone"):
        from_mapping({"metadata": "a"}, JSON)


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_error_shows_no_more_than_the_start_of_a_long_name_or_value(operator):
    value = ["x" * 5000] if operator in {"in", "nin"} else "x" * 5000
    for filters in ({"pages": {operator: value}}, {"y" * 5000 + "\\": {operator: value}}):
        with pytest.raises(ConfigurationError) as refusal:
            from_mapping(filters, BOOKS)

        assert len(str(refusal.value)) < 800


# --- what is checked is a copy


def test_later_changes_of_what_was_given_change_nothing():
    given: dict[str, Any] = {"color": ["red"], "year": {"gte": 1}}
    checked = checked_filters(given)
    given["color"].append("blue")
    given["year"]["gte"] = 0
    given["more"] = "x"

    assert from_mapping(checked, BOOKS) == 'color in ["red"] and year >= 1'


def test_what_is_checked_is_plain_data_that_can_be_checked_copied_and_stored_again():
    checked = checked_filters({"a": Color.RED, "b": [np.int64(1)], "c": {"lt": date(2024, 5, 6)}})

    assert checked == {"a": "red", "b": (1,), "c": {"lt": "2024-05-06"}}
    assert checked_filters(checked) == copy.deepcopy(checked) == checked
    assert pickle.loads(pickle.dumps(checked)) == checked
    assert json.loads(json.dumps(checked)) == {"a": "red", "b": [1], "c": {"lt": "2024-05-06"}}


# --- what it can say


values = st.text() | st.integers() | st.floats() | st.booleans() | st.none()
asked = (
    values
    | st.lists(values, max_size=3)
    | st.dictionaries(st.sampled_from([*OPERATORS, "$gte"]), values | st.lists(values, max_size=2))
)


@given(st.dictionaries(st.text(max_size=8) | st.sampled_from(BOOKS.scalar_fields), asked))
def test_any_filter_is_refused_or_an_expression_that_closes_all_that_it_opens(filters):
    try:
        expr = from_mapping(filters, BOOKS)
    except ConfigurationError:
        return

    checked_expr(expr)
    assert expr


# --- what it finds

ROWS: list[dict[str, Any]] = [
    {"label": "red", "pages": 1, "weight": 0.1, "sold": True, "tags": ["a", "b"], "year": 1999},
    {"label": "blue", "pages": 2, "weight": 2.0, "sold": False, "tags": ["b"], "year": 2004.5},
    {"label": "", "pages": -3, "weight": 1e30, "sold": False, "tags": [], "any key": "x"},
    {"label": "1", "pages": 4, "weight": -0.1, "sold": True, "tags": ["-1"], "year": "1999"},
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[MilvusClient, Any]]:
    client = MilvusClient(str(tmp_path_factory.mktemp("filters") / "library.db"))
    fields = [
        KEY,
        DENSE,
        field("label", FieldType.VARCHAR, params={"max_length": 100}),
        field("pages", FieldType.INT8),
        field("weight", FieldType.FLOAT),
        field("sold", FieldType.BOOL),
        field(
            "tags",
            FieldType.ARRAY,
            element_type=FieldType.VARCHAR,
            params={"max_capacity": 4, "max_length": 10},
        ),
    ]
    schema = client.create_schema(enable_dynamic_field=True)
    for each in fields:
        more = {k: v for k, v in each.items() if k in {"is_primary", "element_type"}}
        schema.add_field(each["name"], int(each["type"]), **more, **each["params"])
    index = client.prepare_index_params()
    index.add_index("dense", index_type="FLAT", metric_type="L2")
    client.create_collection("docs", schema=schema, index_params=index)
    client.insert("docs", [{"pk": pk, "dense": [0.0, 0.0], **row} for pk, row in enumerate(ROWS)])
    yield client, CollectionLayout.from_description(description(*fields, dynamic=True))
    client.close()


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        ({"label": "red"}, {0}),
        ({"label": ["red", ""]}, {0, 2}),
        ({"label": {"ne": "red"}}, {1, 2, 3}),
        ({"pages": {"gte": -3, "lt": 2}}, {0, 2}),
        ({"pages": [-3, 4.0]}, {2, 3}),
        ({"weight": 0.1}, {0}),
        ({"weight": [0.1, 2, 1e30]}, {0, 1, 2}),
        ({"weight": {"lte": 0.1}}, {0, 3}),
        ({"weight": {"lt": 0.1}}, {3}),
        ({"sold": True}, {0, 3}),
        ({"sold": [True, False]}, {0, 1, 2, 3}),
        ({"tags": "b"}, {0, 1}),
        ({"tags": ["a", "-1"]}, {0, 3}),
        ({"tags": {"ne": "b"}}, {2, 3}),
        ({"tags": {"nin": ["b", "-1"]}}, {2}),
        ({"year": 1999}, {0}),
        ({"year": "1999"}, {3}),
        ({"year": [1999, "1999"]}, {0, 3}),
        ({"year": [1999, 2004.5]}, {0, 1}),
        ({"year": {"gt": 1999}}, {1}),
        ({"year": {"nin": [1999, "1999"]}}, {1, 2}),
        ({"any key": ["x", "y"]}, {2}),
        ({"any key": {"ne": "x"}}, {0, 1, 3}),
        ({"nothing": "x"}, set()),
        ({"sold": True, "tags": "b", "year": {"gte": 1000}}, {0}),
    ],
)
def test_a_filter_finds_exactly_the_rows_that_it_names(library, filters, found):
    client, of_library = library

    rows = client.query("docs", filter=from_mapping(filters, of_library), output_fields=["pk"])

    assert {row["pk"] for row in rows} == found


small = st.integers(-5, 5)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(low=small, high=small, among=st.sets(small, min_size=1))
def test_bounds_and_lists_find_what_python_finds(library, low, high, among):
    client, of_library = library
    filters = {"pages": {"gte": low, "lt": high, "nin": among}}

    rows = client.query("docs", filter=from_mapping(filters, of_library), output_fields=["pk"])

    pages = {pk: row["pages"] for pk, row in enumerate(ROWS)}
    expected = {pk for pk, page in pages.items() if low <= page < high and page not in among}
    assert {row["pk"] for row in rows} == expected
