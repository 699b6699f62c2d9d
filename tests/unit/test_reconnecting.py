"""Calls of a Milvus that may be restarting: tried again, and what is told when time runs out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from milvus_vllm_retrievers import SearchError
from milvus_vllm_retrievers._core.deadline import Deadline
from milvus_vllm_retrievers._core.drivers import AsyncDriver, SyncDriver
from milvus_vllm_retrievers._core.milvus import ConnectionSettings, MilvusConnection
from milvus_vllm_retrievers._core.steps import CallMilvus, Flow

GONE = RuntimeError("UNAVAILABLE: connection refused")
LATE = RuntimeError("DEADLINE_EXCEEDED: too slow")

Run = Callable[[Deadline, Sequence[Exception | str | Deadline]], str]


class Client:
    """Stands for both of pymilvus's clients: answers, fails or waits as it was told, in turn."""

    def __init__(self, outcomes: Sequence[Exception | str | Deadline]) -> None:
        self._outcomes = list(outcomes)

    def search(self, **_: Any) -> Any:
        outcome = self._outcomes.pop(0)
        if isinstance(outcome, Deadline):
            while not outcome.passes_within(0):
                time.sleep(0.01)
            outcome = GONE
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def close(self) -> None:
        pass


class AsyncClient(Client):
    async def search(self, **_: Any) -> Any:
        return super().search()


@pytest.fixture(params=["sync", "async"])
def run(request: pytest.FixtureRequest) -> Run:
    """Run one call of Milvus by either driver, where tries come to these outcomes."""

    def call(deadline: Deadline, outcomes: Sequence[Exception | str | Deadline]) -> str:
        def flow() -> Flow[str]:
            return (yield CallMilvus("search of collection 'docs'", "search", {}, deadline))

        if request.param == "async":
            client: Any = AsyncClient(outcomes)
            lent = MilvusConnection(ConnectionSettings(), async_client=client)
            return asyncio.run(AsyncDriver(lent, None).run(flow()))
        client = Client(outcomes)
        return SyncDriver(MilvusConnection(ConnectionSettings(), client=client), None).run(flow())

    return call


def test_a_call_whose_connection_failed_is_tried_again(run: Run) -> None:
    assert run(Deadline(), [GONE, GONE, "found"]) == "found"


REAL = "search of collection 'docs' failed: UNAVAILABLE: connection refused"


def is_told(error: SearchError) -> bool:
    """Tell whether the last real failure is named, and the timeout."""
    return str(error).startswith(REAL) and "the call's timeout left no time to" in str(error)


def test_a_deadline_that_would_come_in_a_pause_is_told_with_what_failed(run: Run) -> None:
    with pytest.raises(SearchError) as caught:
        run(Deadline.after(0.5), [GONE] * 6)

    assert is_told(caught.value)
    assert caught.value.reason == "disconnected"


def test_a_deadline_that_comes_in_a_later_try_is_told_with_what_failed_before(run: Run) -> None:
    deadline = Deadline.after(0.3)

    with pytest.raises(SearchError) as caught:
        run(deadline, [GONE, GONE, deadline])
    assert is_told(caught.value)


def test_a_deadline_that_comes_in_the_first_try_is_told_with_what_failed(run: Run) -> None:
    deadline = Deadline.after(0.3)

    with pytest.raises(SearchError) as caught:
        run(deadline, [deadline])
    assert is_told(caught.value)


def test_a_call_that_only_took_too_long_says_no_more_than_that(run: Run) -> None:
    with pytest.raises(SearchError, match=r"too slow \(raise timeout") as caught:
        run(Deadline.after(60), [LATE])

    assert caught.value.reason == "timeout"


def test_a_try_that_took_too_long_by_itself_is_told_alone(run: Run) -> None:
    with pytest.raises(SearchError, match="too slow"):
        run(Deadline.after(60), [GONE, GONE, LATE])
