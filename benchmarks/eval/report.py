"""What was measured, as tables, as JSON and as a picture."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.eval.agreement import Agreement
from benchmarks.eval.datasets import Dataset
from benchmarks.eval.measure import CURVE_METRIC, CURVE_SEARCHES, CurvePoint, Measured
from benchmarks.eval.metrics import METRICS, Estimate, bootstrap, paired_gain
from benchmarks.eval.systems import FETCH_K, K
from benchmarks.harness import describe_machine, package_versions

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Row:
    """One line of a table: what it is about, and an estimate for each column."""

    what: str
    estimates: Mapping[str, Estimate]


@dataclass(frozen=True)
class Point:
    """A reranked search's quality with one size of the pool.

    Attributes:
        search: What found the candidates.
        fetch_k: Candidates per vector field; None is the search by itself.
        quality: The mean of the curve's metric.
        gain: What reranking changed, per query; None for the search by itself.
    """

    search: str
    fetch_k: int | None
    quality: Estimate
    gain: Estimate | None


@dataclass(frozen=True)
class Report:
    """What is shown and written.

    Attributes:
        systems: Quality of each system.
        gains: What reranking changes, per query, of each search.
        curve: Points of each search, the search by itself first.
        measured: Where they come from.
    """

    systems: Sequence[Row]
    gains: Sequence[Row]
    curve: Sequence[Point]
    measured: Measured


def report_of(measured: Measured) -> Report:
    """Estimate means and intervals from what was measured."""
    systems = [
        Row(
            f"{system.search}, reranked" if system.reranked else system.search,
            {name: bootstrap(values) for name, values in system.values.items()},
        )
        for system in measured.systems
    ]
    pairs = zip(measured.systems[::2], measured.systems[1::2], strict=True)
    gains = [
        Row(
            alone.search,
            {name: paired_gain(alone.values[name], after.values[name]) for name in METRICS},
        )
        for alone, after in pairs
    ]
    return Report(systems, gains, list(_points(measured.curve)), measured)


def _points(curve: Sequence[CurvePoint]) -> Iterator[Point]:
    alone = {point.search: point.values for point in curve if point.fetch_k is None}
    for point in curve:
        gain = None if point.fetch_k is None else paired_gain(alone[point.search], point.values)
        yield Point(point.search, point.fetch_k, bootstrap(point.values), gain)


# --- Tables ---------------------------------------------------------------------------------------


def show(report: Report, dataset: Dataset) -> None:
    """Print the report."""
    # Written to a file or a pipe, a table must not be cut to the width of a terminal.
    console = Console() if sys.stdout.isatty() else Console(width=125)
    counts = f"{len(dataset.queries):,} queries, {len(dataset.documents):,} documents"
    console.print(f"\n[bold]{escape(dataset.name)}[/]: {dataset.description}; {counts}")
    console.print(_table("Quality, with 95 % intervals", report.systems, sign=""))
    console.print(_table("What reranking changes, query by query", report.gains, sign="+"))
    told = "; ".join(f"{row.what} {_verdict(row.estimates[CURVE_METRIC])}" for row in report.gains)
    console.print(f"{CURVE_METRIC}, reranked beside not, by the whole interval: {told}.\n")
    console.print(_curve_table(report))
    for line in _agreements(report.measured):
        console.print(line)


def _agreements(measured: Measured) -> Iterator[str]:
    if measured.modes:
        lists = sum(agreement.lists for agreement in measured.modes)
        same = sum(agreement.same for agreement in measured.modes)
        yield (
            f"Reranked inside Milvus and reranked from here: [bold]{same:,} of {lists:,} lists[/] "
            f"have the same ids, order and scores (float32); wanted: all, {_met(same == lists)}."
        )
    for agreement in measured.modes:
        if not agreement.complete:
            yield f"  {_told(agreement)}"
    for agreement in measured.repeated:
        yield f"With vLLM asked again for every list: {_told(agreement)}"


def _met(met: bool) -> str:
    return "[green]met[/]" if met else "[red]not met[/]"


def _verdict(gain: Estimate) -> str:
    if gain.low > 0:
        return "[green]gains[/]"
    return "[red]loses[/]" if gain.high < 0 else "shows no difference"


def _told(agreement: Agreement) -> str:
    return (
        f"{agreement.what}: {agreement.same:,} of {agreement.lists:,} lists the same, "
        f"{agreement.same_ids:,} but for scores; scores differ by up to "
        f"{agreement.score_difference:.2g}"
    )


def _table(title: str, rows: Sequence[Row], sign: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("search", no_wrap=True)
    for metric in METRICS:
        table.add_column(metric, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.what, *(_shown(row.estimates[metric], sign) for metric in METRICS))
    return table


def _curve_table(report: Report) -> Table:
    title = f"{CURVE_METRIC} by fetch_k, {report.measured.curve_queries:,} queries"
    table = Table(title=title, title_justify="left")
    table.add_column("fetch_k", justify="right", no_wrap=True)
    for search in CURVE_SEARCHES:
        table.add_column(f"{search}, reranked", justify="right", no_wrap=True)
        table.add_column("change", justify="right", no_wrap=True)
    for size in dict.fromkeys(point.fetch_k for point in report.curve):
        cells = []
        for point in report.curve:
            if point.fetch_k == size:
                gain = "" if point.gain is None else _shown(point.gain, sign="+")
                cells += [_shown(point.quality), gain]
        table.add_row("not reranked" if size is None else str(size), *cells)
    return table


def _shown(estimate: Estimate, sign: str = "") -> str:
    return f"{estimate.mean:{sign}.3f} [{estimate.low:{sign}.3f}, {estimate.high:{sign}.3f}]"


# --- JSON -----------------------------------------------------------------------------------------


def as_json(
    report: Report, dataset: Dataset, setup: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """Return the report with all that its figures depend on.

    Args:
        report: The figures.
        dataset: The set that was asked.
        setup: What `describe_servers` returned.
        seconds: How long it all took.
    """
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds),
        "dataset": {
            "name": dataset.name,
            "description": dataset.description,
            "documents": len(dataset.documents),
            "queries": len(dataset.queries),
        },
        "setup": {**setup, "k": K, "fetch_k": FETCH_K},
        "machine": describe_machine(),
        "versions": package_versions(),
        "systems": [_row_as_json(row) for row in report.systems],
        "gains": [_row_as_json(row) for row in report.gains],
        "fetch_k": {
            "metric": CURVE_METRIC,
            "queries": report.measured.curve_queries,
            "points": [asdict(point) for point in report.curve],
        },
        "server_and_client_modes": [asdict(each) for each in report.measured.modes],
        "scored_anew": [asdict(each) for each in report.measured.repeated],
    }


def _row_as_json(row: Row) -> dict[str, Any]:
    return {"search": row.what, **{name: asdict(row.estimates[name]) for name in METRICS}}


# --- Picture --------------------------------------------------------------------------------------


def draw(report: Report, dataset: Dataset, path: Path) -> None:
    """Draw the quality of the reranked searches by `fetch_k`, intervals as bands."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - only a picture needs it

    figure = Figure(figsize=(9, 4.2), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(CURVE_SEARCHES), sharey=True)
    for axes, search in zip(panels, CURVE_SEARCHES, strict=True):
        _draw_search(axes, search, [point for point in report.curve if point.search == search])
    panels[0].set_ylabel(CURVE_METRIC)
    figure.supxlabel("fetch_k: candidates per vector field that are reranked", fontsize=10)
    figure.suptitle(
        f"{dataset.name}: {report.measured.curve_queries:,} queries, "
        f"{len(dataset.documents):,} documents; bands are 95 % intervals",
        fontsize=10,
    )
    figure.savefig(path)


def _draw_search(axes: Axes, search: str, points: Sequence[Point]) -> None:
    alone = next(point.quality for point in points if point.fetch_k is None)
    reranked = [(point.fetch_k, point.quality) for point in points if point.fetch_k is not None]
    sizes = [size for size, _ in reranked]
    axes.axhline(alone.mean, color="#777777", linestyle="--", label="not reranked")
    axes.plot(sizes, [each.mean for _, each in reranked], "o-", color="#0b6e99", label="reranked")
    axes.fill_between(
        sizes,
        [each.low for _, each in reranked],
        [each.high for _, each in reranked],
        color="#0b6e99",
        alpha=0.15,
        linewidth=0,
    )
    axes.set_xscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_title(search, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, loc="lower right")
