"""What the core's tests against servers share: an adapter, called in both ways."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any, Literal

import pytest
from pymilvus import AsyncMilvusClient, MilvusClient

from milvus_vllm_retrievers import VLLMRanker
from milvus_vllm_retrievers._core import adapter as adapter_module
from milvus_vllm_retrievers._core.adapter import MilvusVLLMAdapter
from milvus_vllm_retrievers._core.milvus import ConnectionSettings, MilvusConnection
from milvus_vllm_retrievers._core.query import Encoder, Encoders, Query
from milvus_vllm_retrievers._core.target import TargetSettings
from tests.fakes import Clock, LetterEmbeddings

Call = Callable[..., Awaitable[Any]]
Make = Callable[..., MilvusVLLMAdapter]


async def _aletters(query: Query) -> list[float]:
    return LetterEmbeddings().embed_query(query.text)


LETTERS = Encoder(lambda query: LetterEmbeddings().embed_query(query.text), _aletters)


def questions(count: int) -> list[Query]:
    return [Query(f"question {i} of whales") for i in range(count)]


@pytest.fixture(params=["sync", "async"])
def how(request: pytest.FixtureRequest) -> Literal["sync", "async"]:
    """Blocking in one run of the test, async in the other."""
    return request.param


@pytest.fixture
def call(how: str) -> Call:
    """Call an adapter's method by its name; a blocking one runs in a thread."""

    async def run(adapter: MilvusVLLMAdapter, method: str, *arguments: Any) -> Any:
        if how == "sync":
            return await asyncio.to_thread(getattr(adapter, method), *arguments)
        return await getattr(adapter, f"a{method}")(*arguments)

    return run


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    """Make adapters, which are closed after the test."""
    async with AsyncExitStack() as stack:

        def made(
            uri: str,
            name: str,
            ranker: VLLMRanker | None = None,
            *,
            fields: Sequence[str] | None = None,
            dense: Encoder | None = LETTERS,
            sparse: Encoder | None = None,
        ) -> MilvusVLLMAdapter:
            settings = TargetSettings(
                collection_name=name,
                vector_field=fields,
                encoders=Encoders(dense=dense, sparse=sparse),
            )
            connection = MilvusConnection(ConnectionSettings(uri=uri))
            adapter = MilvusVLLMAdapter(connection, settings, ranker)
            stack.push_async_callback(adapter.aclose)
            return adapter

        yield made


@pytest.fixture
def looking(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock by which an adapter looks at its collection again."""
    clock = Clock()
    monkeypatch.setattr(adapter_module, "time", clock)
    return clock


class Described:
    """How often `describe_collection` was called, and what it raises in place of an answer."""

    def __init__(self) -> None:
        self.times = 0
        self.failure: Exception | None = None


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> Described:
    seen = Described()
    blocking, awaited = MilvusClient.describe_collection, AsyncMilvusClient.describe_collection

    def describe(self: MilvusClient, *args: Any, **kwargs: Any) -> Any:
        seen.times += 1
        if seen.failure:
            raise seen.failure
        return blocking(self, *args, **kwargs)

    async def adescribe(self: AsyncMilvusClient, *args: Any, **kwargs: Any) -> Any:
        seen.times += 1
        if seen.failure:
            raise seen.failure
        return await awaited(self, *args, **kwargs)

    monkeypatch.setattr(MilvusClient, "describe_collection", describe)
    monkeypatch.setattr(AsyncMilvusClient, "describe_collection", adescribe)
    return seen
