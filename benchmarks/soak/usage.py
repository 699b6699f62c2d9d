"""What the process holds, and whether that has grown."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# What may be there at the end beyond what was there after the first calls. A pool of connections
# may hold one more here, one fewer there.
_MORE_FDS = 8
_MORE_THREADS = 8
_MORE_RSS, _MORE_RSS_MB = 1.10, 20.0


@dataclass(frozen=True)
class Usage:
    """What the process holds, once it has come to rest after so many calls."""

    calls: int
    fds: int
    threads: int
    python_threads: int
    tasks: int
    rss_mb: float
    fds_by_kind: Mapping[str, int]

    @classmethod
    def now(cls, calls: int) -> Usage:
        """Measure."""
        status = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
        )
        kinds: Counter[str] = Counter()
        for descriptor in Path("/proc/self/fd").iterdir():
            with suppress(OSError):  # the one that lists the folder is gone again
                kinds[str(descriptor.readlink()).split(":[")[0]] += 1
        return cls(
            calls=calls,
            fds=sum(kinds.values()),
            threads=int(status["Threads"]),
            python_threads=threading.active_count(),
            tasks=len(asyncio.all_tasks()),
            rss_mb=round(int(status["VmRSS"].split()[0]) / 1024, 1),
            fds_by_kind=dict(kinds),
        )

    def __str__(self) -> str:
        return (
            f"{self.fds} file descriptors, {self.threads} threads ({self.python_threads} of "
            f"Python), {self.tasks} tasks, {self.rss_mb:.0f} MB"
        )


async def collect_garbage() -> None:
    """Let go of what nobody holds any more."""
    gc.collect()
    await asyncio.sleep(0.1)  # what the collector has dropped in an event loop is closed there
    gc.collect()
    # What is free and kept by the allocator is nobody's memory.
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def grown(first: Usage, last: Usage) -> list[str]:
    """Return what has grown beyond its limit."""
    limits = {
        "file descriptors": (first.fds, last.fds, first.fds + _MORE_FDS),
        "threads": (first.threads, last.threads, first.threads + _MORE_THREADS),
        "MB of memory": (first.rss_mb, last.rss_mb, first.rss_mb * _MORE_RSS + _MORE_RSS_MB),
        "tasks": (first.tasks, last.tasks, first.tasks),
    }
    return [
        f"{what}: {after:.0f} at the end, {before:.0f} after the first {first.calls:,} calls, "
        f"limit {limit:.0f}"
        for what, (before, after, limit) in limits.items()
        if after > limit
    ]
