"""A soak: thousands of mixed calls, 32 at a time, while the servers fail again and again.

    python -m benchmarks.soak                   5,000 calls
    python -m benchmarks.soak --queries 1000    a shorter run

Every call, of both frameworks, blocking and async, must bring the one right answer that its
`on_error` allows (the items, their order and their scores are known beforehand), or an error of
this package, in time. Nothing may pile up: file descriptors, threads, memory and tasks are measured
after the first 500 calls and at the end. Where VLLM_ENDPOINT is set, a part of the calls reranks
with that real vLLM. `make soak` runs it beside one.

The other processes are Milvus (`tests.milvus26`, killed and restarted on the way) and a vLLM that
fails (`faulty_vllm`), so that what is measured is the client alone. The figures are printed and
written to benchmarks/soak.json (soak-partial.json after a shorter run); the exit code is 1 if
anything went wrong or grew.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from contextlib import ExitStack
from pathlib import Path

import httpx
from pymilvus import MilvusClient
from tests import corpus
from tests.milvus26.process import running_module

from benchmarks.harness import real_vllm
from benchmarks.soak.faults import Disturbances, running_milvus
from benchmarks.soak.frameworks import RANKER_TIMEOUT, Servers
from benchmarks.soak.progress import say
from benchmarks.soak.questions import COLLECTION, TEXTS
from benchmarks.soak.reference import Reference
from benchmarks.soak.report import as_json, show, wrong_with
from benchmarks.soak.run import IN_FLIGHT, Soak

CALLS = 5000
FAULT_EVERY = 50
STALL = RANKER_TIMEOUT + 1.0
RESULTS = Path(__file__).parent.with_suffix(".json")
PARTIAL = RESULTS.with_stem("soak-partial")


def main() -> int:
    """Run it and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--queries", type=int, default=CALLS, help="how many calls to make")
    calls = max(parser.parse_args().queries, 4)
    written = RESULTS if calls >= CALLS else PARTIAL
    wrong = soak(calls, written)
    for line in wrong[:20]:
        say(f"WRONG: {line[:1000]}")
    say(f"written to {written}; " + (f"{len(wrong)} wrong" if wrong else "nothing went wrong"))
    return 1 if wrong else 0


def soak(calls: int, written: Path) -> list[str]:
    """Start the servers, run, report; return what is wrong."""
    with ExitStack() as stack:
        milvus = stack.enter_context(running_milvus())
        failing = ("--every", str(FAULT_EVERY), "--stall", str(STALL))
        vllm = stack.enter_context(running_module("benchmarks.soak.faulty_vllm", *failing))
        reference = _filled(milvus.uri)
        disturbances = Disturbances(milvus, vllm, calls)
        stack.callback(disturbances.close)
        servers = Servers(milvus.uri, vllm, real_vllm())
        with_real = "with" if servers.real_vllm else "without"
        say(f"{calls:,} calls, {IN_FLIGHT} at a time, {with_real} a real vLLM")
        outcome = asyncio.run(Soak(servers, reference, disturbances, calls).run())
        faults = httpx.get(f"{vllm}/stats").json()
    wrong = wrong_with(outcome)
    figures = as_json(outcome, faults, disturbances.counts, wrong)
    written.write_text(json.dumps(figures, indent=2) + "\n")
    show(outcome, faults, disturbances.counts)
    return wrong


def _filled(milvus: str) -> Reference:
    """Fill the collection, and ask what is found there."""
    client = MilvusClient(milvus)
    corpus.create_collection(client, COLLECTION, texts=TEXTS)
    reference = Reference(client)
    client.close()
    return reference


if __name__ == "__main__":
    sys.exit(main())
