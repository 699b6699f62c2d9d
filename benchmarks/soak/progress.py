"""Tells the person who waits."""

from __future__ import annotations

import time

from benchmarks.soak.judge import Tally

_SAY_EVERY = 5.0  # seconds


def say(text: str) -> None:
    """Tell the person who waits."""
    print(f"[soak] {text}", flush=True)


class Progress:
    """Says now and then how far it is.

    Args:
        tally: What came of the calls so far.
        calls: How many there are in all.
    """

    def __init__(self, tally: Tally, calls: int) -> None:
        self._tally = tally
        self._calls = calls
        self._said = time.monotonic(), 0

    def look(self) -> None:
        """Say it, if it was said some time ago."""
        now, tally, (last, calls_then) = time.monotonic(), self._tally, self._said
        if now <= last + _SAY_EVERY:
            return
        rate = (tally.calls - calls_then) / (now - last)
        self._said = now, tally.calls
        say(
            f"{tally.calls:,} of {self._calls:,} calls, {rate:.0f}/s; "
            f"{tally.outcomes['degraded']:,} degraded, {tally.errors.total():,} errors, "
            f"{len(tally.failures):,} wrong"
        )
