"""What a collection's description tells, and how a query reaches its fields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pymilvus import DataType

from milvus_vllm_retrievers import ConfigurationError
from milvus_vllm_retrievers._core.layout import FieldType, ScalarField, TextField, VectorField
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
    assert docs.text_inputs == {"document": "BM25"}
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

    assert docs.text_inputs == {"document": "BM25"}
    assert docs.vector_fields[0].takes_text


def test_a_collection_without_functions_may_leave_them_out() -> None:
    told = description(KEY, TEXT, DENSE)
    del told["functions"]

    assert type(layout()).from_description(told).text_inputs == {}


def longest(name: str, **more: Any) -> dict[str, Any]:
    """A VARCHAR field of Milvus's greatest length, as stores and tutorials make them."""
    return varchar(name, params={"max_length": 65535}, **more)


def auto(name: str) -> dict[str, Any]:
    return field(name, FieldType.INT64, is_primary=True, auto_id=True)


def key(name: str) -> dict[str, Any]:
    return longest(name, is_primary=True)


def tenant(name: str) -> dict[str, Any]:
    return longest(name, is_partition_key=True)


NUMBER = field("page", FieldType.INT64)
USUAL = "a usual name"
BY_BM25 = "the input of its BM25 function"
BY_LANGCHAIN = "where langchain-milvus writes it"
BY_LLAMA_INDEX = "where LlamaIndex writes it"


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(
    ("fields", "inputs", "chosen", "why"),
    [
        # What merely resembles a store's collection.
        ([auto("id"), longest("doc_id"), longest("title"), longest("text"), DENSE], [], "text", ""),
        (
            [key("id"), longest("doc_id"), longest("url"), longest("content"), DENSE],
            [],
            "content",
            "",
        ),
        ([longest("source"), auto("pk"), longest("text"), DENSE], [], "text", ""),
        ([longest("source"), key("pk"), longest("text"), DENSE], [], "text", ""),
        ([longest("title"), longest("text"), auto("pk"), DENSE], [], "text", ""),
        # A usual name, a function, nothing else to choose from.
        ([KEY, varchar("title"), varchar("content"), DENSE], [], "content", ""),
        ([KEY, varchar("title"), varchar("chunk_of_it"), SPARSE], ["chunk_of_it"], None, BY_BM25),
        ([KEY, varchar("text"), varchar("content"), SPARSE], ["content"], "content", BY_BM25),
        ([KEY, varchar("title"), varchar("text"), SPARSE], ["title", "text"], "text", BY_BM25),
        ([KEY, varchar("title"), DENSE], [], "title", "the only VARCHAR field"),
        ([KEY, field("text", FieldType.JSON), varchar("title"), DENSE], [], "title", "the only"),
        ([KEY, varchar("title"), SPARSE], ["title"], "title", "the only VARCHAR field"),
    ],
)
def test_what_the_schema_says_of_a_field_makes_it_the_text(
    fields: list[dict[str, Any]], inputs: list[str], chosen: str | None, why: str, dynamic: bool
) -> None:
    made = [function(BM25, [name], ["sparse"]) for name in inputs]
    wanted = chosen or inputs[0]

    choice = layout(*fields, functions=made, dynamic=dynamic).text_choice(None)

    assert isinstance(choice, TextField)
    assert choice.name == wanted
    assert (why or USUAL) in choice.why
    assert "writes it" not in choice.why


@pytest.mark.parametrize(
    ("fields", "inputs", "dynamic", "chosen", "why"),
    [
        # langchain-milvus 0.3 and 0.4
        ([longest("text"), key("pk"), DENSE], [], True, "text", "the only VARCHAR field"),
        ([longest("story"), auto("isbn"), DENSE], [], True, "story", "the only VARCHAR field"),
        ([longest("text"), key("pk"), DENSE, tenant("tenant")], [], True, "text", BY_LANGCHAIN),
        ([longest("text"), auto("pk"), DENSE, longest("content")], [], False, "text", BY_LANGCHAIN),
        (
            [longest("text"), key("pk"), DENSE, SPARSE, NUMBER, varchar("headline")],
            ["headline"],
            False,
            "text",
            BY_LANGCHAIN,
        ),
        (
            [longest("story"), key("pk"), DENSE, SPARSE, longest("content")],
            ["story"],
            False,
            "story",
            f"{BY_BM25}, {BY_LANGCHAIN}",
        ),
        # llama-index-vector-stores-milvus 1.2
        ([key("id"), longest("doc_id"), longest("text"), DENSE], [], True, "text", BY_LLAMA_INDEX),
        (
            [key("id"), longest("doc_id"), longest("passage"), longest("content"), NUMBER, DENSE],
            [],
            True,
            "passage",
            BY_LLAMA_INDEX,
        ),
        (
            [key("id"), longest("doc_id"), longest("text"), longest("headline"), DENSE, SPARSE],
            ["headline"],
            True,
            "text",
            BY_LLAMA_INDEX,
        ),
        ([key("id"), longest("belongs_to"), longest("text"), DENSE], [], True, "text", USUAL),
        # Neither: langchain-milvus makes no such field beside dynamic ones.
        ([longest("source"), auto("pk"), DENSE, longest("text")], [], True, "text", USUAL),
    ],
)
def test_the_text_of_a_frameworks_store_is_known(
    fields: list[dict[str, Any]], inputs: list[str], dynamic: bool, chosen: str, why: str
) -> None:
    made = [function(BM25, [name], ["sparse"]) for name in inputs]

    choice = layout(*fields, functions=made, dynamic=dynamic).text_choice(None)

    assert isinstance(choice, TextField)
    assert choice.name == chosen
    assert why in choice.why


@pytest.mark.parametrize(
    ("fields", "functions", "candidates"),
    [
        ([KEY, varchar("title"), varchar("summary")], [], ("title", "summary")),
        ([KEY, varchar("title"), varchar("text")], [(BM25, "title")], ("title", "text")),
        ([KEY, varchar("title"), varchar("text")], [(TEXT_EMBEDDING, "title")], ("title", "text")),
        ([KEY, varchar("a"), varchar("b")], [(BM25, "a"), (TEXT_EMBEDDING, "b")], ("a", "b")),
        ([KEY, varchar("body"), varchar("x"), varchar("text")], [], ("body", "text")),
        # Laid out as by langchain-milvus, which the place of the first field alone does not prove.
        ([longest("story"), key("pk"), DENSE, longest("url")], [], ("story", "url")),
        ([longest("source"), auto("pk"), DENSE, longest("text")], [], ("source", "text")),
        (
            [longest("story"), key("pk"), SPARSE, varchar("headline")],
            [(BM25, "headline")],
            ("story", "headline"),
        ),
    ],
)
def test_fields_that_the_schema_does_not_tell_apart_are_all_candidates(
    fields: list[dict[str, Any]], functions: list[tuple[int, str]], candidates: tuple[str, ...]
) -> None:
    made = [function(type_, [name], ["sparse"]) for type_, name in functions]

    assert layout(*fields, functions=made).text_choice(None) == candidates


def test_a_rerank_function_tells_nothing_of_the_text() -> None:
    fields = [KEY, varchar("title"), varchar("text")]

    docs = layout(*fields, functions=[function(RERANK, ["title"], [])])

    assert docs.text_choice(None) == TextField("text", USUAL, nullable=False)


def test_a_collection_without_text_is_refused() -> None:
    with pytest.raises(
        ConfigurationError, match=r"Only a VARCHAR field of the schema can be reranked, .* add one"
    ):
        layout(KEY, DENSE).text_choice(None)


@pytest.mark.parametrize("nullable", [True, False])
@pytest.mark.parametrize(("name", "why"), [(None, USUAL), ("document", "named by text_field=")])
def test_it_is_known_whether_texts_may_be_null(name: str | None, why: str, nullable: bool) -> None:
    docs = layout(KEY, varchar("document", nullable=nullable), varchar("title"), DENSE)

    assert docs.text_choice(name) == TextField("document", why, nullable)


THREE = layout(KEY, varchar("title"), varchar("story", nullable=True), varchar("url"), DENSE)


@pytest.mark.parametrize(
    "rows",
    [
        [{"title": "Whales", "story": "Whales sing.", "url": "w.ex"}],
        [{"title": "ab", "story": text, "url": "cd"} for text in (None, "", "a text", "so long")],
        # One long title changes nothing.
        [{"title": title, "story": "of some length", "url": "u"} for title in ("a", "b", "c" * 99)],
    ],
)
def test_values_that_are_twice_as_long_as_all_others_are_the_text(
    rows: Sequence[dict[str, Any]],
) -> None:
    chosen = THREE.text_field_by_length(("title", "story", "url"), rows)

    why = "the longest texts among ['title', 'story', 'url']"
    assert chosen == TextField("story", why, nullable=True)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"title": "twelve signs", "story": "more than twelve signs"}],
        [{"title": "eleven sign", "story": None}],
        [{"title": None, "story": "a long text of which there is nothing to compare with"}],
        [{"story": "a row without a field that it should have"}],
    ],
)
def test_lengths_that_do_not_tell_leave_the_choice_to_the_caller(
    rows: Sequence[dict[str, Any]],
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        THREE.text_field_by_length(("title", "story"), rows)

    assert str(caught.value) == (
        "collection 'docs': which field holds the text to rerank? It could be any of "
        "['title', 'story'], and its rows do not tell; pass text_field="
    )


names = st.sampled_from(["text", "content", "title", "url", "source", "doc_id", "body"])
# A number as the key, which is given: no store makes it.
OF_NO_STORE = [field("id", FieldType.INT64, is_primary=True), DENSE, SPARSE]


def choice_of(fields: Sequence[dict[str, Any]], inputs: Sequence[str], *, dynamic: bool) -> Any:
    """The chosen field and why, or the candidates in no order."""
    made = [function(BM25, [name], ["sparse"]) for name in inputs]
    choice = layout(*fields, functions=made, dynamic=dynamic).text_choice(None)
    return choice if isinstance(choice, TextField) else set(choice)


@given(
    fields=st.lists(names, unique=True, min_size=1).flatmap(
        lambda chosen: st.permutations([*OF_NO_STORE, *map(longest, chosen)])
    ),
    inputs=st.lists(names, max_size=2, unique=True),
    dynamic=st.booleans(),
    data=st.data(),
)
def test_the_order_of_fields_that_no_store_made_never_changes_the_choice(
    fields: list[dict[str, Any]], inputs: list[str], dynamic: bool, data: st.DataObject
) -> None:
    permuted = data.draw(st.permutations(fields))

    assert choice_of(permuted, inputs, dynamic=dynamic) == choice_of(
        fields, inputs, dynamic=dynamic
    )


@given(
    pk=st.sampled_from([auto("id"), key("id"), OF_NO_STORE[0]]),
    place=st.integers(0, 3),
    text=st.integers(0, 2),
    dynamic=st.booleans(),
)
def test_a_short_field_beside_the_text_never_changes_the_choice(
    pk: dict[str, Any], place: int, text: int, dynamic: bool
) -> None:
    fields = [pk, DENSE]
    fields.insert(text, longest("text"))
    fields.insert(place, varchar("shelf", params={"max_length": 64}))

    choice = layout(*fields, dynamic=dynamic).text_choice(None)

    assert isinstance(choice, TextField)
    assert choice.name == "text"


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
        docs.text_choice(name)

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
        (
            "dense",
            "dense field 'dense' needs query vectors: pass an embedding model .*embed_model=",
        ),
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


@pytest.mark.parametrize("embedded", [True, False])
def test_it_is_said_how_a_query_reaches_each_field(embedded: bool) -> None:
    half = {**HALF, "name": "embedded"}
    made = [FROM_TEXT, function(TEXT_EMBEDDING, ["document"], ["embedded"])]
    docs = layout(KEY, TEXT, DENSE, SPARSE, LEARNED, half, functions=made)

    searched = docs.searched_fields(None, Encoders(ENCODER, OTHER), embedded=embedded)

    assert {vector.name: vector.reached(encoder) for vector, encoder in searched} == {
        "dense": "by the query's own embedding" if embedded else "by the embedding model",
        "sparse": "as text (BM25)",
        "learned": "by the sparse encoder",
        "embedded": "as text (Milvus embeds it)",
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
