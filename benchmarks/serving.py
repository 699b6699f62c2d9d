"""What the benchmarks' own servers share: they serve as long as whoever started them lives."""

from __future__ import annotations

import asyncio
import sys
import threading


async def until_stdin_closes(url: str) -> None:
    """Tell where the server listens, and return when standard input closes."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    print(url, flush=True)

    def wait_for_end() -> None:
        sys.stdin.read()
        loop.call_soon_threadsafe(stopped.set)

    threading.Thread(target=wait_for_end, daemon=True).start()
    await stopped.wait()
