"""Target 2: what a user would pick instead, beside our retrievers: same candidates, same lists.

    python -m benchmarks peers

Peers: for LangChain, langchain-milvus and langchain-cohere; for LlamaIndex, its Milvus store and
its Cohere postprocessor (`peers_langchain` and `peers_llama_index` say how). Both rerank with
vLLM's Cohere-compatible API, from the client; ours has Milvus rerank. 50 candidates of 500 to 820
characters, found by a dense and a BM25 field, become 5 results. That both sides return the same
lists is asserted before anything is measured.

CPU time and received bytes are the client's, with stand-ins that cost it nothing; the bytes are
counted by a proxy, from Milvus and from the reranker together. Latency is measured twice: with the
stand-ins, so that the model's time is left out, and with a real vLLM, whose time is nearly all of
it and, on a machine with two processors, varies by more than what either side adds to it.

Prerequisites: a package index that pip reaches, on first use, when each peer gets an environment
of its own (`.venv-peers-*`, 1 to 2 minutes); VLLM_ENDPOINT for latency (`make bench` sets it).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import (
    ROOT,
    NotRunError,
    Result,
    behind,
    milvus_process,
    real_vllm,
    rerank_process,
    say,
)

CPU_LIMIT = 0.45
BYTES_LIMIT = 0.3
LATENCY_LIMIT = 1.0
ROUNDS = 30
LATENCY_SECONDS = 45
QUICK_ROUNDS = 4
QUICK_LATENCY_SECONDS = 5


@dataclass(frozen=True)
class Peer:
    """One framework's own parts.

    Attributes:
        name: The framework.
        module: What measures it, in its environment.
        requirements: What that environment has.
    """

    name: str
    module: str
    requirements: tuple[str, ...]

    @property
    def environment(self) -> Path:
        """Where the environment is."""
        return ROOT / f".venv-{self.module.rpartition('.')[2].replace('_', '-')}"

    @property
    def python(self) -> Path:
        """The environment's interpreter."""
        return self.environment / "bin" / "python"


LANGCHAIN = Peer(
    "LangChain",
    "benchmarks.peers_langchain",
    (
        "--editable=.[langchain]",
        "langchain-milvus==0.4.*",
        "langchain-cohere==0.6.*",
        "langchain-classic>=1.0",
    ),
)
LLAMA_INDEX = Peer(
    "LlamaIndex",
    "benchmarks.peers_llama_index",
    (
        "--editable=.[llama-index]",
        "llama-index-vector-stores-milvus==1.2.*",
        "llama-index-postprocessor-cohere-rerank==0.10.*",
        "pymilvus>=2.6.10,<3",
    ),
)


def run(quick: bool) -> list[Result]:
    """Measure both peers."""
    if not real_vllm():
        say("peers: latency is not run: VLLM_ENDPOINT is not set (make bench starts a vLLM)")
    results = []
    for peer in (LANGCHAIN, LLAMA_INDEX):
        install(peer)
        results += _results(peer, _measure(peer, quick=quick))
    return results


def _measure(peer: Peer, *, quick: bool) -> dict[str, Any]:
    rounds = QUICK_ROUNDS if quick else ROUNDS
    seconds = QUICK_LATENCY_SECONDS if quick else LATENCY_SECONDS
    with (
        tempfile.TemporaryDirectory() as folder,
        milvus_process(folder) as milvus,
        rerank_process() as rerank,
    ):
        arguments = ["--milvus", milvus, "--rerank", rerank, "--rounds", str(rounds)]
        if vllm := real_vllm():
            arguments += ["--vllm", vllm, "--seconds", str(seconds)]
        return run_in(peer, peer.module, *arguments)


def _results(peer: Peer, figures: dict[str, Any]) -> list[Result]:
    """Return what was measured of one peer; each figure is beside the values it is of."""
    cpu, received, real = figures["cpu"], figures["bytes"], figures.get("latency")
    rows = [
        ("client CPU per query", cpu, ("ratio", "ours_ms", "theirs_ms"), "ms", CPU_LIMIT),
        ("bytes the client receives", received, ("ratio", "ours", "theirs"), "B", BYTES_LIMIT),
        (
            "latency but for the model's time",
            cpu,
            ("wall_ratio", "ours_wall_ms", "theirs_wall_ms"),
            "ms",
            LATENCY_LIMIT,
        ),
    ]
    if real:
        keys = ("ratio", "ours_ms", "theirs_ms")
        rows.append(("latency with a real vLLM", real, keys, "ms", LATENCY_LIMIT))
    return [
        Result(
            f"{peer.name}: {what}, ours / its own parts",
            measured[ratio],
            limit,
            behind=behind(measured[ours], measured[theirs], unit),
            details=measured,
        )
        for what, measured, (ratio, ours, theirs), unit, limit in rows
    ]


# --- The environments -----------------------------------------------------------------------------


def install(peer: Peer) -> None:
    """Make a peer's environment unless it is complete.

    Raises:
        NotRunError: It cannot be made; the end of pip's output says why.
    """
    stamp = peer.environment / "installed.txt"
    wanted = "\n".join([*peer.requirements, _our_dependencies()])
    if stamp.exists() and stamp.read_text() == wanted:
        return
    say(f"making {peer.environment.name}, once and after changes of our dependencies: 1 to 2 min")
    shutil.rmtree(peer.environment, ignore_errors=True)
    pip = (str(peer.python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    for command in (
        (sys.executable, "-m", "venv", str(peer.environment)),
        (*pip, *peer.requirements),
    ):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NotRunError(f"{peer.environment.name} cannot be made: {done.stderr[-500:]}")
    stamp.write_text(wanted)


def _our_dependencies() -> str:
    """Return the part of pyproject.toml that says what this package needs."""
    project = (ROOT / "pyproject.toml").read_text()
    return project.partition("\ndependencies = ")[2].partition("\n[dependency-groups]")[0]


def run_in(peer: Peer, module: str, *arguments: str) -> Any:
    """Run a module in a peer's environment and return the JSON that it prints."""
    done = subprocess.run(
        [str(peer.python), "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])
