"""Connections: made anew when lost, one per event loop, shared by threads, gone when closed."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pymilvus
import pytest
from pymilvus import AsyncMilvusClient, MilvusClient

from milvus_vllm_retrievers import MilvusVLLMError, SearchError, VLLMRanker, langchain
from milvus_vllm_retrievers import llama_index as li
from tests.corpus import create_collection
from tests.fakes import FakeVLLM
from tests.trust.forking import WORDS
from tests.trust.subjects import CLASSES, EXPECTED, WITH_MILVUS, abest, best, fits, make, name_of

NAME = "connection_docs"
SECONDS = 60.0  # far more than anything here takes; what takes longer hangs
LEFT_SECONDS = 5.0  # for the other side of a connection to notice its end

Made = Callable[..., Any]

every_class = pytest.mark.parametrize("class_", CLASSES, ids=name_of)
with_milvus = pytest.mark.parametrize("class_", WITH_MILVUS, ids=name_of)
every_retriever = pytest.mark.parametrize(
    "class_", [langchain.MilvusVLLMRetriever, li.MilvusVLLMRetriever], ids=name_of
)


@pytest.fixture(scope="module", autouse=True)
def _fast_garbage_collection() -> Iterator[None]:
    """Have the garbage collector look only at what comes to be here, not at all modules again."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _own_garbage() -> Iterator[None]:
    """Have what a test leaves unclosed be found at its own end, not in a later test."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def collection(milvus26: MilvusClient) -> None:
    """The collection that everything here searches."""
    create_collection(milvus26, NAME)


@pytest.fixture
def made(collection: None, milvus26_uri: str, fake_vllm: FakeVLLM) -> Made:
    """Make an object of a class, whose connections to Milvus no other test shares."""
    fake_vllm.score = fits

    def of(class_: type, mode: Any = "auto", **arguments: Any) -> Any:
        ranker = VLLMRanker(fake_vllm.url, mode=mode)
        own = {} if "client" in arguments else {"token": f"test:{uuid4()}"}
        return make(class_, NAME, milvus26_uri, ranker, **(own | arguments))

    return of


class Ask:
    """Asks an object for the text that fits a word, blocking or async."""

    def __init__(self, *, is_async: bool) -> None:
        self.is_async = is_async

    async def __call__(self, subject: Any, word: str) -> str:
        return await abest(subject, word) if self.is_async else best(subject, word)


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def ask(request: pytest.FixtureRequest) -> Ask:
    """Ask blocking in one run of a test and async in the other."""
    return Ask(is_async=request.param)


# Closed behind one's back


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All of pymilvus's clients that are made from now on."""
    seen: list[Any] = []

    def noting(make: Callable[..., Any]) -> Callable[..., Any]:
        def make_and_note(*arguments: Any, **more: Any) -> Any:
            seen.append(make(*arguments, **more))
            return seen[-1]

        return make_and_note

    for name in ("MilvusClient", "AsyncMilvusClient"):
        monkeypatch.setattr(pymilvus, name, noting(getattr(pymilvus, name)))
    return seen


async def close_client(client: Any) -> None:
    """Close a client itself."""
    closing = client.close()
    if closing is not None:
        await closing


async def close_channel(client: Any) -> None:
    """Close what a client talks through, which it does not notice."""
    if isinstance(client, MilvusClient):
        client._get_connection()._channel.close()
    else:
        await (await client._get_connection())._async_channel.close()


@with_milvus
@pytest.mark.parametrize("close", [close_client, close_channel])
async def test_a_connection_that_was_closed_is_made_anew_by_the_next_call(
    made: Made,
    ask: Ask,
    class_: type,
    clients: list[Any],
    close: Callable[[Any], Awaitable[None]],
) -> None:
    async with made(class_) as subject:
        await ask(subject, "cat")
        (client,) = clients
        await close(client)

        assert await ask(subject, "violin") == EXPECTED["violin"]


@with_milvus
async def test_a_client_that_was_passed_in_and_closed_is_named_and_not_replaced(
    made: Made, ask: Ask, class_: type, milvus26_uri: str
) -> None:
    client, async_client = MilvusClient(milvus26_uri), AsyncMilvusClient(milvus26_uri)
    subject = made(class_, client=client, async_client=async_client)
    assert await ask(subject, "cat") == EXPECTED["cat"]
    client.close()
    await async_client.close()

    for _ in range(2):
        with pytest.raises(SearchError, match="client that was passed in is closed"):
            await ask(subject, "violin")


@with_milvus
async def test_clients_that_were_passed_in_stay_open(
    made: Made, ask: Ask, class_: type, milvus26_uri: str
) -> None:
    client, async_client = MilvusClient(milvus26_uri), AsyncMilvusClient(milvus26_uri)
    async with made(class_, client=client, async_client=async_client) as subject:
        await ask(subject, "cat")
    subject.close()

    assert client.has_collection(NAME)
    assert await async_client.has_collection(NAME)
    client.close()
    await async_client.close()


# Event loops


@every_class
@pytest.mark.parametrize("closes", [True, False])
def test_one_event_loop_after_another_can_use_the_same_object(
    made: Made, class_: type, *, closes: bool
) -> None:
    subject = made(class_)

    async def run(word: str) -> list[str]:
        try:
            return await asyncio.gather(*(abest(subject, word) for _ in range(3)))
        finally:
            if closes:
                await subject.aclose()

    for word in WORDS[:4]:
        assert asyncio.run(run(word)) == [EXPECTED[word]] * 3
    subject.close()


@every_class
def test_threads_that_each_run_an_event_loop_share_an_object(made: Made, class_: type) -> None:
    subject = made(class_)

    async def run(words: Sequence[str]) -> list[str]:
        return [await abest(subject, word) for word in words]

    together = threading.Barrier(4)

    def in_a_loop(words: Sequence[str]) -> list[str]:
        together.wait(SECONDS)
        return asyncio.run(run(words))

    parts = [WORDS[i::4] for i in range(4)]
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(in_a_loop, parts, timeout=SECONDS))

    assert answers == [[EXPECTED[word] for word in part] for part in parts]
    subject.close()


@every_class
async def test_an_object_serves_a_notebook_whose_loop_runs_all_the_time(
    made: Made, class_: type
) -> None:
    async with made(class_) as subject:
        # A cell that awaits; one that does not, in the loop's own thread; threads beside it.
        assert await abest(subject, "cat") == EXPECTED["cat"]
        assert best(subject, "dog") == EXPECTED["dog"]
        awaited = [abest(subject, word) for word in WORDS[:6]]
        threads = [asyncio.to_thread(best, subject, word) for word in WORDS[6:]]
        answers = await asyncio.wait_for(asyncio.gather(*awaited, *threads), SECONDS)

    assert answers == [EXPECTED[word] for word in WORDS]


@every_class
async def test_tasks_whose_first_calls_race_have_their_own_answers(
    made: Made, class_: type
) -> None:
    async with made(class_) as subject:
        answers = await asyncio.gather(*(abest(subject, word) for word in WORDS))

    assert answers == [EXPECTED[word] for word in WORDS]


# Threads


def ways() -> list[Any]:
    """Return every class, a retriever once for each place where it may have candidates reranked."""
    return [
        pytest.param(class_, mode, id=f"{name_of(class_)}, {mode}")
        for class_ in CLASSES
        for mode in (("server", "client") if "Retriever" in class_.__name__ else ("auto",))
    ]


@pytest.mark.parametrize(("class_", "mode"), ways())
def test_threads_whose_first_calls_race_have_their_own_answers(
    made: Made, class_: type, mode: str
) -> None:
    words = (WORDS * 2)[:16]
    together = threading.Barrier(len(words))

    with made(class_, mode) as subject:

        def first(word: str) -> str:
            together.wait(SECONDS)
            return best(subject, word)

        with ThreadPoolExecutor(len(words)) as threads:
            answers = list(threads.map(first, words, timeout=SECONDS))
            again = list(threads.map(best, [subject] * len(words), words, timeout=SECONDS))

    assert answers == again == [EXPECTED[word] for word in words]


class Gate:
    """Holds requests that have come to vLLM until it is opened; takes a Barrier's place."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def wait(self, timeout: float | None = None) -> None:
        self.reached.set()
        self.opened.wait(timeout)


@every_class
async def test_what_is_closed_just_before_a_request_is_sent_works_or_fails_by_name(
    made: Made, ask: Ask, class_: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = made(class_, "client" if "Retriever" in class_.__name__ else "auto")
    for http_client in (httpx.Client, httpx.AsyncClient):
        monkeypatch.setattr(http_client, "stream", closing_first(subject, http_client.stream))

    came = await outcome(ask(subject, "violin"))

    assert isinstance(came, MilvusVLLMError) or came == EXPECTED["violin"]
    assert await ask(subject, "cat") == EXPECTED["cat"]
    await subject.aclose()


def closing_first(subject: Any, stream: Callable[..., Any]) -> Callable[..., Any]:
    """Have another thread close an object between the choice of a client and its first request."""
    closed: list[None] = []

    def close_and_stream(*arguments: Any, **more: Any) -> Any:
        if not closed:
            closed.append(threading.Thread(target=subject.close).run())
        return stream(*arguments, **more)

    return close_and_stream


async def outcome(call: Awaitable[str]) -> str | MilvusVLLMError:
    try:
        return await call
    except MilvusVLLMError as error:
        return error


# Closing


@every_class
async def test_closing_twice_or_unused_is_closing_once(made: Made, ask: Ask, class_: type) -> None:
    subject = made(class_)
    subject.close()
    await subject.aclose()
    await ask(subject, "cat")
    for _ in range(2):
        subject.close()
        await subject.aclose()

    assert await ask(subject, "violin") == EXPECTED["violin"]
    await subject.aclose()


@with_milvus
@pytest.mark.usefixtures("no_new_sockets")
async def test_a_call_under_way_finishes_when_its_object_is_closed(
    made: Made, class_: type, fake_vllm: FakeVLLM
) -> None:
    before = asyncio.all_tasks()
    subject = made(class_, mode_in_milvus(class_), **apart())
    gate: Any = Gate()
    fake_vllm.gate = gate
    calls = [asyncio.create_task(abest(subject, word)) for word in WORDS[:2]]
    assert await asyncio.to_thread(gate.reached.wait, SECONDS)

    await subject.aclose()
    gate.opened.set()

    assert await asyncio.gather(*calls) == [EXPECTED[word] for word in WORDS[:2]]
    assert asyncio.all_tasks() == before


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 tells not who cancelled")
@with_milvus
async def test_a_call_under_way_says_that_the_client_it_was_lent_was_closed(
    made: Made, class_: type, fake_vllm: FakeVLLM, milvus26_uri: str
) -> None:
    client = AsyncMilvusClient(milvus26_uri, dedicated=True)
    subject = made(class_, mode_in_milvus(class_), client=None, async_client=client)
    gate: Any = Gate()
    fake_vllm.gate = gate
    call = asyncio.create_task(abest(subject, "cat"))
    assert await asyncio.to_thread(gate.reached.wait, SECONDS)

    await client.close()
    gate.opened.set()

    with pytest.raises(SearchError, match="client that was passed in is closed"):
        await call


def mode_in_milvus(class_: type) -> str:
    """Return the mode in which Milvus does all: what is under way is a call of Milvus."""
    return "server" if "Retriever" in class_.__name__ else "auto"


@every_class
async def test_a_context_manager_gives_the_object_itself_and_closes_it(
    made: Made, ask: Ask, class_: type
) -> None:
    subject = made(class_)

    with subject as entered:
        await ask(entered, "cat")
    async with subject as entered_again:
        await ask(entered_again, "dog")

    assert entered is entered_again is subject


@every_class
async def test_a_context_manager_lets_an_error_through(made: Made, class_: type) -> None:
    with pytest.raises(ZeroDivisionError), made(class_) as subject:
        best(subject, str(1 // 0))
    with pytest.raises(ZeroDivisionError):
        async with made(class_) as subject:
            await abest(subject, str(1 // 0))


# Nothing is left


def sockets() -> int:
    """Count this process's open sockets."""
    return sum(_target(each).startswith("socket:") for each in Path("/proc/self/fd").iterdir())


def _target(descriptor: Path) -> str:
    with suppress(OSError):  # that of the listing itself is gone
        return str(descriptor.readlink())
    return ""


@pytest.fixture
def no_new_sockets() -> Iterator[None]:
    """Check that at the end as many sockets are open as now; the other side's close later."""
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("open sockets are counted in /proc")
    gc.collect()
    before = sockets()
    yield
    gc.collect()
    give_up = time.monotonic() + LEFT_SECONDS
    while sockets() > before and time.monotonic() < give_up:
        time.sleep(0.01)
    assert sockets() <= before


def apart() -> dict[str, Any]:
    """Return arguments for a connection of its own: gRPC shares those of equal options."""
    return {"connection_args": {"grpc_options": {"grpc.primary_user_agent": str(uuid4())}}}


@every_class
@pytest.mark.parametrize("closes", [True, False])
@pytest.mark.usefixtures("no_new_sockets")
def test_what_was_closed_or_dropped_leaves_no_socket(
    made: Made, class_: type, *, closes: bool
) -> None:
    for word in WORDS[:3]:
        subject = made(class_, **({} if class_.__name__ == "VLLMRerank" else apart()))
        assert best(subject, word) == EXPECTED[word]
        if closes:
            subject.close()


@every_class
@pytest.mark.parametrize("end", ["closed", "kept", "dropped"])
@pytest.mark.usefixtures("no_new_sockets")
def test_an_event_loop_that_ended_leaves_no_socket(made: Made, class_: type, end: str) -> None:
    kept = []

    async def run(word: str) -> list[str]:
        subject = made(class_, **({} if class_.__name__ == "VLLMRerank" else apart()))
        if end == "kept":
            kept.append(subject)
        try:
            # pymilvus's async client connects on its first call, and several may be first.
            return await asyncio.gather(*(abest(subject, word) for _ in range(4)))
        finally:
            if end == "closed":
                await subject.aclose()

    for word in WORDS[:3]:
        assert asyncio.run(run(word)) == [EXPECTED[word]] * 4


@with_milvus
@pytest.mark.usefixtures("no_new_sockets")
def test_one_object_in_many_event_loops_leaves_no_socket(made: Made, class_: type) -> None:
    subject = made(class_, **apart())

    async def run(word: str) -> str:
        return await abest(subject, word)

    for word in WORDS[:3]:
        assert asyncio.run(run(word)) == EXPECTED[word]
    subject.close()


@every_class
async def test_closing_leaves_no_task(made: Made, class_: type) -> None:
    before = asyncio.all_tasks()
    async with made(class_) as subject:
        await asyncio.gather(*(abest(subject, word) for word in WORDS[:3]))

    assert asyncio.all_tasks() == before


@every_class
async def test_a_call_that_is_cancelled_leaves_no_task_and_the_next_one_works(
    made: Made, class_: type, fake_vllm: FakeVLLM
) -> None:
    before = asyncio.all_tasks()
    gate: Any = Gate()
    fake_vllm.gate = gate
    async with made(class_) as subject:
        call = asyncio.create_task(abest(subject, "cat"))
        assert await asyncio.to_thread(gate.reached.wait, SECONDS)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        gate.opened.set()

        assert await abest(subject, "violin") == EXPECTED["violin"]

    assert asyncio.all_tasks() == before
