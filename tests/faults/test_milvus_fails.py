"""Every row of the table about Milvus: a server process that dies, freezes, comes back, forgets."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pymilvus import MilvusClient

from milvus_vllm_retrievers import SearchError, VLLMRanker
from tests.corpus import create_collection
from tests.fakes import FakeVLLM
from tests.faults.callers import (
    FRONT_ENDS,
    HOWS,
    MARGIN,
    TEXTS,
    FrontEnd,
    Got,
    How,
    at_once,
    check,
    check_error,
    got,
)
from tests.faults.servers import MilvusProcess, milvus_process, passing_on_to, refusing, silent
from tests.faults.table import (
    MILVUS_ROWS,
    MODES,
    ON_ERROR,
    By,
    MilvusRow,
    Mode,
    Raises,
    Reranked,
    Unranked,
)

NAME = "milvus_fails_docs"
SHORT = 2.0  # seconds a call may take that is to run into its limit
BRIEF = 0.1  # the same, where the calls are made one after another
MEDIUM = 5.0  # the same, where calls are to succeed too
LONG = 30.0
MANY = 12
BY: dict[Mode, By] = {"server": "milvus", "client": "client"}

NEVER_ANSWERS = MILVUS_ROWS["takes the first connection and never answers"]


def row(name: str) -> MilvusRow:
    """Look up the row that a test shows."""
    return MILVUS_ROWS[name]


# Milvus, and the retrievers that use it


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MilvusProcess]:
    with milvus_process(tmp_path_factory.mktemp("milvus_fails")) as process:
        yield process


@pytest.fixture
def milvus(process: MilvusProcess) -> MilvusProcess:
    """A Milvus Lite server with the collection, for the test to ill-treat."""
    process.start()
    with_admin(process, create)
    return process


@pytest.fixture
def unknown_milvus(tmp_path: Path) -> Iterator[MilvusProcess]:
    """The same, at an address to which this process has had no connection before."""
    with milvus_process(tmp_path) as process:
        with_admin(process, create)
        yield process


def create(client: MilvusClient) -> None:
    create_collection(client, NAME, texts=TEXTS)


def create_with_other_fields(client: MilvusClient) -> None:
    create_collection(client, NAME, texts=TEXTS, primary_key="id", text_field="body")


def with_admin(milvus: MilvusProcess, do: Callable[[MilvusClient], object]) -> None:
    """Do something with a client whose connection nobody shares."""
    client = MilvusClient(milvus.uri, dedicated=True)
    do(client)
    client.close()


@dataclass(frozen=True)
class User:
    """A retriever or a reranker, and how it is asked."""

    front_end: FrontEnd
    how: How
    subject: Any

    async def ask(self) -> tuple[Got, float]:
        return await got(self.front_end.call(self.subject, self.how))


@dataclass(frozen=True)
class Users:
    """Users of both front ends, blocking and async, with rankers of several kinds."""

    every: Sequence[User]

    async def ask(self) -> list[tuple[Got, float]]:
        """Ask them all at once."""
        answers = await asyncio.gather(
            *(at_once(how, [user.ask() for user in self.every if user.how == how]) for how in HOWS)
        )
        by_how = dict(zip(HOWS, map(iter, answers), strict=True))
        return [next(by_how[user.how]) for user in self.every]

    async def check_they_work(self) -> None:
        for user, (result, _) in zip(self.every, await self.ask(), strict=True):
            check(result, Reranked(BY[user.subject._adapter._ranker.mode]))

    async def check_they_get(self, row: MilvusRow, timeout: float) -> None:
        check_all(await self.ask(), row, timeout)


def check_all(results: Iterable[tuple[Got, float]], row: MilvusRow, timeout: float) -> None:
    """Assert that every call brought what the row says, in time."""
    assert isinstance(row.call, Raises)
    for result, seconds in results:
        check_error(result, row.call)
        assert isinstance(result, SearchError)
        assert result.reason in row.reasons
        assert seconds < timeout + MARGIN


MakeUsers = Callable[..., Awaitable[Users]]


@pytest.fixture
async def users(well_vllm: FakeVLLM) -> AsyncIterator[MakeUsers]:
    """Make retrievers of every kind: front end, how they are asked, mode and `on_error`."""
    async with AsyncExitStack() as stack:

        async def make(
            uri: str,
            *,
            timeout: float,
            vllm: str = well_vllm.url,
            modes: Sequence[Mode] = MODES,
            hows: Sequence[How] = HOWS,
        ) -> Users:
            every = [
                User(front_end, how, front_end.retriever(NAME, uri, ranker, timeout=timeout))
                for front_end in FRONT_ENDS
                for how in hows
                for ranker in rankers(vllm, modes)
            ]
            for user in every:
                await stack.enter_async_context(user.subject)
            return Users(every)

        yield make


def rankers(vllm: str, modes: Sequence[Mode]) -> list[VLLMRanker]:
    return [
        VLLMRanker(vllm, mode=mode, on_error=on_error) for mode in modes for on_error in ON_ERROR
    ]


# Rows: Milvus cannot be reached


async def test_a_milvus_that_refuses_connections(users: MakeUsers) -> None:
    with refusing() as uri:
        of_every_kind = await users(uri, timeout=LONG)

        await of_every_kind.check_they_get(row("refuses connections"), LONG)


async def test_a_milvus_that_takes_the_first_connection_and_never_answers(
    users: MakeUsers,
) -> None:
    expected = row("takes the first connection and never answers")
    with silent() as server:
        of_every_kind = await users(server.url, timeout=BRIEF)

        for user in of_every_kind.every:
            await Users([user]).check_they_get(expected, BRIEF)


async def test_many_retrievers_that_first_meet_a_milvus_that_never_answers_all_end_in_time(
    users: MakeUsers, how: How
) -> None:
    if how == "sync":
        pytest.skip("pymilvus opens one blocking connection at a time: they wait in turn")
    with silent() as server:
        many = await users(server.url, timeout=SHORT, hows=[how])

        await many.check_they_get(NEVER_ANSWERS, SHORT)


async def test_many_callers_of_one_retriever_end_in_time_when_milvus_never_answers(
    users: MakeUsers, how: How
) -> None:
    with silent() as server:
        one, *_ = (await users(server.url, timeout=SHORT, hows=[how])).every

        await Users([one] * MANY).check_they_get(NEVER_ANSWERS, SHORT)


async def test_a_milvus_that_stops_answering_between_two_calls(
    users: MakeUsers, milvus: MilvusProcess
) -> None:
    of_every_kind = await users(milvus.uri, timeout=MEDIUM)
    await of_every_kind.check_they_work()

    with milvus.frozen():
        await of_every_kind.check_they_get(row("stops answering between two calls"), MEDIUM)
    await of_every_kind.check_they_work()


async def test_a_milvus_that_is_killed_and_comes_back_later(
    users: MakeUsers, milvus: MilvusProcess
) -> None:
    of_every_kind = await users(milvus.uri, timeout=LONG)
    await of_every_kind.check_they_work()

    milvus.kill()
    await of_every_kind.check_they_get(row("is killed between two calls"), LONG)
    milvus.start()
    await of_every_kind.check_they_work()


async def test_a_milvus_that_is_killed_in_the_middle_of_a_search(
    users: MakeUsers, milvus: MilvusProcess, well_vllm: FakeVLLM
) -> None:
    allowed = threading.Event()
    with passing_on_to(well_vllm.url, allowed=allowed) as vllm:
        reranked_in_milvus = await users(milvus.uri, timeout=LONG, vllm=vllm.url, modes=["server"])
        asking = asyncio.ensure_future(reranked_in_milvus.ask())
        for _ in reranked_in_milvus.every:
            assert await asyncio.to_thread(vllm.arrived.acquire, timeout=LONG)

        milvus.kill()
        check_all(await asking, row("is killed in the middle of a search"), LONG)
        milvus.start()
        allowed.set()
        await reranked_in_milvus.check_they_work()


async def test_a_milvus_that_is_killed_and_restarted_between_two_calls(
    users: MakeUsers, milvus: MilvusProcess
) -> None:
    assert row("is killed and restarted between two calls").call == "works"
    of_every_kind = await users(milvus.uri, timeout=LONG)
    await of_every_kind.check_they_work()

    milvus.kill()
    milvus.start()
    await of_every_kind.check_they_work()


async def test_a_client_of_the_users_own_does_not_keep_a_retriever_from_connecting_again(
    users: MakeUsers, unknown_milvus: MilvusProcess
) -> None:
    patient = {"grpc.initial_reconnect_backoff_ms": 60_000, "grpc.max_reconnect_backoff_ms": 60_000}
    client = MilvusClient(unknown_milvus.uri, grpc_options=patient)
    of_every_kind = await users(unknown_milvus.uri, timeout=LONG)
    await of_every_kind.check_they_work()

    unknown_milvus.kill()
    await of_every_kind.check_they_get(MILVUS_ROWS["is killed between two calls"], LONG)
    unknown_milvus.start()
    await of_every_kind.check_they_work()
    client.close()


# What can go on without Milvus


async def test_a_reranker_through_milvus_can_go_on_without_it_once_it_knows_the_collection(
    milvus: MilvusProcess, well_vllm: FakeVLLM
) -> None:
    kinds = [(front_end, how) for front_end in FRONT_ENDS for how in HOWS]
    async with AsyncExitStack() as stack:
        users = Users(
            [
                User(front_end, how, reranker_of(front_end, milvus, ranker))
                for front_end, how in kinds
                for ranker in rankers(well_vllm.url, ["server"])
            ]
        )
        for user in users.every:
            await stack.enter_async_context(user.subject)
        for result, _ in await users.ask():
            check(result, Reranked("milvus"), k=len(TEXTS))

        milvus.kill()
        results = iter(await users.ask())

    for raised, reranked, skipped in zip(results, results, results, strict=True):
        check_all([raised], row("is killed between two calls"), LONG)
        check(reranked[0], Reranked("client"), k=len(TEXTS))
        check(skipped[0], Unranked("Fail connecting to server"), k=len(TEXTS))


def reranker_of(front_end: FrontEnd, milvus: MilvusProcess, ranker: VLLMRanker) -> Any:
    return front_end.module.MilvusVLLMRerank(NAME, ranker=ranker, uri=milvus.uri)


# Rows: the collection is not as it was


async def test_a_milvus_that_has_released_the_collection(
    users: MakeUsers, milvus: MilvusProcess
) -> None:
    assert row("has released the collection").call == "works"
    of_every_kind = await users(milvus.uri, timeout=LONG)
    await of_every_kind.check_they_work()

    with_admin(milvus, lambda client: client.release_collection(NAME))
    await of_every_kind.check_they_work()


async def test_a_milvus_that_has_dropped_the_collection(
    users: MakeUsers, milvus: MilvusProcess
) -> None:
    of_every_kind = await users(milvus.uri, timeout=LONG)
    await of_every_kind.check_they_work()

    with_admin(milvus, lambda client: client.drop_collection(NAME))
    await of_every_kind.check_they_get(row("has dropped the collection"), LONG)
    with_admin(milvus, create_with_other_fields)
    await of_every_kind.check_they_work()


async def test_a_milvus_that_has_had_the_collection_made_anew_with_other_fields(
    users: MakeUsers, milvus: MilvusProcess
) -> None:
    of_every_kind = await users(milvus.uri, timeout=LONG)
    await of_every_kind.check_they_work()

    with_admin(milvus, create_with_other_fields)
    await of_every_kind.check_they_get(
        row("has had the collection made anew with other fields"), LONG
    )
    await of_every_kind.check_they_work()


def test_every_row_about_milvus_is_shown_here() -> None:
    shown = re.findall(r'row\(\s*"([^"]+)"', Path(__file__).read_text())

    assert set(shown) == set(MILVUS_ROWS)
