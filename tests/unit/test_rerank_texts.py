"""Scoring and ranking texts from here, driven by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from milvus_vllm_retrievers import (
    RerankConnectionError,
    RerankError,
    RerankResponseError,
    RerankStatusError,
    RerankTimeoutError,
    VLLMRanker,
)
from milvus_vllm_retrievers._core import services
from milvus_vllm_retrievers._core.cool_down import FAILURES_BEFORE_REST, Health
from milvus_vllm_retrievers._core.deadline import Deadline
from milvus_vllm_retrievers._core.hits import NO_TEXT, Ranking, as_given, has_text
from milvus_vllm_retrievers._core.rerank_texts import (
    rank_texts,
    scores_from_here,
    scores_of,
    served_models,
)
from milvus_vllm_retrievers._core.rerank_texts import scored as scored_in_one_request
from milvus_vllm_retrievers._core.services import Answer
from milvus_vllm_retrievers._core.steps import Flow, Pause, Send, Together
from tests.unit.flows import DEADLINE, DOWN, QUESTION, URL, ByHand, body, finish, scored

BUSY = Answer(503, httpx.Headers(), "the queue is full")


def ranked(ranker: VLLMRanker, texts: Sequence[str | None]) -> Flow[list[Ranking]]:
    return rank_texts(ranker, Health(ranker.cool_down), QUESTION, texts, DEADLINE)


def test_given_texts_are_ranked_best_first() -> None:
    flow = ranked(VLLMRanker(URL), ["a", "b", "c"])

    asked = next(flow)
    assert body(asked)["query"] == "a question"
    assert body(asked)["documents"] == ["a", "b", "c"]
    assert finish(flow, scored(0.25, 0.75, 0.5)) == [
        Ranking(1, 0.75, "client"),
        Ranking(2, 0.5, "client"),
        Ranking(0, 0.25, "client"),
    ]


@pytest.mark.parametrize("on_error", ["raise", "client"])
def test_given_texts_that_cannot_be_ranked_are_an_error(on_error: Any) -> None:
    flow = ranked(VLLMRanker(URL, on_error=on_error, max_retries=0), ["a"])
    next(flow)

    with pytest.raises(RerankConnectionError) as caught:
        flow.throw(DOWN)
    assert caught.value is DOWN


def test_given_texts_may_keep_their_order_marked() -> None:
    flow = ranked(VLLMRanker(URL, on_error="skip", max_retries=0), ["a", "b"])
    next(flow)

    with pytest.raises(StopIteration) as end:
        flow.throw(DOWN)
    assert end.value.value == as_given([0, 1], "vLLM is down")


def test_given_texts_that_are_empty_come_last_without_being_sent() -> None:
    flow = ranked(VLLMRanker(URL), ["", "b", "\t", None])

    assert body(next(flow))["documents"] == ["b"]
    assert finish(flow, scored(0.5)) == [Ranking(1, 0.5, "client"), *as_given([0, 2, 3], NO_TEXT)]


def test_where_no_text_is_given_nothing_is_sent() -> None:
    with pytest.raises(StopIteration) as end:
        next(ranked(VLLMRanker(URL), ["", None]))

    assert end.value.value == as_given([0, 1], NO_TEXT)


# Requests


def test_texts_are_scored_in_batches_and_put_together_again() -> None:
    ranker = VLLMRanker(URL, max_client_batch_size=2)
    by_hand = ByHand(lambda step: scored(*map(float, body(step)["documents"])))

    scores = by_hand.run(
        scores_of(ranker, Health(0), "q", ["1", "2", None, "3", "4", "5"], DEADLINE, 3)
    )

    (together,) = by_hand.of(Together)
    assert together.limit == 3
    assert [body(step)["documents"] for step in by_hand.of(Send)] == [["1", "2"], ["3", "4"], ["5"]]
    assert scores == [1, 2, None, 3, 4, 5]


@given(
    st.lists(st.sampled_from([None, "", " ", "1", "2", "3"])),
    st.none() | st.integers(1, 5),
)
def test_every_text_keeps_its_score_however_the_requests_are_cut(
    texts: list[str | None], size: int | None
) -> None:
    ranker = VLLMRanker(URL, max_client_batch_size=size)
    by_hand = ByHand(lambda step: scored(*map(float, body(step)["documents"])))

    scores = by_hand.run(scores_of(ranker, Health(0), "q", texts, DEADLINE, 4))

    assert scores == [float(text) if has_text(text) else None for text in texts]
    assert all(len(body(step)["documents"]) <= (size or 99) for step in by_hand.of(Send))


@pytest.mark.parametrize(("in_flight", "limit"), [(None, 16), (1, 1), (2, 2)])
def test_a_call_sends_no_more_requests_at_once_than_it_was_given(
    in_flight: int | None, limit: int
) -> None:
    ranker = VLLMRanker(URL, max_client_batch_size=1)

    step = next(scores_from_here(ranker, Health(0), "q", ["a", "b"], DEADLINE, in_flight))

    assert isinstance(step, Together)
    assert step.limit == limit
    assert not step.return_exceptions


def test_a_failed_request_fails_its_whole_call() -> None:
    ranker = VLLMRanker(URL, max_client_batch_size=2, max_retries=0)
    by_hand = ByHand(lambda step: DOWN if "c" in body(step)["documents"] else scored(0.1, 0.2))

    with pytest.raises(RerankConnectionError):
        by_hand.run(scores_of(ranker, Health(0), "q", list("abcd"), DEADLINE, 2))


# Tries


@pytest.fixture
def _no_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "_backoff", float)


@pytest.mark.usefixtures("_no_jitter")
def test_a_request_is_sent_again_after_pauses_as_often_as_the_ranker_says() -> None:
    flow = scored_in_one_request(VLLMRanker(URL, max_retries=2), Health(0), "q", ["a"], DEADLINE)

    first = next(flow)
    assert flow.throw(DOWN) == Pause(1)
    assert flow.send(None) == first
    assert flow.send(BUSY) == Pause(2)
    assert flow.send(None) == first
    with pytest.raises(RerankStatusError, match="the queue is full"):
        flow.send(BUSY)


@pytest.mark.usefixtures("_no_jitter")
def test_a_request_that_worked_in_a_later_try_has_worked() -> None:
    flow = scored_in_one_request(VLLMRanker(URL), Health(0), "q", ["a"], DEADLINE)
    next(flow)
    flow.send(BUSY)
    flow.send(None)

    assert finish(flow, scored(0.5)) == [0.5]


@pytest.mark.usefixtures("_no_jitter")
def test_no_pause_is_begun_that_outlasts_the_call() -> None:
    flow = scored_in_one_request(VLLMRanker(URL), Health(0), "q", ["a"], Deadline.after(0.5))
    next(flow)

    with pytest.raises(RerankConnectionError):
        flow.throw(DOWN)


@pytest.mark.parametrize("answer", [scored(0.5, 0.5), Answer(400, httpx.Headers(), "too long")])
def test_an_answer_that_another_try_would_not_better_is_final(answer: Answer) -> None:
    flow = scored_in_one_request(VLLMRanker(URL), Health(0), "q", ["a"], DEADLINE)
    next(flow)

    with pytest.raises((RerankResponseError, RerankStatusError)):
        flow.send(answer)


def test_a_request_that_took_too_long_is_not_sent_again() -> None:
    flow = scored_in_one_request(VLLMRanker(URL), Health(0), "q", ["a"], DEADLINE)
    next(flow)

    with pytest.raises(RerankTimeoutError):
        flow.throw(RerankTimeoutError("too slow"))


# The cool-down


def failing(ranker: VLLMRanker, health: Health) -> None:
    for _ in range(FAILURES_BEFORE_REST):
        flow = scores_from_here(ranker, health, "q", ["a", "b"], DEADLINE)
        next(flow)
        with pytest.raises(RerankError):
            flow.throw(DOWN)


def test_a_service_that_keeps_failing_is_not_asked_for_a_while() -> None:
    ranker, health = VLLMRanker(URL, on_error="skip", max_retries=0, cool_down=60), Health(60)
    failing(ranker, health)

    with pytest.raises(StopIteration) as end:
        next(rank_texts(ranker, health, QUESTION, ["a", "b"], DEADLINE))

    assert [ranking.index for ranking in end.value.value] == [0, 1]
    assert "not asked" in end.value.value[0].rerank_error
    assert "vLLM is down" in end.value.value[0].rerank_error


@pytest.mark.parametrize("on_error", ["raise", "client"])
def test_without_a_fallback_every_call_asks(on_error: Any) -> None:
    ranker, health = VLLMRanker(URL, on_error=on_error, max_retries=0, cool_down=60), Health(60)
    failing(ranker, health)

    assert isinstance(next(scores_from_here(ranker, health, "q", ["a"], DEADLINE)), Send)


# The models that are served


def test_the_served_models_are_asked_for_once_without_a_body() -> None:
    flow = served_models(VLLMRanker(f"{URL}/v1"), DEADLINE)

    asked = next(flow)
    assert isinstance(asked, Send)
    assert (asked.request.url, asked.request.content) == (f"{URL}/v1/models", b"")
    models = json.dumps({"data": [{"id": "a"}, {"id": "b"}]})
    assert finish(flow, Answer(200, httpx.Headers(), models)) == ["a", "b"]


def test_models_that_cannot_be_asked_for_are_not_asked_for_again() -> None:
    flow = served_models(VLLMRanker(URL), DEADLINE)
    next(flow)

    with pytest.raises(RerankConnectionError):
        flow.throw(DOWN)
