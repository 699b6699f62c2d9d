"""The two ways to run a flow: with blocking clients and with async ones."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, TypeVar

from milvus_vllm_retrievers._core.deadline import Deadline
from milvus_vllm_retrievers._core.milvus import MilvusConnection, is_cancelled
from milvus_vllm_retrievers._core.services import RerankClient
from milvus_vllm_retrievers._core.steps import (
    CallMilvus,
    Encode,
    Flow,
    Pause,
    Send,
    Step,
    Together,
)
from milvus_vllm_retrievers.errors import MilvusVLLMError, SearchError

T = TypeVar("T")


class SyncDriver:
    """Runs flows with blocking clients.

    Args:
        milvus: Where searches go; None for flows that need none.
        rerank_client: Where rerank requests go; None for flows that need none.
    """

    def __init__(self, milvus: MilvusConnection | None, rerank_client: RerankClient | None) -> None:
        self._milvus = milvus
        self._rerank_client = rerank_client

    def run(self, flow: Flow[T]) -> T:
        """Run a flow to its result."""
        try:
            step = next(flow)
            while True:
                try:
                    result = self._do(step)
                except Exception as error:  # noqa: BLE001 - the flow decides what it means
                    step = flow.throw(error)
                else:
                    step = flow.send(result)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]

    def _do(self, step: Step) -> Any:
        match step:
            case Encode(encoder, query):
                return encoder.encode(query)
            case CallMilvus():
                return self._call_milvus(step)
            case Send(request, deadline):
                assert self._rerank_client is not None
                return self._rerank_client.send(request, deadline)
            case Pause(seconds):
                return time.sleep(seconds)
            case Together(flows, limit, return_exceptions):
                run = self._outcome if return_exceptions else self.run
                if min(limit, len(flows)) == 1:
                    return [run(flow) for flow in flows]
                return self._in_threads(run, flows, limit)

    def _in_threads(self, run: Any, flows: Sequence[Flow[Any]], limit: int) -> list[Any]:
        """Run flows in threads that see the caller's context variables."""
        with ThreadPoolExecutor(min(limit, len(flows))) as threads:
            futures = [threads.submit(copy_context().run, run, flow) for flow in flows]
            try:
                return [future.result() for future in futures]
            finally:
                for future in futures:
                    future.cancel()

    def _outcome(self, flow: Flow[Any]) -> Any:
        try:
            return self.run(flow)
        except Exception as error:  # noqa: BLE001 - it takes the result's place
            return error

    def _call_milvus(self, step: CallMilvus) -> Any:
        assert self._milvus is not None
        client = self._milvus.client(step.deadline)
        timeout = _timeout(step)
        try:
            with self._milvus.quiet():
                return getattr(client, step.method)(**step.arguments, **timeout)
        except Exception as error:  # noqa: BLE001 - pymilvus and grpc raise many kinds
            failed = self._milvus.failure(error, step.what, client)
        raise failed


class AsyncDriver:
    """Runs flows with async clients; the twin of `SyncDriver`."""

    def __init__(self, milvus: MilvusConnection | None, rerank_client: RerankClient | None) -> None:
        self._milvus = milvus
        self._rerank_client = rerank_client

    async def run(self, flow: Flow[T]) -> T:
        """Run a flow to its result."""
        try:
            step = next(flow)
            while True:
                try:
                    result = await self._do(step)
                except Exception as error:  # noqa: BLE001 - the flow decides what it means
                    step = flow.throw(error)
                else:
                    step = flow.send(result)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]

    async def _do(self, step: Step) -> Any:
        match step:
            case Encode(encoder, query, deadline):
                return await _in_time(encoder.aencode(query), deadline)
            case CallMilvus():
                return await self._call_milvus(step)
            case Send(request, deadline):
                assert self._rerank_client is not None
                return await self._rerank_client.asend(request, deadline)
            case Pause(seconds):
                return await asyncio.sleep(seconds)
            case Together(flows, limit, return_exceptions):
                if len(flows) == 1 and not return_exceptions:
                    return [await self.run(flows[0])]
                return await self._in_tasks(flows, limit, return_exceptions=return_exceptions)

    async def _call_milvus(self, step: CallMilvus) -> Any:
        assert self._milvus is not None
        milvus, client = self._milvus, None
        timeout = _timeout(step)

        async def call() -> Any:
            nonlocal client
            async with milvus.async_client() as client:
                # Of many calls that start at once, each gives way here: what they prepare and
                # what they send would else hold up the event loop in one go.
                await asyncio.sleep(0)
                return await getattr(client, step.method)(**step.arguments, **timeout)

        try:
            with milvus.quiet():
                # The time limit is for the connecting too.
                return await _ended(call(), timeout.get("timeout"))
        except MilvusVLLMError:
            raise
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and is_cancelled():
                raise
            failed = milvus.failure(error, step.what, client)
        raise failed

    async def _in_tasks(
        self, flows: Sequence[Flow[Any]], limit: int, *, return_exceptions: bool
    ) -> list[Any]:
        """Run flows as tasks; an error that is not returned cancels the others."""
        turn = asyncio.Semaphore(limit)

        async def in_turn(flow: Flow[Any]) -> Any:
            async with turn:
                try:
                    return await self.run(flow)
                except Exception as error:
                    if not return_exceptions:
                        raise
                    return error

        tasks = [asyncio.ensure_future(in_turn(flow)) for flow in flows]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _in_time(encoding: Awaitable[T], deadline: Deadline) -> T:
    """Wait for what is the caller's own, whose errors are passed on as they are."""
    try:
        return await _ended(encoding, deadline.remaining())
    except asyncio.TimeoutError as error:
        if not deadline.passes_within(0):
            raise
        raise SearchError(
            "embedding the query took longer than the call's timeout; raise timeout",
            reason="timeout",
        ) from error


async def _ended(awaited: Awaitable[T], seconds: float | None) -> T:
    """Await something for so long at most.

    Raises:
        TimeoutError: It took longer.
    """
    if seconds is None:
        return await awaited
    if sys.version_info < (3, 11):
        return await asyncio.wait_for(awaited, seconds)
    async with asyncio.timeout(seconds):  # makes no task, as wait_for does there
        return await awaited


def _timeout(step: CallMilvus) -> dict[str, float]:
    left = step.deadline.remaining()
    if left is None:
        return {}
    if left == 0:
        raise SearchError(
            f"{step.what} was not tried: the call's timeout is used up; raise it", reason="timeout"
        )
    return {"timeout": left}
