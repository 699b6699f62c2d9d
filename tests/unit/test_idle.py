"""Clients between requests: who gets which, and which are to be closed."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from milvus_vllm_retrievers import VLLMRanker
from milvus_vllm_retrievers._core import idle
from milvus_vllm_retrievers._core.idle import LONGEST_REST, IdleClients, later_in_thread
from milvus_vllm_retrievers._core.services import RerankClient, build_request, read_scores
from tests.fakes import Clock
from tests.faults.servers import Listener, listening, wait_until


class Client:
    """Stands for an HTTP client."""


class Timers:
    """Stands for the clock's timers: a test has one go off."""

    def __init__(self) -> None:
        self.pending: list[tuple[float, Callable[[], None]]] = []

    def later(self, seconds: float, do: Callable[[], None]) -> Timers:
        self.pending.append((seconds, do))
        return self

    def cancel(self) -> None:
        self.pending.clear()

    def go_off(self) -> None:
        _, do = self.pending.pop(0)
        do()


def clients(
    timers: Timers | None = None, dismissed: list[Client] | None = None
) -> IdleClients[Client]:
    dismiss = ([] if dismissed is None else dismissed).extend
    return IdleClients(Client, (timers or Timers()).later, dismiss)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(idle, "time", clock)
    return clock


def test_each_request_in_flight_has_a_client_of_its_own() -> None:
    idle_clients = clients()
    lent = [idle_clients.lend() for _ in range(5)]
    assert len(set(lent)) == 5


def test_the_client_that_was_used_last_is_lent_first() -> None:
    idle_clients = clients()
    first, second = idle_clients.lend(), idle_clients.lend()
    assert idle_clients.take_back(first) == []
    assert idle_clients.take_back(second) == []
    assert [idle_clients.lend(), idle_clients.lend()] == [second, first]


def test_clients_that_have_rested_for_too_long_are_closed_without_another_request(
    clock: Clock,
) -> None:
    timers, dismissed = Timers(), list[Client]()
    idle_clients = clients(timers, dismissed)
    first, second, busy = (idle_clients.lend() for _ in range(3))
    idle_clients.take_back(first)
    clock.now += 1
    idle_clients.take_back(second)
    assert [seconds for seconds, _ in timers.pending] == [LONGEST_REST]

    clock.now += LONGEST_REST - 1
    timers.go_off()
    assert dismissed == [first]
    assert [seconds for seconds, _ in timers.pending] == [1]

    clock.now += 1
    timers.go_off()
    assert dismissed == [first, second]
    assert timers.pending == []

    idle_clients.take_back(busy)
    assert len(timers.pending) == 1


def test_one_timer_is_set_however_many_requests_there_are(clock: Clock) -> None:
    timers = Timers()
    idle_clients = clients(timers)
    for _ in range(100):
        idle_clients.take_back(idle_clients.lend())
        clock.now += 0.01

    assert len(timers.pending) == 1


def test_closing_calls_the_timer_off() -> None:
    timers = Timers()
    idle_clients = clients(timers)
    idle_clients.take_back(idle_clients.lend())

    idle_clients.close()

    assert timers.pending == []


def test_a_timer_that_goes_off_while_closing_does_nothing() -> None:
    timers, dismissed = Timers(), list[Client]()
    idle_clients = clients(timers, dismissed)
    idle_clients.take_back(idle_clients.lend())
    (_, sweep), *_ = timers.pending
    idle_clients.close()

    sweep()

    assert (dismissed, timers.pending) == ([], [])


def test_a_timer_in_a_thread_keeps_no_interpreter_alive() -> None:
    done = threading.Event()
    timer: Any = later_in_thread(0.01, done.set)

    assert timer.daemon
    assert done.wait(30)


def test_where_no_thread_starts_any_more_there_is_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)

    assert later_in_thread(0.0, list) is None


def test_the_longest_at_rest_are_to_be_closed_where_there_are_too_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(idle, "MOST_AT_REST", 2)
    idle_clients = clients()
    first, second, third = (idle_clients.lend() for _ in range(3))
    idle_clients.take_back(first)
    idle_clients.take_back(second)
    assert idle_clients.take_back(third) == [first]


def test_closing_leaves_a_client_in_use_to_whoever_uses_it() -> None:
    idle_clients = clients()
    resting, busy = idle_clients.lend(), idle_clients.lend()
    idle_clients.take_back(resting)
    assert idle_clients.close() == [resting]
    assert idle_clients.take_back(busy) == [busy]
    assert idle_clients.lend() not in {resting, busy}


@given(st.lists(st.sampled_from(["lend", "take back", "close", "sweep", "wait"]), max_size=40))
def test_no_client_is_lost_and_none_serves_two_requests(acts: list[str]) -> None:
    timers, made, closed, clock = Timers(), set[Client](), list[Client](), Clock()
    idle_clients = IdleClients(Client, timers.later, closed.extend)
    lent: list[Client] = []
    do: dict[str, Callable[[], None]] = {
        "lend": lambda: lent.append(idle_clients.lend()),
        "take back": lambda: closed.extend(idle_clients.take_back(lent.pop(0))) if lent else None,
        "close": lambda: closed.extend(idle_clients.close()),
        "sweep": lambda: timers.go_off() if timers.pending else None,
        "wait": lambda: setattr(clock, "now", clock.now + LONGEST_REST / 2),
    }
    for act in acts:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(idle, "time", clock)
            do[act]()
        made.update(lent)
        assert len(set(lent)) == len(lent)
        assert not set(lent) & set(closed)
    for client in lent:
        closed.extend(idle_clients.take_back(client))
    closed.extend(idle_clients.close())
    assert len(closed) == len(set(closed))
    assert set(closed) == made


# Sockets

BURST = 60
CLOSE_WAIT = "08"  # the other side has hung up, and this one has not


def half_closed(port: int) -> int:
    """Count this process's connections to a port on which the other side has hung up."""
    own = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            own.add(str(descriptor.readlink()))
    lines = Path("/proc/self/net/tcp").read_text().splitlines()[1:]
    rows = [line.split() for line in lines]
    return sum(
        row[2].endswith(f":{port:04X}") and row[3] == CLOSE_WAIT and f"socket:[{row[9]}]" in own
        for row in rows
    )


@pytest.fixture
def hanging_up() -> Iterator[Any]:
    """A server that answers a burst of requests at once, and hangs up when all are answered."""
    if not Path("/proc/self/net/tcp").exists():
        pytest.skip("connections are counted in /proc")
    together = threading.Barrier(BURST)
    body = b'{"results": [{"index": 0, "relevance_score": 0.5}]}'
    head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\n\r\n".encode()

    def converse(_: Listener, connection: socket.socket) -> None:
        asked = b""
        while not asked.endswith(b"}"):  # what is left unread would reset the connection
            asked += connection.recv(65_536)
        together.wait(60)
        connection.sendall(head + body)
        server.answered.wait(60)

    with listening(converse) as server:
        server.answered = threading.Event()
        yield server


async def test_after_a_burst_no_connection_stays_half_closed(hanging_up: Any) -> None:
    ranker = VLLMRanker(hanging_up.url, max_retries=0, timeout=60)
    client, request = RerankClient(ranker), build_request(ranker, "q", ["a"])

    answers = await asyncio.gather(*(client.asend(request) for _ in range(BURST)))

    assert [read_scores(answer, request) for answer in answers] == [[0.5]] * BURST
    await until_none_is_half_closed(hanging_up)
    await client.aclose()


async def test_after_a_blocking_burst_no_connection_stays_half_closed(
    hanging_up: Any,
) -> None:
    ranker = VLLMRanker(hanging_up.url, max_retries=0, timeout=60)
    client, request = RerankClient(ranker), build_request(ranker, "q", ["a"])

    with ThreadPoolExecutor(BURST) as threads:
        answers = list(threads.map(client.send, [request] * BURST))

    assert [read_scores(answer, request) for answer in answers] == [[0.5]] * BURST
    await until_none_is_half_closed(hanging_up)
    client.close()


async def until_none_is_half_closed(server: Any) -> None:
    server.answered.set()
    seen = [0]

    def gone() -> bool:
        seen.append(half_closed(server.port))
        return max(seen) > 0 and seen[-1] == 0

    await asyncio.to_thread(wait_until, gone, "no connection is half-closed", 30)


def test_a_client_that_is_dropped_is_not_kept_by_its_timer(hanging_up: Any) -> None:
    client = RerankClient(VLLMRanker(hanging_up.url))
    client._clients.take_back(client._clients.lend())
    dropped = weakref.ref(client)

    del client
    gc.collect()

    assert dropped() is None
