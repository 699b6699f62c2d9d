"""The evaluation's metrics: values worked out by hand, and what holds for every ranking."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

import pytest
from benchmarks.eval.metrics import METRICS, bootstrap, ndcg, paired_gain, recall, reciprocal_rank
from hypothesis import assume, given
from hypothesis import strategies as st

IDS = [f"d{number}" for number in range(12)]

rankings = st.lists(st.sampled_from(IDS), unique=True)
judgements = st.dictionaries(st.sampled_from(IDS), st.integers(-1, 3))
metric_names = st.sampled_from(sorted(METRICS))


def test_ndcg_weighs_grades_by_rank() -> None:
    # Found: 1 at rank 1, 3 at rank 3. Best: 3, 2, 1.
    found = 1 + 3 / math.log2(4)
    best = 3 + 2 / math.log2(3) + 1 / math.log2(4)

    assert ndcg(["a", "x", "c"], {"a": 1, "b": 2, "c": 3}, 10) == pytest.approx(found / best)


def test_ndcg_of_one_relevant_document_is_its_discount() -> None:
    assert ndcg(["x", "y", "a"], {"a": 1}, 10) == pytest.approx(0.5)


def test_ndcg_counts_no_more_documents_than_the_cut() -> None:
    assert ndcg(["x", "a"], {"a": 1}, 1) == 0
    # The second relevant document has no place in the best order of one either.
    assert ndcg(["a"], {"a": 1, "b": 1}, 1) == 1


def test_reciprocal_rank_is_of_the_first_relevant_document() -> None:
    assert reciprocal_rank(["x", "a", "b"], {"a": 1, "b": 2}, 10) == pytest.approx(1 / 2)
    assert reciprocal_rank(["x", "y", "a"], {"a": 1}, 2) == 0


def test_recall_is_the_share_that_was_found() -> None:
    assert recall(["a", "x", "b", "c"], {"a": 1, "b": 2, "c": 1}, 3) == pytest.approx(2 / 3)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("ranked", [[], ["x", "y"]])
def test_an_empty_or_wholly_irrelevant_ranking_is_worth_nothing(
    name: str, ranked: list[str]
) -> None:
    assert METRICS[name](ranked, {"a": 1, "x": 0, "y": -1}) == 0


@given(rankings, judgements, metric_names)
def test_every_metric_stays_between_0_and_1(
    ranked: list[str], grades: dict[str, int], name: str
) -> None:
    assert 0 <= METRICS[name](ranked, grades) <= 1 + 1e-12


@given(judgements, metric_names)
def test_the_best_order_is_worth_1(grades: dict[str, int], name: str) -> None:
    assume(any(grade > 0 for grade in grades.values()))

    ranked = sorted(grades, key=lambda id_: -grades[id_])

    assert METRICS[name](ranked, grades) == pytest.approx(1)


@given(rankings, judgements, metric_names, st.randoms())
def test_which_irrelevant_document_stands_where_does_not_matter(
    ranked: list[str], grades: dict[str, int], name: str, random: Random
) -> None:
    irrelevant = [id_ for id_ in ranked if grades.get(id_, 0) <= 0]
    shuffled = iter(random.sample(irrelevant, len(irrelevant)))
    other = [id_ if grades.get(id_, 0) > 0 else next(shuffled) for id_ in ranked]

    assert METRICS[name](other, grades) == METRICS[name](ranked, grades)


@given(rankings, judgements, metric_names, st.data())
def test_moving_a_relevant_document_up_never_hurts(
    ranked: list[str], grades: dict[str, int], name: str, data: st.DataObject
) -> None:
    assume(len(ranked) > 1)
    lower = data.draw(st.integers(1, len(ranked) - 1))
    above, below = ranked[lower - 1], ranked[lower]
    assume(grades.get(below, 0) >= max(grades.get(above, 0), 0))

    better = [*ranked[: lower - 1], below, above, *ranked[lower + 1 :]]

    assert METRICS[name](better, grades) >= METRICS[name](ranked, grades) - 1e-12


values = st.lists(st.floats(0, 1), min_size=1, max_size=30)


@given(values)
def test_an_interval_holds_the_mean_and_stays_among_the_values(sample: list[float]) -> None:
    estimate = bootstrap(sample, resamples=200)

    assert estimate.mean == pytest.approx(sum(sample) / len(sample))
    assert min(sample) - 1e-9 <= estimate.low <= estimate.high <= max(sample) + 1e-9


def test_an_interval_is_the_same_on_every_run() -> None:
    sample = [0.0, 0.3, 1.0, 0.5]

    assert bootstrap(sample, resamples=500) == bootstrap(sample, resamples=500)
    assert bootstrap(sample, resamples=500) != bootstrap(sample, resamples=500, seed=1)


def test_an_interval_is_as_wide_as_theory_has_it() -> None:
    # A share of one half in 400 queries: 1.96 standard errors of 0.025 to each side.
    estimate = bootstrap([0.0, 1.0] * 200)

    assert estimate.low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.005)
    assert estimate.high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.005)


def test_a_gain_is_of_each_query_over_itself() -> None:
    before = [0.1, 0.9, 0.4, 0.0]
    after = [value + 0.1 for value in before]

    gain = paired_gain(before, after, resamples=500)

    # However far the queries are apart, each gains the same: there is nothing to be unsure of.
    assert [gain.mean, gain.low, gain.high] == pytest.approx([0.1, 0.1, 0.1])


@pytest.mark.parametrize(("before", "after"), [([0.5], [0.5, 0.5]), ([0.5, 0.5], [0.5])])
def test_a_gain_needs_the_same_queries_both_ways(
    before: Sequence[float], after: Sequence[float]
) -> None:
    with pytest.raises(ValueError, match="zip"):
        paired_gain(before, after)
