"""The time one call may take, handed down to everything it does."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

_A_YEAR = 365 * 24 * 3600.0  # locks and sockets take no time limit that is much longer


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment on the monotonic clock; None is no limit.

    Attributes:
        at: The moment.
        argument: What the user may raise to have more time, for messages.
    """

    at: float | None = None
    argument: str = field(default="the call's timeout", compare=False)

    @classmethod
    def after(cls, seconds: float | None) -> Deadline:
        """Return the moment that is `seconds` from now; more than a year is no limit."""
        if seconds is None or seconds > _A_YEAR:
            return NO_DEADLINE
        return cls(time.monotonic() + seconds)

    def or_after(self, seconds: float | None, argument: str) -> Deadline:
        """Return this moment, or the one `seconds` from now where that comes before."""
        if seconds is None or self.passes_within(seconds):
            return self
        return replace(Deadline.after(seconds), argument=argument)

    def remaining(self) -> float | None:
        """Return the seconds left, never below zero."""
        return None if self.at is None else max(self.at - time.monotonic(), 0.0)

    def within(self, seconds: float | None) -> float | None:
        """Return the seconds left, or `seconds` where that is less."""
        limits = [limit for limit in (self.remaining(), seconds) if limit is not None]
        return min(limits, default=None)

    def share(self, part: float) -> Deadline:
        """Return the moment when only that part, between 0 and 1, of the time left is used."""
        left = self.remaining()
        return self if left is None else Deadline.after(part * left)

    def passes_within(self, seconds: float) -> bool:
        """Tell whether the moment will have come `seconds` from now."""
        left = self.remaining()
        return left is not None and left <= seconds


NO_DEADLINE = Deadline()
