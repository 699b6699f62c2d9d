"""VLLMClient over HTTP: what it sends, how it takes every kind of answer, what it tries again."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from milvus_vllm_retrievers import (
    RerankConnectionError,
    RerankError,
    RerankResponseError,
    RerankStatusError,
    RerankTimeoutError,
    VLLMRanker,
)
from milvus_vllm_retrievers._core import services as vllm
from milvus_vllm_retrievers._core.deadline import Deadline
from milvus_vllm_retrievers._core.services import VLLMClient
from tests.fakes import FakeVLLM, Reply, tcp_server

SECRET = "sk-a-secret"
DOCUMENTS = ["a", "ccc", "bb"]
NO_DEADLINE = Deadline()
BUSY = Reply.json(503, {"error": {"message": "the queue is full"}})

Call = Callable[..., Awaitable[list[float]]]


@pytest.fixture(params=["sync", "async"])
def call(request: pytest.FixtureRequest) -> Call:
    """Rerank with a client, blocking in one run of the test and async in the other."""

    async def run(
        client: VLLMClient, documents: list[str] = DOCUMENTS, deadline: Deadline = NO_DEADLINE
    ) -> list[float]:
        if request.param == "sync":
            return client.rerank("a query", documents, deadline)
        return await client.arerank("a query", documents, deadline)

    return run


@pytest.fixture
def rerank(call: Call) -> Call:
    """Rerank with a client of the given ranker and close it."""

    async def run(endpoint: str, deadline: Deadline = NO_DEADLINE, **ranker: Any) -> list[float]:
        client = VLLMClient(VLLMRanker(endpoint, **ranker))
        try:
            return await call(client, deadline=deadline)
        finally:
            await client.aclose()

    return run


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Keep no pause between tries but what a server asks for; a test may set another."""
    pause = [0.0]
    monkeypatch.setattr(vllm, "_backoff", lambda state: pause[0])
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
    client = VLLMClient(VLLMRanker(fake_vllm.url))
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
        (Reply(422, b""), "answered 422: "),
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


async def test_a_redirect_is_not_followed_and_the_key_not_sent_on(
    rerank: Call, fake_vllm: FakeVLLM
) -> None:
    elsewhere = f"{fake_vllm.url}/elsewhere"
    fake_vllm.replies = [Reply(307, b"", {"location": elsewhere})]

    with pytest.raises(RerankStatusError, match=f"redirects to '{elsewhere}'"):
        await rerank(fake_vllm.url, api_key=SECRET)
    assert [received.path for received in fake_vllm.received] == ["/v1/rerank"]


# Answers


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        (Reply(200, b'{"results": [{"ind'), "something other than rerank results"),
        (Reply(200, b"<html>hello</html>"), "something other than rerank results"),
        (Reply.json(200, {"data": []}), "something other than rerank results"),
        (Reply(200, b"\xff\xfe"), "something other than rerank results"),
        (results((0, 0.5), (1, 0.5)), "2 results for 3 documents"),
        (results((0, 0.5), (1, 0.5), (1, 0.5)), "1 of them without a score"),
        (results((0, 0.5), (1, 0.5), (7, 0.5)), "1 of them without a score"),
        (results((0, 0.5), (1, 0.5), (2, float("nan"))), "not a finite number"),
    ],
    ids=["cut off", "html", "another API", "bytes", "dropped", "repeated", "unknown", "NaN"],
)
async def test_an_answer_without_a_score_for_every_document_is_an_error_at_once(
    rerank: Call, fake_vllm: FakeVLLM, reply: Reply, problem: str
) -> None:
    fake_vllm.always = reply

    with pytest.raises(RerankResponseError, match=problem):
        await rerank(fake_vllm.url)
    assert len(fake_vllm.received) == 1


# Connections


async def test_a_refused_connection_is_tried_again_and_then_named(
    rerank: Call, closed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed: list[int] = []
    monkeypatch.setattr(vllm, "_backoff", lambda state: failed.append(state.attempt_number) or 0.0)

    with pytest.raises(RerankConnectionError, match=f"{closed}/v1/rerank could not be reached"):
        await rerank(closed, max_retries=2)
    assert failed == [1, 2, 3]


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
    client = VLLMClient(VLLMRanker(fake_vllm.url))

    await call(client)
    client.close()
    await client.aclose()
    await client.aclose()

    assert await call(client) == [1.0, 3.0, 2.0]
    await client.aclose()


def test_one_client_serves_one_event_loop_after_another(fake_vllm: FakeVLLM) -> None:
    client = VLLMClient(VLLMRanker(fake_vllm.url))

    first, second = (asyncio.run(client.arerank("q", DOCUMENTS)) for _ in range(2))

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
