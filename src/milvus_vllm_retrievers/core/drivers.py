"""The two ways to run a flow: with blocking clients and with async ones."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from milvus_vllm_retrievers.core.flow import CallMilvus, Encode, Flow, Rerank, Step, Together
from milvus_vllm_retrievers.core.milvus import MilvusConnection, explain_error
from milvus_vllm_retrievers.core.vllm import VLLMClient
from milvus_vllm_retrievers.errors import SearchError

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
            case CallMilvus(what, method, arguments):
                assert self._milvus is not None
                call = getattr(self._milvus.client(), method)
                timeout = _timeout(step)
                try:
                    return call(**arguments, **timeout)
                except Exception as error:
                    raise explain_error(error, what) from error
            case Rerank(query, texts, deadline):
                assert self._vllm is not None
                return self._vllm.rerank(query, texts, deadline)
            case Together(steps, limit):
                if len(steps) == 1:
                    return [self._do(steps[0])]
                with ThreadPoolExecutor(min(limit, len(steps))) as pool:
                    return list(pool.map(self._do, steps))


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
            case Encode(encoder, queries):
                return await encoder.aencode(queries)
            case CallMilvus(what, method, arguments):
                assert self._milvus is not None
                call = getattr(await self._milvus.async_client(), method)
                timeout = _timeout(step)
                try:
                    return await call(**arguments, **timeout)
                except Exception as error:
                    raise explain_error(error, what) from error
            case Rerank(query, texts, deadline):
                assert self._vllm is not None
                return await self._vllm.arerank(query, texts, deadline)
            case Together(steps, limit):
                return await self._at_once(steps, limit)

    async def _at_once(self, steps: Sequence[Step], limit: int) -> list[Any]:
        """Do steps, at most `limit` at once; the first error cancels the others."""
        turn = asyncio.Semaphore(limit)

        async def in_turn(step: Step) -> Any:
            async with turn:
                return await self._do(step)

        tasks = [asyncio.ensure_future(in_turn(step)) for step in steps]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _timeout(step: CallMilvus) -> dict[str, float]:
    left = step.deadline.remaining()
    if left is None:
        return {}
    if left == 0:
        raise SearchError(f"{step.what} was not tried: the call's timeout is used up; raise it")
    return {"timeout": left}
