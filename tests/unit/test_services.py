"""vLLM's rerank API without a socket: what is sent, how answers are read, what is tried again."""

from __future__ import annotations

import json
import ssl
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from milvus_vllm_retrievers import (
    RerankConnectionError,
    RerankError,
    RerankResponseError,
    RerankStatusError,
    RerankTimeoutError,
    VLLMRanker,
)
from milvus_vllm_retrievers._core import services
from milvus_vllm_retrievers._core.deadline import NO_DEADLINE
from milvus_vllm_retrievers._core.services import (
    Answer,
    RerankClient,
    RerankRequest,
    build_models_request,
    build_request,
    pause_before_retry,
    read_models,
    read_scores,
    redirected,
    status_error,
    transport_error,
)

HOST = "http://vllm:8000"
REQUEST = build_request(VLLMRanker(HOST), "q", ["a", "b", "c"])


def said(status: int, text: str = "", secrets: tuple[str, ...] = (), **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, httpx.Headers(named), text, secrets)


def body(request: RerankRequest) -> dict[str, Any]:
    return json.loads(request.content)


def answer(*results: tuple[Any, Any]) -> Answer:
    shown = [{"index": index, "relevance_score": score} for index, score in results]
    return said(200, json.dumps({"id": "x", "results": shown}))


@pytest.mark.parametrize(
    ("arguments", "sent"),
    [
        ({}, {"truncate_prompt_tokens": -1}),
        ({"truncate_prompt_tokens": None}, {}),
        (
            {"model": "bge", "instruction": "find code", "truncate_prompt_tokens": 256},
            {"model": "bge", "instruction": "find code", "truncate_prompt_tokens": 256},
        ),
        (
            {"extra_body": {"use_activation": False}},
            {"truncate_prompt_tokens": -1, "use_activation": False},
        ),
    ],
)
def test_the_body_holds_what_the_ranker_says_and_nothing_else(
    arguments: dict[str, Any], sent: dict[str, Any]
) -> None:
    request = build_request(VLLMRanker(HOST, **arguments), "q", ("a", "b"))

    assert body(request) == {"query": "q", "documents": ["a", "b"], **sent}
    assert request.documents == 2


def test_a_request_goes_to_v1_below_the_gateways_prefix() -> None:
    request = build_request(VLLMRanker("http://gw/team-a/v1"), "q", ["a"])

    assert request.url == "http://gw/team-a/v1/rerank"


def test_a_request_is_built_without_secrets() -> None:
    ranker = VLLMRanker(HOST, api_key="sk-secret", headers={"x-key": "sk-header"})

    assert build_request(ranker, "q", ["a"]) == build_request(VLLMRanker(HOST), "q", ["a"])


def test_a_request_goes_to_the_rerank_path_that_is_given() -> None:
    request = build_request(VLLMRanker("http://gw/v1", rerank_path="/rank"), "q", ["a"])

    assert request.url == "http://gw/v1/rank"


def test_a_lone_surrogate_is_sent_as_a_question_mark() -> None:
    request = build_request(VLLMRanker(HOST), "größe", ["cut \ud83d"])

    assert body(request)["documents"] == ["cut ?"]
    assert "größe".encode() in request.content


finite = st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(st.lists(finite, max_size=20).flatmap(lambda s: st.permutations(list(enumerate(s)))))
def test_scores_come_in_the_documents_order_whatever_the_order_of_results(
    results: list[tuple[int, float]],
) -> None:
    request = build_request(VLLMRanker(HOST), "q", [""] * len(results))

    assert read_scores(answer(*results), request) == [score for _, score in sorted(results)]


@pytest.mark.parametrize(
    "text",
    [
        "<html>welcome</html>",
        "",
        "[]",
        "null",
        '{"data": []}',
        '{"results": null}',
        '{"results": ["a", "b", "c"]}',
        '{"results": [{"index": 0}, {"index": 1}, {"index": 2}]}',
        '{"results": [{"index": 0, "relevance_score": "high"}]}',
        '{"results": [{"index": 0, "relevance_score": null}]}',
    ],
)
def test_an_answer_of_another_shape_is_shown_and_the_base_url_asked_for(text: str) -> None:
    with pytest.raises(RerankResponseError, match="is it vLLM's base URL") as caught:
        read_scores(said(200, text), REQUEST)

    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("results", "count"),
    [
        ([(0, 0.5), (2, 0.1)], "2 results for 3 documents (1 of them without a score)"),
        ([(0, 0.5), (1, 0.5), (1, 0.1)], "3 results for 3 documents (1 of them"),
        ([(0, 0.5), (1, 0.5), (3, 0.1)], "3 results for 3 documents (1 of them"),
        ([(0, 0.5), (1, 0.5), (-1, 0.1)], "3 results for 3 documents (1 of them"),
        ([(0, 0.5), (1, 0.5), (2, 0.1), (2, 0.1)], "4 results for 3 documents: a gateway"),
        ([], "0 results for 3 documents (3 of them"),
    ],
)
def test_every_document_needs_one_score_of_its_own(
    results: list[tuple[int, float]], count: str
) -> None:
    with pytest.raises(RerankResponseError) as caught:
        read_scores(answer(*results), REQUEST)

    assert count in str(caught.value)


def test_one_result_and_one_document_are_not_called_several() -> None:
    one = build_request(VLLMRanker(HOST), "q", ["a"])
    with pytest.raises(RerankResponseError, match=r"0 results for 1 document \(1 of"):
        read_scores(answer(), one)
    with pytest.raises(RerankResponseError, match="1 result for 3 documents"):
        read_scores(answer((0, 0.5)), REQUEST)


def test_an_error_without_a_text_goes_on_with_what_to_do() -> None:
    error = str(status_error(said(307, "", location="http://other/v1/rerank"), REQUEST))

    assert error.startswith(f"{HOST}/v1/rerank answered 307. It redirects to")


def test_a_model_that_is_not_served_is_to_be_looked_up_at_its_url() -> None:
    unknown = said(404, '{"error": {"message": "The model `x` does not exist."}}')

    assert f"{HOST}/v1/models lists what vLLM serves" in str(status_error(unknown, REQUEST))


@pytest.mark.parametrize("score", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_not_a_finite_number_is_an_error(score: float) -> None:
    with pytest.raises(RerankResponseError, match="not a finite number"):
        read_scores(answer((0, 0.5), (1, score), (2, 0.1)), REQUEST)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('{"error": {"message": "too long", "code": 400}}', "too long"),
        ('{"error": "Unauthorized"}', "Unauthorized"),
        ('{"detail": "Not Found"}', "Not Found"),
        ('{"detail": [{"loc": ["body"]}]}', "[{'loc': ['body']}]"),
        ('{"error": {"code": 7}}', '{"error": {"code": 7}}'),
        ('["no"]', '["no"]'),
        ("<h1>Bad Gateway</h1>", "<h1>Bad Gateway</h1>"),
    ],
)
def test_the_message_of_every_kind_of_error_answer_is_found(text: str, shown: str) -> None:
    error = status_error(said(418, text), REQUEST)

    assert str(error) == f"{HOST}/v1/rerank answered 418: {shown}"
    assert (error.status_code, error.body) == (418, text)


def test_a_long_error_answer_is_shown_in_part() -> None:
    error = status_error(said(500, "a document " * 500), REQUEST)

    assert len(error.body) == 200
    assert str(error).count("a document ") < 20


@pytest.mark.parametrize(
    ("status", "hint"),
    [
        (401, "Check the ranker's api_key"),
        (403, "Check the ranker's api_key"),
        (404, "Check the ranker's model name and endpoint"),
        (400, "keep truncate_prompt_tokens=-1"),
    ],
)
def test_a_status_comes_with_what_to_do(status: int, hint: str) -> None:
    assert hint in str(status_error(said(status, "no"), REQUEST))


@pytest.mark.parametrize(
    ("secrets", "hint"),
    [((), "Check the ranker's api_key (none is given)"), (("sk-a",), "api_key")],
)
def test_a_refusal_tells_whether_a_key_was_sent(secrets: tuple[str, ...], hint: str) -> None:
    assert str(status_error(said(401, "no", secrets), REQUEST)).endswith(hint)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/score", "/v1/chat/completions"])
def test_an_endpoint_that_is_another_route_of_vllm_is_told_from_the_base_url(path: str) -> None:
    request = build_request(VLLMRanker(HOST + path), "q", ["a"])

    error = str(status_error(said(404, '{"detail": "Not Found"}'), request))

    assert "the endpoint is its base URL" in error
    assert f"Unless {path!r} is a gateway's prefix, pass endpoint={HOST!r}" in error


REDIRECTS = [
    (302, "https://gw/v1/rerank", "endpoint='https://gw'"),
    (301, "https://gw/team-a/v1/rerank", "endpoint='https://gw/team-a'"),
    (301, "/v2/rerank", f"endpoint='{HOST}', rerank_path='/v2/rerank'"),
    (302, "/v1/rerank/", f"endpoint='{HOST}', rerank_path='/v1/rerank/'"),
    (307, "https://gw/rerank/v1/rerank", "endpoint='https://gw', rerank_path='/rerank/v1/rerank'"),
    (308, "https://gw/rank", "endpoint='https://gw', rerank_path='/rank'"),
]


@pytest.mark.parametrize(("status", "location", "advice"), REDIRECTS)
def test_a_redirect_that_is_not_followed_is_told_with_arguments_that_lead_there(
    status: int, location: str, advice: str
) -> None:
    error = str(status_error(said(status, location=location), REQUEST))
    arguments = eval(f"dict({error.rpartition('pass ')[2]})")

    assert error.endswith(f"pass {advice}")
    there = build_request(VLLMRanker(**arguments), "q", ["a"]).url
    assert there == str(httpx.URL(REQUEST.url).join(location))


@pytest.mark.parametrize("location", ["http://[x", "http://vllm:port/", ""])
def test_a_redirect_to_nowhere_is_an_error_as_any_other(location: str) -> None:
    request = replace(REQUEST, path="/a")

    assert redirected(said(307, location=location), request) in {None, request}
    assert "It redirects to" in str(status_error(said(307, location=location), request))


@pytest.mark.parametrize("status", [307, 308])
@pytest.mark.parametrize(
    ("location", "url"),
    [
        ("/v1/rerank/", f"{HOST}/v1/rerank/"),
        (f"{HOST}/rank?version=2", f"{HOST}/rank?version=2"),
        ("HTTP://VLLM:8000/rank", f"{HOST}/rank"),
    ],
)
def test_a_redirect_of_the_same_origin_is_followed_with_the_body(
    status: int, location: str, url: str
) -> None:
    request = redirected(said(status, location=location), REQUEST)

    assert request is not None
    assert request.url == url
    assert (request.content, request.documents) == (REQUEST.content, REQUEST.documents)


@pytest.mark.parametrize(
    ("status", "location"),
    [
        (307, "https://vllm:8000/v1/rerank"),
        (307, "http://vllm:8001/v1/rerank"),
        (308, "//other:8000/v1/rerank"),
        (307, "http://user@vllm:8000/v1/rerank"),
        *[(status, "/v1/rerank/") for status in (200, 300, 301, 302, 303, 304)],
    ],
)
def test_no_other_redirect_is_followed(status: int, location: str) -> None:
    assert redirected(said(status, location=location), REQUEST) is None


def test_a_redirect_without_a_target_is_not_followed() -> None:
    assert redirected(said(307), REQUEST) is None


# The models that are served


def test_the_models_are_asked_for_beside_the_rerank_route() -> None:
    request = build_models_request(VLLMRanker("http://gw/team-a/v1/rerank", api_key="sk-secret"))

    assert request.url == "http://gw/team-a/v1/models"
    assert request.content == b""


def test_the_names_of_all_served_models_are_read() -> None:
    served = said(200, '{"object": "list", "data": [{"id": "bge"}, {"id": "an-adapter"}]}')

    assert read_models(served, build_models_request(VLLMRanker(HOST))) == ["bge", "an-adapter"]


@pytest.mark.parametrize(
    "text", ["", "[]", "null", '{"data": null}', '{"data": [{}]}', '{"data": [{"id": 1}]}', "{}"]
)
def test_an_answer_that_is_no_list_of_models_is_an_error(text: str) -> None:
    with pytest.raises(RerankResponseError, match="other than a list of models"):
        read_models(said(200, text), build_models_request(VLLMRanker(HOST)))


def test_an_endpoint_that_does_not_list_its_models_is_an_error() -> None:
    with pytest.raises(RerankStatusError, match="v1/models answered 404"):
        read_models(said(404), build_models_request(VLLMRanker(HOST)))


# Waiting and trying again


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("0", 0.0),
        ("1.5", 1.5),
        ("-3", 0.0),
        (None, None),
        ("", None),
        ("Wed, 21 Oct 2026 07:28:00 GMT", None),
        ("nan", None),
        ("inf", None),
    ],
)
def test_a_wait_is_read_where_it_is_given_in_seconds(
    header: str | None, seconds: float | None
) -> None:
    headers = {} if header is None else {"retry_after": header}

    assert status_error(said(429, **headers), REQUEST).retry_after == seconds


@pytest.mark.parametrize(
    ("error", "kind", "advice"),
    [
        (httpx.ConnectTimeout("slow"), RerankTimeoutError, "raise the ranker's timeout"),
        (httpx.ReadTimeout("slow"), RerankTimeoutError, "raise the ranker's timeout"),
        (httpx.ConnectError("refused"), RerankConnectionError, "is vLLM running there"),
        (httpx.RemoteProtocolError("cut off"), RerankConnectionError, "is vLLM running there"),
    ],
)
def test_a_request_without_an_answer_is_a_timeout_or_a_broken_connection(
    error: httpx.HTTPError, kind: type[Exception], advice: str
) -> None:
    limit = NO_DEADLINE.or_after(10, "the ranker's timeout")
    made = transport_error(error, REQUEST, limit)

    assert type(made) is kind
    assert advice in str(made)


@pytest.mark.parametrize(
    ("endpoint", "error", "advice"),
    [
        (
            "https://vllm:8000",
            httpx.ConnectError("[SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:1006)"),
            "use 'http://vllm:8000'",
        ),
        (
            "https://vllm:8000",
            httpx.ConnectError("[SSL] record layer failure (_ssl.c:1010)"),
            "use 'http://vllm:8000'",
        ),
        (
            "https://vllm",
            httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self"),
            "set SSL_CERT_FILE to the authority's file, or pass http_client=httpx.Client(verify=",
        ),
        (
            "https://vllm",
            httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] Hostname mismatch, certificate"),
            "use the host name that its certificate is for",
        ),
        (
            HOST,
            httpx.RemoteProtocolError("illegal request line"),
            "Milvus's own (19530) answers so",
        ),
    ],
)
def test_a_broken_connection_comes_with_what_to_do(
    endpoint: str, error: Exception, advice: str
) -> None:
    request = build_request(VLLMRanker(endpoint), "q", ["a"])

    assert advice in str(transport_error(error, request, NO_DEADLINE))


PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without proxies, for the test to set some."""
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
@pytest.mark.parametrize("error", [httpx.ConnectError("refused"), httpx.ProxyError("403")])
def test_a_proxy_that_cannot_be_reached_is_named(
    no_proxies: pytest.MonkeyPatch, name: str, error: Exception
) -> None:
    no_proxies.setenv(name, "http://user:sk-secret@proxy:3128")

    told = str(transport_error(error, REQUEST, NO_DEADLINE))

    assert f"that is the proxy which {name} names, not vLLM" in told
    assert "sk-secret" not in told


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"HTTPS_PROXY": "http://proxy:3128"},
        {"HTTP_PROXY": "http://proxy:3128", "NO_PROXY": "vllm"},
    ],
)
def test_where_no_proxy_is_used_none_is_blamed(
    no_proxies: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        no_proxies.setenv(name, value)

    assert "is vLLM running there" in str(
        transport_error(httpx.ConnectError("no"), REQUEST, NO_DEADLINE)
    )


@pytest.mark.parametrize(
    ("variables", "advice"),
    [
        (
            {"ALL_PROXY": "socks5://h:1"},
            "ALL_PROXY names a SOCKS proxy: pip install 'httpx[socks]'",
        ),
        ({"ALL_PROXY": "socks5://h:1", "NO_PROXY": "vllm"}, "ALL_PROXY names a SOCKS proxy"),
        ({"HTTP_PROXY": "foo://u:sk-secret@h:1"}, "HTTP_PROXY is not the address of a proxy"),
        ({"https_proxy": "http://u:sk-secret@h:port"}, "https_proxy is not the address of a proxy"),
        ({"NO_PROXY": "localhost,[::1]"}, "NO_PROXY has an entry that httpx cannot read"),
        ({"SSL_CERT_FILE": "/no/such.pem"}, "read from SSL_CERT_FILE='/no/such.pem' (No such file"),
    ],
)
@pytest.mark.parametrize("make", [services._new_client, services._new_async_client])
def test_a_client_that_the_environment_does_not_let_be_made_names_the_variable(
    no_proxies: pytest.MonkeyPatch, variables: dict[str, str], advice: str, make: Any
) -> None:
    for name, value in variables.items():
        no_proxies.setenv(name, value)
    services._certificates.cache_clear()

    with pytest.raises(RerankConnectionError) as caught:
        make()

    told = str(caught.value)
    assert advice in told
    assert "Or pass an http_client" in told
    assert "sk-secret" not in f"{told} {caught.value.__cause__!r} {caught.value.__context__!r}"


def test_a_file_without_certificates_is_named(
    no_proxies: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_proxies.setenv("SSL_CERT_FILE", str(empty := tmp_path / "empty.pem"))
    empty.touch()
    services._certificates.cache_clear()

    with pytest.raises(RerankConnectionError, match=r"SSL_CERT_FILE='.*empty.pem'") as caught:
        services._new_client()

    assert isinstance(caught.value.__cause__, ssl.SSLError)


def test_what_the_environment_does_wrong_is_found_before_the_first_query(
    no_proxies: pytest.MonkeyPatch,
) -> None:
    no_proxies.setenv("ALL_PROXY", "socks5://h:1")

    with pytest.raises(RerankConnectionError, match="ALL_PROXY"):
        RerankClient(VLLMRanker(HOST)).check_environment()
    with httpx.Client(trust_env=False) as own:
        RerankClient(VLLMRanker(HOST, http_client=own)).check_environment()  # needs no other


def status(code: int, retry_after: float | None = None) -> RerankStatusError:
    return RerankStatusError("", status_code=code, body="", retry_after=retry_after)


def pause(error: Exception, attempt: int = 1, left: float | None = None) -> float | None:
    return pause_before_retry(error, attempt, VLLMRanker(HOST, max_retries=40), left)


UNTRUSTED = transport_error(
    httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED]"), REQUEST, NO_DEADLINE
)


@pytest.mark.parametrize(
    ("error", "attempt", "again"),
    [
        *[(status(code), 5, True) for code in (429, 502, 503, 504)],
        (status(500), 1, True),
        (status(500), 2, False),
        *[(status(code), 1, False) for code in (307, 400, 401, 404, 422, 501)],
        (RerankConnectionError("refused"), 5, True),
        (RerankTimeoutError("slow"), 1, False),
        (UNTRUSTED, 1, False),
        (RerankResponseError("no results"), 1, False),
        (RerankError("no key"), 1, False),
        (KeyError("a bug"), 1, False),
    ],
)
def test_only_what_may_be_gone_by_then_is_tried_again(
    error: Exception, attempt: int, again: bool
) -> None:
    assert (pause(error, attempt) is not None) == again


@pytest.mark.parametrize(("attempt", "again"), [(1, True), (2, True), (3, False)])
def test_a_request_is_tried_as_often_again_as_the_ranker_says(attempt: int, again: bool) -> None:
    found = pause_before_retry(status(503), attempt, VLLMRanker(HOST, max_retries=2), None)

    assert (found is not None) == again


@given(st.integers(1, 40))
def test_pauses_grow_up_to_eight_seconds(attempt: int) -> None:
    least = min(0.2 * 2 ** (attempt - 1), 8.0)
    found = pause(status(503), attempt)

    assert found is not None
    assert least <= found <= min(least + 0.2, 8.0)


@pytest.mark.parametrize("error", [status(429, retry_after=5.0), status(503, retry_after=5.0)])
def test_a_longer_wait_that_the_server_asks_for_is_kept(error: RerankStatusError) -> None:
    assert pause(error) == 5.0


@pytest.mark.parametrize(("asked", "left"), [(8.5, None), (3600.0, None), (5.0, 5.0), (5.0, 1.0)])
def test_no_pause_is_begun_that_is_too_long_or_outlasts_the_call(
    asked: float, left: float | None
) -> None:
    assert pause(status(429, retry_after=asked), left=left) is None


def test_a_key_that_an_answer_repeats_is_not_shown() -> None:
    text = json.dumps({"error": {"message": "wrong API key: sk-secret"}})
    refusal = said(401, text, ("sk-secret",))

    error = status_error(refusal, REQUEST)

    assert "sk-secret" not in f"{error} {error.body} {refusal!r}"
    assert "wrong API key: ***" in str(error)


@pytest.mark.parametrize(
    "text",
    [
        '{"results":[{"index":Infinity,"relevance_score":1}]}',
        '{"results":[{"index":0,"relevance_score":1' + "0" * 400 + "}]}",
        "[" * 100_000,
        '{"results":[{"index":0.9,"relevance_score":1}]}',
        '{"results":[{"index":true,"relevance_score":1}]}',
        '{"results":[{"index":"0","relevance_score":1}]}',
    ],
)
def test_odd_json_is_a_wrong_answer_and_not_a_crash(text: str) -> None:
    with pytest.raises(RerankResponseError):
        read_scores(said(200, text), build_request(VLLMRanker(HOST), "q", ["a"]))
