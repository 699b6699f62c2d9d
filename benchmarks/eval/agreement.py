"""Pure: what a query got, and whether two ways of asking got the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ranked:
    """What one query got.

    Attributes:
        ids: Documents, best first.
        scores: What each was ordered by; None where the model scored nothing.
    """

    ids: tuple[str, ...]
    scores: tuple[float | None, ...]

    def same_as(self, other: Ranked) -> bool:
        """Tell whether ids, order and scores (as float32) are the same."""
        return self._items() == other._items()

    def score_difference(self, other: Ranked) -> float:
        """Return the largest difference of a document's two scores, of those in both lists."""
        ours, theirs = dict(self._items()), dict(other._items())
        pairs = ((ours[id_], theirs[id_]) for id_ in ours.keys() & theirs.keys())
        return max((abs(a - b) for a, b in pairs if a is not None and b is not None), default=0.0)

    def _items(self) -> list[tuple[str, float | None]]:
        rounded = [None if score is None else float(np.float32(score)) for score in self.scores]
        return list(zip(self.ids, rounded, strict=True))


@dataclass(frozen=True)
class Agreement:
    """How many lists two ways of asking have in common.

    Attributes:
        what: What was compared.
        lists: Lists compared, one for each query.
        same: Those of the same ids in the same order with the same scores.
        same_ids: Those of the same ids in the same order, whatever the scores.
        score_difference: The largest difference of one document's two scores.
        differing: A few of the queries whose lists differ.
    """

    what: str
    lists: int
    same: int
    same_ids: int
    score_difference: float
    differing: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether all lists are the same."""
        return self.same == self.lists


def compare(
    what: str, queries: Sequence[str], one: Sequence[Ranked], other: Sequence[Ranked]
) -> Agreement:
    """Compare the lists of two ways of asking the same queries.

    Args:
        what: What is compared.
        queries: Query texts.
        one: A list for each query.
        other: The same queries' lists, got the other way.
    """
    rows = list(zip(queries, one, other, strict=True))
    differing = [query for query, a, b in rows if not a.same_as(b)]
    return Agreement(
        what=what,
        lists=len(rows),
        same=len(rows) - len(differing),
        same_ids=sum(a.ids == b.ids for _, a, b in rows),
        score_difference=max((a.score_difference(b) for _, a, b in rows), default=0.0),
        differing=tuple(differing[:5]),
    )
