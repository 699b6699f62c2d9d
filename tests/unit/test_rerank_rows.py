"""Ranking items by the primary keys of their rows, driven by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from milvus_vllm_retrievers import RerankConnectionError, SearchError, VLLMRanker
from milvus_vllm_retrievers._core.cool_down import FAILURES_BEFORE_REST, Health
from milvus_vllm_retrievers._core.hits import Ranking, as_given
from milvus_vllm_retrievers._core.query import Item, SearchOptions
from milvus_vllm_retrievers._core.rerank_rows import rank_rows
from milvus_vllm_retrievers._core.route import Route, provider_of
from milvus_vllm_retrievers._core.steps import CallMilvus, Flow
from milvus_vllm_retrievers._core.target import Reranking
from tests.unit.flows import (
    DEADLINE,
    DOWN,
    LITE,
    QUESTION,
    URL,
    body,
    finish,
    rows,
    scored,
    target,
)

ITEMS = [Item("one", "1"), Item("two", "2"), Item("three", "3")]


def rank(
    ranker: VLLMRanker,
    items: Sequence[Item] = ITEMS,
    on_missing: Any = "raise",
    version: str = "2.6.4",
    health: Health | None = None,
) -> Flow[list[Ranking]]:
    on = target(version)
    route = Route("milvus", "it has to", provider_of(ranker, on.facts(None), "MilvusVLLMRerank"))
    asked = Reranking(ranker, route, health or Health(ranker.cool_down))
    return rank_rows(on, asked, QUESTION, items, SearchOptions(), DEADLINE, on_missing)


@pytest.mark.parametrize(("version", "provider"), [("2.6.4", "vllm"), (LITE, "cohere")])
def test_milvus_ranks_the_items_rows(version: str, provider: str) -> None:
    flow = rank(VLLMRanker(URL), [*ITEMS, Item("one again", "1")], version=version)

    search = next(flow)
    ranked = finish(flow, [rows((2, None, 0.75), (1, None, 0.5), (3, None, 0.25))])

    assert isinstance(search, CallMilvus)
    assert search.method == "search"
    assert search.arguments["filter"] == "pk in [1, 2, 3]"
    assert search.arguments["ranker"].params["provider"] == provider
    assert search.arguments["ranker"].params["queries"] == ["a question"]
    assert ranked == [
        Ranking(1, 0.75, "milvus"),
        Ranking(0, 0.5, "milvus"),
        Ranking(3, 0.5, "milvus"),
        Ranking(2, 0.25, "milvus"),
    ]


def test_items_without_a_row_are_an_error_that_counts_them() -> None:
    flow = rank(VLLMRanker(URL), [*ITEMS, Item("none", "a-uuid")])
    next(flow)
    lookup = flow.send([rows((1, None, 0.5), (3, None, 0.25))])
    assert isinstance(lookup, CallMilvus)
    assert (lookup.method, lookup.arguments["filter"]) == ("query", "pk in [2]")

    with pytest.raises(SearchError, match=r"2 of 4 items have no row .* the first has id '2'"):
        flow.send([])


@pytest.mark.parametrize("on_error", ["raise", "client", "skip"])
def test_rows_that_an_approximate_index_has_not_returned_are_not_called_gone(on_error: Any) -> None:
    flow = rank(VLLMRanker(URL, on_error=on_error), on_missing="keep")
    next(flow)
    flow.send([rows((1, None, 0.5), (3, None, 0.25))])

    if on_error == "raise":
        with pytest.raises(SearchError, match=r"did not return 1 rows .* has key 2: it is approx"):
            flow.send([{"pk": 2}])
    elif on_error == "client":
        assert body(flow.send([{"pk": 2}]))["documents"] == ["one", "two", "three"]
    else:
        ranked = finish(flow, [{"pk": 2}])
        assert [r.index for r in ranked] == [0, 1, 2]
        assert "approximate" in ranked[0].rerank_error


def test_items_without_a_row_may_be_kept_last_and_marked() -> None:
    flow = rank(VLLMRanker(URL), on_missing="keep")
    next(flow)
    flow.send([rows((3, None, 0.25))])

    ranked = finish(flow, [])

    assert [(r.index, r.reranked_by) for r in ranked] == [(2, "milvus"), (0, None), (1, None)]
    assert ranked[1].rerank_error == "collection 'docs' has no row with this item's primary key"


def test_items_of_which_none_has_a_key_are_not_searched_for() -> None:
    flow = rank(VLLMRanker(URL), [Item("a", "a-uuid")])

    with pytest.raises(SearchError, match="1 of 1 items have no row"):
        next(flow)


def test_rows_that_milvus_fails_to_rank_are_an_error() -> None:
    flow = rank(VLLMRanker(URL))
    next(flow)

    with pytest.raises(RerankConnectionError, match="vLLM is down"):
        flow.throw(DOWN)


def test_rows_that_milvus_fails_to_rank_may_be_ranked_by_their_texts() -> None:
    flow = rank(VLLMRanker(URL, on_error="client"))
    next(flow)

    asked = flow.throw(DOWN)
    ranked = finish(flow, scored(0.25, 0.75, 0.5))

    assert body(asked)["documents"] == ["one", "two", "three"]
    assert [(r.index, r.reranked_by) for r in ranked] == [
        (1, "client"),
        (2, "client"),
        (0, "client"),
    ]


def test_rows_that_milvus_fails_to_rank_may_stay_as_given_and_marked() -> None:
    flow = rank(VLLMRanker(URL, on_error="skip"))
    next(flow)

    with pytest.raises(StopIteration) as end:
        flow.throw(DOWN)

    assert [ranking.index for ranking in end.value.value] == [0, 1, 2]
    assert all("vLLM is down" in ranking.rerank_error for ranking in end.value.value)


def test_a_service_that_keeps_failing_in_milvus_is_not_asked_for_a_while() -> None:
    ranker, health = VLLMRanker(URL, on_error="skip"), Health(60)
    for _ in range(FAILURES_BEFORE_REST):
        flow = rank(ranker, health=health)
        next(flow)
        with pytest.raises(StopIteration):
            flow.throw(DOWN)

    with pytest.raises(StopIteration) as end:
        next(rank(ranker, health=health))

    reason = end.value.value[0].rerank_error
    assert "not asked" in reason
    assert end.value.value == as_given([0, 1, 2], reason)
