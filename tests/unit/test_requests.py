"""From legs and options to the keyword arguments of pymilvus's search and hybrid_search."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pymilvus import RRFRanker

from milvus_vllm_retrievers import ConfigurationError, VLLMRanker
from milvus_vllm_retrievers._core.layout import FieldType, VectorField
from milvus_vllm_retrievers._core.query import SearchOptions
from milvus_vllm_retrievers._core.requests import (
    Leg,
    SearchCall,
    candidate_limit,
    has_key_in,
    make_leg,
    plain_call,
    reranked_call,
    rows_call,
)
from tests.unit.builders import layout

DENSE = VectorField("dense", FieldType.FLOAT_VECTOR, dim=2, takes_text=False)
SPARSE = VectorField("sparse", FieldType.SPARSE_FLOAT_VECTOR, dim=None, takes_text=True)
DENSE_LEG = Leg(DENSE, [[0.0, 1.0]])
SPARSE_LEG = Leg(SPARSE, ["a question"])
FUNCTION = VLLMRanker("http://vllm").to_function("a question", "document")


def plain(*legs: Leg, limit: int = 10, **options: Any) -> SearchCall:
    return plain_call("docs", legs, SearchOptions(**options), ["pk"], limit=limit)


def reranked(*legs: Leg, exactly: bool = True, **options: Any) -> SearchCall:
    asked = SearchOptions(**options)
    return reranked_call(
        "docs",
        legs,
        asked,
        ["pk"],
        function=FUNCTION,
        limit=asked.k,
        search_reranks_exactly=exactly,
    )


def params(call: SearchCall) -> list[Any]:
    if call.method == "search":
        return [call.arguments["search_params"]]
    return [request.param for request in call.arguments["reqs"]]


def test_a_dense_vector_becomes_a_list_of_floats() -> None:
    assert make_leg(DENSE, [np.array([1, 2]), (3, 4)]).data == [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize(
    ("type_", "dtype", "library"),
    [
        (FieldType.FLOAT16_VECTOR, "float16", "numpy"),
        (FieldType.BFLOAT16_VECTOR, "bfloat16", "ml_dtypes"),
    ],
)
def test_a_half_precision_field_gets_vectors_of_its_type(
    type_: FieldType, dtype: str, library: str
) -> None:
    pytest.importorskip(library)
    half = VectorField("half", type_, dim=2, takes_text=False)

    (vector,) = make_leg(half, [[0.5, 1.0]]).data

    assert str(vector.dtype) == dtype
    assert vector.tolist() == [0.5, 1.0]


@pytest.mark.parametrize(
    ("made", "shown"),
    [
        (None, "not None"),
        ([0.5, float("nan")], "not one with NaN or infinity"),
        (np.array([np.inf, 1]), "not one with NaN or infinity"),
        ([0.5, None], "not one with NaN or infinity"),
    ],
)
def test_an_embedding_that_is_no_vector_of_numbers_names_the_field(made: Any, shown: str) -> None:
    with pytest.raises(ConfigurationError, match="field 'dense' needs a query vector") as caught:
        make_leg(DENSE, [made])

    assert shown in str(caught.value)


def test_a_sparse_vector_becomes_a_map_of_plain_numbers() -> None:
    learned = VectorField("learned", FieldType.SPARSE_FLOAT_VECTOR, None, takes_text=False)

    leg = make_leg(learned, [{np.int64(3): np.float32(0.5)}, [(7, 1)]])

    assert leg.data == [{3: 0.5}, {7: 1.0}]
    assert {type(x) for entry in leg.data for pair in entry.items() for x in pair} == {int, float}


def test_a_vector_of_other_dimensions_names_both_numbers_and_the_field() -> None:
    with pytest.raises(ConfigurationError, match="made 3 dimensions, but field 'dense' has 2"):
        make_leg(DENSE, [[0.0, 1.0], [0.0, 1.0, 2.0]])


def test_one_leg_without_a_rerank_model_is_a_plain_search() -> None:
    call = plain(DENSE_LEG)

    assert call == SearchCall(
        "search",
        {
            "collection_name": "docs",
            "data": [[0.0, 1.0]],
            "anns_field": "dense",
            "limit": 10,
            "output_fields": ["pk"],
            "search_params": None,
            "filter": "",
        },
    )


def test_several_legs_without_a_rerank_model_are_fused_by_rrf() -> None:
    call = plain(DENSE_LEG, SPARSE_LEG, k=3, fetch_k=20, expr="a > 1")

    assert call.method == "hybrid_search"
    assert isinstance(call.arguments["ranker"], RRFRanker)
    assert call.arguments["limit"] == 10
    assert [(r.anns_field, r.data, r.limit, r.expr, r.param) for r in call.arguments["reqs"]] == [
        ("dense", [[0.0, 1.0]], 20, "a > 1", {}),
        ("sparse", ["a question"], 20, "a > 1", {}),
    ]


@pytest.mark.parametrize("legs", [[DENSE_LEG], [DENSE_LEG, SPARSE_LEG]])
def test_what_the_options_leave_open_is_left_to_milvus(legs: list[Leg]) -> None:
    arguments = plain(*legs).arguments

    assert not {"partition_names", "consistency_level", "filter_params"} & set(arguments)


@pytest.mark.parametrize("legs", [[DENSE_LEG], [DENSE_LEG, SPARSE_LEG]])
def test_partitions_and_consistency_go_with_every_kind_of_search(legs: list[Leg]) -> None:
    arguments = plain(*legs, partition_names=("a", "b"), consistency_level="Strong").arguments

    assert arguments["partition_names"] == ["a", "b"]
    assert arguments["consistency_level"] == "Strong"


def test_a_filters_templates_go_with_it() -> None:
    options = {"expr": "a > {x}", "expr_params": {"x": 1}}

    search, hybrid = plain(DENSE_LEG, **options), plain(DENSE_LEG, SPARSE_LEG, **options)

    assert (search.arguments["filter"], search.arguments["filter_params"]) == ("a > {x}", {"x": 1})
    assert [(r.expr, r.expr_params) for r in hybrid.arguments["reqs"]] == [
        ("a > {x}", {"x": 1})
    ] * 2


@pytest.mark.parametrize(
    ("given", "dense", "sparse"),
    [
        ({"params": {"ef": 64}}, {"params": {"ef": 64}}, {"params": {"ef": 64}}),
        ({"metric_type": "L2"}, {"metric_type": "L2"}, {"metric_type": "L2"}),
        ({"dense": {"params": {"ef": 64}}}, {"params": {"ef": 64}}, {}),
        ({"dense": {"a": 1}, "sparse": {"b": 2}}, {"a": 1}, {"b": 2}),
        (None, {}, {}),
    ],
)
def test_search_params_are_common_or_by_field(
    given: dict[str, Any] | None, dense: dict[str, Any], sparse: dict[str, Any]
) -> None:
    assert params(plain(DENSE_LEG, SPARSE_LEG, search_params=given)) == [dense, sparse]
    assert params(plain(DENSE_LEG, search_params=given)) == [dense or None]


@pytest.mark.parametrize(
    ("legs", "options", "exactly", "method"),
    [
        ([DENSE_LEG], {"k": 5, "fetch_k": 5}, True, "search"),
        ([DENSE_LEG], {"k": 5, "fetch_k": 6}, True, "hybrid_search"),
        ([DENSE_LEG], {"k": 5, "fetch_k": 5}, False, "hybrid_search"),
        ([DENSE_LEG, SPARSE_LEG], {"k": 5, "fetch_k": 5}, True, "hybrid_search"),
    ],
)
def test_search_serves_only_one_leg_whose_candidates_are_all_returned(
    legs: list[Leg], options: dict[str, int], exactly: bool, method: str
) -> None:
    call = reranked(*legs, exactly=exactly, **options)

    assert call.method == method
    assert call.arguments["ranker"] is FUNCTION
    assert call.arguments["limit"] == 5


def test_one_leg_of_fetch_k_candidates_returns_k() -> None:
    call = reranked(DENSE_LEG, k=5, fetch_k=40)

    assert [request.limit for request in call.arguments["reqs"]] == [40]
    assert call.arguments["limit"] == 5


def test_rows_are_reranked_by_a_search_that_finds_just_them() -> None:
    call = rows_call(
        layout(),
        has_key_in(layout(), [7, 8]),
        2,
        SearchOptions(search_params={"nprobe": 64}, partition_names=["a"]),
        FUNCTION,
    )

    assert call == SearchCall(
        "search",
        {
            "collection_name": "docs",
            "data": [[1.0, 0.0]],
            "anns_field": "dense",
            "search_params": {"nprobe": 64},
            "filter": "pk in [7, 8]",
            "limit": 2,
            "output_fields": ["pk"],
            "partition_names": ["a"],
            "ranker": FUNCTION,
        },
    )


def test_keys_that_are_texts_are_quoted() -> None:
    assert has_key_in(layout(), ["a", 'b"]) or true']) == r'pk in ["a", "b\"]) or true"]'


@pytest.mark.parametrize(
    ("legs", "pool", "limit"), [(1, 50, 50), (3, 50, 150), (2, 10_000, 16_384)]
)
def test_candidates_are_what_the_legs_yield_together_within_milvus_limit(
    legs: int, pool: int, limit: int
) -> None:
    assert candidate_limit([DENSE_LEG] * legs, SearchOptions(fetch_k=pool)) == limit
