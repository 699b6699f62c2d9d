"""Deadlines, on a clock that the test sets."""

from __future__ import annotations

import time

import pytest

from milvus_vllm_retrievers._core.deadline import Deadline


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock at 100 s; the test moves it by setting its only entry."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_without_a_limit_a_deadline_never_passes() -> None:
    deadline = Deadline.after(None)

    assert deadline.remaining() is None
    assert deadline.within(None) is None
    assert deadline.within(7) == 7
    assert not deadline.passes_within(1e9)


def test_the_time_left_shrinks_to_nothing_and_no_further(clock: list[float]) -> None:
    deadline = Deadline.after(10)

    clock[0] = 104.0
    assert deadline.remaining() == 6
    assert deadline.within(None) == 6
    assert deadline.within(2) == 2
    assert deadline.within(8) == 6
    clock[0] = 120.0
    assert deadline.remaining() == 0


@pytest.mark.parametrize(("pause", "passes"), [(9.0, False), (10.0, True), (11.0, True)])
def test_a_pause_that_uses_up_the_time_is_too_long(
    clock: list[float], pause: float, passes: bool
) -> None:
    assert Deadline.after(10).passes_within(pause) is passes


def test_a_share_leaves_the_rest_of_the_time_to_what_follows(clock: list[float]) -> None:
    deadline = Deadline.after(10)
    clock[0] = 104.0

    assert deadline.share(0.5).remaining() == 3
    assert deadline.remaining() == 6
    assert Deadline().share(0.5).remaining() is None


@pytest.mark.parametrize("seconds", [1e12, 1e300])
def test_more_time_than_locks_and_sockets_take_is_no_limit(seconds: float) -> None:
    assert Deadline.after(seconds).remaining() is None
