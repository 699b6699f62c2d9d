"""Lines that tell the person who waits how far it is."""

from __future__ import annotations

import time

_SAY_EVERY = 5.0  # seconds


def say(text: str) -> None:
    """Tell the person who waits."""
    print(f"[eval] {text}", flush=True)


class Progress:
    """Counts what is done and says so now and then, and in the end.

    Args:
        what: What is counted, in the plural.
        total: How many there are.
    """

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._started = self._said = time.monotonic()

    def advance(self, count: int) -> None:
        """Note that so many more are done."""
        self._done += count
        now = time.monotonic()
        if now >= self._said + _SAY_EVERY or self._done >= self._total:
            seconds = now - self._started
            say(f"  {self._what}: {self._done:,} of {self._total:,} ({seconds:.0f} s)")
            self._said = now
