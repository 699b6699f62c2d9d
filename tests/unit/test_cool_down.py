"""How a failing rerank service is spared, and what the log says of it."""

from __future__ import annotations

import logging
import threading

import pytest

from milvus_vllm_retrievers import (
    MilvusVLLMError,
    RerankConnectionError,
    RerankStatusError,
)
from milvus_vllm_retrievers._core.cool_down import FAILURES_BEFORE_REST, CoolDown, Health
from tests.fakes import Clock

DOWN = RerankConnectionError("vLLM is down")
TOO_LONG = RerankStatusError("a document is too long", status_code=400, body="")


def failing(cool_down: CoolDown, error: MilvusVLLMError = DOWN) -> CoolDown:
    for _ in range(FAILURES_BEFORE_REST):
        assert cool_down.rest() is None
        cool_down.note([error], worked=False)
    return cool_down


def messages(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == level]


def test_a_service_rests_after_failures_in_a_row(clock: Clock) -> None:
    rest = failing(CoolDown("there", 30)).rest()

    assert "failed 3 times in a row and is tried again in 30 s" in str(rest)
    assert "vLLM is down" in str(rest)


def test_a_success_in_between_starts_the_count_anew(clock: Clock) -> None:
    cool_down = CoolDown("there", 30)
    cool_down.note([DOWN], worked=False)
    cool_down.note([DOWN], worked=False)
    cool_down.note([], worked=True)

    assert failing(cool_down).rest() is not None


def test_after_the_rest_one_caller_asks_for_all(clock: Clock) -> None:
    cool_down = failing(CoolDown("there", 30))
    clock.now += 30

    assert cool_down.rest() is None
    assert cool_down.rest() is not None


def test_a_success_after_the_rest_lets_everyone_ask(clock: Clock) -> None:
    cool_down = failing(CoolDown("there", 30))
    clock.now += 30
    cool_down.rest()
    cool_down.note([], worked=True)

    assert cool_down.rest() is cool_down.rest() is None


def test_a_caller_that_never_reports_back_holds_nobody_up_for_longer(clock: Clock) -> None:
    cool_down = failing(CoolDown("there", 30))
    clock.now += 30
    assert cool_down.rest() is None
    clock.now += 30

    assert cool_down.rest() is None


def test_a_refused_request_says_nothing_of_the_service(clock: Clock) -> None:
    assert failing(CoolDown("there", 30), TOO_LONG).rest() is None


def test_a_refused_request_shows_that_the_service_answers(clock: Clock) -> None:
    cool_down = failing(CoolDown("there", 30))
    clock.now += 30
    assert cool_down.rest() is None
    cool_down.note([TOO_LONG], worked=False)

    assert cool_down.rest() is None


def test_a_service_that_fails_some_queries_and_serves_others_does_not_rest(clock: Clock) -> None:
    cool_down = CoolDown("there", 30)
    for _ in range(2 * FAILURES_BEFORE_REST):
        cool_down.note([TOO_LONG, DOWN], worked=True)

    assert cool_down.rest() is None


def test_a_failure_counts_whichever_query_it_came_to(clock: Clock) -> None:
    cool_down = CoolDown("there", 30)
    for _ in range(FAILURES_BEFORE_REST):
        cool_down.note([TOO_LONG, DOWN], worked=False)

    assert "vLLM is down" in str(cool_down.rest())


def test_a_call_that_asked_nothing_is_no_success(clock: Clock) -> None:
    cool_down = CoolDown("there", 30)
    for _ in range(FAILURES_BEFORE_REST):
        cool_down.note([DOWN], worked=False)
        cool_down.note([], worked=False)

    assert cool_down.rest() is not None


def test_no_rest_is_no_failure_of_its_own(clock: Clock) -> None:
    cool_down = failing(CoolDown("there", 30))
    rest = cool_down.rest()
    assert rest is not None
    cool_down.note([rest], worked=False)

    assert "failed 3 times" in str(cool_down.rest())


def test_zero_seconds_never_rest(clock: Clock) -> None:
    assert failing(CoolDown("there", 0)).rest() is None


def test_an_incident_is_logged_once_and_its_end_once(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    cool_down = CoolDown("inside Milvus", 30)
    for _ in range(10):
        cool_down.note([DOWN], worked=False)
        clock.now += 5
    clock.now += 30
    for _ in range(3):
        cool_down.note([], worked=True)

    (warning,) = messages(caplog, logging.WARNING)
    assert "reranking inside Milvus failed" in warning
    assert "vLLM is down" in warning
    assert messages(caplog, logging.INFO) == ["reranking inside Milvus works again"]


def test_failures_that_alternate_with_successes_are_one_incident(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    cool_down = CoolDown("there", 30)
    for _ in range(20):
        cool_down.note([TOO_LONG], worked=False)
        clock.now += 5
        cool_down.note([], worked=True)

    assert len(messages(caplog, logging.WARNING)) == 1


def test_threads_agree_on_who_asks(clock: Clock) -> None:
    cool_down = failing(CoolDown("there", 30))
    clock.now += 30
    rests: list[object] = []
    threads = [threading.Thread(target=lambda: rests.append(cool_down.rest())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert rests.count(None) == 1


# One and the same score


def test_one_score_for_different_texts_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    asked = Health(30)
    for _ in range(3):
        asked.check_spread(["a", "b", "c"], [0.25, 0.25, 0.25])

    (warning,) = messages(caplog, logging.WARNING)
    assert "gave 3 different texts the same score, 0.25" in warning
    assert "template" in warning


@pytest.mark.parametrize(
    ("texts", "scores"),
    [
        (["a", "b", "c"], [0.25, 0.25, 0.5]),
        (["a", "a", "a"], [0.25, 0.25, 0.25]),
        (["a", "b"], [0.25, 0.25]),
        (["a", "b", None, ""], [0.25, 0.25, None, None]),
        ([], []),
    ],
)
def test_scores_that_may_well_be_equal_are_not_warned_of(
    texts: list[str | None], scores: list[float | None], caplog: pytest.LogCaptureFixture
) -> None:
    Health(30).check_spread(texts, scores)

    assert messages(caplog, logging.WARNING) == []


def test_what_fails_inside_milvus_is_not_held_against_what_is_asked_from_here(clock: Clock) -> None:
    health = Health(30)
    failing(health.in_milvus)

    assert health.in_milvus.rest() is not None
    assert health.from_here.rest() is None


def test_the_log_says_which_way_failed(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    health = Health(30)
    health.in_milvus.note([DOWN], worked=False)
    health.from_here.note([DOWN], worked=False)

    inside, here = messages(caplog, logging.WARNING)
    assert inside.startswith("reranking inside Milvus failed")
    assert here.startswith("reranking from this process failed")
