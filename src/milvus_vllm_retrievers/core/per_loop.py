"""One client per event loop, since async clients are bound to the loop they first ran in."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class PerLoop(Generic[T]):
    """Makes a value on first use in an event loop, and closes it at the latest with the loop.

    Each value is held by an async generator. Event loops close the async generators that are
    left when they end (`asyncio.run` does), and those that are garbage-collected before, so a
    value is closed in its own loop even if nobody calls `close`.

    Args:
        make: Makes the value; called while the loop runs.
        close: Closes it.
    """

    def __init__(self, make: Callable[[], T], close: Callable[[T], Awaitable[None]]) -> None:
        self._make = make
        self._close = close
        self._lock = threading.Lock()  # threads may each run a loop
        self._held: weakref.WeakKeyDictionary[
            asyncio.AbstractEventLoop, tuple[T, AsyncGenerator[T, None]]
        ] = weakref.WeakKeyDictionary()

    async def get(self) -> T:
        """Return the running loop's value."""
        loop = asyncio.get_running_loop()
        with self._lock:
            held = self._held.get(loop)
        if held is None:
            holder = _hold(self._make, self._close)
            held = await anext(holder), holder
            with self._lock:
                self._forget_closed_loops()
                self._held[loop] = held
        return held[0]

    def discard(self, value: T) -> None:
        """Forget a value that is of no more use; its loop closes it."""
        with self._lock:
            for loop in [loop for loop, held in self._held.items() if held[0] is value]:
                del self._held[loop]

    async def close(self) -> None:
        """Close the running loop's value, if there is one."""
        with self._lock:
            held = self._held.pop(asyncio.get_running_loop(), None)
        if held is not None:
            await held[1].aclose()

    def _forget_closed_loops(self) -> None:
        # A value may refer to its loop, which then never leaves the weak dictionary by itself.
        for loop in [loop for loop in self._held if loop.is_closed()]:
            del self._held[loop]


async def _hold(
    make: Callable[[], T], close: Callable[[T], Awaitable[None]]
) -> AsyncGenerator[T, None]:
    value = make()
    try:
        yield value
    finally:
        await close(value)
