"""MetadataFilters as Milvus expressions: their text, and what they find on a real Milvus Lite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from datetime import date, datetime, timezone
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
)
from llama_index.core.vector_stores.utils import build_metadata_filter_fn
from pymilvus import DataType, MilvusClient

from milvus_vllm_retrievers._core.expressions import checked_expr, literal
from milvus_vllm_retrievers._core.layout import CollectionLayout
from milvus_vllm_retrievers.errors import ConfigurationError
from milvus_vllm_retrievers.llama_index._filters import checked_filters, to_expr

Op = FilterOperator
AND, OR, NOT = FilterCondition.AND, FilterCondition.OR, FilterCondition.NOT


def described(*fields: dict[str, Any], dynamic: bool = True) -> CollectionLayout:
    return CollectionLayout.from_description(
        {
            "collection_name": "books",
            "enable_dynamic_field": dynamic,
            "fields": [
                {"name": "pk", "type": DataType.INT64, "is_primary": True},
                {"name": "embedding", "type": DataType.FLOAT_VECTOR, "params": {"dim": 2}},
                *fields,
            ],
        }
    )


DYNAMIC = described(
    {"name": "title", "type": DataType.VARCHAR},
    {"name": "shelf", "type": DataType.VARCHAR, "nullable": True},
    {"name": "sold", "type": DataType.BOOL},
    {"name": "pages", "type": DataType.INT32},
    {"name": "price", "type": DataType.DOUBLE},
    {"name": "authors", "type": DataType.ARRAY, "element_type": DataType.VARCHAR},
    {"name": "years", "type": DataType.ARRAY, "element_type": DataType.INT64, "nullable": True},
    {"name": "extra", "type": DataType.JSON},
    {"name": "place", "type": 24},  # GEOMETRY
    {"name": "in", "type": DataType.INT64},
)
JSON = described({"name": "metadata", "type": DataType.JSON}, dynamic=False)


def expr(
    key: str, value: Any, operator: FilterOperator = Op.EQ, layout: CollectionLayout = DYNAMIC
) -> str | None:
    # model_construct: values that MetadataFilter's own types refuse must be safe too.
    filter_ = MetadataFilter.model_construct(key=key, value=value, operator=operator)
    return to_expr(MetadataFilters.model_construct(filters=[filter_], condition=AND), layout)


def is_(key: str, value: Any, operator: FilterOperator = Op.EQ) -> MetadataFilter:
    return MetadataFilter(key=key, value=value, operator=operator)


def group(condition: FilterCondition | None, *filters: Any) -> MetadataFilters:
    return MetadataFilters(filters=list(filters), condition=condition)


# --- the text of an expression


@pytest.mark.parametrize(
    ("operator", "value", "expected"),
    [
        (Op.EQ, "red", 'color == "red"'),
        (Op.NE, "red", '(color is null or color != "red")'),
        (Op.GT, 3, "color > 3"),
        (Op.GTE, 3, "color >= 3"),
        (Op.LT, 1.5, "color < 1.5"),
        (Op.LTE, -1.5, "color <= -1.5"),
        (Op.IN, ["a", "b"], 'color in ["a", "b"]'),
        (Op.NIN, [1, 2], "(color is null or color not in [1, 2])"),
        (Op.ANY, ["a"], 'json_contains_any(color, ["a"])'),
        (Op.ALL, ["a"], 'json_contains_all(color, ["a"])'),
        (Op.CONTAINS, "a", 'json_contains_any(color, ["a"])'),
        (Op.TEXT_MATCH, "a", 'color like "%a%"'),
        (Op.IS_EMPTY, None, '(color is null or color == "")'),
    ],
)
def test_every_operator_has_its_expression_on_a_dynamic_field(operator, value, expected):
    assert expr("color", value, operator) == expected


@pytest.mark.parametrize("operator", set(Op))
def test_no_operator_is_forgotten(operator):
    value: Any = "a"
    if operator in {Op.IN, Op.NIN, Op.ANY, Op.ALL}:
        value = ["a"]
    try:
        assert expr("color", value, operator)
    except ConfigurationError:
        assert operator == Op.TEXT_MATCH_INSENSITIVE


@pytest.mark.parametrize(
    ("key", "operator", "value", "expected"),
    [
        ("title", Op.NE, "x", 'title != "x"'),
        ("shelf", Op.NE, "x", '(shelf is null or shelf != "x")'),
        ("title", Op.IS_EMPTY, None, '(title is null or title == "")'),
        ("sold", Op.EQ, 1, "sold == true"),
        ("sold", Op.IN, [0, 1], "sold in [false, true]"),
        ("pages", Op.EQ, 7.0, "pages == 7"),
        ("pages", Op.IS_EMPTY, None, "(pages is null)"),
        ("price", Op.LT, 7, "price < 7.0"),
        ("authors", Op.CONTAINS, "x", 'array_contains_any(authors, ["x"])'),
        ("authors", Op.IS_EMPTY, None, "(authors is null or array_length(authors) == 0)"),
        ("years", Op.ANY, [1, 2], "array_contains_any(years, [1, 2])"),
        ("extra", Op.ALL, ["x", "y"], 'json_contains_all(extra, ["x", "y"])'),
    ],
)
def test_a_schema_field_is_asked_by_its_type(key, operator, value, expected):
    assert expr(key, value, operator) == expected


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("color", "color == 1"),
        ("any key", '$meta["any key"] == 1'),
        ("ключ", '$meta["ключ"] == 1'),
        ("a[b]", '$meta["a[b]"] == 1'),
        ("like", '$meta["like"] == 1'),
        ("Array_Contains", '$meta["Array_Contains"] == 1'),
        ('say "hi"', "$meta['say \"hi\"'] == 1"),
        ('x == 1 or "a" == ', "$meta['x == 1 or \"a\" == '] == 1"),
    ],
)
def test_any_key_of_a_dynamic_field_is_only_ever_a_name(key, expected):
    assert expr(key, 1) == expected


def test_a_key_is_looked_up_in_the_only_json_field_of_a_collection_without_dynamic_fields():
    assert expr("pk", 1, layout=JSON) == "pk == 1"
    assert expr("color", 1, layout=JSON) == 'metadata["color"] == 1'
    assert expr("color", "a", Op.CONTAINS, JSON) == 'json_contains_any(metadata["color"], ["a"])'


def test_in_becomes_a_chain_where_milvus_lite_does_not_know_it():
    assert expr("k", ["a", "b"], Op.IN, JSON) == '(metadata["k"] == "a" or metadata["k"] == "b")'
    assert expr("k", [1], Op.NIN, JSON) == '(metadata["k"] is null or not (metadata["k"] == 1))'


def test_a_list_of_several_types_is_a_chain_since_neither_milvus_takes_it_as_a_list():
    assert expr("color", ["a", 1], Op.IN) == '(color == "a" or color == 1)'


def test_groups_nest_in_parentheses():
    a, b, c = is_("a", 1), is_("b", 2), is_("c", 3)

    assert to_expr(group(AND, a, group(OR, b, c)), DYNAMIC) == "(a == 1 and (b == 2 or c == 3))"
    assert to_expr(group(None, a, b), DYNAMIC) == "(a == 1 and b == 2)"


def test_not_is_none_of_and_turns_each_filter_round():
    negated = group(NOT, is_("title", "a"), is_("pages", 1, Op.GT))
    assert to_expr(negated, DYNAMIC) == '(title != "a" and not (pages > 1))'

    twice = group(NOT, negated)
    assert to_expr(twice, DYNAMIC) == '(title == "a" or pages > 1)'

    lacking = group(NOT, is_("color", 1, Op.GT))
    assert to_expr(lacking, DYNAMIC) == "(color is null or not (color > 1))"


@pytest.mark.parametrize(
    "filters",
    [
        group(AND),
        group(OR, group(AND), group(NOT)),
        group(AND, is_("color", "red"), group(OR)),
        group(NOT, is_("color", "red"), group(AND, is_("color", "red"), group(NOT))),
    ],
)
def test_a_group_without_a_filter_is_refused_rather_than_matching_everything(filters):
    for check in (checked_filters, partial(to_expr, layout=DYNAMIC)):
        with pytest.raises(
            ConfigurationError, match="holds none: leave it out, or name a field in it"
        ):
            check(filters)


@pytest.mark.parametrize("operator", [Op.EQ, Op.NE, Op.GT])
def test_none_is_refused_with_the_way_to_ask_for_rows_without_a_value(operator):
    for check in (checked_filters, partial(to_expr, layout=DYNAMIC)):
        with pytest.raises(ConfigurationError, match=r"IS_EMPTY.* condition NOT around that"):
            check(group(AND, is_("color", None, operator)))


def test_rows_without_a_value_are_asked_for_by_is_empty_and_those_with_one_by_not_around_it():
    empty = is_("color", None, Op.IS_EMPTY)

    assert to_expr(group(AND, empty), DYNAMIC) == '(color is null or color == "")'
    assert to_expr(group(NOT, empty), DYNAMIC) == 'not (color is null or color == "")'


def test_filters_are_checked_and_copied_before_the_collection_is_known():
    given = group(AND, is_("color", ["red"], Op.IN), group(OR, is_("year", 1)))
    copy = checked_filters(given)
    given.filters[0].value.append("blue")
    given.filters[1].filters.clear()

    assert to_expr(copy, DYNAMIC) == '(color in ["red"] and year == 1)'


def test_what_are_no_metadata_filters_is_refused():
    with pytest.raises(ConfigurationError, match="must be MetadataFilters, not dict"):
        checked_filters({"color": "red"})


def test_wildcards_in_a_text_match_stand_for_themselves():
    assert expr("title", '50% "a_b"', Op.TEXT_MATCH) == r'title like "%50\\% \"a\\_b\"%"'


def test_dates_are_compared_as_llama_index_stores_them():
    noon = datetime(2024, 5, 6, 12, tzinfo=timezone.utc)
    assert expr("at", noon, Op.GTE) == 'at >= "2024-05-06T12:00:00Z"'
    assert expr("at", [date(2024, 5, 6)], Op.IN) == 'at in ["2024-05-06"]'


def test_a_text_keeps_every_character_but_what_both_milvus_escape():
    assert literal("\\ \" \n\r\t \x00\x1b 😀 {x} '") == '"\\\\ \\" \\n\\r\\t \x00\x1b 😀 {x} \'"'


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, "true"),
        (-3, "-3"),
        (1e22, "1e+22"),
        (2**63 - 1, "9223372036854775807"),
        ((1, "a"), '[1, "a"]'),
    ],
)
def test_other_values_have_literals_too(value, expected):
    assert literal(value) == expected


@given(key=st.text(), value=st.text())
def test_an_expression_closes_all_that_it_opens_whatever_the_value(key, value):
    try:
        whole = expr(key, value, Op.NE)
    except ConfigurationError:
        return
    checked_expr(whole)


# --- what is refused


@pytest.mark.parametrize(
    ("key", "operator", "value", "reason"),
    [
        ("color", Op.TEXT_MATCH_INSENSITIVE, "a", "use TEXT_MATCH"),
        ("color", Op.TEXT_MATCH, "C:\\x", "backslash"),
        ("color", Op.TEXT_MATCH, 1, "takes a text"),
        ("color", Op.EQ, math.nan, "nan"),
        ("color", Op.EQ, math.inf, "inf"),
        ("color", Op.EQ, 2**63, "64 bits"),
        ("color", Op.EQ, 10**400, "64 bits"),
        ("color", Op.EQ, "\ud800", "lone surrogate at character 0"),
        ("\ud800", Op.EQ, 1, "lone surrogate"),
        ("color", Op.EQ, object(), "by a object"),
        ("color", Op.EQ, ["a"], "takes one value, not list"),
        ("color", Op.IN, "a", "takes a list of values, not str"),
        ("color", Op.ALL, [], "empty list"),
        ("color", Op.GT, None, "IS_EMPTY"),
        ("color", Op.EQ, None, "IS_EMPTY"),
        ("color", Op.NE, None, "IS_EMPTY"),
        ("color", Op.IN, [None], "None is no value"),
        ("color", Op.IN, [], "empty list"),
        ("color", Op.NIN, [], "empty list"),
        ("color", Op.ANY, [], "empty list"),
        ("color", Op.IN, [["a"]], "list cannot stand in a list"),
        ("color", Op.IN, [1, math.nan], "nan"),
        ("color", Op.GT, True, "no order"),
        ("in", Op.EQ, 1, "store it under another name"),
        ("", Op.EQ, 1, "by the key ''"),
        ("a\\b", Op.EQ, 1, "by the key"),
        ("a\nb", Op.EQ, 1, "by the key"),
        ("\"'", Op.EQ, 1, "by the key"),
        ('a"]["b', Op.EQ, 1, "by the key"),
        ("embedding", Op.EQ, 1, "holds vectors"),
        ("title", Op.EQ, 1, "VARCHAR cannot hold 1"),
        ("title", Op.CONTAINS, "a", "of a field of type VARCHAR"),
        ("pages", Op.EQ, 1.5, "INT32 cannot hold 1.5"),
        ("pages", Op.EQ, True, "INT32 cannot hold True"),
        ("pages", Op.TEXT_MATCH, "a", "of a field of type INT32"),
        ("price", Op.EQ, "a", "DOUBLE cannot hold 'a'"),
        ("sold", Op.EQ, 2, "BOOL cannot hold 2"),
        ("sold", Op.GT, 1, "of a field of type BOOL"),
        ("authors", Op.EQ, "a", "of a field of type ARRAY"),
        ("authors", Op.CONTAINS, 1, "VARCHAR cannot hold 1"),
        ("extra", Op.EQ, "a", "of a field of type JSON"),
        ("place", Op.EQ, "a", "of a field of type 24"),
    ],
)
def test_what_milvus_cannot_express_is_refused_by_name(key, operator, value, reason):
    with pytest.raises(ConfigurationError) as refusal:
        expr(key, value, operator)

    assert str(refusal.value).startswith(f"filter {operator.name} on {key!r}: ")
    assert reason in str(refusal.value)


def test_a_key_that_no_row_can_have_is_refused():
    layout = described({"name": "title", "type": DataType.VARCHAR}, dynamic=False)

    with pytest.raises(ConfigurationError, match=r"has no field 'titel' \(did you mean 'title'"):
        expr("titel", "x", layout=layout)


# --- what is found

ROWS = 6
KEYS = ["label", "color", "any key"]  # a VARCHAR field, a dynamic field, one that needs quoting

Find = Callable[[MetadataFilters], set[int]]


def make_collection(client: MilvusClient, name: str, *, dynamic: bool) -> CollectionLayout:
    schema = client.create_schema(enable_dynamic_field=dynamic)
    schema.add_field("pk", DataType.INT64, is_primary=True)
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=2)
    if dynamic:
        schema.add_field("label", DataType.VARCHAR, max_length=1000)
        schema.add_field(
            "labels",
            DataType.ARRAY,
            element_type=DataType.VARCHAR,
            max_capacity=4,
            max_length=1000,
        )
    else:
        schema.add_field("metadata", DataType.JSON)
    index = client.prepare_index_params()
    index.add_index("embedding", index_type="FLAT", metric_type="L2")
    client.create_collection(name, schema=schema, index_params=index)
    return CollectionLayout.from_description(client.describe_collection(name))


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MilvusClient]:
    client = MilvusClient(str(tmp_path_factory.mktemp("filters") / "filters.db"))
    yield client
    client.close()


@pytest.fixture(scope="module")
def dynamic(client: MilvusClient) -> CollectionLayout:
    return make_collection(client, "dynamic", dynamic=True)


@pytest.fixture(scope="module")
def json_(client: MilvusClient) -> CollectionLayout:
    return make_collection(client, "json", dynamic=False)


def put(client: MilvusClient, layout: CollectionLayout, rows: list[dict[str, Any]]) -> None:
    """Make the collection hold these rows' metadata under the keys 0, 1, 2, ..."""
    client.upsert(
        layout.name,
        [
            {"pk": pk, "embedding": [0.0, 0.0], **(row if layout.dynamic else {"metadata": row})}
            for pk, row in enumerate(rows)
        ],
    )


def found(client: MilvusClient, layout: CollectionLayout, filters: MetadataFilters) -> set[int]:
    expression = to_expr(filters, layout)
    checked_expr(expression)
    rows = client.query(layout.name, filter=expression, output_fields=["pk"], limit=100)
    return {row["pk"] for row in rows}


FRAGMENTS = [
    *(
        "'",
        '"',
        "\\",
        "\n",
        "\r",
        "\t",
        "\x00",
        "\x7f",
        "\u2028",
        "{",
        "}",
        "{x}",
        "[",
        "]",
        "(",
        ")",
    ),
    *("%", "_", "#", "--", "/*", ";", "\\n", "\\u0041", "\\x41", "\\'", '\\"', "' or '1' == '1"),
    *('" or pk >= 0 or "" == "', '") or (pk >= 0', "x' OR 1=1 --", "'; DROP TABLE books", "$meta"),
    *(
        "😀",
        "👩‍👩‍👧",
        "é",
        "e\u0301",
        "中文",
        "𠀀",
        "\ufeff",
        "\uffff",
        " ",
        "true",
        "null",
        "1",
        "a",
        "A",
    ),
]
texts = st.one_of(
    st.lists(st.sampled_from(FRAGMENTS), max_size=5).map("".join),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)
# A few values for all rows, so that some are equal and some nearly so.
values = st.lists(texts, min_size=1, max_size=3).flatmap(
    lambda some: st.lists(
        st.sampled_from([*some, *(text + '"' for text in some), *(text + "\\" for text in some)]),
        min_size=ROWS,
        max_size=ROWS,
    )
)
on_milvus_lite = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@on_milvus_lite
@given(stored=values, other=texts)
def test_a_filter_finds_exactly_the_rows_whose_value_is_equal(client, dynamic, stored, other):
    put(client, dynamic, [dict.fromkeys(KEYS, value) | {"labels": [value]} for value in stored])

    for key in KEYS:
        assert_finds_equals(client, dynamic, key, stored, other)
    for wanted in {stored[0], other}:
        contains = group(AND, is_("labels", wanted, Op.CONTAINS))
        assert found(client, dynamic, contains) == where(stored, lambda v, w=wanted: v == w)


@on_milvus_lite
@given(stored=values, other=texts)
def test_a_filter_on_a_json_field_finds_exactly_the_equal_rows(client, json_, stored, other):
    put(client, json_, [{"any key": value} for value in stored])

    assert_finds_equals(client, json_, "any key", stored, other)


def assert_finds_equals(client, layout, key, stored, other) -> None:
    one, two = stored[0], [stored[0], other]
    expected = {
        (Op.EQ, one): where(stored, lambda v: v == one),
        (Op.EQ, other): where(stored, lambda v: v == other),
        (Op.NE, one): where(stored, lambda v: v != one),
        (Op.IN, tuple(two)): where(stored, lambda v: v in two),
        (Op.NIN, tuple(two)): where(stored, lambda v: v not in two),
    }
    for (operator, value), rows in expected.items():
        wanted = list(value) if isinstance(value, tuple) else value
        assert found(client, layout, group(AND, is_(key, wanted, operator))) == rows, operator


def where(stored: list[str], matches: Callable[[str], bool]) -> set[int]:
    return {pk for pk, value in enumerate(stored) if matches(value)}


@on_milvus_lite
@given(stored=values, part=texts)
def test_a_text_match_finds_exactly_the_rows_that_hold_the_text(client, dynamic, stored, part):
    put(client, dynamic, [dict.fromkeys(KEYS, value) | {"labels": []} for value in stored])

    for wanted in {part.replace("\\", ""), stored[0][1:3].replace("\\", "")}:
        for key in KEYS:
            match = group(AND, is_(key, wanted, Op.TEXT_MATCH))
            assert found(client, dynamic, match) == where(stored, lambda v, w=wanted: w in v)


@on_milvus_lite
@given(key=texts.filter(bool), value=texts)
def test_a_key_finds_its_own_rows_whatever_it_is_called(client, dynamic, key, value):
    if key in {"pk", "embedding", "label", "labels", "$meta"}:
        return
    fixed = {"label": "", "labels": []}
    put(client, dynamic, [fixed | {key: value}, fixed | {key: value + "x"}, *[fixed] * (ROWS - 2)])

    try:
        assert found(client, dynamic, group(AND, is_(key, value))) == {0}
    except ConfigurationError as refused:
        assert "by the key" in str(refused)  # noqa: PT017 - refusing is right, too


METADATA: list[dict[str, Any]] = [
    {"color": "red", "year": 1999, "tags": ["a", "b"]},
    {"color": "dark red", "year": 2005, "tags": ["b"]},
    {"color": "", "year": 2005, "tags": ["c"]},
    {"color": None, "year": -4},
    {"year": 0, "tags": ["a"]},
    {"color": "blue"},
]
single = st.one_of(
    st.builds(
        is_,
        st.just("color"),
        st.sampled_from(["red", "blue", "", "green"]),
        st.sampled_from([Op.EQ, Op.NE, Op.GT, Op.LTE, Op.TEXT_MATCH]),
    ),
    st.builds(
        is_,
        st.just("year"),
        st.sampled_from([-4, 0, 1999, 2004.5]),
        st.sampled_from([Op.EQ, Op.NE, Op.GT, Op.GTE, Op.LT, Op.LTE]),
    ),
    st.builds(
        is_,
        st.just("color"),
        st.lists(st.sampled_from(["red", "blue", "green"]), min_size=1, max_size=2),
        st.sampled_from([Op.IN, Op.NIN]),
    ),
    st.builds(
        is_,
        st.just("tags"),
        st.lists(st.sampled_from(["a", "b", "z"]), min_size=1, max_size=2),
        st.sampled_from([Op.ANY, Op.ALL]),
    ),
    st.builds(is_, st.just("tags"), st.sampled_from(["a", "z"]), st.just(Op.CONTAINS)),
    st.builds(is_, st.sampled_from(["color", "year"]), st.none(), st.just(Op.IS_EMPTY)),
)


def groups_of(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[MetadataFilters]:
    conditions = st.sampled_from([AND, OR, NOT])
    filters = st.lists(inner, min_size=1, max_size=3)
    return st.builds(lambda condition, given: group(condition, *given), conditions, filters)


nested = groups_of(single | groups_of(single | groups_of(single)))


@pytest.fixture(scope="module", params=["dynamic", "json"])
def library(request: pytest.FixtureRequest, client: MilvusClient) -> CollectionLayout:
    """The same metadata, as dynamic fields and in a JSON field."""
    is_dynamic = request.param == "dynamic"
    layout = make_collection(client, f"library_{request.param}", dynamic=is_dynamic)
    fixed = {"label": "", "labels": []} if is_dynamic else {}
    put(client, layout, [fixed | row for row in METADATA])
    return layout


@on_milvus_lite
@given(filters=nested)
def test_nested_filters_mean_what_llama_index_means_by_them(client, library, filters):
    expected = {pk for pk, row in enumerate(METADATA) if matches(filters, row)}

    assert found(client, library, group(AND, filters)) == expected


def matches(filters: MetadataFilters | MetadataFilter, row: dict[str, Any]) -> bool:
    """What LlamaIndex's in-memory store answers; it knows no nested groups, hence the recursion."""
    if isinstance(filters, MetadataFilter):
        return build_metadata_filter_fn(lambda _: row, group(AND, filters))("")
    each = [matches(inner, row) for inner in filters.filters]
    return {AND: all(each), OR: any(each), NOT: not any(each)}[filters.condition or AND]


@pytest.mark.parametrize(
    ("value", "rows"),
    [("ark r", {1}), ("red", {0, 1}), ("RED", set()), ("r_d", set()), ("", {0, 1, 2, 5})],
)
def test_a_text_match_finds_a_part_of_the_text_as_it_is_written(client, library, value, rows):
    assert found(client, library, group(AND, is_("color", value, Op.TEXT_MATCH))) == rows


def test_a_filter_value_cannot_widen_another_filter(client, library):
    attack = 'x" or pk >= 0 or "" == "'

    both = group(AND, is_("color", attack), is_("year", 1999))

    assert found(client, library, both) == set()


def test_a_field_reference_reads_as_its_name():
    assert f"{DYNAMIC.field_ref('any key')} == {literal('x')}" == '$meta["any key"] == "x"'
