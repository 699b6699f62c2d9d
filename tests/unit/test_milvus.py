"""Milvus at the edge: versions, error texts, connections with stub clients."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from milvus_lite.db import MilvusLite
from pydantic import SecretStr

from milvus_vllm_retrievers import (
    ConfigurationError,
    MilvusVLLMError,
    RerankConnectionError,
    RerankError,
    RerankResponseError,
    RerankStatusError,
    RerankTimeoutError,
    SearchError,
    VLLMRanker,
)
from milvus_vllm_retrievers._core.milvus import ConnectionSettings, MilvusConnection
from milvus_vllm_retrievers._core.milvus_errors import explain_error, with_advice
from milvus_vllm_retrievers._core.server import Server


@pytest.mark.parametrize(
    ("version", "known", "provider"),
    [
        ("2.6.4", True, "vllm"),
        ("v2.6.4-dev", True, "vllm"),
        ("2.10.0", True, "vllm"),
        ("3.0.0", True, "vllm"),
        ("Zilliz Cloud Vector Database(Compatible with Milvus 2.6)", True, "vllm"),
        ("Zilliz Cloud Vector Database(Compatible with Milvus 2.5)", True, None),
        ("2.5.14", True, None),
        ("v2.3.5-lite", True, None),
        ("milvus_lite-3.2.2", True, "cohere"),
        ("milvus-lite 3.0.0", True, "cohere"),
        ("milvus_lite-2.5.1", True, None),
        ("master-8f3a2c1", False, "vllm"),
        ("", False, "vllm"),
    ],
)
def test_a_version_tells_how_the_server_reaches_vllm(
    version: str, known: bool, provider: str | None
) -> None:
    server = Server.from_version(version)

    assert (server.version, server.known, server.provider) == (version, known, provider)
    assert server.is_lite == version.startswith("milvus")


FAILED = "call service failed, errs:["
GO = f'{FAILED}Post "http://vllm:8000/rerank": '
UNREACHABLE = "vLLM must be reachable from Milvus: set server_endpoint"
SERVES_NONE = "Does that vLLM serve a rerank model?"
NO_MODEL = "vLLM serves /v1/rerank only for embedding and one-label classification models"
BUSY = "lower the ranker's max_concurrency"
LONGER = "raise the ranker's timeout"
LOG = "The log of vLLM"
DROPPED = "a gateway may drop documents; is the endpoint vLLM's base URL"


@pytest.mark.parametrize(
    "message",
    [
        f"{GO}dial tcp 10.0.0.1:8000: connect: connection refused]",
        f"{GO}dial tcp 10.0.0.1:8000: connect: connection timed out]",
        f"{GO}dial tcp 10.0.0.1:8000: i/o timeout]",
        f"{GO}dial tcp 10.0.0.1:8000: connect: no route to host]",
        f"{GO}dial tcp 10.0.0.1:8000: connect: network is unreachable]",
        f"{GO}dial tcp: lookup vllm: no such host]",
        f"{GO}dial tcp: lookup vllm on 127.0.0.11:53: server misbehaving]",
        # Without the URL, as other releases may say it.
        *(
            f"call service failed: {words}"
            for words in (
                "connection refused",
                "i/o timeout",
                "no route to host",
                "network is unreachable",
                "no such host",
                "server misbehaving",
            )
        ),
        "Cohere API connection error: [Errno 111] Connection refused",
    ],
)
def test_a_vllm_that_milvus_cannot_reach_is_explained_as_seen_from_milvus(message: str) -> None:
    error = explain_error(Exception(message), "search")

    assert type(error) is RerankConnectionError
    assert str(error).startswith(f"reranking inside Milvus failed: {message} ({UNREACHABLE}")


NO_TLS = "it speaks no TLS: write http:// in the ranker's server_endpoint or endpoint"
NOT_HTTP = "what listens there does not speak HTTP: is that vLLM's port? Milvus's own (19530)"
NOT_TRUSTED = "Milvus does not trust vLLM's certificate: give Milvus its CA"
BROKE = "the connection broke: vLLM, or a gateway before it, may have restarted; its log says why"


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("http: server gave HTTP response to HTTPS client", NO_TLS),
        ("[SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:1006)", NO_TLS),
        (
            "net/http: HTTP/1.x transport connection broken: malformed HTTP response "
            r'"\x00\x00\x06\x04"',
            NOT_HTTP,
        ),
        ("tls: failed to verify certificate: x509: unknown authority", NOT_TRUSTED),
        ("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate", NOT_TRUSTED),
        ("EOF", BROKE),
        ("unexpected EOF", BROKE),
        ("read tcp 10.0.0.2:5000->10.0.0.1:8000: read: connection reset by peer", BROKE),
        ("Remote end closed connection without response", BROKE),
    ],
)
@pytest.mark.parametrize("begin", [GO, "call service failed: ", "Cohere API connection error: "])
def test_a_vllm_that_milvus_reaches_but_cannot_talk_to_is_not_called_unreachable(
    begin: str, words: str, advice: str
) -> None:
    error = explain_error(Exception(begin + words), "search")

    assert type(error) is RerankConnectionError
    assert str(error).startswith(f"reranking inside Milvus failed: {begin}{words} ({advice}")
    assert UNREACHABLE not in str(error)


@pytest.mark.parametrize(
    ("message", "kind", "advice"),
    [
        (f"{GO}context deadline exceeded]", RerankTimeoutError, LONGER),
        ("call service failed: context deadline exceeded", RerankTimeoutError, LONGER),
        ("Cohere API request timed out", RerankTimeoutError, LONGER),
        (f"{FAILED}400 Bad Request, no]", RerankStatusError, "keep truncate_prompt_tokens=-1"),
        (f"{FAILED}404 Not Found, Not Found]", RerankStatusError, f"{SERVES_NONE} {NO_MODEL}"),
        ('Cohere API error 404: {"detail": "Not Found"}', RerankStatusError, NO_MODEL),
        ("Cohere API error 404: The model `x` does not exist.", RerankStatusError, "/v1/models"),
        (f"{FAILED}429 Too Many Requests, no]", RerankStatusError, BUSY),
        ("call service failed: status code 503: busy", RerankStatusError, BUSY),
        (f"{FAILED}502 Bad Gateway, connection refused]", RerankStatusError, LOG),
        (f"{FAILED}504 Gateway Timeout, timed out]", RerankStatusError, LOG),
        ("Cohere API error 400: maximum context length", RerankStatusError, "Lite cannot truncate"),
        ("docs and scores does not match docs:[3], scores:[2]", RerankResponseError, DROPPED),
        ("an invalid or duplicated result index [1] for [3] docs", RerankResponseError, DROPPED),
        ("call service failed, unmarshal response failed", RerankResponseError, DROPPED),
        ("Cohere API returned nothing", RerankError, ""),
    ],
)
def test_a_failed_rerank_service_is_told_from_a_failed_search_and_comes_with_what_to_do(
    message: str, kind: type[RerankError], advice: str
) -> None:
    error = explain_error(Exception(message), "search of collection 'docs'")

    assert type(error) is kind
    assert str(error).startswith(f"reranking inside Milvus failed: {message}")
    assert advice in str(error)
    assert UNREACHABLE not in str(error)


NO_KEY = "Milvus sent no key: it sends only a credential, the name of a key in milvus.yaml"
NOT_SENT = "Milvus does not send the api_key: it sends only a credential"


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize(
    ("ranker", "advice"),
    [
        ({}, NO_KEY),
        ({"api_key": "sk-here"}, NOT_SENT),
        ({"credential": "prod"}, "Check the key that milvus.yaml holds under the name 'prod'"),
        ({"api_key": "sk-here", "credential": "prod"}, "under the name 'prod'"),
    ],
)
def test_a_refused_key_is_explained_by_what_milvus_was_given(
    status: int, ranker: dict[str, Any], advice: str
) -> None:
    failed = explain_error(Exception(f"call service failed, errs:[{status} No, no]"), "search")
    failed.__cause__ = cause = OSError("why")

    error = with_advice(failed, VLLMRanker("http://vllm:8000", **ranker))

    assert isinstance(error, RerankStatusError)
    assert error.status_code == status
    assert f"{advice}" in str(error)
    assert "sk-here" not in str(error)
    assert error.__cause__ is cause


def test_a_key_that_milvus_lite_cannot_send_is_to_be_sent_from_here() -> None:
    failed = explain_error(Exception("Cohere API error 401: Unauthorized"), "search")

    error = with_advice(failed, VLLMRanker("http://vllm:8000"))

    assert "Milvus Lite sends no key: use mode='client' with an api_key" in str(error)


@pytest.mark.parametrize(
    ("ranker", "shown"),
    [
        ({}, "the ranker's endpoint, http://vllm:8000"),
        ({"server_endpoint": "http://in:80"}, "the ranker's server_endpoint, http://in:80"),
    ],
)
@pytest.mark.parametrize(
    "message",
    [
        f"{GO}EOF]",
        "call service failed, errs:[404 Not Found, no]",
        "call service failed, unmarshal response failed, errs:[no]",
        "context deadline exceeded",
    ],
)
def test_a_failure_inside_milvus_names_the_url_that_milvus_was_given(
    message: str, ranker: dict[str, Any], shown: str
) -> None:
    failed = explain_error(Exception(message), "search")

    error = with_advice(failed, VLLMRanker("http://vllm:8000", **ranker))

    assert isinstance(error, RerankError)
    assert f"Milvus was given {shown}" in str(error)


def test_a_time_limit_that_milvus_met_within_itself_is_the_rankers() -> None:
    failed = explain_error(Exception("context deadline exceeded"), "search")

    error = with_advice(failed, VLLMRanker("http://vllm:8000"))

    assert type(error) is RerankTimeoutError
    assert error.__cause__ is failed
    assert str(error).startswith("reranking inside Milvus took too long: search failed: context")
    assert LONGER in str(error)


@pytest.mark.parametrize("key", ["nope", "sk-not-a-name", "sk-not a.apikey name"])
def test_a_key_in_place_of_its_name_in_milvus_yaml_is_not_repeated(key: str) -> None:
    said = f"{key} is not a apikey crediential, can not find key: {key}.apikey"
    connection = MilvusConnection(ConnectionSettings())

    error = connection.failure(Exception(said), "search of collection 'docs'", None)

    assert type(error) is SearchError
    assert "the NAME of a key under 'credential' in milvus.yaml, never the key" in str(error)
    assert key not in str(error)
    assert error.__cause__ is None, "the cause shows it in every traceback"


def test_a_call_that_ran_out_of_time_while_milvus_was_to_rerank_points_to_vllm_too() -> None:
    failed = explain_error(Exception("DEADLINE_EXCEEDED: Deadline Exceeded"), "search")

    error = with_advice(failed, VLLMRanker("http://vllm:8000", server_endpoint="http://in:80"))

    assert isinstance(error, SearchError)
    assert error.reason == "timeout"
    assert "raise timeout" in str(error)
    assert "Milvus was to rerank in that time: see whether vLLM answers at http://in:80" in str(
        error
    )


@pytest.mark.parametrize("status", [404, 500, 502])
def test_what_ends_in_a_question_mark_gets_no_full_stop(status: int) -> None:
    failed = explain_error(Exception(f"{FAILED}{status} No, no]"), "search")

    error = str(with_advice(failed, VLLMRanker("http://vllm:8000")))

    assert "?" in error
    assert "?." not in error


def test_a_failed_search_has_nothing_to_do_with_the_ranker() -> None:
    failed = SearchError("disk full")

    assert with_advice(failed, VLLMRanker("http://vllm:8000")) is failed


RECONNECT_SOON = {
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.max_reconnect_backoff_ms": 1000,
}


def test_a_status_that_milvus_passes_on_can_be_read() -> None:
    error = explain_error(Exception("call service failed, status code: 401, body: no"), "search")

    assert isinstance(error, RerankStatusError)
    assert (error.status_code, error.body) == (
        401,
        "call service failed, status code: 401, body: no",
    )


@pytest.mark.parametrize(
    ("message", "advice"),
    [
        ("unknown rerank model provider: vllm", "use mode='client'"),
        ("Unknown rerank provider: 'vllm'. Supported: 'cohere'", "use mode='client'"),
        ("rerank provider: [vllm] is disabled", "enable provider vllm in milvus.yaml"),
        ("unsupported reranker model", "use mode='client'"),
        ("function input field cannot be nullable", "use mode='client', or name another with text"),
        ("RESOURCE_EXHAUSTED: Received message larger than max (9 vs. 4)", "smaller fetch_k"),
        ("Fail connecting to server on localhost:8000", "vLLM's URL is the ranker's endpoint"),
        ("endpoint is not a valid http/https link", "set the ranker's server_endpoint"),
        ("model input field id must be VarChar, got Int64", "with text_field="),
        ("collection not loaded[collection=docs]", "load the collection first"),
        ("can't find collection[collection=docs]", "check collection_name"),
        ("cannot parse expression: a ==", r"check the filter \(expr\)"),
        ("StatusCode.UNIMPLEMENTED", "too old"),
    ],
)
def test_a_failed_search_comes_with_what_to_do(message: str, advice: str) -> None:
    error = explain_error(Exception(message), "search of collection 'docs'")

    assert type(error) is SearchError
    assert str(error).startswith(f"search of collection 'docs' failed: {message} (")
    assert pytest.raises(SearchError, match=advice).matches(error)


def test_an_error_of_no_known_kind_is_passed_on_as_it_is() -> None:
    assert str(explain_error(Exception("disk full"), "search")) == "search failed: disk full"


def test_the_message_of_a_milvus_exception_is_taken_without_its_wrapping() -> None:
    error = SimpleNamespace(code=100, message="disk full")

    assert str(explain_error(error, "search")) == "search failed: disk full"  # type: ignore[arg-type]


def test_a_long_error_is_shown_in_part() -> None:
    assert len(str(explain_error(Exception("a document " * 500), "search"))) < 500


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("collection not loaded[collection=docs]", "not_loaded"),
        ("collection 'docs' is in state 'released'", "not_loaded"),
        ("can't find collection[collection=docs]", None),
        ("should create connection first", "closed"),
        ("Cannot invoke RPC on closed channel!", "closed"),
        ("context deadline exceeded", "rerank_timeout"),
        ("CLIENT: Received message larger than max (5 vs. 4)", "too_large"),
        ("RESOURCE_EXHAUSTED: trying to send message larger than max", "too_large"),
        ("DEADLINE_EXCEEDED: Deadline Exceeded", "timeout"),
        ("Fail connecting to server on localhost:19530, server unavailable", "disconnected"),
        ("a document " * 500 + "collection not loaded[collection=docs]", "not_loaded"),
    ],
)
def test_a_failure_is_recognised_by_what_milvus_says(message: str, reason: str | None) -> None:
    error = explain_error(Exception(message), "search")

    assert isinstance(error, SearchError)
    assert error.reason == reason


def test_settings_become_a_clients_arguments_and_empty_ones_are_left_out() -> None:
    assert ConnectionSettings().arguments() == {"uri": "http://localhost:19530"}
    assert ConnectionSettings(
        "https://cloud", "root:pw", "db", {"secure": True, "uri": "https://other"}
    ).arguments() == {"uri": "https://other", "token": "root:pw", "db_name": "db", "secure": True}


def test_settings_do_not_show_how_to_log_in() -> None:
    settings = ConnectionSettings(token="sk-secret", connection_args={"password": "sk-secret"})

    assert "sk-secret" not in repr(settings)


class StubClient:
    """Stands for both of pymilvus's clients."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


class StubAsyncClient(StubClient):
    async def close(self) -> None:  # type: ignore[override]
        self.closed += 1


@pytest.fixture
def _stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pymilvus.MilvusClient", StubClient)
    monkeypatch.setattr("pymilvus.AsyncMilvusClient", StubAsyncClient)


async def async_client_of(connection: MilvusConnection) -> Any:
    """Return a connection's async client after a use of it."""
    async with connection.async_client() as client:
        return client


@pytest.mark.usefixtures("_stubs")
async def test_a_front_ends_arguments_describe_the_connection() -> None:
    borrowed = StubAsyncClient()
    connection = MilvusConnection.of(
        SimpleNamespace(
            uri="http://milvus",
            token=SecretStr("root:pw"),
            db_name="db",
            connection_args={"secure": True},
            client=None,
            async_client=borrowed,
        )
    )

    assert connection.client().arguments == {
        "uri": "http://milvus",
        "token": "root:pw",
        "db_name": "db",
        "secure": True,
        "grpc_options": RECONNECT_SOON,
        "dedicated": True,
    }
    assert await async_client_of(connection) is borrowed


@pytest.mark.usefixtures("_stubs")
async def test_clients_are_made_once_and_anew_after_closing() -> None:
    connection = MilvusConnection(ConnectionSettings("http://milvus", "root:pw"))
    client, async_client = connection.client(), await async_client_of(connection)

    assert client.arguments == {
        "uri": "http://milvus",
        "token": "root:pw",
        "grpc_options": RECONNECT_SOON,
        "dedicated": True,
    }
    assert async_client.arguments == client.arguments
    assert connection.client() is client
    assert await async_client_of(connection) is async_client

    await connection.aclose()
    await connection.aclose()

    assert (client.closed, async_client.closed) == (1, 1)
    assert connection.client() is not client
    assert await async_client_of(connection) is not async_client


@pytest.mark.usefixtures("_stubs")
def test_each_event_loop_has_an_async_client_of_its_own_and_closes_it() -> None:
    connection = MilvusConnection(ConnectionSettings())

    first, second = (asyncio.run(async_client_of(connection)) for _ in range(2))

    assert first is not second
    assert (first.closed, second.closed) == (1, 1)


async def test_borrowed_clients_are_used_and_never_closed() -> None:
    client, async_client = StubClient(), StubAsyncClient()
    connection = MilvusConnection(ConnectionSettings(), client=client, async_client=async_client)

    assert connection.client() is client
    assert await async_client_of(connection) is async_client
    connection.close()
    await connection.aclose()

    assert (client.closed, async_client.closed) == (0, 0)


@pytest.mark.usefixtures("_stubs")
async def test_a_borrowed_blocking_client_tells_where_the_async_one_connects() -> None:
    client = StubClient()
    client._config = SimpleNamespace(
        uri="http://milvus", token="root:pw", db_name="db", handler_kwargs={"secure": True}
    )
    connection = MilvusConnection(ConnectionSettings(), client=client)

    async_client = await async_client_of(connection)
    await connection.aclose()

    assert async_client.arguments == {
        "uri": "http://milvus",
        "token": "root:pw",
        "db_name": "db",
        "secure": True,
        "grpc_options": RECONNECT_SOON,
        "dedicated": True,
    }
    assert (client.closed, async_client.closed) == (0, 1)


async def test_a_borrowed_client_that_does_not_tell_its_server_serves_blocking_calls_only() -> None:
    connection = MilvusConnection(ConnectionSettings(), client=StubClient())

    with pytest.raises(ConfigurationError, match="pass async_client="):
        await async_client_of(connection)


@pytest.mark.usefixtures("_stubs")
def test_a_borrowed_async_client_alone_serves_async_calls_only() -> None:
    with pytest.raises(ConfigurationError, match="pass client="):
        MilvusConnection(ConnectionSettings(), async_client=StubAsyncClient()).client()

    elsewhere = ConnectionSettings("http://milvus")
    client = MilvusConnection(elsewhere, async_client=StubAsyncClient()).client()
    assert client.arguments == {
        "uri": "http://milvus",
        "grpc_options": RECONNECT_SOON,
        "dedicated": True,
    }


def test_a_failed_connection_names_the_server_without_the_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(**arguments: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("pymilvus.MilvusClient", refuse)

    with pytest.raises(MilvusVLLMError) as caught:
        MilvusConnection(ConnectionSettings("http://root:sk-secret@milvus:19530")).client()

    assert type(caught.value) is SearchError
    assert "cannot connect to Milvus at 'http://***@milvus:19530': no route" in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert "It listens on port 19530 unless told otherwise" in str(caught.value)


@pytest.mark.parametrize(
    ("message", "advice"),
    [
        ("(code=1, message=Open local milvus failed)", "another process"),
        ("(code=1, message=Open local milvus failed, dir: ./no not exists)", "that exists"),
        ("milvus-lite is required", "pip install 'milvus-vllm-retrievers"),
        (
            "localhost:19530 is illegal, needs start with [unix, http, https, tcp]",
            "write 'http://localhost:19530'; for Milvus Lite a path ending in .db",
        ),
    ],
)
def test_a_milvus_lite_file_that_cannot_be_opened_comes_with_what_to_do(
    message: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**arguments: Any) -> None:
        raise OSError(message)

    monkeypatch.setattr("pymilvus.MilvusClient", refuse)

    with pytest.raises(SearchError, match=advice) as caught:
        MilvusConnection(ConnectionSettings("./x.db")).client()
    assert "19530 unless" not in str(caught.value)


def test_a_milvus_lite_file_that_is_held_is_said_to_be(tmp_path: Path) -> None:
    held = tmp_path / "held.db"
    holder = MilvusLite(str(held))
    try:
        with pytest.raises(SearchError, match="another process, such as a notebook"):
            MilvusConnection(ConnectionSettings(str(held))).client()
    finally:
        holder.close()


@pytest.mark.parametrize(
    ("uri", "more"),
    [
        ("ftp://root:pa55word@h:1", {}),
        ("http://root:x@pa55word@127.0.0.1:1", {}),
        ("http://127.0.0.1:1", {"token": "root:pa55word"}),
        ("http://127.0.0.1:1", {"connection_args": {"password": "pa55word"}}),
    ],
)
def test_no_login_is_shown_where_a_connection_fails(
    monkeypatch: pytest.MonkeyPatch, uri: str, more: dict[str, Any]
) -> None:
    def refuse(**arguments: Any) -> None:
        raise ValueError(f"cannot use {arguments}")

    monkeypatch.setattr("pymilvus.MilvusClient", refuse)

    with pytest.raises(SearchError) as caught:
        MilvusConnection(ConnectionSettings(uri, **more)).client()

    assert "pa55word" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_credentials_that_end_the_host_are_refused_unseen() -> None:
    with pytest.raises(ConfigurationError, match="pass token=") as caught:
        ConnectionSettings("http://root:pa55/word@127.0.0.1:1")

    assert "pa55" not in str(caught.value)


def test_a_rerank_failure_is_told_apart_however_long_the_message() -> None:
    error = explain_error(Exception("x" * 400 + " call service failed: refused"), "search")

    assert isinstance(error, RerankError)


def test_a_bare_grpc_error_is_told_in_a_line() -> None:
    class Code:
        name = "DEADLINE_EXCEEDED"

    class InactiveRpcError(Exception):
        def code(self) -> Code:
            return Code()

        def details(self) -> str:
            return "Deadline Exceeded"

    error = explain_error(InactiveRpcError("page\n" * 50), "search of collection 'docs'")

    assert type(error) is SearchError
    assert str(error) == (
        "search of collection 'docs' failed: DEADLINE_EXCEEDED: Deadline Exceeded "
        "(raise timeout, or search fewer candidates)"
    )
