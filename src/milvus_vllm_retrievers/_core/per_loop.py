"""One client per event loop, since async clients are bound to the loop they first ran in."""

from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any, Generic, TypeVar

T = TypeVar("T")
logger = logging.getLogger("milvus_vllm_retrievers")


class PerLoop(Generic[T]):
    """Makes a value on first use in an event loop, and closes it at the latest with the loop.

    It is closed in its own loop even if nobody calls `close`: when the loop ends, if that closes
    the async generators that are left (`asyncio.run` does), or when the `PerLoop` is
    garbage-collected before that.

    Args:
        make: Makes the value; called while the loop runs.
        close: Closes it.
        connect: Makes it ready for `using`; done once, however many ask for it at once.
    """

    def __init__(
        self,
        make: Callable[[], T],
        close: Callable[[T], Coroutine[Any, Any, None]],
        connect: Callable[[T], Coroutine[Any, Any, object]] | None = None,
    ) -> None:
        self._make = make
        self._close = close
        self._connect = connect
        self._lock = threading.Lock()  # threads may each run a loop
        self._held: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Held[T]]
        self._held = weakref.WeakKeyDictionary()
        # Not at the interpreter's end: a forked process must leave its parent's loops alone.
        weakref.finalize(self, _close_all, self._held).atexit = False

    @property
    def is_open(self) -> bool:
        """Whether a loop has a value that is not closed."""
        return any(not loop.is_closed() for loop in self._held)

    async def get(self) -> T:
        """Return the running loop's value; `close` does not know that it is used."""
        return (await self._get()).value

    def using(self) -> _Use[T]:
        """Return a context manager for the running loop's value: it stays open meanwhile."""
        return _Use(self._get)

    def discard(self, value: T) -> None:
        """Forget a value that is of no more use; its loop closes it once nobody uses it."""
        with self._lock:
            found = {loop: held for loop, held in self._held.items() if held.value is value}
            for loop, held in found.items():
                del self._held[loop]
                held.forgotten = True
        _close_all(found)

    async def close(self) -> None:
        """Close the running loop's value, if there is one.

        A value that is used is forgotten at once, and closed by the last who uses it.
        """
        with self._lock:
            held = self._held.pop(asyncio.get_running_loop(), None)
        if held is not None:
            held.forgotten = True
            if not held.users:
                await held.until_end.aclose()

    async def _get(self) -> _Held[T]:
        loop = asyncio.get_running_loop()
        with self._lock:
            held = self._held.get(loop)
        if held is None:
            held = _Held(self._make(), self._close, self._connect)
            await anext(held.until_end)
            with self._lock:
                self._forget_closed_loops()
                self._held[loop] = held
        return held

    def _forget_closed_loops(self) -> None:
        # A value may refer to its loop, which then never leaves the weak dictionary by itself.
        for loop in [loop for loop in self._held if loop.is_closed()]:
            del self._held[loop]


class _Held(Generic[T]):
    """A value and how many use it."""

    def __init__(
        self,
        value: T,
        close: Callable[[T], Coroutine[Any, Any, None]],
        connect: Callable[[T], Coroutine[Any, Any, object]] | None,
    ) -> None:
        self.value = value
        self.users = 0
        self.connected = connect is None
        self.forgotten = False
        self.until_end = self._until_end()
        self._close = close
        self._closing: _Closing | None = None
        self._connect = connect
        self._connecting = asyncio.Lock()

    async def connect(self) -> None:
        """Make the value ready, unless another task has just done so."""
        async with self._connecting:
            if self._connect is not None and not self.connected:
                await self._connect(self.value)
                self.connected = True

    async def _until_end(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            await self._begin_closing()

    def close_unless_used(self) -> None:
        """Begin to close the value; its last user does so otherwise."""
        if not self.users:
            self._begin_closing()

    def _begin_closing(self) -> _Closing:
        if self._closing is None:
            self._closing = _Closing(self._close_quietly())
        return self._closing

    async def _close_quietly(self) -> None:
        """Close the value; what fails then concerns no call."""
        try:
            await self._close(self.value)
        except Exception:
            logger.debug("closing %s failed", type(self.value).__name__, exc_info=True)


class _Use(Generic[T]):
    """One use of a value; not made of a generator, since every call pays for it."""

    def __init__(self, get: Callable[[], Coroutine[Any, Any, _Held[T]]]) -> None:
        self._get = get

    async def __aenter__(self) -> T:
        held = self._held = await self._get()
        held.users += 1
        if not held.connected:
            try:
                await held.connect()
            except BaseException:
                await self.__aexit__()
                raise
        return held.value

    async def __aexit__(self, *_: object) -> None:
        held = self._held
        held.users -= 1
        if held.forgotten and not held.users:
            await held.until_end.aclose()


class _Closing(asyncio.Task[None]):
    """Closes a value to the end: a loop that ends cancels its tasks, and then waits for them."""

    def cancel(self, msg: object = None) -> bool:  # noqa: ARG002 - as Task has it
        """Go on."""
        return False


def _close_all(held: Mapping[asyncio.AbstractEventLoop, _Held[Any]]) -> None:
    """Have loops close their values soon; called in any thread."""
    for loop, each in list(held.items()):
        with suppress(RuntimeError):  # the loop is closed already
            loop.call_soon_threadsafe(each.close_unless_used)
