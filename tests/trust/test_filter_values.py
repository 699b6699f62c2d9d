"""A filter's value is a value, whatever it says: it finds the rows that hold it and no others.

Every hostile text is a tenant here, so that a text read as another, or as an expression, finds a
row of another tenant. The expressions are read by real Milvus Lite, and by a small reader of
Milvus's own literals.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from llama_index.core.vector_stores.types import FilterOperator, MetadataFilter, MetadataFilters
from milvus_lite.search.filter.tokens import tokenize
from pymilvus import DataType, MilvusClient

from milvus_vllm_retrievers import ConfigurationError
from milvus_vllm_retrievers._core.expressions import all_of, checked_expr, for_milvus, literal
from milvus_vllm_retrievers._core.filters import checked_filters, from_mapping
from milvus_vllm_retrievers._core.layout import CollectionLayout
from milvus_vllm_retrievers.llama_index._filters import to_expr
from tests.milvus26.filters import as_milvus_reads
from tests.trust import hostile

VALUES = hostile.HOSTILE_VALUES
FLAT, NESTED = "values", "values_in_json"
# A VARCHAR field, a dynamic field, one whose name needs quotes, an ARRAY field; a JSON field's key.
PLACES = [(FLAT, "tenant"), (FLAT, "owner"), (FLAT, "any key"), (FLAT, "tags"), (NESTED, "tenant")]
OWN = {"product": "a"}

few_examples = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def client(lite: MilvusClient) -> Iterator[MilvusClient]:
    """Milvus Lite with two rows of every tenant: its row number is the value's, and 1000 more."""
    for name in (FLAT, NESTED):
        schema = lite.create_schema(enable_dynamic_field=name == FLAT)
        schema.add_field("pk", DataType.INT64, is_primary=True)
        schema.add_field("dense", DataType.FLOAT_VECTOR, dim=2)
        if name == FLAT:
            schema.add_field("tenant", DataType.VARCHAR, max_length=65_535)
            schema.add_field(
                "tags",
                DataType.ARRAY,
                element_type=DataType.VARCHAR,
                max_length=65_535,
                max_capacity=2,
            )
        else:
            schema.add_field("metadata", DataType.JSON)
        index = lite.prepare_index_params()
        index.add_index("dense", index_type="AUTOINDEX", metric_type="L2")
        lite.create_collection(name, schema=schema, index_params=index, consistency_level="Strong")
        for product, first in (("a", 0), ("b", 1000)):
            rows = [row(value, product) for value in VALUES]
            flat = [r | {"tags": [r["tenant"]], "any key": r["tenant"]} for r in rows]
            kept = flat if name == FLAT else [{"metadata": r} for r in rows]
            lite.insert(
                name, [{"pk": first + i, "dense": [0.0, 0.0], **r} for i, r in enumerate(kept)]
            )
    yield lite
    for name in (FLAT, NESTED):
        lite.drop_collection(name)


def row(value: str, product: str) -> dict[str, Any]:
    return {"tenant": value, "owner": value, "product": product}


@pytest.fixture(params=PLACES, ids=" ".join)
def place(
    request: pytest.FixtureRequest, client: MilvusClient
) -> tuple[MilvusClient, str, str, CollectionLayout]:
    """Where the values stand: a collection and the name of a field."""
    collection, field = request.param
    described = client.describe_collection(collection)
    return client, collection, field, CollectionLayout.from_description(described)


def numbered(step: int) -> list[tuple[int, str]]:
    """Return each value, or one in `step`, with its row's number."""
    return list(enumerate(VALUES))[::step]


def found(client: MilvusClient, collection: str, expr: str) -> set[int]:
    checked_expr(expr)
    rows = client.query(collection, filter=expr, output_fields=["pk"], limit=3000)
    return {row["pk"] for row in rows}


def test_there_are_enough_hostile_values_and_no_two_are_the_same() -> None:
    assert len(VALUES) >= 600
    assert len(set(VALUES)) == len(VALUES)


def test_a_value_finds_its_own_tenants_rows_and_no_others(place) -> None:
    client, collection, field, layout = place

    for number, value in numbered(1 if (collection, field) == PLACES[0] else 3):
        expr = from_mapping({field: value}, layout)
        assert found(client, collection, expr) == {number, 1000 + number}, repr(value[:100])


def test_a_value_in_a_vector_search_narrows_a_tenants_filter_and_never_widens_it(place) -> None:
    client, collection, field, layout = place
    own = from_mapping(OWN, layout)

    for number, value in numbered(12):
        expr = all_of(own, from_mapping({field: value}, layout))
        (hits,) = client.search(collection, [[0.0, 0.0]], filter=expr, limit=10)
        assert [hit["pk"] for hit in hits] == [number], repr(value[:100])


def test_a_list_of_values_finds_the_rows_of_each_and_no_others(place) -> None:
    client, collection, field, layout = place

    for start in range(0, len(VALUES), 40):
        expr = from_mapping({field: VALUES[start : start + 40], **OWN}, layout)
        numbers = set(range(start, min(start + 40, len(VALUES))))
        assert found(client, collection, expr) == numbers


def test_what_is_not_a_value_finds_all_other_rows(place) -> None:
    client, collection, field, layout = place
    everything = set(range(len(VALUES)))

    for number, value in numbered(20):
        expr = from_mapping({field: {"ne": value}, **OWN}, layout)
        assert found(client, collection, expr) == everything - {number}, repr(value[:100])


def test_llama_indexs_filters_write_a_value_as_langchains_do(place) -> None:
    *_, field, layout = place
    operator = FilterOperator.CONTAINS if field == "tags" else FilterOperator.EQ

    for value in VALUES:
        asked = MetadataFilter(key=field, value=value, operator=operator)
        assert to_expr(MetadataFilters(filters=[asked]), layout) == from_mapping(
            {field: value}, layout
        )


@pytest.mark.parametrize("value", hostile.LONE_SURROGATES, ids=ascii)
def test_what_is_no_valid_unicode_is_refused(value: str) -> None:
    for asked in (value, [value], ["a", value], {"ne": value}, {"in": [value]}):
        with pytest.raises(ConfigurationError, match="lone surrogate"):
            checked_filters({"tenant": asked})


# What reads the literals


@few_examples
@given(st.text() | st.lists(st.sampled_from(VALUES), max_size=3).map("".join))
@example("\U00020bb7")
def test_a_literal_is_read_back_as_its_value(value: str) -> None:
    written = literal(value)

    string, end = tokenize(written)
    assert (string.value, end.text) == (value, "")
    assert read_by_milvus(for_milvus(written)) == value


def read_by_milvus(written: str) -> str:
    """Read a literal as the grammar of Milvus 2.6 does, and what stands before and after it."""
    assert re.fullmatch(r""""(?:[^"\\\r\n]|\\[^\r\n])*\"""", written), "no literal of the grammar"
    string, end = tokenize(as_milvus_reads(written))
    assert end.text == ""
    return str(string.value)


def test_only_what_milvus_reads_otherwise_is_spelled_out_for_it() -> None:
    assert for_milvus("a in [\"\U00020bb7\u4e2d\", '\U0001f600']") == (
        "a in [\"\\U00020bb7\u4e2d\", '\U0001f600']"
    )
    assert for_milvus("a == 1") == "a == 1"


@pytest.fixture
def homonyms(milvus26: MilvusClient) -> Iterator[CollectionLayout]:
    """Tenants whose names Milvus 2.6 takes for one another."""
    milvus26.create_collection("homonyms", 2, id_type="int", consistency_level="Strong")
    names = enumerate(["\U00020bb7", "\u0bb7"])
    milvus26.insert("homonyms", [{"id": i, "vector": [0.0, 0.0], "tenant": t} for i, t in names])
    yield CollectionLayout.from_description(milvus26.describe_collection("homonyms"))
    milvus26.drop_collection("homonyms")


def test_a_tenant_that_milvus_takes_for_another_is_told_apart_by_how_it_is_spelled(
    milvus26: MilvusClient, homonyms: CollectionLayout
) -> None:
    expr = from_mapping({"tenant": "\U00020bb7"}, homonyms)

    def found_by(filter_: str) -> list[int]:
        return [row["id"] for row in milvus26.query("homonyms", filter=filter_)]

    (searched,) = milvus26.search("homonyms", [[0.0, 0.0]], filter=for_milvus(expr))
    assert found_by(expr) == [1]
    assert found_by(for_milvus(expr)) == [hit["id"] for hit in searched] == [0]
