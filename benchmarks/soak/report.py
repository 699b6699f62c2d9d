"""What came of a run, as JSON and in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

from benchmarks.harness import describe_machine, package_versions
from benchmarks.soak.run import Outcome
from benchmarks.soak.usage import grown


def wrong_with(outcome: Outcome) -> list[str]:
    """Return what is wrong."""
    return [*outcome.tally.failures, *grown(outcome.usages[0], outcome.usages[-1])]


def as_json(
    outcome: Outcome,
    faults: Mapping[str, Any],
    disturbances: Mapping[str, int],
    wrong: Sequence[str],
) -> dict[str, Any]:
    """Return the figures with all that they depend on.

    Args:
        outcome: The figures.
        faults: What the vLLM that fails says of itself.
        disturbances: What else happened, and how often.
        wrong: What is wrong.
    """
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "versions": package_versions(),
        "seconds": round(outcome.seconds, 1),
        "calls_per_second": round(outcome.tally.calls / outcome.seconds, 1),
        "tally": outcome.tally.as_json(),
        "faults": faults,
        "disturbances": disturbances,
        "usage": [asdict(usage) for usage in outcome.usages],
        "usage_after_closing": asdict(outcome.usage_after_closing),
        "log": outcome.logged,
        "strays": outcome.strays,
        "wrong": wrong,
    }


def show(outcome: Outcome, faults: Mapping[str, Any], disturbances: Mapping[str, int]) -> None:
    """Print the figures."""
    for what, figure in _rows(outcome, faults, disturbances):
        print(f"{what:32} {figure}")
    for kind, example in outcome.tally.examples.items():
        print(f"{kind}, for example: {example[:300]}")
    for stray, count in outcome.strays.items():
        print(f"left to the event loop or the garbage collector, {count} times: {stray}")


def _rows(
    outcome: Outcome, faults: Mapping[str, Any], disturbances: Mapping[str, int]
) -> list[tuple[str, object]]:
    tally, seconds = outcome.tally, outcome.seconds
    return [
        ("calls", f"{tally.calls:,} in {seconds:.0f} s: {tally.calls / seconds:.0f}/s"),
        ("the longest", f"{tally.longest[0]:.1f} s ({tally.longest[1]})"),
        ("questions", f"{tally.questions:,}"),
        *((f"  {what}", f"{n:,}") for what, n in tally.outcomes.most_common()),
        *((f"  {what}", f"{n:,}") for what, n in tally.errors.most_common()),
        ("rerank requests", f"{sum(faults['requests'].values()):,}"),
        *((f"  {what}", f"{n:,}") for what, n in sorted(faults["injected"].items())),
        ("  the same again, for a retry", sum(faults["repeated"].values())),
        ("  refused during an outage", faults["during_outage"]),
        *disturbances.items(),
        *((f"after {usage.calls:,} calls", usage) for usage in outcome.usages),
        ("after closing", outcome.usage_after_closing),
    ]
