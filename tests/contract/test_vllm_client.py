"""The client over HTTP: what it sends, how it takes every kind of answer, what is tried again."""

from __future__ import annotations

import asyncio
import contextvars
import json
import socket
import threading
import traceback
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import httpx
import pytest
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode

from milvus_vllm_retrievers import (
    ConfigurationError,
    RerankConnectionError,
    RerankError,
    RerankResponseError,
    RerankStatusError,
    RerankTimeoutError,
    VLLMRanker,
    langchain,
)
from milvus_vllm_retrievers import llama_index as li
from milvus_vllm_retrievers._core import services as vllm
from milvus_vllm_retrievers._core.cool_down import Health
from milvus_vllm_retrievers._core.deadline import Deadline
from milvus_vllm_retrievers._core.drivers import AsyncDriver, SyncDriver
from milvus_vllm_retrievers._core.rerank_texts import scored, served_models
from milvus_vllm_retrievers._core.services import RerankClient
from tests.fakes import FakeVLLM, Reply, running_fake_vllm, tcp_server

SECRET = "sk-a-secret"
DOCUMENTS = ["a", "ccc", "bb"]
NO_DEADLINE = Deadline()
BUSY = Reply.json(503, {"error": {"message": "the queue is full"}})

Call = Callable[..., Awaitable[list[float]]]
every_module = pytest.mark.parametrize("module", [langchain, li], ids=["langchain", "llama_index"])


@pytest.fixture(params=["sync", "async"])
def how(request: pytest.FixtureRequest) -> str:
    """Blocking in one run of the test and async in the other."""
    return request.param


@pytest.fixture
def call(how: str) -> Call:
    """Rerank with a client, tried again as its ranker says."""

    async def run(
        client: RerankClient, documents: list[str] = DOCUMENTS, deadline: Deadline = NO_DEADLINE
    ) -> list[float]:
        flow = scored(client._ranker, Health(0), "a query", documents, deadline)
        if how == "sync":
            return SyncDriver(None, client).run(flow)
        return await AsyncDriver(None, client).run(flow)

    return run


@pytest.fixture
def rerank(call: Call) -> Call:
    """Rerank with a client of the given ranker and close it."""

    async def run(endpoint: str, deadline: Deadline = NO_DEADLINE, **ranker: Any) -> list[float]:
        client = RerankClient(VLLMRanker(endpoint, **ranker))
        try:
            return await call(client, deadline=deadline)
        finally:
            await client.aclose()

    return run


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Keep no pause between tries but what a server asks for; a test may set another."""
    pause = [0.0]
    monkeypatch.setattr(vllm, "_backoff", lambda attempt: pause[0])
    return pause


@pytest.fixture
def silent() -> Iterator[str]:
    """The URL of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def closed() -> Iterator[str]:
    """The URL of a port that nobody listens on, held so that nobody will."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{holder.getsockname()[1]}"


@contextmanager
def trickling(head: bytes) -> Iterator[str]:
    """The URL of a fake server that answers with a head and then a byte now and then."""
    done = threading.Event()

    def answer(connection: socket.socket) -> None:
        connection.sendall(head)
        while not done.wait(0.05):
            connection.sendall(b" ")

    with tcp_server(answer) as url:
        try:
            yield url
        finally:
            done.set()


def results(*scores: tuple[int, float]) -> Reply:
    return Reply.json(200, {"results": [{"index": i, "relevance_score": s} for i, s in scores]})


# Requests and scores


async def test_a_request_carries_the_query_the_documents_and_the_key(
    rerank: Call, fake_vllm: FakeVLLM
) -> None:
    await rerank(f"{fake_vllm.url}/team-a", model="bge", api_key=SECRET)

    (received,) = fake_vllm.received
    assert received.path == "/team-a/v1/rerank"
    assert received.body == {
        "query": "a query",
        "documents": DOCUMENTS,
        "model": "bge",
        "truncate_prompt_tokens": -1,
    }
    assert received.headers["authorization"] == f"Bearer {SECRET}"
    assert received.headers["content-type"] == "application/json"


async def test_without_a_key_no_authorization_is_sent(rerank: Call, fake_vllm: FakeVLLM) -> None:
    await rerank(fake_vllm.url)

    assert "authorization" not in fake_vllm.received[0].headers


async def test_scores_sorted_by_vllm_come_back_in_the_documents_order(
    rerank: Call, fake_vllm: FakeVLLM
) -> None:
    assert await rerank(fake_vllm.url) == [1.0, 3.0, 2.0]


async def test_text_of_any_script_arrives_as_it_is(call: Call, fake_vllm: FakeVLLM) -> None:
    client = RerankClient(VLLMRanker(fake_vllm.url))
    texts = ["größe", "日本語", "emoji 🎻", 'quotes " and \\', "\x00\n"]

    await call(client, texts)
    await client.aclose()

    assert fake_vllm.received[0].body["documents"] == texts


# Statuses


@pytest.mark.parametrize(
    ("reply", "shown"),
    [
        (Reply.json(400, {"error": {"message": "NaN score"}}), "answered 400: NaN score"),
        (Reply.json(401, {"error": "Unauthorized"}), "answered 401: Unauthorized"),
        (Reply.json(404, {"detail": "Not Found"}), "answered 404: Not Found"),
        (Reply(422, b""), "answered 422"),
    ],
)
async def test_a_refusal_is_not_tried_again(
    rerank: Call, fake_vllm: FakeVLLM, reply: Reply, shown: str
) -> None:
    fake_vllm.always = reply

    with pytest.raises(RerankStatusError) as caught:
        await rerank(fake_vllm.url)

    assert shown in str(caught.value)
    assert caught.value.status_code == reply.status
    assert len(fake_vllm.received) == 1


@pytest.mark.parametrize(
    "reply",
    [
        BUSY,
        Reply(502, b"<html>Bad Gateway</html>", {"content-type": "text/html"}),
        Reply(504, b""),
        Reply.json(429, {"error": "slow down"}, **{"retry-after": "0"}),
        Reply.json(500, {"error": {"message": "the engine died"}}),
    ],
    ids=lambda reply: str(reply.status),
)
async def test_a_passing_failure_is_tried_again(
    rerank: Call, fake_vllm: FakeVLLM, reply: Reply
) -> None:
    fake_vllm.replies = [reply]

    assert await rerank(fake_vllm.url) == [1.0, 3.0, 2.0]
    assert len(fake_vllm.received) == 2


async def test_a_server_error_is_tried_again_only_once(rerank: Call, fake_vllm: FakeVLLM) -> None:
    fake_vllm.always = Reply.json(500, {"error": {"message": "the engine died"}})

    with pytest.raises(RerankStatusError, match="answered 500: the engine died"):
        await rerank(fake_vllm.url, max_retries=5)
    assert len(fake_vllm.received) == 2


@pytest.mark.parametrize("max_retries", [0, 1, 3])
async def test_a_lasting_failure_is_tried_as_often_as_the_ranker_says(
    rerank: Call, fake_vllm: FakeVLLM, max_retries: int
) -> None:
    fake_vllm.always = Reply(502, b"<html>Bad Gateway</html>")

    with pytest.raises(RerankStatusError, match="answered 502: <html>Bad Gateway</html>"):
        await rerank(fake_vllm.url, max_retries=max_retries)
    assert len(fake_vllm.received) == 1 + max_retries


async def test_no_pause_is_begun_that_outlasts_the_deadline(
    rerank: Call, fake_vllm: FakeVLLM, pauses: list[float]
) -> None:
    fake_vllm.always = BUSY
    pauses[0] = 3600

    with pytest.raises(RerankStatusError, match="the queue is full"):
        await rerank(fake_vllm.url, Deadline.after(600))
    assert len(fake_vllm.received) == 1


async def test_a_wait_that_the_server_asks_for_counts_against_the_deadline(
    rerank: Call, fake_vllm: FakeVLLM
) -> None:
    fake_vllm.always = Reply.json(429, {"error": "slow down"}, **{"retry-after": "3600"})

    with pytest.raises(RerankStatusError, match="slow down"):
        await rerank(fake_vllm.url, Deadline.after(600))
    assert len(fake_vllm.received) == 1


async def test_a_server_that_asks_for_a_long_wait_is_not_waited_for(
    rerank: Call, fake_vllm: FakeVLLM
) -> None:
    fake_vllm.always = Reply.json(429, {"error": "slow down"}, **{"retry-after": "3600"})

    with pytest.raises(RerankStatusError, match="slow down"):
        await rerank(fake_vllm.url)
    assert len(fake_vllm.received) == 1


async def test_nothing_is_sent_once_the_deadline_has_passed(
    rerank: Call, fake_vllm: FakeVLLM
) -> None:
    with pytest.raises(RerankTimeoutError, match="timeout is used up"):
        await rerank(fake_vllm.url, Deadline.after(0))
    assert fake_vllm.received == []


async def test_an_answer_that_trickles_in_is_given_up_after_the_timeout(rerank: Call) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n"

    with trickling(head) as url, pytest.raises(RerankTimeoutError, match="did not answer in time"):
        await rerank(url, timeout=0.3, max_retries=0)


async def test_an_endless_answer_is_not_read_to_its_end(rerank: Call, fake_vllm: FakeVLLM) -> None:
    fake_vllm.always = Reply(200, b" " * 3_000_000)

    with pytest.raises(RerankResponseError, match="more than"):
        await rerank(fake_vllm.url)


@pytest.mark.parametrize("status", [307, 308])
async def test_a_redirect_to_the_same_path_with_a_slash_is_followed_with_body_and_key(
    rerank: Call, fake_vllm: FakeVLLM, status: int
) -> None:
    fake_vllm.replies = [Reply(status, b"", {"location": "/v1/rerank/"})]

    scores = await rerank(fake_vllm.url, api_key=SECRET, headers={"x-tenant": "a"})

    assert scores == [1.0, 3.0, 2.0]
    first, second = fake_vllm.received
    assert [first.path, second.path] == ["/v1/rerank", "/v1/rerank/"]
    assert first.body == second.body
    assert second.headers["authorization"] == f"Bearer {SECRET}"
    assert second.headers["x-tenant"] == "a"


async def test_redirects_in_a_circle_come_to_an_end(rerank: Call, fake_vllm: FakeVLLM) -> None:
    fake_vllm.always = Reply(307, b"", {"location": "/v1/rerank"})

    with pytest.raises(RerankStatusError, match="answered 307"):
        await rerank(fake_vllm.url)
    assert len(fake_vllm.received) == 4


async def test_a_redirect_to_another_origin_is_not_followed_and_the_key_not_sent_on(
    rerank: Call, fake_vllm: FakeVLLM
) -> None:
    with running_fake_vllm() as other:
        fake_vllm.replies = [Reply(307, b"", {"location": f"{other.url}/v1/rerank"})]

        with pytest.raises(RerankStatusError, match=f"pass endpoint='{other.url}'"):
            await rerank(fake_vllm.url, api_key=SECRET)
        assert other.received == []


# Keys, headers and clients of the user's


def callables() -> dict[str, Callable[[], Any]]:
    """Every kind of api_key that a blocking caller may ask."""

    class Provider:
        def __call__(self) -> str:
            return SECRET

    return {"function": lambda: SECRET, "partial": partial(str, SECRET), "object": Provider()}


def async_callables() -> dict[str, Callable[[], Any]]:
    """Every kind of api_key that only an async caller may ask."""

    async def coroutine() -> str:
        await asyncio.sleep(0)
        return SECRET

    class Provider:
        async def __call__(self) -> str:
            return await coroutine()

    return {
        "coroutine function": coroutine,
        "partial": partial(coroutine),
        "returns a coroutine": lambda: coroutine(),  # noqa: PLW0108 - it is no coroutine function
        "object": Provider(),
    }


@pytest.mark.parametrize("api_key", callables().values(), ids=callables())
async def test_a_key_that_is_asked_for_is_sent(
    rerank: Call, fake_vllm: FakeVLLM, api_key: Callable[[], str]
) -> None:
    await rerank(fake_vllm.url, api_key=api_key)

    assert fake_vllm.received[0].headers["authorization"] == f"Bearer {SECRET}"


@pytest.mark.parametrize("api_key", async_callables().values(), ids=async_callables())
async def test_an_async_key_is_awaited_by_async_callers_and_refused_for_others(
    rerank: Call, how: str, fake_vllm: FakeVLLM, api_key: Callable[[], Any]
) -> None:
    if how == "sync":
        with pytest.raises(ConfigurationError, match=r"api_key is async.*use the async methods"):
            await rerank(fake_vllm.url, api_key=api_key)
        assert fake_vllm.received == []
    else:
        await rerank(fake_vllm.url, api_key=api_key)
        assert fake_vllm.received[0].headers["authorization"] == f"Bearer {SECRET}"


async def test_a_key_is_asked_for_each_try(rerank: Call, fake_vllm: FakeVLLM) -> None:
    fake_vllm.replies = [BUSY, BUSY]
    keys = iter(["sk-1", "sk-2", "sk-3"])

    await rerank(fake_vllm.url, api_key=lambda: next(keys))

    sent = [received.headers["authorization"] for received in fake_vllm.received]
    assert sent == ["Bearer sk-1", "Bearer sk-2", "Bearer sk-3"]


tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant")


async def test_a_key_is_asked_for_with_the_callers_context_and_without_holding_up_the_loop(
    rerank: Call, how: str, fake_vllm: FakeVLLM
) -> None:
    threads: list[threading.Thread] = []

    def key() -> str:
        threads.append(threading.current_thread())
        return f"sk-{tenant.get()}"

    tenant.set("a")
    await rerank(fake_vllm.url, api_key=key)

    assert fake_vllm.received[0].headers["authorization"] == "Bearer sk-a"
    assert (threads == [threading.main_thread()]) == (how == "sync")


class KeyStoreError(Exception):
    """What a key store of a user's raises."""


def failing_key() -> str:
    raise KeyStoreError(f"login with {SECRET} failed")


async def failing_async_key() -> str:
    raise KeyStoreError(f"login with {SECRET} failed")


FAILING_KEYS = [
    (failing_key, "raised KeyStoreError"),
    (lambda: "", "returned is empty"),
    (lambda: None, "returned must be text, not NoneType"),
    (lambda: f"{SECRET}\n{SECRET}", "returned must be plain ASCII"),
    (lambda: "*****", "returned is the mask"),
]


@pytest.mark.parametrize(("api_key", "problem"), FAILING_KEYS)
async def test_a_key_that_cannot_be_had_is_an_error_of_reranking_without_a_secret(
    rerank: Call, fake_vllm: FakeVLLM, api_key: Any, problem: str
) -> None:
    with pytest.raises(RerankError, match=problem) as caught:
        await rerank(fake_vllm.url, api_key=api_key)

    assert SECRET not in shown_of(caught.value)
    assert fake_vllm.received == []


async def test_an_async_key_that_cannot_be_had_is_one_too(fake_vllm: FakeVLLM) -> None:
    client = RerankClient(VLLMRanker(fake_vllm.url, api_key=failing_async_key))

    with pytest.raises(RerankError, match="raised KeyStoreError") as caught:
        await client.asend(vllm.build_models_request(client._ranker))

    assert SECRET not in shown_of(caught.value)


async def test_a_key_that_is_not_given_in_time_is_not_waited_for(fake_vllm: FakeVLLM) -> None:
    never = asyncio.Event()

    async def key() -> str:
        await never.wait()
        return SECRET

    client = RerankClient(VLLMRanker(fake_vllm.url, api_key=key, timeout=0.05))

    with pytest.raises(RerankTimeoutError):
        await client.asend(vllm.build_models_request(client._ranker))


@every_module
@pytest.mark.parametrize(("api_key", "problem"), FAILING_KEYS[:2])
async def test_a_key_that_cannot_be_had_is_covered_by_on_error(
    how: str, module: Any, fake_vllm: FakeVLLM, api_key: Any, problem: str
) -> None:
    degraded = await degraded_by(how, module, VLLMRanker(fake_vllm.url, api_key=api_key))

    assert len(degraded) == len(DOCUMENTS)
    assert problem in degraded[0].metadata["rerank_error"]
    assert SECRET not in repr(degraded)


async def degraded_by(how: str, module: Any, ranker: VLLMRanker) -> Any:
    """Rerank with a ranker that fails and on_error="skip"."""
    documents = [Document(page_content=text) for text in DOCUMENTS]
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in DOCUMENTS]
    ranker = replace(ranker, on_error="skip")
    async with module.VLLMRerank(ranker=ranker) as reranker:
        if module is langchain and how == "sync":
            return reranker.compress_documents(documents, "q")
        if module is langchain:
            return await reranker.acompress_documents(documents, "q")
        if how == "sync":
            return reranker.postprocess_nodes(nodes, query_str="q")
        return await reranker.apostprocess_nodes(nodes, query_str="q")


@every_module
@pytest.mark.parametrize(
    ("variable", "value"),
    [("ALL_PROXY", "socks5://h:1"), ("NO_PROXY", "[::1]"), ("HTTP_PROXY", "foo://h:1")],
)
async def test_what_the_environment_does_wrong_is_covered_by_on_error(
    how: str, module: Any, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)

    degraded = await degraded_by(how, module, VLLMRanker("http://vllm.example"))

    assert len(degraded) == len(DOCUMENTS)
    assert variable in degraded[0].metadata["rerank_error"]


@every_module
def test_what_the_environment_does_wrong_is_met_where_a_reranker_is_made(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://h:1")

    with pytest.raises(RerankConnectionError, match="ALL_PROXY names a SOCKS proxy"):
        module.VLLMRerank(ranker=VLLMRanker("http://vllm.example"))


@every_module
def test_what_the_environment_does_wrong_is_met_where_a_retriever_is_made_that_reranks_from_here(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://h:1")

    with pytest.raises(RerankConnectionError, match="ALL_PROXY names a SOCKS proxy"):
        module.MilvusVLLMRetriever("docs", VLLMRanker("http://vllm.example", mode="client"))


async def test_headers_are_sent_and_not_shown(rerank: Call, fake_vllm: FakeVLLM) -> None:
    headers = {"X-Tenant": "a", "Authorization": f"Basic {SECRET}"}
    fake_vllm.always = Reply.json(401, {"error": f"no login {SECRET}"})

    with pytest.raises(RerankStatusError, match=r"no login \*\*\*") as caught:
        await rerank(fake_vllm.url, headers=headers)

    assert fake_vllm.received[0].headers["x-tenant"] == "a"
    assert fake_vllm.received[0].headers["authorization"] == f"Basic {SECRET}"
    assert SECRET not in shown_of(caught.value)


def noting(sent: list[httpx.Request]) -> dict[str, Any]:
    """Return the user's own HTTP clients, of both kinds, which note what is sent."""

    async def note(request: httpx.Request) -> None:
        sent.append(request)

    return {
        "http_client": httpx.Client(
            event_hooks={"request": [sent.append]}, headers={"authorization": f"Bearer {SECRET}"}
        ),
        "async_http_client": httpx.AsyncClient(
            event_hooks={"request": [note]}, headers={"authorization": f"Bearer {SECRET}"}
        ),
    }


async def test_a_client_that_was_passed_in_sends_all_requests_and_stays_open(
    rerank: Call, fake_vllm: FakeVLLM
) -> None:
    sent: list[httpx.Request] = []
    clients = noting(sent)

    for _ in range(2):
        await rerank(fake_vllm.url, **clients)

    assert len(sent) == len(fake_vllm.received) == 2
    assert fake_vllm.received[0].headers["authorization"] == f"Bearer {SECRET}"
    assert not clients["http_client"].is_closed
    assert not clients["async_http_client"].is_closed
    clients["http_client"].close()
    await clients["async_http_client"].aclose()


async def test_a_client_that_was_passed_in_follows_no_redirect_and_shows_no_key(
    rerank: Call, fake_vllm: FakeVLLM
) -> None:
    clients: dict[str, Any] = {
        "http_client": httpx.Client(
            follow_redirects=True, headers={"authorization": f"Bearer {SECRET}"}
        ),
        "async_http_client": httpx.AsyncClient(
            follow_redirects=True, headers={"authorization": f"Bearer {SECRET}"}
        ),
    }
    with running_fake_vllm() as other:
        location = f"{other.url}/v1/rerank?{SECRET}"
        fake_vllm.always = Reply(307, b"", {"location": location})
        with pytest.raises(RerankStatusError, match="not followed") as caught:
            await rerank(fake_vllm.url, **clients)
        assert other.received == []

    assert SECRET not in shown_of(caught.value)
    clients["http_client"].close()
    await clients["async_http_client"].aclose()


async def test_a_client_that_was_passed_in_and_closed_is_an_error_of_reranking_at_once(
    rerank: Call, fake_vllm: FakeVLLM, pauses: list[float]
) -> None:
    clients = noting([])
    clients["http_client"].close()
    await clients["async_http_client"].aclose()
    pauses[0] = 3600

    with pytest.raises(RerankConnectionError, match="passed in closed, or of another event loop"):
        await rerank(fake_vllm.url, **clients)


def test_an_async_client_that_was_passed_in_serves_the_event_loop_it_belongs_to_alone(
    fake_vllm: FakeVLLM,
) -> None:
    own = httpx.AsyncClient()
    ranker = VLLMRanker(fake_vllm.url, async_http_client=own)

    async def send() -> int:
        client = RerankClient(ranker)
        return (await client.asend(vllm.build_request(ranker, "q", ["a"]))).status_code

    with asyncio.Runner() if hasattr(asyncio, "Runner") else closing_loop() as first:
        assert first.run(send()) == first.run(send()) == 200
        with pytest.raises(ConfigurationError, match="first used in another event loop"):
            threaded(lambda: asyncio.run(send()))
        first.run(own.aclose())
    assert len(fake_vllm.received) == 2


@contextmanager
def closing_loop() -> Iterator[Any]:
    """What Python 3.11 calls a Runner."""
    loop = asyncio.new_event_loop()
    loop.run = loop.run_until_complete  # type: ignore[attr-defined]
    yield loop
    loop.close()


def threaded(do: Callable[[], Any]) -> Any:
    """Do something in a thread, where another event loop may run."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(do).result()


async def test_the_served_models_are_asked_for_with_the_key(how: str) -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json={"data": [{"id": "bge"}]})

    transport = httpx.MockTransport(answer)
    ranker = VLLMRanker(
        "http://gw/team-a",
        api_key=lambda: SECRET,
        http_client=httpx.Client(transport=transport),
        async_http_client=httpx.AsyncClient(transport=transport),
    )
    flow, client = served_models(ranker, NO_DEADLINE), RerankClient(ranker)

    if how == "sync":
        names = SyncDriver(None, client).run(flow)
    else:
        names = await AsyncDriver(None, client).run(flow)

    assert names == ["bge"]
    (request,) = seen
    assert (request.method, str(request.url)) == ("GET", "http://gw/team-a/v1/models")
    assert request.headers["authorization"] == f"Bearer {SECRET}"


# Answers


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        (Reply(200, b'{"results": [{"ind'), "something other than rerank results"),
        (Reply(200, b"<html>hello</html>"), "something other than rerank results"),
        (Reply.json(200, {"data": []}), "something other than rerank results"),
        (Reply(200, b"\xff\xfe"), "something other than rerank results"),
        (Reply(200, b"\xef\xbb\xbf[]"), "something other than rerank results"),
        (results((0, 0.5), (1, 0.5)), "2 results for 3 documents"),
        (results((0, 0.5), (1, 0.5), (1, 0.5)), "1 of them without a score"),
        (results((0, 0.5), (1, 0.5), (7, 0.5)), "1 of them without a score"),
        (results((0, 0.5), (1, 0.5), (2, float("nan"))), "not a finite number"),
    ],
    ids=[
        "cut off",
        "html",
        "another API",
        "bytes",
        "mark",
        "dropped",
        "repeated",
        "unknown",
        "NaN",
    ],
)
async def test_an_answer_without_a_score_for_every_document_is_an_error_at_once(
    rerank: Call, fake_vllm: FakeVLLM, reply: Reply, problem: str
) -> None:
    fake_vllm.always = reply

    with pytest.raises(RerankResponseError, match=problem):
        await rerank(fake_vllm.url)
    assert len(fake_vllm.received) == 1


async def test_an_answer_may_begin_with_a_byte_order_mark(
    rerank: Call, fake_vllm: FakeVLLM
) -> None:
    good = results((0, 0.1), (1, 0.3), (2, 0.2))
    fake_vllm.always = Reply(200, b"\xef\xbb\xbf" + good.body, good.headers)

    assert await rerank(fake_vllm.url) == [0.1, 0.3, 0.2]


# Connections


@pytest.mark.parametrize("timeout", [1e12, 1e300, None])
async def test_a_timeout_may_be_as_long_as_one_likes(
    rerank: Call, fake_vllm: FakeVLLM, timeout: float | None
) -> None:
    assert await rerank(fake_vllm.url, timeout=timeout) == [1.0, 3.0, 2.0]


async def test_what_the_environment_does_wrong_is_an_error_of_reranking_at_once(
    rerank: Call, fake_vllm: FakeVLLM, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    pauses[0] = 3600

    with pytest.raises(RerankConnectionError, match="names a SOCKS proxy"):
        await rerank(fake_vllm.url)


async def test_a_proxy_that_refuses_is_named(
    rerank: Call, closed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", closed)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)

    with pytest.raises(RerankConnectionError, match="the proxy which http_proxy names, not vLLM"):
        await rerank("http://vllm.example:8000", max_retries=0)


async def test_a_server_that_speaks_no_tls_is_told_at_once(
    rerank: Call, fake_vllm: FakeVLLM, pauses: list[float]
) -> None:
    pauses[0] = 3600

    with pytest.raises(RerankConnectionError, match=f"speaks no TLS: use '{fake_vllm.url}'"):
        await rerank(fake_vllm.url.replace("http:", "https:"), timeout=30)


async def test_a_server_that_speaks_no_http_is_told_from_vllm(rerank: Call) -> None:
    def answer(connection: socket.socket) -> None:
        connection.sendall(b"\x00\x00\x12\x04\x00\x00\x00\x00\x00\r\n\r\n")  # as gRPC begins

    with (
        tcp_server(answer) as url,
        pytest.raises(RerankConnectionError, match=r"Milvus's own \(19530\) answers so"),
    ):
        await rerank(url, max_retries=0)


async def test_a_refused_connection_is_tried_again_and_then_named(
    rerank: Call, closed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed: list[int] = []
    monkeypatch.setattr(vllm, "_backoff", lambda attempt: failed.append(attempt) or 0.0)

    with pytest.raises(RerankConnectionError, match=f"{closed}/v1/rerank could not be reached"):
        await rerank(closed, max_retries=2)
    assert failed == [1, 2]


async def test_a_connection_that_breaks_off_is_tried_again(
    rerank: Call, fake_vllm: FakeVLLM
) -> None:
    def break_off_once(query: str, document: str) -> float:
        if len(fake_vllm.received) == 1:
            raise ConnectionAbortedError
        return 0.5

    fake_vllm.score = break_off_once

    assert await rerank(fake_vllm.url) == [0.5, 0.5, 0.5]
    assert len(fake_vllm.received) == 2


async def test_a_server_that_does_not_answer_is_given_up_after_the_timeout(
    rerank: Call, silent: str
) -> None:
    with pytest.raises(RerankTimeoutError, match="did not answer in time"):
        await rerank(silent, timeout=0.05)


async def test_a_deadline_before_the_timeout_ends_the_wait(
    rerank: Call, silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Deadline, "remaining", lambda self: 0.05)

    with pytest.raises(RerankTimeoutError, match="did not answer in time"):
        await rerank(silent, timeout=None)


async def test_a_closed_client_can_be_used_again(call: Call, fake_vllm: FakeVLLM) -> None:
    client = RerankClient(VLLMRanker(fake_vllm.url))

    await call(client)
    client.close()
    await client.aclose()
    await client.aclose()

    assert await call(client) == [1.0, 3.0, 2.0]
    await client.aclose()


def test_one_client_serves_one_event_loop_after_another(fake_vllm: FakeVLLM) -> None:
    ranker = VLLMRanker(fake_vllm.url)
    client = RerankClient(ranker)

    def run() -> list[float]:
        return asyncio.run(
            AsyncDriver(None, client).run(scored(ranker, Health(0), "q", DOCUMENTS, NO_DEADLINE))
        )

    first, second = run(), run()

    assert first == second == [1.0, 3.0, 2.0]


# Secrets


@pytest.mark.parametrize(
    "reply",
    [
        Reply.json(400, {"error": {"message": "bad"}}),
        Reply.json(401, {"error": "Unauthorized"}),
        Reply(502, b"<html>Bad Gateway</html>"),
        Reply(307, b"", {"location": "/elsewhere"}),
        Reply(200, b"no json"),
        results((0, 0.5)),
        results((0, 0.5), (1, 0.5), (2, float("nan"))),
    ],
    ids=lambda reply: f"{reply.status}-{len(reply.body)}",
)
async def test_no_error_shows_the_key_however_vllm_answers(
    rerank: Call, fake_vllm: FakeVLLM, reply: Reply
) -> None:
    fake_vllm.always = reply

    with pytest.raises(RerankError) as caught:
        await rerank(fake_vllm.url, api_key=SECRET)

    assert SECRET not in shown_of(caught.value)


async def test_no_error_shows_the_key_where_vllm_does_not_answer(
    rerank: Call, closed: str, silent: str
) -> None:
    with pytest.raises(RerankConnectionError) as refused:
        await rerank(closed, api_key=SECRET)
    with pytest.raises(RerankTimeoutError) as late:
        await rerank(silent, api_key=SECRET, timeout=0.05)

    assert SECRET not in shown_of(refused.value) + shown_of(late.value)


def shown_of(error: BaseException) -> str:
    """All that a log would hold of an error."""
    return repr(error) + json.dumps(vars(error)) + "".join(traceback.format_exception(error))
