"""Target 5: how much of a real vLLM's speed arrives, and who waits behind whom.

    python tools/vllm_server.py run -- python -m benchmarks throughput

Throughput: documents per second through `VLLMRerank` (LangChain, async) and through a bare httpx
client, at the same time, each with 3 requests of 100 documents in flight, which together are more
than the server can do. It serves requests in the order of their arrival, so who takes longer to
ask again gets less of it; and whatever else slows the machine down slows both. By Little's law,
documents per second are the documents in flight by the mean time of a request. The first requests
find the queue empty, and the last ones others gone: both are left out.

Fairness: a request of 2 documents that comes while one of 2,000 is under way. Sent as one request,
the 2,000 are all in the queue before it; split into requests of `max_client_batch_size`, with
`max_concurrency` of them in flight, no more than those are. The large one is given up as soon as
the small one is answered: only the wait is measured.

Prerequisite: VLLM_ENDPOINT, a real vLLM (`make bench` starts one).
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import httpx
from langchain_core.documents import Document

from benchmarks.harness import ROOT, NotRunError, Result, behind, real_vllm, say
from milvus_vllm_retrievers.langchain import VLLMRanker, VLLMRerank

THROUGHPUT_LIMIT = 0.95
FAIRNESS_LIMIT = 0.2
IN_FLIGHT = 3
DOCUMENTS = 100  # in one request: the candidates of two vector fields
LARGE = 2_000
SMALL = 2
MAX_CONCURRENCY = 4
BATCH_SIZES = (None, 32, 64)
TIMEOUT = 300.0
HEAD_START = 0.5  # seconds that the large request has
SECONDS, FAIRNESS_SECONDS = 90, 50
QUICK_SECONDS, QUICK_FAIRNESS_SECONDS = 30, 10
QUERY = "how do I read a file line by line?"

Rerank = Callable[[Sequence[str]], Awaitable[Any]]


def run(quick: bool) -> list[Result]:
    """Measure throughput, then fairness."""
    endpoint = real_vllm()
    if not endpoint:
        raise NotRunError("VLLM_ENDPOINT is not set: it takes a real vLLM (make bench starts one)")
    seconds = (QUICK_SECONDS, QUICK_FAIRNESS_SECONDS) if quick else (SECONDS, FAIRNESS_SECONDS)
    return asyncio.run(_run(endpoint, *seconds))


async def _run(endpoint: str, seconds: float, fairness_seconds: float) -> list[Result]:
    texts = _texts()
    rerankers = {size: _reranker(endpoint, size) for size in BATCH_SIZES}
    ours = {size: _through(reranker) for size, reranker in rerankers.items()}
    try:
        shares = {}
        async with httpx.AsyncClient(timeout=TIMEOUT) as client:
            bare = _bare(client, endpoint)
            await bare(texts[:SMALL])
            for size, rerank in ours.items():
                shares[size] = await _side_by_side(rerank, bare, texts, seconds / len(ours))
        say("throughput: fairness ...")
        waits = await _fairness(ours, texts, fairness_seconds)
    finally:
        for reranker in rerankers.values():
            await reranker.aclose()
    return [*_throughput_results(shares), *_fairness_results(waits)]


def _texts() -> list[str]:
    """Return 2,000 texts of up to 320 characters, from Python's documentation."""
    sys.path.append(str(ROOT / "examples"))
    import stdlib_docs  # noqa: PLC0415 - found only now

    entries = stdlib_docs.load()
    return [entries[number % len(entries)].text for number in range(LARGE)]


def _reranker(endpoint: str, batch_size: int | None) -> VLLMRerank:
    ranker = VLLMRanker(
        endpoint,
        max_client_batch_size=batch_size,
        max_concurrency=MAX_CONCURRENCY,
        timeout=TIMEOUT,
    )
    return VLLMRerank(ranker=ranker, top_n=5)


def _through(reranker: VLLMRerank) -> Rerank:
    async def rerank(texts: Sequence[str]) -> None:
        await reranker.acompress_documents([Document(text) for text in texts], QUERY)

    return rerank


def _bare(client: httpx.AsyncClient, endpoint: str) -> Rerank:
    async def rerank(texts: Sequence[str]) -> list[float]:
        body = {"query": QUERY, "documents": texts, "truncate_prompt_tokens": -1}
        answer = await client.post(f"{endpoint}/v1/rerank", json=body)
        results = answer.raise_for_status().json()["results"]
        return [result["relevance_score"] for result in results]

    return rerank


# --- Throughput -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """What two clients got of a server at the same time.

    Attributes:
        ours: Seconds of each of our requests.
        bare: Seconds of each of the bare client's.
    """

    ours: Sequence[float]
    bare: Sequence[float]


async def _side_by_side(ours: Rerank, bare: Rerank, texts: Sequence[str], seconds: float) -> Share:
    """Let both send requests for so many seconds, always as many in flight."""
    end = time.monotonic() + seconds
    starts = cycle(range(0, len(texts), DOCUMENTS))

    async def worker(rerank: Rerank, took: list[float]) -> None:
        start = next(starts)
        await rerank(texts[start : start + DOCUMENTS])
        while True:
            start = next(starts)
            one = await _seconds(rerank(texts[start : start + DOCUMENTS]))
            if took and time.monotonic() > end:
                return
            took.append(one)

    share = Share([], [])
    workers = [worker(*side) for side in ((ours, share.ours), (bare, share.bare)) * IN_FLIGHT]
    await asyncio.gather(*workers)
    return share


def _throughput_results(shares: Mapping[int | None, Share]) -> list[Result]:
    return [
        Result(
            f"documents per second, {_setting(size)}: VLLMRerank / a bare httpx client",
            statistics.fmean(share.bare) / statistics.fmean(share.ours),
            THROUGHPUT_LIMIT,
            at_most=False,
            behind=behind(_per_second(share.ours), _per_second(share.bare), "documents/s"),
            details={
                "ours_per_second": _per_second(share.ours),
                "bare_per_second": _per_second(share.bare),
                "ours_requests": len(share.ours),
                "bare_requests": len(share.bare),
            },
        )
        for size, share in shares.items()
    ]


def _per_second(took: Sequence[float]) -> float:
    return IN_FLIGHT * DOCUMENTS / statistics.fmean(took)


def _setting(batch_size: int | None) -> str:
    return f"at most {batch_size} in a request" if batch_size else "one request a query"


# --- Fairness -------------------------------------------------------------------------------------


async def _fairness(
    rerankers: Mapping[int | None, Rerank], texts: Sequence[str], seconds: float
) -> dict[Any, list[float]]:
    waits: dict[Any, list[float]] = {"alone": [], **{size: [] for size in rerankers}}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        waits["alone"].append(await _seconds(rerankers[None](texts[:SMALL])))
        for size, rerank in rerankers.items():
            waits[size].append(await _wait_beside(rerank, rerankers[None], texts))
    return waits


async def _wait_beside(large: Rerank, small: Rerank, texts: Sequence[str]) -> float:
    """Return the seconds that a small request takes while a large one is under way."""
    task = asyncio.ensure_future(large(texts))
    try:
        await asyncio.sleep(HEAD_START)
        if task.done():
            raise NotRunError(
                f"this vLLM reranks {LARGE:,} documents in less than {HEAD_START} s: nobody waits"
            )
        return await _seconds(small(texts[:SMALL]))
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await asyncio.sleep(HEAD_START)  # until vLLM has noticed and its queue is empty


async def _seconds(work: Awaitable[Any]) -> float:
    started = time.perf_counter()
    await work
    return time.perf_counter() - started


def _fairness_results(waits: Mapping[Any, Sequence[float]]) -> list[Result]:
    medians = {name: statistics.median(found) for name, found in waits.items()}
    return [
        Result(
            f"wait of {SMALL} documents beside {LARGE:,}, {_setting(size)}, {MAX_CONCURRENCY} in "
            "flight / in one request",
            medians[size] / medians[None],
            FAIRNESS_LIMIT,
            behind=behind(medians[size], medians[None], "s"),
            details={
                "rounds": len(waits[size]),
                "seconds": medians[size],
                "seconds_in_one_request": medians[None],
                "seconds_alone": medians["alone"],
            },
        )
        for size in BATCH_SIZES
        if size
    ]
