"""What a collection's description tells, and how a query reaches its fields."""

from __future__ import annotations

from typing import Any

import pytest
from pymilvus import DataType

from milvus_vllm_retrievers import ConfigurationError
from milvus_vllm_retrievers._core.layout import FieldType, ScalarField, VectorField
from milvus_vllm_retrievers._core.query import Encoder, Encoders, Item, sparse_encoder
from tests.unit.builders import (
    BM25,
    DENSE,
    FROM_TEXT,
    KEY,
    RERANK,
    SPARSE,
    TEXT,
    TEXT_EMBEDDING,
    description,
    field,
    function,
    layout,
)

ENCODER: Encoder = sparse_encoder(lambda text: {len(text): 1.0})
OTHER: Encoder = sparse_encoder(lambda text: {1: 1.0})


def varchar(name: str, **more: Any) -> dict[str, Any]:
    return field(name, FieldType.VARCHAR, **more)


def test_field_types_have_milvus_numbers() -> None:
    assert {t.name: t.value for t in FieldType} == {t.name: DataType[t.name] for t in FieldType}


def test_a_collections_fields_are_sorted_by_the_part_they_play() -> None:
    tags = field("tags", FieldType.ARRAY, element_type=FieldType.VARCHAR, nullable=True)

    docs = layout(KEY, TEXT, tags, DENSE, SPARSE, functions=[FROM_TEXT], dynamic=True)

    assert (docs.name, docs.primary_key, docs.dynamic) == ("docs", "pk", True)
    assert docs.text_fields == ("document",)
    assert docs.text_inputs == ("document",)
    assert docs.vector_fields == (
        VectorField("dense", FieldType.FLOAT_VECTOR, dim=2, takes_text=False),
        VectorField("sparse", FieldType.SPARSE_FLOAT_VECTOR, dim=None, takes_text=True),
    )
    assert docs.scalars == (
        ScalarField("pk", FieldType.INT64),
        ScalarField("document", FieldType.VARCHAR),
        ScalarField("tags", FieldType.ARRAY, FieldType.VARCHAR, nullable=True),
    )


def test_a_dimension_may_be_given_as_text() -> None:
    dense = field("dense", FieldType.FLOAT_VECTOR, params={"dim": "384"})

    assert layout(KEY, TEXT, dense).vector_fields[0].dim == 384


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [(["document"], ["sparse"]), ("['document']", "['sparse']"), ("document", "sparse")],
)
def test_a_functions_field_names_may_be_a_list_or_its_text(inputs: Any, outputs: Any) -> None:
    docs = layout(KEY, TEXT, SPARSE, functions=[function(BM25, inputs, outputs)])

    assert docs.text_inputs == ("document",)
    assert docs.vector_fields[0].takes_text


def test_a_collection_without_functions_may_leave_them_out() -> None:
    told = description(KEY, TEXT, DENSE)
    del told["functions"]

    assert type(layout()).from_description(told).text_inputs == ()


@pytest.mark.parametrize(
    ("fields", "functions", "chosen"),
    [
        ([varchar("title"), varchar("chunk_of_it")], [(BM25, "chunk_of_it")], "chunk_of_it"),
        ([varchar("text"), varchar("title")], [(TEXT_EMBEDDING, "title")], "title"),
        ([varchar("title"), varchar("content")], [], "content"),
        ([varchar("body"), varchar("text")], [], "text"),
        ([varchar("title")], [], "title"),
        ([varchar("title"), varchar("text")], [(RERANK, "title")], "text"),
        ([field("text", FieldType.JSON), varchar("title")], [], "title"),
    ],
)
def test_the_text_field_is_what_the_schema_points_to(
    fields: list[dict[str, Any]], functions: list[tuple[int, str]], chosen: str
) -> None:
    made = [function(type_, [name], ["sparse"]) for type_, name in functions]

    assert layout(KEY, *fields, SPARSE, functions=made).text_field(None) == chosen


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ([varchar("title"), varchar("summary")], r"could be any of \['title', 'summary'\]"),
        ([], "has no VARCHAR field"),
    ],
)
def test_a_text_field_that_cannot_be_told_is_asked_for(
    fields: list[dict[str, Any]], problem: str
) -> None:
    with pytest.raises(ConfigurationError, match=f"{problem}; pass text_field="):
        layout(KEY, *fields, DENSE).text_field(None)


def test_two_fields_that_feed_functions_leave_the_choice_to_the_caller() -> None:
    made = [function(BM25, ["title"], ["sparse"]), function(BM25, ["text"], ["sparse_2"])]
    docs = layout(KEY, varchar("title"), varchar("text"), SPARSE, functions=made)

    with pytest.raises(ConfigurationError, match="could be any of"):
        docs.text_field(None)
    assert docs.text_field("title") == "title"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("documnet", "has no field 'documnet' (did you mean 'document'?)"),
        ("number", "field 'number' of collection 'docs' cannot be the text field: it is not"),
        ("dense", "it is not VARCHAR"),
        ("key", "it is the primary key"),
    ],
)
def test_a_text_field_that_cannot_be_one_is_refused(name: str, problem: str) -> None:
    docs = layout(varchar("key", is_primary=True), TEXT, field("number", FieldType.INT64), DENSE)

    with pytest.raises(ConfigurationError) as caught:
        docs.text_field(name)

    assert problem in str(caught.value)
    assert str(caught.value).endswith("Its VARCHAR fields are ['document']")


def test_what_functions_log_in_with_is_told_apart_and_not_shown() -> None:
    params = {
        "provider": "openai",
        "api_key": "k-1",
        "Integration_SECRET": "k-2",
        "access_token": "k-3",
        "credential": "k-4",
        "password": "k-5",
        "max_tokens": "512",
        "tokenizer": "standard",
    }
    made = [{**FROM_TEXT, "params": params}, {**FROM_TEXT, "type": 99, "params": {"key": "k-6"}}]

    docs = layout(KEY, TEXT, SPARSE, functions=made)

    assert docs.secrets == ("k-1", "k-2", "k-3", "k-4", "k-5", "k-6")
    assert "k-" not in repr(docs)


BINARY = field("binary", FieldType.BINARY_VECTOR, params={"dim": 8})
HALF = field("half", FieldType.FLOAT16_VECTOR, params={"dim": 2})
LEARNED = field("learned", FieldType.SPARSE_FLOAT_VECTOR)
EVERY_KIND = layout(KEY, TEXT, DENSE, HALF, SPARSE, LEARNED, BINARY, functions=[FROM_TEXT])


@pytest.mark.parametrize(
    ("encoders", "reached"),
    [
        (Encoders(), {"sparse": None}),
        (Encoders(dense=ENCODER), {"dense": ENCODER, "half": ENCODER, "sparse": None}),
        (Encoders(sparse=ENCODER), {"sparse": None, "learned": ENCODER}),
        (Encoders(by_field={"half": OTHER}), {"half": OTHER, "sparse": None}),
        (
            Encoders(dense=ENCODER, by_field={"half": OTHER}),
            {"dense": ENCODER, "half": OTHER, "sparse": None},
        ),
        (Encoders(by_field={"binary": OTHER}), {"binary": OTHER, "sparse": None}),
        (Encoders(by_field={"sparse": OTHER}), {"sparse": None}),
    ],
)
def test_without_names_every_field_is_searched_that_a_query_can_reach(
    encoders: Encoders, reached: dict[str, Encoder | None]
) -> None:
    searched = EVERY_KIND.searched_fields(None, encoders)

    assert {vector.name: encoder for vector, encoder in searched} == reached


@pytest.mark.parametrize(
    ("names", "searched"),
    [("dense", ["dense"]), (["sparse", "dense"], ["sparse", "dense"]), (("half",), ["half"])],
)
def test_named_fields_are_searched_in_the_order_of_their_names(
    names: Any, searched: list[str]
) -> None:
    found = EVERY_KIND.searched_fields(names, Encoders(dense=ENCODER))

    assert [vector.name for vector, _ in found] == searched


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ("dens", r"has no vector field 'dens' \(did you mean 'dense'\?\)"),
        ("document", "has no vector field 'document'"),
        ("dense", "dense field 'dense' needs query vectors: pass an embedding model"),
        ("learned", "sparse field 'learned' is not BM25"),
        ("binary", "vector field 'binary' is of a type no text embedding model makes"),
        ([], "at least one field"),
        (["sparse", "sparse"], "each only once"),
        (["dense", "learned"], "dense field 'dense' .*; sparse field 'learned' is not BM25"),
    ],
)
def test_a_field_that_cannot_be_searched_is_refused(names: Any, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        EVERY_KIND.searched_fields(names, Encoders())


@pytest.mark.parametrize("encoders", [Encoders(), Encoders(dense=ENCODER)])
def test_queries_with_a_vector_of_their_own_reach_every_dense_field_without_an_encoder(
    encoders: Encoders,
) -> None:
    searched = EVERY_KIND.searched_fields(None, encoders, embedded=True)

    assert {vector.name: encoder for vector, encoder in searched} == {
        "dense": None,
        "half": None,
        "sparse": None,
    }


@pytest.mark.parametrize(
    ("fields", "reason"),
    [([DENSE], "dense field 'dense' needs query vectors"), ([], "it has no vector field at all")],
)
def test_a_collection_without_a_field_in_reach_is_refused(
    fields: list[dict[str, Any]], reason: str
) -> None:
    with pytest.raises(ConfigurationError, match=f"no vector field that .* can reach: {reason}"):
        layout(KEY, TEXT, *fields).searched_fields(None, Encoders())


def test_json_fields_are_known_by_name() -> None:
    assert layout(KEY, TEXT, field("extra", FieldType.JSON), dynamic=True).json_fields == ("extra",)


@pytest.mark.parametrize(
    ("type_", "item", "keys"),
    [
        (FieldType.INT64, Item("", id="7"), [7]),
        (FieldType.INT64, Item("", id="-7"), [-7]),
        (FieldType.INT64, Item("", id="a-uuid", metadata={"pk": 7}), [7]),
        (FieldType.INT64, Item("", metadata={"pk": "7"}), [7]),
        (FieldType.INT64, Item("", id="a-uuid"), []),
        (FieldType.INT64, Item("", id="7.0", metadata={"pk": True}), []),
        (FieldType.VARCHAR, Item("", id="a-uuid", metadata={"pk": "other"}), ["a-uuid", "other"]),
        (FieldType.VARCHAR, Item("", id="a", metadata={"pk": "a"}), ["a"]),
        (FieldType.VARCHAR, Item("", id="7"), ["7"]),
        (FieldType.VARCHAR, Item("", metadata={"pk": "a-uuid"}), ["a-uuid"]),
        (FieldType.VARCHAR, Item("", metadata={"pk": 7}), []),
    ],
)
def test_an_items_key_may_be_its_id_or_what_its_metadata_says_if_it_fits(
    type_: FieldType, item: Item, keys: list[int | str]
) -> None:
    assert layout(field("pk", type_, is_primary=True), TEXT).keys_of(item) == keys


def test_rows_are_found_by_key_over_the_first_dense_field() -> None:
    assert layout(KEY, TEXT, LEARNED, BINARY, HALF, DENSE).vector_for_keys().name == "half"
    with pytest.raises(ConfigurationError, match="no dense vector field"):
        layout(KEY, TEXT, LEARNED, BINARY).vector_for_keys()


@pytest.mark.parametrize(("dynamic", "more"), [(False, []), (True, ["$meta"])])
def test_all_fields_but_vectors_are_fetched(dynamic: bool, more: list[str]) -> None:
    docs = layout(KEY, TEXT, DENSE, dynamic=dynamic)

    assert docs.output_fields(None, "document") == ["pk", "document", *more]


@pytest.mark.parametrize(
    ("asked", "fetched"),
    [
        ([], ["document"]),
        (["pk", "document"], ["pk", "document"]),
        (["dense"], ["dense", "document"]),
        (["*"], ["*", "document"]),
        (["pk", "pk"], ["pk", "document"]),
    ],
)
def test_the_text_is_fetched_whatever_is_asked_for(asked: list[str], fetched: list[str]) -> None:
    assert layout(KEY, TEXT, DENSE).output_fields(asked, "document") == fetched


def test_only_a_dynamic_collection_may_have_other_fields() -> None:
    assert layout(KEY, TEXT, dynamic=True).output_fields(["x"], "document") == ["x", "document"]
    with pytest.raises(ConfigurationError, match="has no field 'documnt'"):
        layout(KEY, TEXT).output_fields(["documnt"], "document")
