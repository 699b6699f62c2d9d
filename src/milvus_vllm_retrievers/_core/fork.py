"""Connections belong to the process that opened them: what a fork must not share."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from typing import Protocol


class _Forgets(Protocol):
    def forget_connections(self) -> Sequence[object]:
        """Give up what the parent process opened, without closing it."""


_holders: weakref.WeakSet[_Forgets] = weakref.WeakSet()
# What a child got from its parent is neither used nor freed: to free it may close it.
_inherited: list[object] = []


def forget_in_child(holder: _Forgets) -> None:
    """Have a holder of connections drop them in every process forked from this one.

    A socket that two processes share mixes up their answers.
    """
    _holders.add(holder)


def _after_fork_in_child() -> None:
    for holder in list(_holders):
        _inherited.extend(holder.forget_connections())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
