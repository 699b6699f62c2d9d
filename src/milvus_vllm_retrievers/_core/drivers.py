"""The two ways to run a flow: with blocking clients and with async ones."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from tenacity import AsyncRetrying, Retrying

from milvus_vllm_retrievers._core.deadline import Deadline
from milvus_vllm_retrievers._core.milvus import MilvusConnection, is_cancelled, reconnecting
from milvus_vllm_retrievers._core.services import VLLMClient
from milvus_vllm_retrievers._core.steps import CallMilvus, Encode, Flow, Rerank, Step, Together
from milvus_vllm_retrievers.errors import MilvusVLLMError, SearchError

T = TypeVar("T")


class SyncDriver:
    """Runs flows with blocking clients.

    Args:
        milvus: Where searches go; None for flows that need none.
        vllm: Where rerank requests go; None for flows that need none.
    """

    def __init__(self, milvus: MilvusConnection | None, vllm: VLLMClient | None) -> None:
        self._milvus = milvus
        self._vllm = vllm

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
            case Encode(encoder, queries):
                return encoder.encode(queries)
            case CallMilvus():
                try:  # tenacity is for the rare case: it would cost every query
                    return self._call_milvus(step)
                except SearchError as error:
                    if not error.is_of_connection:
                        raise
                    failed = error
                return Retrying(**reconnecting(step.deadline, failed))(self._call_milvus, step)
            case Rerank(query, texts, deadline):
                assert self._vllm is not None
                return self._vllm.rerank(query, texts, deadline)
            case Together(steps, limit, errors_apart):
                do = self._do_apart if errors_apart else self._do
                if len(steps) == 1:
                    return [do(steps[0])]
                with ThreadPoolExecutor(min(limit, len(steps))) as pool:
                    return list(pool.map(do, steps))

    def _do_apart(self, step: Step) -> Any:
        try:
            return self._do(step)
        except MilvusVLLMError as error:
            return error

    def _call_milvus(self, step: CallMilvus) -> Any:
        assert self._milvus is not None
        client = self._milvus.client(step.deadline)
        timeout = _timeout(step)
        try:
            return getattr(client, step.method)(**step.arguments, **timeout)
        except Exception as error:  # noqa: BLE001 - pymilvus and grpc raise many kinds
            failed = self._milvus.failure(error, step.what, client)
        raise failed


class AsyncDriver:
    """Runs flows with async clients; the twin of `SyncDriver`."""

    def __init__(self, milvus: MilvusConnection | None, vllm: VLLMClient | None) -> None:
        self._milvus = milvus
        self._vllm = vllm

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
            case Encode(encoder, queries, deadline):
                return await _in_time(encoder.aencode(queries), deadline)
            case CallMilvus():
                try:  # as above
                    return await self._call_milvus(step)
                except SearchError as error:
                    if not error.is_of_connection:
                        raise
                    failed = error
                retrying = AsyncRetrying(**reconnecting(step.deadline, failed))
                return await retrying(self._call_milvus, step)
            case Rerank(query, texts, deadline):
                assert self._vllm is not None
                return await self._vllm.arerank(query, texts, deadline)
            case Together(steps, limit, errors_apart):
                return await self._at_once(steps, limit, errors_apart=errors_apart)

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
            # The time limit is for the connecting too.
            return await asyncio.wait_for(call(), timeout.get("timeout"))
        except MilvusVLLMError:
            raise
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and is_cancelled():
                raise
            failed = milvus.failure(error, step.what, client)
        raise failed

    async def _at_once(self, steps: Sequence[Step], limit: int, *, errors_apart: bool) -> list[Any]:
        """Do steps, at most `limit` at once; an error not kept apart cancels the others."""
        if len(steps) == 1 and not errors_apart:
            return [await self._do(steps[0])]
        turn = asyncio.Semaphore(limit)

        async def in_turn(step: Step) -> Any:
            async with turn:
                try:
                    return await self._do(step)
                except MilvusVLLMError as error:
                    if not errors_apart:
                        raise
                    return error

        tasks = [asyncio.ensure_future(in_turn(step)) for step in steps]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _in_time(encoding: Awaitable[T], deadline: Deadline) -> T:
    """Wait for what is the caller's own, whose errors are passed on as they are."""
    if deadline.at is None:
        return await encoding
    try:
        return await asyncio.wait_for(encoding, deadline.remaining())
    except asyncio.TimeoutError as error:
        if not deadline.passes_within(0):
            raise
        raise SearchError(
            "embedding the query took longer than the call's timeout; raise timeout",
            reason="timeout",
        ) from error


def _timeout(step: CallMilvus) -> dict[str, float]:
    left = step.deadline.remaining()
    if left is None:
        return {}
    if left == 0:
        raise SearchError(
            f"{step.what} was not tried: the call's timeout is used up; raise it", reason="timeout"
        )
    return {"timeout": left}
