"""Fallbacks over time: vLLM that goes away and comes back, the cool-down, the log, and batches."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from milvus_vllm_retrievers import RerankStatusError, VLLMRanker
from milvus_vllm_retrievers.langchain import MilvusVLLMRetriever
from tests.fakes import Clock, FakeVLLM, Received, Reply
from tests.faults.callers import QUERY, FrontEnd, Got, How, K, check, got, items_of
from tests.faults.conftest import COLLECTION
from tests.faults.servers import passing_on_to, wait_until
from tests.faults.table import (
    MODES,
    ON_ERROR,
    ROWS,
    GoesAway,
    Mode,
    OnError,
    Outcome,
    Reranked,
    Unranked,
)

COOL_DOWN = 30.0
BUSY = Reply.json(503, {"error": {"message": "the queue is full"}})
TOO_LONG = Reply.json(400, {"error": {"message": "too long"}})
WELL: dict[Mode, Outcome] = {"server": Reranked("milvus"), "client": Reranked("client")}

# What makes up for a vLLM that is busy, and how. In mode "client" there is only one way out.
DEGRADED: dict[tuple[Mode, OnError], Outcome] = {
    ("server", "client"): Reranked("client"),
    ("server", "skip"): Unranked("the queue is full"),
    ("client", "skip"): Unranked("the queue is full"),
}
NOT_ASKED: dict[tuple[Mode, OnError], Outcome] = {
    ("server", "client"): Reranked("client"),
    ("server", "skip"): Unranked("not asked: reranking inside Milvus failed 3 times in a row"),
    ("client", "skip"): Unranked("not asked: reranking from this process failed 3 times in a row"),
}


def endpoints(mode: Mode, ill: str, well: str) -> dict[str, str]:
    """Return a ranker's endpoints: in mode "server" only Milvus asks the ill one."""
    if mode == "server":
        return {"endpoint": well, "server_endpoint": ill}
    return {"endpoint": ill}


@dataclass(frozen=True)
class User:
    """A retriever, and how it is asked."""

    front_end: FrontEnd
    how: How
    retriever: Any

    async def ask(self) -> Got:
        return (await got(self.front_end.retrieve(self.retriever, self.how)))[0]

    async def gets(self, expected: Outcome) -> None:
        check(await self.ask(), expected)


# vLLM goes away and comes back


@pytest.mark.parametrize("on_error", ON_ERROR)
@pytest.mark.parametrize("mode", MODES)
async def test_a_retriever_is_reranked_again_when_vllm_listens_again(
    mode: Mode,
    on_error: OnError,
    front_end: FrontEnd,
    how: How,
    milvus26_uri: str,
    collection: str,
    well_vllm: FakeVLLM,
) -> None:
    (row,) = (row for row in ROWS if isinstance(row.fault, GoesAway))
    column = row.column(mode)
    assert column is not None
    with passing_on_to(well_vllm.url) as vllm:
        where = endpoints(mode, vllm.url, well_vllm.url)
        ranker = VLLMRanker(**where, mode=mode, on_error=on_error, cool_down=0)
        user = User(front_end, how, front_end.retriever(collection, milvus26_uri, ranker))
        await user.gets(WELL[mode])

    async with user.retriever:
        await user.gets(column[on_error])
        with passing_on_to(well_vllm.url, vllm.port):
            await user.gets(WELL[mode])


# The cool-down


@pytest.fixture(params=DEGRADED, ids="-".join)
def way(request: pytest.FixtureRequest) -> tuple[Mode, OnError]:
    """A mode, and an `on_error` that makes up for a failure."""
    return request.param


MakeUser = Callable[..., User]


@pytest.fixture
async def user_of(
    front_end: FrontEnd,
    how: How,
    milvus26_uri: str,
    collection: str,
    ill_vllm: FakeVLLM,
    well_vllm: FakeVLLM,
) -> MakeUser:
    """Make a user of a ranker whose first way to vLLM is to the ill one."""

    def make(way: tuple[Mode, OnError], **ranker: Any) -> User:
        mode, on_error = way
        where = endpoints(mode, ill_vllm.url, well_vllm.url)
        settings = {"max_retries": 0, "cool_down": COOL_DOWN, **ranker}
        vllm = VLLMRanker(**where, mode=mode, on_error=on_error, **settings)
        return User(front_end, how, front_end.retriever(collection, milvus26_uri, vllm))

    return make


def asked(ill_vllm: FakeVLLM) -> int:
    """Count the requests that have come since the last count."""
    count = len(ill_vllm.received)
    ill_vllm.received.clear()
    return count


async def test_after_three_failures_in_a_row_vllm_is_not_asked_until_the_cool_down_is_over(
    user_of: MakeUser, way: tuple[Mode, OnError], ill_vllm: FakeVLLM, clock: Clock
) -> None:
    user = user_of(way)
    async with user.retriever:
        ill_vllm.always = BUSY
        for _ in range(3):
            await user.gets(DEGRADED[way])
            assert asked(ill_vllm) > 0

        ill_vllm.always = None  # it is well again, but nobody knows
        for seconds in (0, 1, COOL_DOWN - 2):
            clock.now += seconds
            await user.gets(NOT_ASKED[way])
            assert asked(ill_vllm) == 0

        clock.now += 1
        for _ in range(2):
            await user.gets(WELL[way[0]])
            assert asked(ill_vllm) == 1


async def test_a_failure_after_the_cool_down_begins_another(
    user_of: MakeUser, way: tuple[Mode, OnError], ill_vllm: FakeVLLM, clock: Clock
) -> None:
    user = user_of(way)
    async with user.retriever:
        ill_vllm.always = BUSY
        for _ in range(3):
            await user.gets(DEGRADED[way])

        clock.now += COOL_DOWN
        await user.gets(DEGRADED[way])
        assert asked(ill_vllm) > 0
        clock.now += COOL_DOWN - 1
        check_not_asked = NOT_ASKED[way]
        if isinstance(check_not_asked, Unranked):
            check_not_asked = Unranked(check_not_asked.phrase.replace("3 times", "4 times"))
        await user.gets(check_not_asked)
        assert asked(ill_vllm) == 0


async def test_while_one_call_finds_out_whether_vllm_is_back_others_do_not_ask(
    user_of: MakeUser, way: tuple[Mode, OnError], ill_vllm: FakeVLLM, clock: Clock
) -> None:
    user = user_of(way)
    async with user.retriever:
        ill_vllm.always = BUSY
        for _ in range(3):
            await user.gets(DEGRADED[way])
        ill_vllm.always = None
        clock.now += COOL_DOWN
        ill_vllm.gate = threading.Barrier(2)

        first = beside(user)
        await asyncio.to_thread(wait_until, lambda: ill_vllm.in_flight == 1, "the first has asked")
        await user.gets(NOT_ASKED[way])
        await asyncio.to_thread(ill_vllm.gate.wait, 10)
        check(await first, WELL[way[0]])


def beside(user: User) -> asyncio.Future[Got]:
    """Ask beside the test: in a thread, if asking blocks."""
    if user.how == "async":
        return asyncio.ensure_future(user.ask())
    return asyncio.ensure_future(asyncio.to_thread(asyncio.run, user.ask()))


async def test_failures_that_are_not_in_a_row_begin_no_cool_down(
    user_of: MakeUser, way: tuple[Mode, OnError], ill_vllm: FakeVLLM
) -> None:
    user = user_of(way)
    async with user.retriever:
        for _ in range(2):
            ill_vllm.always = BUSY
            await user.gets(DEGRADED[way])
            await user.gets(DEGRADED[way])
            ill_vllm.always = None
            await user.gets(WELL[way[0]])


async def test_a_document_that_vllm_refuses_begins_no_cool_down(
    user_of: MakeUser, way: tuple[Mode, OnError], ill_vllm: FakeVLLM
) -> None:
    user = user_of(way)
    async with user.retriever:
        ill_vllm.always = TOO_LONG
        for _ in range(4):
            assert isinstance(await user.ask(), list)
            assert asked(ill_vllm) > 0


async def test_a_cool_down_of_zero_has_every_call_ask(
    user_of: MakeUser, way: tuple[Mode, OnError], ill_vllm: FakeVLLM
) -> None:
    user = user_of(way, cool_down=0)
    async with user.retriever:
        ill_vllm.always = BUSY
        for _ in range(5):
            await user.gets(DEGRADED[way])
            assert asked(ill_vllm) > 0


@pytest.mark.parametrize("mode", MODES)
async def test_without_a_fallback_every_call_asks(
    user_of: MakeUser, mode: Mode, ill_vllm: FakeVLLM
) -> None:
    user = user_of((mode, "raise"))
    async with user.retriever:
        ill_vllm.always = BUSY
        for _ in range(5):
            assert isinstance(await user.ask(), RerankStatusError)
            assert asked(ill_vllm) > 0


async def test_a_direct_reranker_cools_down_too(
    front_end: FrontEnd, how: How, ill_vllm: FakeVLLM, clock: Clock
) -> None:
    ranker = VLLMRanker(ill_vllm.url, on_error="skip", max_retries=0, cool_down=COOL_DOWN)
    reranker = front_end.module.VLLMRerank(ranker=ranker, top_n=K)
    async with reranker:
        ill_vllm.always = BUSY
        for _ in range(3):
            check(await front_end.rerank(reranker, how), Unranked("the queue is full"))
            assert asked(ill_vllm) == 1

        ill_vllm.always = None
        check(await front_end.rerank(reranker, how), Unranked("not asked"))
        assert asked(ill_vllm) == 0
        clock.now += COOL_DOWN
        check(await front_end.rerank(reranker, how), Reranked("client"))


# The log


def logged(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    """Return what the package has logged since the last look, but for what it chose at first."""
    records = [
        (record.levelno, record.getMessage())
        for record in caplog.records
        if record.name == "milvus_vllm_retrievers"
        and not record.getMessage().startswith(f"collection {COLLECTION!r}: the text is ")
    ]
    caplog.clear()
    return records


async def test_many_degraded_queries_log_one_warning_and_one_word_when_it_is_over(
    user_of: MakeUser,
    way: tuple[Mode, OnError],
    ill_vllm: FakeVLLM,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "milvus_vllm_retrievers")
    user = user_of(way)
    async with user.retriever:
        for _ in range(2):  # the second incident is logged as the first
            ill_vllm.always = BUSY
            for _ in range(5):
                assert isinstance(await user.ask(), list)
            ((level, warning),) = logged(caplog)
            assert level == logging.WARNING
            assert "failed; results are degraded" in warning
            assert "the queue is full" in warning

            ill_vllm.always = None
            clock.now += COOL_DOWN
            for _ in range(3):
                await user.gets(WELL[way[0]])
            ((level, message),) = logged(caplog)
            assert level == logging.INFO
            assert message.endswith("works again")


async def test_without_a_fallback_nothing_is_logged_that_is_raised(
    user_of: MakeUser, ill_vllm: FakeVLLM, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "milvus_vllm_retrievers")
    user = user_of(("client", "raise"))
    async with user.retriever:
        ill_vllm.always = BUSY
        assert isinstance(await user.ask(), RerankStatusError)

    assert logged(caplog) == []


# Batches

BAD = f"{QUERY} nonsense"  # finds the same, as no document has the second word


@pytest.fixture
def picky_vllm(ill_vllm: FakeVLLM, monkeypatch: pytest.MonkeyPatch) -> FakeVLLM:
    """A vLLM that fails one query."""
    answer = ill_vllm.answer

    def picky(received: Received) -> Reply:
        return TOO_LONG if received.body["query"] == BAD else answer(received)

    monkeypatch.setattr(ill_vllm, "answer", picky)
    return ill_vllm


Batch = Callable[..., Any]


@pytest.fixture
def batch(
    how: How, milvus26_uri: str, collection: str, picky_vllm: FakeVLLM, well_vllm: FakeVLLM
) -> Batch:
    """Ask for three queries at once, the second of which fails."""

    async def run(
        mode: Mode, on_error: OnError, *, return_exceptions: bool = False, **ranker: Any
    ) -> list[Got]:
        where = endpoints(mode, picky_vllm.url, well_vllm.url)
        retriever = MilvusVLLMRetriever(
            collection,
            ranker=VLLMRanker(**where, mode=mode, on_error=on_error, **ranker),
            uri=milvus26_uri,
            vector_field="sparse",
            k=K,
        )
        arguments: dict[str, Any] = {"return_exceptions": return_exceptions}
        async with retriever:
            if how == "sync":
                found = retriever.batch([QUERY, BAD, QUERY], **arguments)
            else:
                found = await retriever.abatch([QUERY, BAD, QUERY], **arguments)
        return [items_of(each) if isinstance(each, list) else each for each in found]

    return run


async def test_in_a_batch_only_the_query_that_failed_is_degraded(
    batch: Batch, way: tuple[Mode, OnError]
) -> None:
    degraded = {
        ("server", "client"): Reranked("client"),
        ("server", "skip"): Unranked("too long"),
        ("client", "skip"): Unranked("too long"),
    }
    first, second, third = await batch(*way)

    check(first, WELL[way[0]])
    check(second, degraded[way])
    check(third, WELL[way[0]])


async def test_one_after_another_too_the_queries_of_a_batch_do_not_share_a_failure(
    batch: Batch,
) -> None:
    first, second, third = await batch("server", "client", max_concurrency=1)

    check(first, Reranked("milvus"))
    check(second, Reranked("client"))
    check(third, Reranked("milvus"))


@pytest.mark.parametrize(
    ("mode", "on_error"), [("server", "raise"), ("client", "raise"), ("client", "client")]
)
async def test_a_batch_without_a_way_out_raises(
    batch: Batch, mode: Mode, on_error: OnError
) -> None:
    with pytest.raises(RerankStatusError, match="too long"):
        await batch(mode, on_error)


@pytest.mark.parametrize(
    ("mode", "on_error"), [("server", "raise"), ("client", "raise"), ("client", "client")]
)
async def test_a_batch_may_return_the_error_in_the_place_of_its_query(
    batch: Batch, mode: Mode, on_error: OnError
) -> None:
    first, second, third = await batch(mode, on_error, return_exceptions=True)

    check(first, WELL[mode])
    assert isinstance(second, RerankStatusError)
    check(third, WELL[mode])
