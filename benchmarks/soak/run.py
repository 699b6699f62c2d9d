"""The run: makes all the calls, and measures at the beginning, on the way and at the end."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from benchmarks.soak.faults import Disturbances, outage
from benchmarks.soak.frameworks import Servers, aask, ask
from benchmarks.soak.judge import Judge, Tally
from benchmarks.soak.mix import Answer, Call, Mix
from benchmarks.soak.progress import say
from benchmarks.soak.questions import Question, Setup
from benchmarks.soak.reference import Reference
from benchmarks.soak.usage import Usage, collect_garbage
from benchmarks.soak.watch import Strays, Watch
from milvus_vllm_retrievers.errors import MilvusVLLMError

IN_FLIGHT = 32
_BEFORE_FIRST_FIGURES = 500
_KEEP_ALIVE = 3.5  # idle connections are let go of on the first use after that


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        seconds: How long the calls took.
        tally: What came of them.
        usages: What the process held, after some of the calls, and last after all.
        usage_after_closing: The same with all that is long-lived closed.
        logged: How often the package logged each message.
        strays: What was left to the event loop or the garbage collector, how often.
    """

    seconds: float
    tally: Tally
    usages: Sequence[Usage]
    usage_after_closing: Usage
    logged: Mapping[str, int]
    strays: Mapping[str, int]


class Soak:
    """The run itself.

    Args:
        servers: Where everything is.
        reference: What to ask, and what is right.
        disturbances: What happens on the way.
        calls: How many calls to make.
    """

    def __init__(
        self, servers: Servers, reference: Reference, disturbances: Disturbances, calls: int
    ) -> None:
        self._servers = servers
        self._disturbances = disturbances
        self._calls = calls
        self._mix = Mix(servers, reference.queries)
        self._idle_question = reference.queries[0]
        self._tally = Tally()
        self._judge = Judge(reference, self._tally)
        self._watch = Watch(self._tally, calls)
        self._threads = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="call")

    async def run(self) -> Outcome:
        """Make all calls, and measure."""
        strays = Strays()
        strays.install(asyncio.get_running_loop())
        self._start_threads()
        self._watch.start()
        made, seconds, usages = 0, 0.0, []
        for mark in _marks(self._calls):
            started = time.monotonic()
            numbers = iter(range(made + 1, mark + 1))
            await asyncio.gather(*(self._work(numbers) for _ in range(IN_FLIGHT)))
            await self._disturbances.finished()
            seconds += time.monotonic() - started
            made = mark
            await self._rest()
            usages.append(Usage.now(made))
            say(f"at rest after {made:,} calls: {usages[-1]}")
        usage_after_closing = await self._close()
        self._watch.end()
        return Outcome(
            seconds, self._tally, usages, usage_after_closing, strays.logged, strays.found
        )

    def _start_threads(self) -> None:
        together = threading.Barrier(IN_FLIGHT)
        for waiting in [self._threads.submit(together.wait, 30) for _ in range(IN_FLIGHT)]:
            waiting.result()

    async def _work(self, numbers: Iterator[int]) -> None:
        for number in numbers:
            self._disturbances.happen(number)
            await self._make(number, self._mix.call())

    async def _make(self, number: int, call: Call) -> None:
        answers: Sequence[Answer]
        started = time.monotonic()
        with self._watch.over(number, call):
            try:
                answers = await self._answers(call)
            except Exception as error:  # noqa: BLE001 - which ones are right is judged below
                answers = [error] * len(call.questions)
        ended = time.monotonic()
        disturbed = self._disturbances.of_milvus(started, ended)
        self._judge.ended(call, answers, ended - started, disturbed=disturbed)

    async def _answers(self, call: Call) -> Sequence[Answer]:
        if call.is_async:
            return await self._mix.arun(call)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._mix.run, call)

    async def _rest(self) -> None:
        """Let what is idle go, so that only what stays is measured.

        A pool closes connections that were idle for too long when it is next used, so every pool
        is used: that of a fallback too, for which the vLLM refuses Milvus for a while.
        """
        await asyncio.sleep(_KEEP_ALIVE)
        for setup in self._mix.things:
            await self._use_once(setup)
        outage(self._servers.vllm, seconds=_KEEP_ALIVE, of="milvus")
        for setup in self._mix.things:
            if setup.on_error == "client":
                await self._use_once(setup)
        await asyncio.sleep(_KEEP_ALIVE)
        await collect_garbage()

    async def _use_once(self, setup: Setup) -> None:
        thing = self._mix.things[setup]
        items = tuple(range(8)) if setup.kind != "retriever" else ()
        question = Question(self._idle_question, items)
        loop = asyncio.get_running_loop()
        with suppress(MilvusVLLMError):
            await loop.run_in_executor(self._threads, ask, thing, setup, question)
        with suppress(MilvusVLLMError):
            await aask(thing, setup, question)

    async def _close(self) -> Usage:
        """Close what is long-lived, and measure what is left then."""
        for thing in self._mix.things.values():
            await thing.aclose()
        await asyncio.sleep(0.5)
        gc.collect()
        usage = Usage.now(self._calls)
        self._threads.shutdown()
        return usage


def _marks(calls: int) -> list[int]:
    """Return after how many calls to measure: the first 500, all, and in a long run between."""
    first = min(_BEFORE_FIRST_FIGURES, calls // 4)
    between = [calls // 3, calls * 2 // 3] if calls > 4 * _BEFORE_FIRST_FIGURES else []
    return [first, *between, calls]
