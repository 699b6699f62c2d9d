"""Hits: read from rows, scored, ordered, cut."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from milvus_vllm_retrievers import SearchError
from milvus_vllm_retrievers._core.hits import (
    NO_TEXT,
    SCORE_KEYS,
    Hit,
    Ranking,
    RowReader,
    above,
    as_given,
    fits_float32,
    float32,
    ranked_by_client,
    ranked_by_milvus,
    relevance_order,
    reranked_by_client,
    stored,
    unranked,
)


def read(row: dict[str, Any]) -> Hit:
    (hit,) = RowReader("pk", "document").retrieved([row])
    return hit


@pytest.mark.parametrize("pk", [7, 0, "id-7", ""])
def test_a_row_is_read_into_key_text_fields_and_retrieval_score(pk: int | str) -> None:
    hit = read({"pk": pk, "distance": 1, "entity": {"document": "a text", "number": 3}})

    assert hit == Hit(pk, "a text", {"pk": pk, "number": 3}, retrieval_score=1.0)


def test_an_old_server_gives_the_key_as_id() -> None:
    assert read({"id": 7, "distance": 0.5, "entity": {"document": "a text"}}).pk == 7


def test_a_row_without_its_key_is_an_error() -> None:
    with pytest.raises(SearchError, match="without its primary key 'pk'"):
        read({"distance": 0.5, "entity": {"document": "a text"}})


def test_a_null_text_is_none() -> None:
    assert read({"pk": 1, "distance": 0.5, "entity": {"document": None}}).text is None


def test_a_row_without_its_text_field_is_an_error_since_the_collection_is_another() -> None:
    with pytest.raises(SearchError, match=r"without the field 'document'.*made anew"):
        read({"pk": 1, "distance": 0.5, "entity": {"body": "a text"}})


def test_rows_that_were_fetched_without_their_fields_have_keys_and_scores() -> None:
    rows = [{"pk": 2, "distance": 0.5, "entity": {}}, {"pk": 1, "distance": 0.25, "entity": {}}]

    assert RowReader("pk", "document").scores(rows) == {2: 0.5, 1: 0.25}


OURS = ["relevance_score", "retrieval_score", "reranked_by", "reranked_with", "rerank_error"]


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("ranked", [True, False])
@pytest.mark.parametrize("in_json", [True, False])
def test_a_stored_field_with_the_name_of_a_score_of_ours_comes_back_as_stored(
    name: str, ranked: bool, in_json: bool
) -> None:
    own = {name: "the user's", "page": 7}
    entity = {"document": "a", **({"about": own} if in_json else own)}
    reader = RowReader("pk", "document", "about" if in_json else None)

    rows = [{"pk": 1, "distance": 0.5, "entity": entity}]
    (hit,) = reader.reranked(rows) if ranked else reader.retrieved(rows)

    assert hit.fields == {f"stored_{name}": "the user's", "page": 7, "pk": 1}


field_names = st.sampled_from([*OURS, *(f"stored_{name}" for name in OURS), "page"])


@given(st.dictionaries(field_names, st.integers()))
def test_no_stored_value_is_lost_for_its_name(fields: dict[str, int]) -> None:
    before = dict(fields)

    renamed = stored(fields)

    assert sorted(renamed.values()) == sorted(fields.values())
    assert SCORE_KEYS.isdisjoint(renamed)
    assert fields == before
    assert renamed.items() >= {k: v for k, v in fields.items() if k not in SCORE_KEYS}.items()


class Repeated:
    """As protobuf hands over an ARRAY field."""

    def __iter__(self) -> Iterator[int]:
        return iter([1, 2])


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (Repeated(), [1, 2]),
        ("ab", "ab"),
        (b"ab", b"ab"),
        ({"a": [1]}, {"a": [1]}),
        (None, None),
        (True, True),
    ],
)
def test_fields_hold_plain_values(value: Any, plain: Any) -> None:
    hit = read({"pk": 1, "distance": 0.5, "entity": {"document": "a", "tags": value}})

    assert hit.fields["tags"] == plain
    assert type(hit.fields["tags"]) is type(plain)


@given(st.floats())
def test_float32_rounds_as_numpy_does(value: float) -> None:
    with np.errstate(over="ignore"):
        expected = float(np.float32(value))

    assert repr(float32(value)) == repr(expected)  # tells NaN and -0.0 too


@pytest.mark.parametrize("score", [3.4e38, -3.4e38, 0.0, 1e-60])
def test_a_score_that_a_float32_can_hold_fits(score: float) -> None:
    assert fits_float32(score)


@pytest.mark.parametrize("score", [1e39, -1e39, float("inf"), float("-inf"), float("nan")])
def test_a_score_that_would_become_infinite_or_is_no_number_does_not_fit(score: float) -> None:
    assert not fits_float32(score)


scores = st.floats(-100, 100).map(float32)
keys = st.one_of(st.sets(st.integers(-9, 9)), st.sets(st.text(max_size=3)))
pools = keys.flatmap(lambda pks: st.tuples(*(st.tuples(st.just(pk), scores) for pk in pks)))


@given(pools.flatmap(lambda pool: st.tuples(st.just(pool), st.permutations(pool))))
def test_the_order_of_relevance_does_not_depend_on_the_order_of_retrieval(pools: Any) -> None:
    first, second = (
        sorted(
            (Hit(pk, "", relevance_score=s) for pk, s in pool),
            key=lambda hit: relevance_order(hit.relevance_score, hit.pk),
        )
        for pool in pools
    )

    assert first == second
    for higher, lower in itertools.pairwise(first):
        assert higher.relevance_score >= lower.relevance_score
        assert higher.relevance_score > lower.relevance_score or higher.pk < lower.pk


def test_a_score_from_milvus_is_the_relevance_and_no_retrieval_score() -> None:
    rows = [
        {"pk": pk, "distance": score, "entity": {"document": text}}
        for pk, text, score in [(2, "b", 0.5), (1, "a", 0.5), (4, "", 1.0), (3, "c", 0.9)]
    ]

    assert RowReader("pk", "document").reranked(rows) == [
        Hit(3, "c", {"pk": 3}, relevance_score=0.9, reranked_by="milvus"),
        Hit(1, "a", {"pk": 1}, relevance_score=0.5, reranked_by="milvus"),
        Hit(2, "b", {"pk": 2}, relevance_score=0.5, reranked_by="milvus"),
        Hit(4, "", {"pk": 4}, rerank_error=NO_TEXT),
    ]


def test_a_score_from_this_client_stands_beside_the_retrieval_score() -> None:
    hits = [Hit(1, "a", retrieval_score=0.9), Hit(2, "b", retrieval_score=0.8)]

    assert reranked_by_client(hits, [0.1, 0.7]) == [
        Hit(2, "b", {}, 0.8, float32(0.7), "client"),
        Hit(1, "a", {}, 0.9, float32(0.1), "client"),
    ]
    assert [hit.pk for hit in reranked_by_client(hits, [0.1, 0.7], k=1)] == [2]


def test_scores_that_differ_by_less_than_a_float32_are_a_tie() -> None:
    hits = [Hit(2, "b"), Hit(1, "a")]

    assert [hit.pk for hit in reranked_by_client(hits, [0.5 + 1e-12, 0.5])] == [1, 2]


def test_every_hit_needs_a_score() -> None:
    with pytest.raises(ValueError, match="shorter"):
        reranked_by_client([Hit(1, "a"), Hit(2, "b")], [0.5])


def test_hits_that_were_not_ranked_keep_their_order_and_say_why() -> None:
    hits = unranked([Hit(2, "b", {}, 0.1), Hit(1, "a", {}, 0.9)], "vLLM is down")

    assert [(hit.pk, hit.rerank_error) for hit in hits] == [
        (2, "vLLM is down"),
        (1, "vLLM is down"),
    ]


def test_a_threshold_drops_lower_scores_and_keeps_unscored_hits() -> None:
    hits = [
        Hit(1, "", relevance_score=0.5),
        Hit(2, "", relevance_score=0.25),
        Hit(3, "", relevance_score=None),
        Hit(4, "", relevance_score=-1.0),
    ]

    assert [hit.pk for hit in above(hits, 0.5)] == [1, 3]
    assert above(hits, None) == hits


@pytest.mark.parametrize(
    ("item", "metadata"),
    [
        (
            Hit(1, "", {}, 0.5, 0.75, "client"),
            {"relevance_score": 0.75, "reranked_by": "client", "retrieval_score": 0.5},
        ),
        (
            Hit(1, "", {}, None, 0.75, "milvus"),
            {"relevance_score": 0.75, "reranked_by": "milvus"},
        ),
        (
            Hit(1, "", {}, 0.5, rerank_error="down"),
            {
                "relevance_score": None,
                "reranked_by": None,
                "retrieval_score": 0.5,
                "rerank_error": "down",
            },
        ),
        (Ranking(0, 0.75, "milvus"), {"relevance_score": 0.75, "reranked_by": "milvus"}),
        (
            Ranking(0, rerank_error="down"),
            {"relevance_score": None, "reranked_by": None, "rerank_error": "down"},
        ),
    ],
)
def test_an_item_tells_its_scores_and_where_they_are_from(
    item: Hit | Ranking, metadata: dict[str, Any]
) -> None:
    assert item.scores() == metadata


@given(st.lists(st.floats(-100, 100)))
def test_items_are_ranked_by_score_and_ties_keep_the_given_order(given_scores: list[float]) -> None:
    ranked = ranked_by_client(given_scores)

    assert sorted(r.index for r in ranked) == list(range(len(given_scores)))
    assert all(r.relevance_score == float32(given_scores[r.index]) for r in ranked)
    order = [(-float32(given_scores[r.index]), r.index) for r in ranked]
    assert order == sorted(order)


def test_rows_are_ranked_by_score_and_key_and_items_without_a_row_come_last() -> None:
    keys = [["c"], [], ["b"], ["gone"], ["foreign", "a"], ["c"]]

    ranked = ranked_by_milvus(keys, {"a": 0.75, "b": 0.25, "c": 0.25}, "docs")

    lost = "collection 'docs' has no row with this item's primary key"
    assert ranked == [
        Ranking(4, 0.75, "milvus"),
        Ranking(2, 0.25, "milvus"),
        Ranking(0, 0.25, "milvus"),
        Ranking(5, 0.25, "milvus"),
        *as_given([1, 3], lost),
    ]


def test_items_that_were_not_ranked_stay_as_given_and_say_why() -> None:
    assert as_given([2, 0], "vLLM is down") == [
        Ranking(2, None, None, "vLLM is down"),
        Ranking(0, None, None, "vLLM is down"),
    ]


def test_a_score_of_just_the_threshold_stays_although_it_is_a_float32() -> None:
    hit = Hit(1, "", relevance_score=float32(0.7))

    assert above([hit], 0.7) == [hit]
