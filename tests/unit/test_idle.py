"""Clients between requests: who gets which, and which are to be closed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from milvus_vllm_retrievers._core import idle
from milvus_vllm_retrievers._core.idle import LONGEST_REST, IdleClients
from tests.fakes import Clock


class Client:
    """Stands for an HTTP client."""


def clients() -> IdleClients[Client]:
    return IdleClients(Client)


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


def test_clients_that_have_rested_for_too_long_are_to_be_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr(idle, "time", clock)
    idle_clients = clients()
    old, busy = idle_clients.lend(), idle_clients.lend()
    idle_clients.take_back(old)
    clock.now += LONGEST_REST + 1
    assert idle_clients.take_back(busy) == [old]
    assert idle_clients.lend() is busy


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


@given(st.lists(st.sampled_from(["lend", "take back", "close"]), max_size=40))
def test_no_client_is_lost_and_none_serves_two_requests(acts: list[str]) -> None:
    idle_clients, made, closed = clients(), set[Client](), list[Client]()
    lent: list[Client] = []
    do: dict[str, Callable[[], None]] = {
        "lend": lambda: lent.append(idle_clients.lend()),
        "take back": lambda: closed.extend(idle_clients.take_back(lent.pop(0))) if lent else None,
        "close": lambda: closed.extend(idle_clients.close()),
    }
    for act in acts:
        do[act]()
        made.update(lent)
        assert len(set(lent)) == len(lent)
        assert not set(lent) & set(closed)
    for client in lent:
        closed.extend(idle_clients.take_back(client))
    closed.extend(idle_clients.close())
    assert len(closed) == len(set(closed))
    assert set(closed) == made
