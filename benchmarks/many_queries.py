"""Target 3: 64 queries at once, where every rerank call takes 50 ms.

    python -m benchmarks many_queries

LangChain's `batch` and `abatch` of our retriever, reranking in Milvus and from the client, beside
`batch` of the peer (a langchain-milvus store and CohereRerank in a ContextualCompressionRetriever)
as LangChain runs it by default: one thread a query, at most 4 more than there are processors. The
collection is small and found by BM25 alone, so that the searches cost next to nothing: what is
measured is how the waiting is shared out. Ours is also held against the best it could do: as many
turns of 50 ms as `max_concurrency` leaves, and one search for all queries. LlamaIndex has no batch;
there it is our own `retrieve_many` and `aretrieve_many`, against the same ideal.

Which `max_concurrency`? A service whose latency is fixed, such as many replicas behind a gateway,
gains by every request in flight: 4 leave 16 turns (800 ms), 16 leave 4 (200 ms), 64 leave one. The
peer runs 6 threads on two processors, so it needs 11 turns, and 700 ms. Measured there, reranking
from the client: with 4 in flight 0.8 times as fast as the peer, with 8 1.4, with 16 2.4, with 32
3.4, with 64 3 to 4.6 times. What is left then is this process's own work, 1 ms for each call. With
reranking in Milvus 32 are the fastest, 3.3 times: the stand-in for Milvus, one process of Python,
takes 2 to 4 ms for a search, and for 64 at once that is most of the time. So 5 times takes all 64
in flight, and does not come by that alone.

A single vLLM is another matter. The candidates of one or two queries keep it busy, and more in
flight only wait in its queue: on two processors it reranks 160 texts of 600 characters a second, so
that 16 requests of 50 candidates take it 5 s, of the 30 s after which the ranker by default gives
up. So 16, the default, is a sensible number for both. It is held against the ideal, and 64
against the peer; the details have the others.

Prerequisites: as for `peers`, whose environment for LangChain is used; no real vLLM.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from typing import Any

from pymilvus import MilvusClient

from benchmarks import peers
from benchmarks.corpus import STDLIB_QUERIES
from benchmarks.harness import (
    Result,
    Timing,
    behind,
    interleaved,
    milvus_process,
    rerank_process,
    say,
)
from milvus_vllm_retrievers.ranker import VLLMRanker

DELAY_MS = 50
IN_FLIGHT = (4, 8, 16, 32, 64)
SENSIBLE = 16
AGAINST_PEER = 64
MODES = ("client", "server")
SPEED_LIMIT = 5.0
IDEAL_LIMIT = 1.3
ROUNDS = 5
QUICK_ROUNDS = 1
REPEAT = 2  # so that one of two batches finds connections that are open
WORKERS = 64  # searches that the stand-in for Milvus does at once
ROWS = 20  # and so many candidates
K = 5
COLLECTION = "many_queries"
QUERIES = [text for text in STDLIB_QUERIES for _ in range(8)]

Variants = dict[str, Callable[[], Any]]


def run(quick: bool) -> list[Result]:
    """Measure both frameworks."""
    peers.install(peers.LANGCHAIN)
    rounds = QUICK_ROUNDS if quick else ROUNDS
    with (
        tempfile.TemporaryDirectory() as folder,
        milvus_process(folder, workers=WORKERS) as milvus,
        rerank_process(DELAY_MS) as rerank,
    ):
        arguments = ("--milvus", milvus, "--rerank", rerank, "--rounds", str(rounds))
        walls = peers.run_in(peers.LANGCHAIN, "benchmarks.many_queries", *arguments)
        langchain = {name: Timing(cpu=(), wall=wall) for name, wall in walls.items()}
        say("many_queries: LlamaIndex ...")
        llama_index = interleaved(_llama_index(milvus, rerank), rounds, REPEAT)
    return [
        *_against_peer(langchain),
        *_against_ideal("LangChain", ("batch", "abatch"), langchain),
        *_against_ideal("LlamaIndex", ("retrieve_many", "aretrieve_many"), llama_index),
    ]


def _against_peer(timings: Mapping[str, Timing]) -> list[Result]:
    results = []
    for method, mode in product(("batch", "abatch"), MODES):
        ours = {n: timings[_name(method, mode, n)] for n in IN_FLIGHT}
        speeds = {n: timings["peer"].wall_ratio(timing) for n, timing in ours.items()}
        what = f"LangChain {method} of {len(QUERIES)} queries, reranked by {mode}, {AGAINST_PEER}"
        results.append(
            Result(
                f"{what} in flight: the time of the peer's batch / ours",
                speeds[AGAINST_PEER],
                SPEED_LIMIT,
                at_most=False,
                behind=behind(timings["peer"].wall_ms, ours[AGAINST_PEER].wall_ms, "ms"),
                details={
                    "peer_ms": timings["peer"].wall_ms,
                    **{f"with_{n}_in_flight": speed for n, speed in speeds.items()},
                },
            )
        )
    return results


def _against_ideal(
    framework: str, methods: tuple[str, ...], timings: Mapping[str, Timing]
) -> list[Result]:
    results = []
    search = timings["search"].wall_ms
    for method, mode in product(methods, MODES):
        ideals = {n: math.ceil(len(QUERIES) / n) * DELAY_MS + search for n in IN_FLIGHT}
        details = {"search_ms": search}
        for n, ideal in ideals.items():
            if timing := timings.get(_name(method, mode, n)):
                details[f"ms_with_{n}_in_flight"] = timing.wall_ms
                details[f"ratio_with_{n}_in_flight"] = timing.wall_ms / ideal
        what = f"{framework} {method} of {len(QUERIES)} queries, reranked by {mode}, {SENSIBLE}"
        results.append(
            Result(
                f"{what} in flight: time / turns of {DELAY_MS} ms and one search",
                details[f"ratio_with_{SENSIBLE}_in_flight"],
                IDEAL_LIMIT,
                behind=behind(details[f"ms_with_{SENSIBLE}_in_flight"], ideals[SENSIBLE], "ms"),
                details=details,
            )
        )
    return results


def _name(method: str, mode: str, in_flight: int) -> str:
    return f"{method} {mode} {in_flight}"


def _search(milvus: str) -> Callable[[], Any]:
    """Return what searches for all queries in one call of pymilvus."""
    return partial(
        MilvusClient(milvus).search,
        COLLECTION,
        data=QUERIES,
        anns_field="sparse",
        limit=ROWS,
        output_fields=["pk", "text", "source"],
    )


# --- LangChain, in the peer's environment ---------------------------------------------------------


def main() -> None:
    """Measure LangChain's retrievers and print the seconds of every round as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--milvus", required=True)
    parser.add_argument("--rerank", required=True)
    parser.add_argument("--rounds", type=int, required=True)
    arguments = parser.parse_args()
    variants = _langchain(arguments.milvus, arguments.rerank)
    timings = interleaved(variants, arguments.rounds, REPEAT)
    print(json.dumps({name: timing.wall for name, timing in timings.items()}))


def _langchain(milvus: str, rerank: str) -> Variants:
    from benchmarks import peers_langchain  # noqa: PLC0415 - what only that environment has
    from milvus_vllm_retrievers.langchain import MilvusVLLMRetriever  # noqa: PLC0415

    peer = peers_langchain.by_bm25(milvus, rerank, COLLECTION, rows=ROWS, k=K)
    expected = [[document.page_content for document in found] for found in peer.batch(QUERIES)]
    loop = asyncio.new_event_loop()
    variants: Variants = {"peer": partial(peer.batch, QUERIES), "search": _search(milvus)}
    for mode, in_flight in product(MODES, IN_FLIGHT):
        ours = MilvusVLLMRetriever(
            collection_name=COLLECTION,
            uri=milvus,
            ranker=VLLMRanker(rerank, mode=mode, max_concurrency=in_flight),
            k=K,
            fetch_k=ROWS,
        )
        found = [[document.page_content for document in found] for found in ours.batch(QUERIES)]
        assert found == expected, "not the documents that the peer finds"
        variants[_name("batch", mode, in_flight)] = partial(ours.batch, QUERIES)
        variants[_name("abatch", mode, in_flight)] = lambda retriever=ours: loop.run_until_complete(
            retriever.abatch(QUERIES)
        )
    return variants


# --- LlamaIndex, in our own -----------------------------------------------------------------------


def _llama_index(milvus: str, rerank: str) -> Variants:
    from milvus_vllm_retrievers.llama_index import MilvusVLLMRetriever  # noqa: PLC0415

    loop = asyncio.new_event_loop()
    variants: Variants = {"search": _search(milvus)}
    for mode in MODES:
        ours = MilvusVLLMRetriever(
            COLLECTION,
            uri=milvus,
            ranker=VLLMRanker(rerank, mode=mode, max_concurrency=SENSIBLE),
            similarity_top_k=K,
            fetch_k=ROWS,
        )
        variants[_name("retrieve_many", mode, SENSIBLE)] = partial(ours.retrieve_many, QUERIES)
        variants[_name("aretrieve_many", mode, SENSIBLE)] = lambda retriever=ours: (
            loop.run_until_complete(retriever.aretrieve_many(QUERIES))
        )
    return variants


if __name__ == "__main__":
    main()
