"""Looks for calls that hang, and for errors that nobody was there to catch."""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import re
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.soak.judge import Tally
from benchmarks.soak.mix import Call
from benchmarks.soak.progress import Progress, say

_MARGIN = 5.0  # of a call beyond its timeout, before it counts as hanging; two cores are busy
_GIVE_UP_AFTER = 60.0  # beyond that: it will not come back


@dataclass
class _InFlight:
    """A call that is being made."""

    call: Call
    started: float
    task: asyncio.Task[Any] | None
    overdue: bool = False


class Watch(threading.Thread):
    """Looks for calls that hang, and says now and then how far it is.

    Args:
        tally: Where to note them.
        calls: How many calls there are.
    """

    def __init__(self, tally: Tally, calls: int) -> None:
        super().__init__(name="watch", daemon=True)
        self._tally = tally
        self._progress = Progress(tally, calls)
        self._ended = threading.Event()
        self._in_flight: dict[int, _InFlight] = {}

    @contextmanager
    def over(self, number: int, call: Call) -> Iterator[None]:
        """Watch a call while the block runs, from within its task."""
        self._in_flight[number] = _InFlight(call, time.monotonic(), asyncio.current_task())
        try:
            yield
        finally:
            del self._in_flight[number]

    def run(self) -> None:
        """Watch until the end."""
        while not self._ended.wait(0.5):
            now = time.monotonic()
            for each in list(self._in_flight.values()):
                self._look_at(each, now - each.started - each.call.limit - _MARGIN)
            self._progress.look()

    def end(self) -> None:
        """Stop watching."""
        self._ended.set()
        self.join()

    def _look_at(self, each: _InFlight, too_long: float) -> None:
        if too_long > 0 and not each.overdue:
            each.overdue = True
            self._tally.failures.append(
                f"{each.call.name} on {each.call.setup} took longer than {each.call.limit:.0f} s"
            )
            say(f"HANGS: {self._tally.failures[-1]}")
            if each.task is not None:
                each.task.print_stack(file=sys.stderr)
            faulthandler.dump_traceback(all_threads=True)
        if too_long > _GIVE_UP_AFTER:
            say("FAILED: it does not come back")
            # Its thread would never end. The servers end when their standard input closes.
            os._exit(1)


class Strays(logging.Handler):
    """Collects what nobody was there to catch, and counts what the package logs.

    Attributes:
        found: How often each came up; numbers in them are left out.
        logged: How often the package logged each message.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: Counter[str] = Counter()
        self.logged: Counter[str] = Counter()

    def install(self, loop: asyncio.AbstractEventLoop) -> None:
        """Listen everywhere."""
        # It reports every failed call on its own, with a traceback.
        logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
        for name in ("asyncio", "milvus_vllm_retrievers"):
            logging.getLogger(name).addHandler(self)
            logging.getLogger(name).propagate = False
        loop.set_exception_handler(lambda _loop, context: self._note("loop", context))
        sys.unraisablehook = lambda context: self._note("unraisable", _attributes(context))
        threading.excepthook = lambda context: self._note("thread", _attributes(context))
        warnings.simplefilter("always", ResourceWarning)
        warnings.showwarning = lambda message, *_args, **_named: self._note(
            "warning", {"message": str(message)}
        )

    def emit(self, record: logging.LogRecord) -> None:
        """Take a line of a log."""
        if record.name.startswith("milvus_vllm_retrievers"):
            self.logged[str(record.msg)] += 1
        else:
            self._note(record.name, {"message": record.getMessage()[:300]})

    def _note(self, where: str, context: Mapping[str, Any]) -> None:
        error = context.get("exception") or context.get("exc_value")
        message = context.get("message") or context.get("err_msg") or ""
        text = f"{where}: {message} {error!r}"[:200]
        self.found[re.sub(r"\d+", "N", text)] += 1


def _attributes(context: Any) -> dict[str, Any]:
    """Return the attributes of what a hook is given."""
    return {name: getattr(context, name) for name in dir(context) if not name.startswith("_")}
