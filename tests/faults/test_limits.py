"""Nothing outlives its deadline, and a cancelled call stops what it has begun."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from llama_index.core.base.embeddings.base import BaseEmbedding

from milvus_vllm_retrievers import (
    RerankStatusError,
    RerankTimeoutError,
    SearchError,
    VLLMRanker,
    langchain,
)
from milvus_vllm_retrievers._core import services
from tests.fakes import FakeVLLM, LetterEmbeddings, Received, Reply
from tests.faults.callers import MARGIN, FrontEnd, Got, How, K, at_once, check, got
from tests.faults.servers import Listener, silent
from tests.faults.table import ON_ERROR, OnError, Outcome, Raises, Unranked

TIMEOUT = 1.0  # seconds for the calls that are to run into it
PATIENCE = 30.0


# Deadlines

MakeCalls = Callable[..., Awaitable[list[tuple[OnError, Got, float]]]]


@pytest.fixture
def calls(
    front_end: FrontEnd, how: How, milvus26_uri: str, collection: str, ill_vllm: FakeVLLM
) -> MakeCalls:
    """Call retrievers and direct rerankers at once, with a limit on the whole call."""

    async def run(limit: float, **arguments: Any) -> list[tuple[OnError, Got, float]]:
        subjects: list[tuple[OnError, Any]] = []
        for on_error in ON_ERROR:
            ranker = VLLMRanker(ill_vllm.url, mode="client", on_error=on_error, **arguments)
            retriever = front_end.retriever(collection, milvus26_uri, ranker, timeout=limit)
            reranker = front_end.module.VLLMRerank(ranker=ranker, timeout=limit, top_n=K)
            subjects += [(on_error, retriever), (on_error, reranker)]
        results = await at_once(how, [attempt(front_end, each, how) for _, each in subjects])
        return [
            (on_error, *result) for (on_error, _), result in zip(subjects, results, strict=True)
        ]

    return run


async def attempt(front_end: FrontEnd, subject: Any, how: How) -> tuple[Got, float]:
    async with subject:
        return await got(front_end.call(subject, how))


def from_here(on_error: OnError, raised: Raises) -> Outcome:
    """What comes of a failure on the client path."""
    return Unranked(raised.phrase) if on_error == "skip" else raised


async def test_a_wait_that_vllm_asks_for_is_not_begun_if_it_outlasts_the_call(
    calls: MakeCalls, ill_vllm: FakeVLLM
) -> None:
    ill_vllm.always = Reply.json(429, {"error": "slow down"}, **{"retry-after": "7"})

    results = await calls(6.0)

    for on_error, result, _ in results:
        check(result, from_here(on_error, Raises(RerankStatusError, "slow down", 429)))
    assert len(ill_vllm.received) == len(results)  # one request of each


async def test_tries_end_with_the_call_however_many_are_allowed(
    calls: MakeCalls, ill_vllm: FakeVLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "_backoff", lambda attempt: TIMEOUT / 10)
    ill_vllm.always = Reply.json(503, {"error": {"message": "the queue is full"}})

    for on_error, result, seconds in await calls(TIMEOUT, max_retries=1_000_000):
        if on_error == "skip":
            check(result, Unranked(""))
        else:  # the limit may come in a pause or during a try
            assert isinstance(result, RerankStatusError | RerankTimeoutError)
        assert seconds < TIMEOUT + MARGIN


async def test_requests_that_follow_one_another_share_the_calls_time(
    calls: MakeCalls, ill_vllm: FakeVLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = ill_vllm.answer
    never = threading.Event()

    def slowly(received: Received) -> Reply:
        never.wait(0.4 * TIMEOUT)
        return answer(received)

    monkeypatch.setattr(ill_vllm, "answer", slowly)

    one_by_one = {"max_client_batch_size": 1, "max_concurrency": 1, "timeout": None}
    for on_error, result, seconds in await calls(TIMEOUT, **one_by_one):
        check(result, from_here(on_error, Raises(RerankTimeoutError, "")))
        assert seconds < TIMEOUT + MARGIN


class SlowEmbeddings(LetterEmbeddings):
    """Embeds at once until it is told to take its time."""

    def __init__(self) -> None:
        self.slow = False
        self.cancelled = False

    def argument_of(self, front_end: FrontEnd) -> dict[str, Any]:
        """Return the argument by which a front end takes an embedding model."""
        if front_end.module is langchain:
            return {"embedding": self}
        return {"embed_model": SlowEmbedModel(self)}

    def embed_query(self, text: str) -> list[float]:
        if self.slow:
            time.sleep(1.2 * TIMEOUT)
        return super().embed_query(text)

    async def aembed_query(self, text: str) -> list[float]:
        if self.slow:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled = True
                raise
        return super().embed_query(text)


class SlowEmbedModel(BaseEmbedding):
    """The same, for LlamaIndex."""

    _slow: SlowEmbeddings

    def __init__(self, slow: SlowEmbeddings) -> None:
        super().__init__()
        self._slow = slow

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._slow.embed_query(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await self._slow.aembed_query(query)

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._slow.embed_query(text)


async def test_an_embedding_model_that_is_too_slow_ends_the_call(
    front_end: FrontEnd, how: How, milvus26_uri: str, collection: str, well_vllm: FakeVLLM
) -> None:
    slow = SlowEmbeddings()
    retriever = front_end.module.MilvusVLLMRetriever(
        collection,
        ranker=VLLMRanker(well_vllm.url, on_error="skip"),
        uri=milvus26_uri,
        vector_field="dense",
        timeout=TIMEOUT,
        **slow.argument_of(front_end),
    )
    async with retriever:
        result, _ = await got(front_end.retrieve(retriever, how))
        assert isinstance(result, list)

        slow.slow = True
        result, seconds = await got(front_end.retrieve(retriever, how))

    assert isinstance(result, SearchError)
    assert result.reason == "timeout"
    # What blocks is not ended; the call ends as soon as it returns.
    assert slow.cancelled == (how == "async")
    assert seconds < 2 * TIMEOUT + MARGIN


# Cancellation


@pytest.fixture
async def cancelled(front_end: FrontEnd) -> Callable[..., Any]:
    """Begin a call of a retriever or a reranker, cancel it once requests are under way, wait."""

    async def run(subject: Any, vllm: Listener, requests: int) -> set[Any]:
        before = asyncio.all_tasks()
        task = asyncio.ensure_future(front_end.call(subject, "async"))
        for _ in range(requests):
            assert await asyncio.to_thread(vllm.arrived.acquire, timeout=PATIENCE)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return asyncio.all_tasks() - before

    return run


@pytest.mark.parametrize("on_error", ON_ERROR)
@pytest.mark.parametrize("requests", [1, 5])
async def test_a_cancelled_call_hangs_up_on_vllm_and_leaves_no_task_behind(
    front_end: FrontEnd,
    on_error: OnError,
    requests: int,
    milvus26_uri: str,
    collection: str,
    cancelled: Callable[..., Any],
) -> None:
    with silent() as server:
        ranker = VLLMRanker(
            server.url,
            mode="client",
            on_error=on_error,
            max_client_batch_size=5 // requests,
            max_concurrency=5,
        )
        retriever = front_end.retriever(collection, milvus26_uri, ranker)
        reranker = front_end.module.VLLMRerank(ranker=ranker)
        async with AsyncExitStack() as stack:
            for subject in (retriever, reranker):
                await stack.enter_async_context(subject)
                left_over = await cancelled(subject, server, requests)

                assert left_over == set()
                for _ in range(requests):
                    assert await asyncio.to_thread(server.gone.acquire, timeout=PATIENCE)


@pytest.mark.parametrize("on_error", ON_ERROR)
async def test_a_call_that_is_cancelled_while_milvus_reranks_ends_at_once(
    front_end: FrontEnd,
    on_error: OnError,
    milvus26_uri: str,
    collection: str,
    well_vllm: FakeVLLM,
    cancelled: Callable[..., Any],
) -> None:
    with silent() as server:
        ranker = VLLMRanker(
            well_vllm.url, server_endpoint=server.url, mode="server", on_error=on_error
        )
        async with front_end.retriever(collection, milvus26_uri, ranker) as retriever:
            left_over = await cancelled(retriever, server, 1)

    assert left_over == set()
    assert well_vllm.received == []  # no fallback was begun
