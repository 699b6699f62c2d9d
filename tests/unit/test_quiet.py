"""What pymilvus logs of a failed call: nothing on the screen for ours, as ever for others'."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
from pymilvus import AsyncMilvusClient, MilvusClient, MilvusException

from milvus_vllm_retrievers import RerankStatusError, SearchError, VLLMRanker
from milvus_vllm_retrievers._core.milvus import ConnectionSettings, MilvusConnection
from milvus_vllm_retrievers._core.quiet import Quiet
from tests.corpus import create_collection
from tests.fakes import FakeVLLM, Reply
from tests.faults.callers import FRONT_ENDS, HOWS, TEXTS, FrontEnd, How, got
from tests.faults.servers import refusing

NAME = "quiet_docs"
Call = Callable[[], Awaitable[object]]


class Screen(logging.Handler):
    """What reaches any handler of pymilvus's loggers."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.name}: {record.getMessage()}")


@pytest.fixture
def screen() -> Iterator[Screen]:
    pymilvus, handler = logging.getLogger("pymilvus"), Screen()
    pymilvus.addHandler(handler)
    yield handler
    pymilvus.removeHandler(handler)


@pytest.fixture(params=["sync", "async"])
async def fail(request: pytest.FixtureRequest, milvus26_uri: str) -> AsyncIterator[Call]:
    """Make a call of plain pymilvus that fails, blocking or async."""
    if request.param == "sync":
        client = MilvusClient(milvus26_uri)

        async def call() -> object:
            return client.describe_collection("nowhere")

        yield call
        client.close()
    else:
        async_client = AsyncMilvusClient(milvus26_uri)

        async def call() -> object:
            return await async_client.describe_collection("nowhere")

        yield call
        await async_client.close()


async def failed(call: Call) -> None:
    with pytest.raises(MilvusException, match="nowhere"):
        await call()


async def test_pymilvus_says_nothing_of_a_call_that_is_kept_quiet(
    fail: Call, screen: Screen
) -> None:
    with Quiet(str):
        await failed(fail)
    assert screen.lines == []

    await failed(fail)
    assert any("pymilvus.decorators" in line and "Traceback" in line for line in screen.lines)


async def test_other_threads_and_tasks_are_logged_at_the_same_time(
    milvus26_uri: str, screen: Screen
) -> None:
    client, async_client = MilvusClient(milvus26_uri), AsyncMilvusClient(milvus26_uri)

    def in_thread() -> None:
        with pytest.raises(MilvusException):
            client.describe_collection("of_a_thread")

    async def in_task() -> None:
        with pytest.raises(MilvusException):
            await async_client.describe_collection("of_a_task")

    started, may_go = asyncio.Event(), asyncio.Event()

    async def in_quiet() -> None:
        with Quiet(str):
            started.set()
            await may_go.wait()
            with pytest.raises(MilvusException):
                client.describe_collection("of_ours")

    ours = asyncio.create_task(in_quiet())
    await started.wait()
    thread = threading.Thread(target=in_thread)
    thread.start()
    await asyncio.to_thread(thread.join)
    await asyncio.create_task(in_task())
    may_go.set()
    await ours
    client.close()
    await async_client.close()

    said = "".join(screen.lines)
    assert "of_a_thread" in said
    assert "of_a_task" in said
    assert "of_ours" not in said


async def test_what_is_kept_quiet_is_a_short_line_without_secrets_at_debug(
    fail: Call, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "milvus_vllm_retrievers")

    with Quiet(lambda text: text.replace("nowhere", "***")):
        await failed(fail)

    (line,) = [r.getMessage() for r in caplog.records if r.name == "milvus_vllm_retrievers"]
    assert line.startswith("pymilvus: ERROR: RPC error: [describe_collection]")
    assert "***" in line
    assert "nowhere" not in line
    assert len(line) < 250
    assert "Traceback" not in line


@pytest.mark.parametrize("how", ["sync", "async"])
async def test_a_milvus_that_refuses_connections_is_told_by_the_error_alone(
    how: str, screen: Screen, capfd: pytest.CaptureFixture[str]
) -> None:
    with refusing() as uri:
        connection = MilvusConnection(ConnectionSettings(uri, connection_args={"timeout": 0.5}))
        if how == "sync":
            with pytest.raises(SearchError, match="19530"):
                connection.client()
        else:
            with pytest.raises(MilvusException), connection.quiet():
                async with connection.async_client() as client:
                    await client.list_collections()
    await connection.aclose()

    assert screen.lines == []
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("front_end", FRONT_ENDS, ids=str)
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("asked_by", ["retriever", "reranker"])
async def test_a_failure_inside_milvus_is_told_once_with_advice_and_no_traceback(
    front_end: FrontEnd,
    how: How,
    asked_by: str,
    milvus26: MilvusClient,
    milvus26_uri: str,
    fake_vllm: FakeVLLM,
    screen: Screen,
    capfd: pytest.CaptureFixture[str],
) -> None:
    create_collection(milvus26, NAME, texts=TEXTS)
    fake_vllm.always = Reply.json(401, {"error": "Unauthorized"})
    ranker = VLLMRanker(fake_vllm.url, mode="server")
    if asked_by == "retriever":
        subject = front_end.retriever(NAME, milvus26_uri, ranker)
    else:
        subject = front_end.module.MilvusVLLMRerank(NAME, ranker=ranker, uri=milvus26_uri)
    async with subject:
        error, _ = await got(front_end.call(subject, how))

    assert isinstance(error, RerankStatusError)
    assert error.status_code == 401
    assert f"Milvus was given the ranker's endpoint, {fake_vllm.url}. Milvus sent no key" in str(
        error
    )
    assert screen.lines == []
    assert "Traceback" not in capfd.readouterr().err
