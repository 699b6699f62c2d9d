"""Calls of a Milvus that may be restarting, or whose collection is released, driven by hand."""

from __future__ import annotations

import time
from typing import Any

import pytest

from milvus_vllm_retrievers import RerankError, RerankTimeoutError, SearchError, VLLMRanker
from milvus_vllm_retrievers._core.deadline import Deadline
from milvus_vllm_retrievers._core.milvus_calls import call, search, search_and_rerank
from milvus_vllm_retrievers._core.requests import SearchCall
from milvus_vllm_retrievers._core.steps import CallMilvus, Pause, Step
from tests.unit.flows import DEADLINE, FOUND, URL, ByHand, finish

GONE = SearchError("search failed: connection refused", reason="disconnected")
CLOSED = SearchError("search failed: its client was closed meanwhile", reason="closed")
LATE = SearchError("search took longer than the call's timeout", reason="timeout")
RELEASED = SearchError("search failed: collection not loaded[collection=docs]", reason="not_loaded")
WANTED = SearchCall("search", {"collection_name": "docs"})


class Clock:
    """The monotonic clock, which the test moves."""

    now = 100.0


@pytest.fixture
def moving(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    return clock


def step(deadline: Deadline = DEADLINE) -> CallMilvus:
    return CallMilvus("search of collection 'docs'", "search", {}, deadline)


@pytest.mark.parametrize("error", [GONE, CLOSED])
def test_a_call_whose_connection_failed_is_tried_again_after_a_pause(error: SearchError) -> None:
    wanted = step()
    flow = call(wanted)

    assert next(flow) is wanted
    assert isinstance(flow.throw(error), Pause)
    assert flow.send(None) is wanted
    assert isinstance(flow.throw(error), Pause)
    assert flow.send(None) is wanted
    assert finish(flow, "found") == "found"


def test_the_first_further_try_comes_at_once_and_the_others_after_longer_and_longer(
    moving: Clock,
) -> None:
    pauses: list[float] = []

    def answer(step: Step) -> Any:
        if isinstance(step, CallMilvus):
            return GONE
        assert isinstance(step, Pause)
        pauses.append(step.seconds)
        moving.now += step.seconds
        return None

    with pytest.raises(SearchError) as caught:
        ByHand(answer).run(call(step()))

    assert caught.value is GONE
    assert pauses[0] == 0
    assert pauses == sorted(pauses)
    assert 1 < sum(pauses) < 2


def test_tries_that_take_long_themselves_use_up_the_two_seconds(moving: Clock) -> None:
    flow = call(step())
    next(flow)
    flow.throw(GONE)
    flow.send(None)
    moving.now += 1.95

    with pytest.raises(SearchError) as caught:
        flow.throw(GONE)
    assert caught.value is GONE


@pytest.mark.parametrize("error", [SearchError("disk full"), LATE, RELEASED])
def test_a_call_that_failed_otherwise_is_not_tried_again(error: SearchError) -> None:
    flow = call(step())
    next(flow)

    with pytest.raises(SearchError) as caught:
        flow.throw(error)
    assert caught.value is error


def is_told(error: SearchError) -> bool:
    """Tell whether the last real failure is named, and the argument to raise."""
    return str(error).startswith(str(GONE)) and "(raise timeout)" in str(error)


def test_a_deadline_that_would_come_in_a_pause_is_told_with_what_failed(moving: Clock) -> None:
    flow = call(step(Deadline.after(0.25)))
    next(flow)
    for _ in range(2):
        moving.now += flow.throw(GONE).seconds
        flow.send(None)

    with pytest.raises(SearchError) as caught:
        flow.throw(GONE)
    assert is_told(caught.value)
    assert caught.value.reason == "disconnected"
    assert caught.value.__cause__ is GONE


def test_a_deadline_that_comes_in_a_later_try_is_told_with_what_failed_before() -> None:
    flow = call(step())
    next(flow)
    flow.throw(GONE)
    flow.send(None)

    with pytest.raises(SearchError) as caught:
        flow.throw(LATE)
    assert is_told(caught.value)
    assert caught.value.reason == "disconnected"


def test_a_deadline_that_comes_in_the_first_try_is_told_with_what_failed(moving: Clock) -> None:
    flow = call(step(Deadline.after(0.3)))
    next(flow)
    moving.now += 1

    with pytest.raises(SearchError) as caught:
        flow.throw(GONE)
    assert is_told(caught.value)


# Released collections


def test_a_released_collection_is_loaded_and_searched_again() -> None:
    flow = search("docs", WANTED, DEADLINE)
    wanted = next(flow)

    load = flow.throw(RELEASED)
    again = flow.send(None)

    assert load == CallMilvus(
        "loading collection 'docs'", "load_collection", {"collection_name": "docs"}, DEADLINE
    )
    assert again is wanted
    assert finish(flow, [FOUND]) == [FOUND]


def test_a_collection_that_is_released_again_is_not_loaded_twice() -> None:
    flow = search("docs", WANTED, DEADLINE)
    next(flow)
    flow.throw(RELEASED)
    flow.send(None)

    with pytest.raises(SearchError, match="not loaded"):
        flow.throw(RELEASED)


def test_a_collection_that_cannot_be_loaded_is_an_error() -> None:
    flow = search("docs", WANTED, DEADLINE)
    next(flow)
    flow.throw(RELEASED)

    with pytest.raises(SearchError, match="no index"):
        flow.throw(SearchError("loading failed: no index"))


# With a ranker


def test_a_model_that_vllm_has_not_loaded_is_no_released_collection() -> None:
    flow = search_and_rerank("docs", WANTED, VLLMRanker(URL, mode="server"), DEADLINE)
    next(flow)

    with pytest.raises(RerankError, match="model not loaded"):
        flow.throw(RerankError("call service failed: model not loaded"))


@pytest.mark.parametrize(("on_error", "share"), [("raise", 1.0), ("skip", 0.75), ("client", 0.5)])
def test_a_search_with_a_ranker_leaves_time_for_the_fallback(
    on_error: Any, share: float, moving: Clock
) -> None:
    ranker = VLLMRanker(URL, on_error=on_error)

    asked = next(search_and_rerank("docs", WANTED, ranker, Deadline.after(100)))

    assert asked.deadline.remaining() == pytest.approx(100 * share)


def test_a_time_limit_inside_milvus_is_one_of_reranking() -> None:
    flow = search_and_rerank("docs", WANTED, VLLMRanker(URL, mode="server"), DEADLINE)
    next(flow)

    with pytest.raises(RerankTimeoutError, match=r"raise the ranker's timeout"):
        flow.throw(SearchError("context deadline exceeded", reason="rerank_timeout"))


def test_a_failure_of_the_service_names_the_endpoint_that_milvus_was_given() -> None:
    ranker = VLLMRanker(URL, server_endpoint="http://vllm.internal:8000", mode="server")
    flow = search_and_rerank("docs", WANTED, ranker, DEADLINE)
    next(flow)

    with pytest.raises(RerankError, match=r"server_endpoint, http://vllm\.internal:8000"):
        flow.throw(RerankError("call service failed"))
