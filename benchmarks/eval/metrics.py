"""Pure: how good a ranking is, and how sure one can be of a mean over queries.

A ranking is a sequence of document ids, best first. The judgements of its query map ids to grades:
whole numbers, where more is better and 0, or no grade, means not relevant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Grades = Mapping[str, int]
Metric = Callable[[Sequence[str], Grades], float]


def ndcg(ranked: Sequence[str], grades: Grades, k: int) -> float:
    """Return the normalised discounted cumulative gain of the first k; 1 is the best order.

    The gain is the grade itself, the discount log2(rank + 1), as trec_eval and BEIR have it.
    """
    best = sorted((grade for grade in grades.values() if grade > 0), reverse=True)
    ideal = _discounted(best[:k])
    gains = [max(grades.get(id_, 0), 0) for id_ in ranked[:k]]
    return _discounted(gains) / ideal if ideal else 0.0


def reciprocal_rank(ranked: Sequence[str], grades: Grades, k: int) -> float:
    """Return 1 / rank of the first relevant document among the first k, 0 if there is none."""
    ranks = (rank for rank, id_ in enumerate(ranked[:k], 1) if grades.get(id_, 0) > 0)
    return 1 / next(ranks, math.inf)


def recall(ranked: Sequence[str], grades: Grades, k: int) -> float:
    """Return the share of the relevant documents that is among the first k."""
    relevant = {id_ for id_, grade in grades.items() if grade > 0}
    return len(relevant.intersection(ranked[:k])) / len(relevant) if relevant else 0.0


def _discounted(gains: Sequence[int]) -> float:
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, 1))


METRICS: Mapping[str, Metric] = {
    "nDCG@10": lambda ranked, grades: ndcg(ranked, grades, 10),
    "MRR@10": lambda ranked, grades: reciprocal_rank(ranked, grades, 10),
    "recall@50": lambda ranked, grades: recall(ranked, grades, 50),
}


@dataclass(frozen=True)
class Estimate:
    """A mean over queries and the interval that holds it with 95 % confidence."""

    mean: float
    low: float
    high: float


def bootstrap(values: Sequence[float], *, resamples: int = 10_000, seed: int = 0) -> Estimate:
    """Estimate the mean over all queries one might have asked, from those that were.

    The queries are drawn anew, with replacement, `resamples` times; the interval is from the 2.5th
    to the 97.5th percentile of the means. The same values give the same interval on every run.

    Args:
        values: One for each query; at least one.
        resamples: How often to draw.
        seed: Of the random numbers.
    """
    sample = np.asarray(values, dtype=np.float64)
    random = np.random.default_rng(seed)
    size = len(sample)
    means = [sample[random.integers(0, size, size)].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(sample.mean()), float(low), float(high))


def paired_gain(
    before: Sequence[float], after: Sequence[float], *, resamples: int = 10_000, seed: int = 0
) -> Estimate:
    """Estimate by how much the second way is better, from the same queries asked both ways.

    Each query is compared with itself, so that easy and hard queries do not widen the interval.

    Args:
        before: One value for each query, without the change.
        after: The values with the change, of the same queries in the same order.
        resamples: How often to draw.
        seed: Of the random numbers.
    """
    gains = [new - old for old, new in zip(before, after, strict=True)]
    return bootstrap(gains, resamples=resamples, seed=seed)
