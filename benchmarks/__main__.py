"""Runs the benchmarks and reports every target beside its figure.

    python -m benchmarks                 all of them, 11 to 12 minutes on two cores
    python -m benchmarks overhead peers  some of them
    python -m benchmarks --quick         fewer rounds, to see that everything runs

`make bench` does the first beside a real vLLM. The report is a table and benchmarks/results.json
(results-partial.json after the other two).
A missed target is part of the report, not an error: the exit code is 0 unless a benchmark broke.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.harness import NotRunError, Result, describe_machine, package_versions, say

TARGETS = {
    "overhead": "1 overhead",
    "peers": "2 peers",
    "many_queries": "3 many queries",
    "concurrency": "4 concurrency",
    "throughput": "5 at the limit",
    "startup": "6 start-up and memory",
    "growth": "7 growth",
    "within": "8 within",
}
"""The project's targets, each by the module that measures it."""
RESULTS = Path(__file__).with_name("results.json")
PARTIAL = RESULTS.with_name("results-partial.json")


@dataclass
class Report:
    """What came of a run.

    Attributes:
        machine: Where it was, and the load before it began.
        results: Every figure, by benchmark.
        not_run: Benchmarks that could not be run, and why.
        failed: Benchmarks that broke, and with what.
        seconds: How long each benchmark took.
    """

    machine: dict[str, Any] = field(default_factory=describe_machine)
    results: dict[str, list[Result]] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def as_json(self, *, quick: bool) -> dict[str, Any]:
        """Return the report as it is written to results.json."""
        return {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "quick": quick,
            "machine": self.machine,
            "versions": package_versions(),
            "seconds": self.seconds,
            "not_run": self.not_run,
            "failed": self.failed,
            "results": [
                {"target": TARGETS[name], **asdict(result), "met": result.met}
                for name, results in self.results.items()
                for result in results
            ],
        }


def main() -> int:
    """Run what the command line names; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"of {', '.join(TARGETS)}; none means all")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(TARGETS)
    if unknown:
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    report = Report()
    for name in arguments.names or TARGETS:
        run_one(name, report, quick=arguments.quick)
    show(report)
    # The figures of a whole run are not to be lost to a look at one of them.
    whole = set(arguments.names or TARGETS) == set(TARGETS) and not arguments.quick
    written = RESULTS if whole else PARTIAL
    written.write_text(json.dumps(report.as_json(quick=arguments.quick), indent=2) + "\n")
    say(f"written to {written}")
    return 1 if report.failed else 0


def run_one(name: str, report: Report, *, quick: bool) -> None:
    """Run one benchmark, whatever becomes of it, and add it to the report."""
    say(f"{name} ...")
    started = time.monotonic()
    try:
        report.results[name] = importlib.import_module(f"benchmarks.{name}").run(quick)
    except NotRunError as reason:
        report.not_run[name] = str(reason)
    except Exception as error:  # noqa: BLE001 - the others are to run all the same
        traceback.print_exc()
        report.failed[name] = f"{type(error).__name__}: {error}"
    report.seconds[name] = round(time.monotonic() - started, 1)
    say(f"{name}: {report.seconds[name]:.0f} s")


def show(report: Report) -> None:
    """Print the report as one table."""
    # Written to a file or a pipe, a table must not be cut to the width of a terminal.
    console = Console() if sys.stdout.isatty() else Console(width=170)
    cores, load = report.machine["cores"], report.machine["load_average"][0]
    title = f"Targets and figures, on {cores} cores, load average before: {load}"
    table = Table(title=title, title_justify="left")
    table.add_column("target", no_wrap=True)
    table.add_column("what was measured")
    for heading in ("values", "figure", "limit"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for name, results in report.results.items():
        for result in results:
            sign = "<=" if result.at_most else ">="
            table.add_row(
                TARGETS[name],
                result.what,
                result.behind,
                f"{result.figure:,.3g} {result.unit}",
                f"{sign} {result.limit:,.3g} {result.unit}",
                "[green]met[/]" if result.met else "[red]not met[/]",
            )
        table.add_section()
    for name, reason in report.not_run.items():
        table.add_row(TARGETS[name], escape(reason), "", "", "", "[yellow]not run[/]")
    for name, reason in report.failed.items():
        table.add_row(TARGETS[name], escape(reason), "", "", "", "[red]failed[/]")
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
