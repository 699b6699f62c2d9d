"""What both peer benchmarks share: texts, queries, an embedding, a byte counter, the measuring.

It runs in an environment of the peer's own, so it imports no more than both environments have.
The collection has as many rows as a search fetches per vector field. So both sides rerank the same
candidates, all of its rows, whatever their legs find. This favours the peers, which carry every
candidate to the client: two legs of 50 usually find more than 50 rows.
"""

from __future__ import annotations

import argparse
import json
import math
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, pairwise
from typing import Any, Protocol
from urllib.parse import urlsplit
from zlib import crc32

import cohere

from benchmarks.corpus import STDLIB_QUERIES as QUERIES
from benchmarks.harness import ROOT, Timing, interleaved

K = 5
FETCH_K = 50
DIM = 384
COLLECTION = "peers"
MODEL = "all-MiniLM-L6-v2"
_LEAST_CHARACTERS = 500
_LEAST_LATENCY_ROUNDS = 8

Ranked = list[tuple[str, float]]
Retrieve = Callable[[str], Ranked]


@dataclass(frozen=True)
class Servers:
    """Where everything is.

    Attributes:
        milvus: The URI of Milvus, as the client reaches it.
        rerank: The base URL of what reranks, as the client reaches it.
        rerank_from_milvus: The same as Milvus reaches it.
    """

    milvus: str
    rerank: str
    rerank_from_milvus: str


@dataclass(frozen=True)
class Contest:
    """Two ways to the same lists of texts with scores.

    Attributes:
        ours: Retrieve with this package.
        theirs: Retrieve with the peer.
    """

    ours: Retrieve
    theirs: Retrieve


class Peer(Protocol):
    """What `peers_langchain` and `peers_llama_index` have."""

    def fill(self, uri: str, rows: int) -> None:
        """Write the collection, with the peer's own store."""

    def build(self, servers: Servers) -> Contest:
        """Make both contestants over that collection."""


class TruncatingCohere(cohere.ClientV2):
    """Cohere's client as vLLM needs it; it costs the peers no more than 0.02 ms a query.

    LangChain's CohereRerank sends ``max_tokens_per_doc: null``, which vLLM refuses, and no peer
    can ask for truncation, without which one long document fails the request.
    """

    def rerank(self, *, max_tokens_per_doc: int | None = None, **arguments: Any) -> Any:  # noqa: ARG002
        """Rerank, truncated to the model's own length."""
        options = {"additional_body_parameters": {"truncate_prompt_tokens": -1}}
        return super().rerank(**arguments, request_options=options)


def texts(count: int) -> list[str]:
    """Return so many texts of 500 to 820 characters: Python's documentation, joined."""
    sys.path.append(str(ROOT / "examples"))
    import stdlib_docs  # noqa: PLC0415 - found only now

    joined, part = [], ""
    for entry in stdlib_docs.load():
        part = f"{part} {entry.text}".strip()
        if len(part) >= _LEAST_CHARACTERS:
            joined.append(part)
            part = ""
    return [joined[i * len(joined) // count] for i in range(count)]


def embed(text: str) -> list[float]:
    """Return a vector of the text's words."""
    vector = [0.0] * DIM
    for word in text.lower().split():
        vector[crc32(word.encode()) % DIM] += 1.0
    length = math.sqrt(sum(value * value for value in vector)) or 1.0
    return [value / length for value in vector]


_QUERY_VECTORS = {query: embed(query) for query in QUERIES}


def embed_query(query: str) -> list[float]:
    """Return the vector of one of the queries, which is ready-made: embedding is not measured."""
    return _QUERY_VECTORS[query]


# --- Measuring ------------------------------------------------------------------------------------


def main(peer: Peer) -> None:
    """Measure one peer as the command line says, and print what came out as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--milvus", required=True)
    parser.add_argument("--rerank", required=True, help="the stand-in, for CPU time and bytes")
    parser.add_argument("--vllm", help="a real vLLM, for latency")
    parser.add_argument("--rounds", type=int, required=True, help="of CPU time")
    parser.add_argument("--seconds", type=float, default=0, help="for latency, about")
    arguments = parser.parse_args()
    peer.fill(arguments.milvus, FETCH_K)
    contest = peer.build(Servers(arguments.milvus, arguments.rerank, arguments.rerank))
    check_same_lists(contest, tolerance=1e-6)
    figures = {
        "cpu": cpu(contest, arguments.rounds),
        "bytes": received(peer, arguments.milvus, arguments.rerank),
    }
    if arguments.vllm:
        contest = peer.build(Servers(arguments.milvus, arguments.vllm, arguments.vllm))
        figures["latency"] = latency(contest, arguments.seconds)
    print(json.dumps(figures))


def check_same_lists(contest: Contest, tolerance: float) -> None:
    """Make sure that both sides return the same texts, in the same order, with the same scores.

    Args:
        contest: Both sides.
        tolerance: How much a score may differ. Texts with closer scores may change places.
    """
    for query in QUERIES:
        ours, theirs = contest.ours(query), contest.theirs(query)
        assert len(ours) == len(theirs) == K, f"{len(ours)} and {len(theirs)} items, not {K}"
        close = [abs(a - b) <= tolerance for (_, a), (_, b) in zip(ours, theirs, strict=True)]
        assert all(close), f"the scores differ for {query!r}: {ours} {theirs}"
        gaps = [a - b for (_, a), (_, b) in pairwise(ours)]
        if min(gaps) > tolerance:
            assert [t for t, _ in ours] == [t for t, _ in theirs], f"other texts for {query!r}"


def cpu(contest: Contest, rounds: int) -> dict[str, float]:
    """Measure the client's CPU time for a query, and the time on the clock beside it."""
    ours, theirs = _timed(contest, rounds, repeat=2 * len(QUERIES))
    return {
        "ratio": ours.cpu_ratio(theirs),
        "ours_ms": ours.cpu_ms,
        "theirs_ms": theirs.cpu_ms,
        "wall_ratio": ours.wall_ratio(theirs),
        "ours_wall_ms": ours.wall_ms,
        "theirs_wall_ms": theirs.wall_ms,
    }


def latency(contest: Contest, seconds: float) -> dict[str, float]:
    """Measure the time on the clock for a query, for about so many seconds."""
    started = time.monotonic()
    # In bfloat16 a score depends a little on what else is in the model's batch.
    check_same_lists(contest, tolerance=0.02)
    one_round = (time.monotonic() - started) / len(QUERIES)
    rounds = max(_LEAST_LATENCY_ROUNDS, int(seconds / one_round))
    ours, theirs = _timed(contest, rounds, repeat=1)
    return {
        "ratio": ours.wall_ratio(theirs),
        "ours_ms": ours.wall_ms,
        "theirs_ms": theirs.wall_ms,
        "rounds": rounds,
        **_interval([a / b for a, b in zip(ours.wall, theirs.wall, strict=True)]),
    }


def _interval(ratios: Sequence[float]) -> dict[str, float]:
    """Return between what the median is in 95 of 100 such measurements, by order statistics."""
    ordered, middle = sorted(ratios), len(ratios) / 2
    margin = 0.98 * math.sqrt(len(ratios))
    return {
        "low": ordered[max(0, int(middle - margin))],
        "high": ordered[min(len(ratios) - 1, int(middle + margin))],
    }


def _timed(contest: Contest, rounds: int, repeat: int) -> tuple[Timing, Timing]:
    for_ours, for_theirs = cycle(QUERIES), cycle(QUERIES)
    timings = interleaved(
        {
            "ours": lambda: contest.ours(next(for_ours)),
            "theirs": lambda: contest.theirs(next(for_theirs)),
        },
        rounds,
        repeat,
    )
    return timings["ours"], timings["theirs"]


def received(peer: Peer, milvus: str, rerank: str) -> dict[str, float]:
    """Count the bytes that the client receives for a query, from Milvus and from the reranker."""
    with counted(milvus) as (via_milvus, milvus_bytes), counted(rerank) as (via, rerank_bytes):
        contest = peer.build(Servers(via_milvus, via, rerank_from_milvus=rerank))
        per_query = {}
        for name, retrieve in (("ours", contest.ours), ("theirs", contest.theirs)):
            retrieve(QUERIES[0])  # what is asked only once belongs to no query
            before = milvus_bytes.received + rerank_bytes.received
            for query in QUERIES:
                retrieve(query)
            total = milvus_bytes.received + rerank_bytes.received - before
            per_query[name] = total / len(QUERIES)
    return {"ratio": per_query["ours"] / per_query["theirs"], **per_query}


# --- Counting bytes -------------------------------------------------------------------------------


class Counter:
    """Counts what a server sends to its clients.

    Attributes:
        received: Bytes until now.
    """

    def __init__(self) -> None:
        self.received = 0


@contextmanager
def counted(url: str) -> Iterator[tuple[str, Counter]]:
    """Pass connections on to a server while the block runs; yield the URL to use and the count."""
    counter = Counter()
    parts = urlsplit(url)
    target = (str(parts.hostname), int(parts.port or 80))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_accept, args=(listener, target, counter), daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", counter


def _accept(listener: socket.socket, target: tuple[str, int], counter: Counter) -> None:
    while True:
        try:
            client, _ = listener.accept()
        except OSError:  # it was closed
            return
        server = socket.create_connection(target)
        for source, sink, count in ((client, server, None), (server, client, counter)):
            threading.Thread(target=_pass_on, args=(source, sink, count), daemon=True).start()


def _pass_on(source: socket.socket, sink: socket.socket, counter: Counter | None) -> None:
    try:
        while data := source.recv(65_536):
            if counter is not None:
                counter.received += len(data)
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:  # one side is gone
        return
