"""Target 4: 200 queries at once, beside the bare client doing the same calls.

    python -m benchmarks concurrency

`ainvoke` and `aretrieve` of our retrievers, of the ones written by hand (see overhead.py) and bare
`AsyncMilvusClient.hybrid_search`, all over one client, while a rerank call takes 50 ms. Measured
are the throughput (the median over the rounds of the ratio) and the event loop's worst pause: how
late a task wakes up that sleeps for 1 ms at a time. What else runs on the machine can only make a
pause longer, so the shortest of the rounds' worst pauses counts.

Twice: with the Milvus stand-in, 200 searches at once, where the stand-in is what limits; and with
its answers replayed after the 50 ms, where the client's own work is all there is. The framework's
share of it is what the retriever written by hand needs beyond the bare client.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.corpus import QUERIES
from benchmarks.harness import Result, behind, say
from benchmarks.overhead import Setting, arguments, setting

AT_ONCE = 200
RERANK_MS = 50
LEAST_THROUGHPUT = 0.9
LONGEST_EXTRA_PAUSE = 10.0
BARE = "bare"
_TICK = 0.001

Ask = Callable[[str], Awaitable[Any]]


@dataclass(frozen=True)
class Burst:
    """What became of one burst of queries.

    Attributes:
        throughput: Queries per second.
        pause_ms: The event loop's worst pause.
    """

    throughput: float
    pause_ms: float


async def burst(ask: Ask) -> Burst:
    """Ask many queries at once, with a heartbeat beside them."""
    gc.collect()
    heart = asyncio.create_task(worst_pause())
    await asyncio.sleep(20 * _TICK)  # the heart beats before the first query starts
    started = time.perf_counter()
    await asyncio.gather(*(ask(QUERIES[i % len(QUERIES)]) for i in range(AT_ONCE)))
    seconds = time.perf_counter() - started
    await asyncio.sleep(20 * _TICK)
    heart.cancel()
    return Burst(AT_ONCE / seconds, 1000 * await heart)


async def worst_pause() -> float:
    """Return, when cancelled, by how many seconds a beat came too late at most."""
    worst = 0.0
    try:
        while True:
            expected = time.perf_counter() + _TICK
            await asyncio.sleep(_TICK)
            worst = max(worst, time.perf_counter() - expected)
    except asyncio.CancelledError:
        return worst


async def bursts(variants: Mapping[str, Ask], rounds: int) -> dict[str, list[Burst]]:
    """Run bursts of every variant in turn, after one of each to warm up."""
    names = list(variants)
    seen: dict[str, list[Burst]] = {name: [] for name in names}
    for turn in range(-1, rounds):
        for name in (*names[turn % len(names) :], *names[: turn % len(names)]):
            measured = await burst(variants[name])
            if turn >= 0:
                seen[name].append(measured)
    return seen


def variants(up: Setting) -> dict[str, Ask]:
    """Return what is compared, by name."""

    async def bare(query: str) -> Any:
        return await up.async_client.hybrid_search(**arguments(query, up.functions[query]))

    found: dict[str, Ask] = {BARE: bare}
    for pair in up.pairs:
        found[pair.framework] = pair.aours
        found[by_hand(pair.framework)] = pair.aby_hand
    return found


def by_hand(framework: str) -> str:
    """Return the name of a framework's retriever written by hand."""
    return f"{framework} by hand"


def results(framework: str, where: str, seen: Mapping[str, Sequence[Burst]]) -> list[Result]:
    """Return throughput and pause of one framework against one server."""
    ours, hand = _against_bare(seen, framework), _against_bare(seen, by_hand(framework))
    shown = {BARE: BARE, framework: "ours", by_hand(framework): "by hand"}
    per_second = {to: _median(seen[name], "throughput") for name, to in shown.items()}
    pauses = {to: pause_of(seen[name]) for name, to in shown.items()}
    details = {
        "queries_per_second": per_second,
        "worst_pause_ms": pauses,
        "median_pause_ms": {to: _median(seen[name], "pause_ms") for name, to in shown.items()},
        "rounds": len(seen[BARE]),
    }
    return [
        Result(
            what=(
                f"{framework}, {where}: throughput of {AT_ONCE} at once, ours / bare client "
                f"(by hand {hand[0]:.2f})"
            ),
            figure=ours[0],
            limit=LEAST_THROUGHPUT,
            at_most=False,
            behind=behind(per_second["ours"], per_second[BARE], "queries/s"),
            details={"by_hand": hand[0], **details},
        ),
        Result(
            what=(
                f"{framework}, {where}: worst pause of the event loop, ours - bare client "
                f"(by hand {hand[1]:.0f} ms)"
            ),
            figure=ours[1],
            limit=LONGEST_EXTRA_PAUSE,
            unit="ms",
            behind=behind(pauses["ours"], pauses[BARE], "ms"),
            details={"by_hand": hand[1], **details},
        ),
    ]


def _against_bare(seen: Mapping[str, Sequence[Burst]], name: str) -> tuple[float, float]:
    """Return the median of the throughput's ratio, and the difference of the pauses."""
    rounds = list(zip(seen[name], seen[BARE], strict=True))
    return (
        statistics.median(one.throughput / bare.throughput for one, bare in rounds),
        pause_of(seen[name]) - pause_of(seen[BARE]),
    )


def pause_of(bursts_: Sequence[Burst]) -> float:
    """Return the worst pause that no other process has made longer."""
    return min(one.pause_ms for one in bursts_)


def _median(bursts_: Sequence[Burst], what: str) -> float:
    return statistics.median(getattr(one, what) for one in bursts_)


async def measure(quick: bool) -> list[Result]:
    """Measure both frameworks against the stand-in and against replayed answers."""
    found = []
    for replay, rounds in ((False, 1 if quick else 3), (True, 3 if quick else 15)):
        where = "answers replayed" if replay else "Milvus stand-in"
        say(f"  {where}: {rounds} rounds of {AT_ONCE} queries at once, five ways")
        async with setting(replay=replay, rerank_ms=RERANK_MS, workers=AT_ONCE) as up:
            seen = await bursts(variants(up), rounds)
            for pair in up.pairs:
                found += results(pair.framework, where, seen)
    return found


def run(quick: bool) -> list[Result]:
    """Return the figures of target 4."""
    return asyncio.run(measure(quick))
