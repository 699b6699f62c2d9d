"""What the benchmarks share: results, servers in processes of their own, and fair timing.

Two processes stand in for a cluster: Milvus 2.6 (`milvus_process`) and vLLM's rerank API
(`rerank_process`). They are apart from the client, so that its CPU time is measured alone. What is
compared is run in turn, again and again, and a ratio is the median of the rounds' ratios: noise
that lasts longer than a round hits both sides.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Awaitable, Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Generic, TypeVar

from tests.milvus26.process import running_module

K = TypeVar("K", bound=Hashable)  # what names a variant

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = (
    "milvus-vllm-retrievers",
    "pymilvus",
    "milvus-lite",
    "langchain-core",
    "llama-index-core",
    "httpx",
    "pydantic",
    "grpcio",
    "protobuf",
)


# --- Results --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """One figure beside what it should be.

    Attributes:
        what: What was measured, in words.
        figure: The figure.
        limit: What it is held against.
        unit: ``"x"`` for a ratio, else the unit of both numbers.
        at_most: Whether the limit is the largest figure that meets it, or the smallest.
        behind: The two values that a ratio or a difference is of, in words.
        details: Anything else worth keeping; must be JSON.
    """

    what: str
    figure: float
    limit: float
    unit: str = "x"
    at_most: bool = True
    behind: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        """Whether the figure keeps the limit."""
        return self.figure <= self.limit if self.at_most else self.figure >= self.limit


def behind(ours: float, theirs: float, unit: str) -> str:
    """Write the two values that a ratio or a difference is of."""
    return f"{_three_digits(ours)} / {_three_digits(theirs)} {unit}"


def _three_digits(value: float) -> str:
    hundred = 100
    return f"{value:,.0f}" if abs(value) >= hundred else f"{value:.3g}"


class NotRunError(Exception):
    """Raised by a benchmark that lacks something it needs; the message says what."""


def describe_machine() -> dict[str, Any]:
    """Return what the figures depend on: the processor, the memory, the load, Python."""
    return {
        "cpu": _from_proc("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": os.cpu_count(),
        "memory": _from_proc("/proc/meminfo", "MemTotal"),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def package_versions() -> dict[str, str]:
    """Return the versions of what is measured."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _from_proc(path: str, key: str) -> str | None:
    file = Path(path)
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), None)


def real_vllm() -> str | None:
    """Return the endpoint of the real vLLM that `make bench` starts, or None."""
    return os.environ.get("VLLM_ENDPOINT") or None


def say(text: str) -> None:
    """Tell the person who waits."""
    print(f"[bench] {text}", flush=True)


# --- Servers --------------------------------------------------------------------------------------


@contextmanager
def milvus_process(data_dir: str | os.PathLike[str], *, workers: int = 10) -> Iterator[str]:
    """Run the stand-in for Milvus 2.6 (tests/milvus26) and yield its URI.

    Args:
        data_dir: Where the collections are stored; made if missing.
        workers: Searches it does at once; each waits for its rerank call.
    """
    arguments = ("--data-dir", os.fspath(data_dir), "--workers", str(workers))
    with running_module("benchmarks.milvus_server", *arguments) as uri:
        yield uri


@contextmanager
def rerank_process(delay_ms: float = 0) -> Iterator[str]:
    """Run a stand-in for vLLM's rerank API that answers after a fixed delay; yield its URL."""
    with running_module("benchmarks.rerank_server", "--delay-ms", str(delay_ms)) as url:
        yield url


@contextmanager
def replaying(milvus_uri: str, delay_ms: float = 0, *, same_answer: bool = False) -> Iterator[str]:
    """Answer searches that Milvus answered before in its place; yield the URI to ask.

    A search is recorded the first time and answered after a fixed delay from then on, so that
    neither the stand-in's speed nor its worker threads stand between the client and its figure.

    Args:
        milvus_uri: Where the searches are recorded.
        delay_ms: How long an answer takes.
        same_answer: Whether every search gets the first one's answer, whatever it asks.
    """
    arguments = ["--upstream", milvus_uri, "--delay-ms", str(delay_ms)]
    arguments += ["--same-answer"] if same_answer else []
    with running_module("benchmarks.replay_server", *arguments) as uri:
        yield uri


# --- Timing ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one variant, one value for each round.

    Attributes:
        cpu: CPU seconds of this process, all its threads, per call.
        wall: Seconds on the clock per call.
    """

    cpu: Sequence[float]
    wall: Sequence[float]

    @property
    def cpu_ms(self) -> float:
        """The median of the CPU time, in milliseconds per call."""
        return 1000 * statistics.median(self.cpu)

    @property
    def wall_ms(self) -> float:
        """The median of the time on the clock, in milliseconds per call."""
        return 1000 * statistics.median(self.wall)

    def cpu_ratio(self, other: Timing) -> float:
        """Return the median of the rounds' ratios of CPU time, this to the other."""
        return _ratio(self.cpu, other.cpu)

    def wall_ratio(self, other: Timing) -> float:
        """Return the median of the rounds' ratios of time on the clock, this to the other."""
        return _ratio(self.wall, other.wall)


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def interleaved(
    variants: Mapping[K, Callable[[], Any]], rounds: int, repeat: int
) -> dict[K, Timing]:
    """Run variants in turn, `repeat` calls of each in every round, after one call to warm up.

    Many rounds of few calls find smaller differences than few rounds of many.

    Args:
        variants: What to run, by name.
        rounds: How often each has its turn; the first in a round is another every time.
        repeat: Calls in one turn.
    """
    clocks = _Clocks(variants)
    for call in variants.values():
        call()
    for name in _turns(list(variants), rounds):
        call = variants[name]
        with clocks.measuring(name, repeat):
            for _ in range(repeat):
                call()
    return clocks.timings()


async def ainterleaved(
    variants: Mapping[K, Callable[[], Awaitable[Any]]], rounds: int, repeat: int
) -> dict[K, Timing]:
    """Run coroutine functions in turn, one call after another; the async twin of `interleaved`."""
    clocks = _Clocks(variants)
    for call in variants.values():
        await call()
    for name in _turns(list(variants), rounds):
        call = variants[name]
        with clocks.measuring(name, repeat):
            for _ in range(repeat):
                await call()
    return clocks.timings()


def _turns(names: Sequence[K], rounds: int) -> Iterator[K]:
    for turn in range(rounds):
        start = turn % len(names)
        yield from (*names[start:], *names[:start])


class _Clocks(Generic[K]):
    """Measures turns, and keeps the garbage collector out of what was there before them.

    A collection of all that the imports left would hit now one side, now the other.
    """

    def __init__(self, names: Iterable[K]) -> None:
        gc.collect()
        gc.freeze()
        self._cpu: dict[K, list[float]] = {}
        self._wall: dict[K, list[float]] = {}
        for name in names:
            self._cpu[name], self._wall[name] = [], []

    @contextmanager
    def measuring(self, name: K, repeat: int) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self._cpu[name].append((time.process_time() - cpu) / repeat)
        self._wall[name].append((time.perf_counter() - wall) / repeat)

    def timings(self) -> dict[K, Timing]:
        gc.unfreeze()
        return {name: Timing(self._cpu[name], self._wall[name]) for name in self._cpu}
