"""vLLM's rerank API without a socket: what is sent, how answers are read, what is tried again."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tenacity import RetryCallState, Retrying

from milvus_vllm_retrievers import (
    RerankConnectionError,
    RerankResponseError,
    RerankStatusError,
    RerankTimeoutError,
    VLLMRanker,
)
from milvus_vllm_retrievers._core.services import (
    RerankRequest,
    build_request,
    read_scores,
    seconds_to_wait,
    should_retry,
    status_error,
    transport_error,
)

HOST = "http://vllm:8000"
REQUEST = build_request(VLLMRanker(HOST), "q", ["a", "b", "c"])


def body(request: RerankRequest) -> dict[str, Any]:
    return json.loads(request.content)


def answer(*results: tuple[Any, Any]) -> httpx.Response:
    shown = [{"index": index, "relevance_score": score} for index, score in results]
    return httpx.Response(200, text=json.dumps({"id": "x", "results": shown}))


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


@pytest.mark.parametrize(
    ("api_key", "authorization"), [(None, None), ("sk-secret", "Bearer sk-secret")]
)
def test_the_api_key_is_a_bearer_token(api_key: str | None, authorization: str | None) -> None:
    request = build_request(VLLMRanker(HOST, api_key=api_key), "q", ["a"])

    assert request.headers.get("authorization") == authorization
    assert request.headers["content-type"] == "application/json"


def test_a_lone_surrogate_is_sent_as_a_question_mark() -> None:
    request = build_request(VLLMRanker(HOST), "größe", ["cut \ud83d"])

    assert body(request)["documents"] == ["cut ?"]
    assert "größe".encode() in request.content


finite = st.floats(allow_nan=False, allow_infinity=False)


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
        read_scores(httpx.Response(200, text=text), REQUEST)

    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("results", "count"),
    [
        ([(0, 0.5), (2, 0.1)], "2 results for 3 documents (1 of them without a score)"),
        ([(0, 0.5), (1, 0.5), (1, 0.1)], "3 results for 3 documents (1 of them"),
        ([(0, 0.5), (1, 0.5), (3, 0.1)], "3 results for 3 documents (1 of them"),
        ([(0, 0.5), (1, 0.5), (-1, 0.1)], "3 results for 3 documents (1 of them"),
        ([(0, 0.5), (1, 0.5), (2, 0.1), (2, 0.1)], "4 results for 3 documents (0 of them"),
        ([], "0 results for 3 documents (3 of them"),
    ],
)
def test_every_document_needs_one_score_of_its_own(
    results: list[tuple[int, float]], count: str
) -> None:
    with pytest.raises(RerankResponseError) as caught:
        read_scores(answer(*results), REQUEST)

    assert count in str(caught.value)


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
        ("", ""),
    ],
)
def test_the_message_of_every_kind_of_error_answer_is_found(text: str, shown: str) -> None:
    error = status_error(httpx.Response(418, text=text), REQUEST)

    assert str(error) == f"{HOST}/v1/rerank answered 418: {shown}"
    assert (error.status_code, error.body) == (418, text)


def test_a_long_error_answer_is_shown_in_part() -> None:
    error = status_error(httpx.Response(500, text="a document " * 500), REQUEST)

    assert len(error.body) == 200
    assert len(str(error)) < 300


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
    assert hint in str(status_error(httpx.Response(status, text="no"), REQUEST))


@pytest.mark.parametrize(
    ("location", "target"),
    [("https://gw/v1/rerank", "https://gw/v1/rerank"), ("/v2/rerank", f"{HOST}/v2/rerank")],
)
def test_a_redirect_names_its_target(location: str, target: str) -> None:
    response = httpx.Response(307, headers={"location": location})

    assert f"redirects to {target!r}" in str(status_error(response, REQUEST))


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
    headers = {} if header is None else {"retry-after": header}

    assert status_error(httpx.Response(429, headers=headers), REQUEST).retry_after == seconds


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
    made = transport_error(error, REQUEST)

    assert type(made) is kind
    assert advice in str(made)


def failed(error: Exception, attempt: int = 1) -> RetryCallState:
    """The state of a call whose `attempt`-th try ended in `error`."""
    state = RetryCallState(Retrying(), None, (), {})
    state.attempt_number = attempt
    state.set_exception((type(error), error, None))
    return state


def status(code: int, retry_after: float | None = None) -> RerankStatusError:
    return RerankStatusError("", status_code=code, body="", retry_after=retry_after)


@pytest.mark.parametrize(
    ("error", "attempt", "again"),
    [
        *[(status(code), 5, True) for code in (429, 502, 503, 504)],
        (status(500), 1, True),
        (status(500), 2, False),
        *[(status(code), 1, False) for code in (307, 400, 401, 404, 422, 501)],
        (RerankConnectionError("refused"), 5, True),
        (RerankTimeoutError("slow"), 1, False),
        (RerankResponseError("no results"), 1, False),
        (KeyError("a bug"), 1, False),
    ],
)
def test_only_what_may_be_gone_by_then_is_tried_again(
    error: Exception, attempt: int, again: bool
) -> None:
    assert should_retry(failed(error, attempt)) is again


def test_a_success_is_not_tried_again() -> None:
    state = failed(KeyError())
    state.set_result([0.5])

    assert should_retry(state) is False


@given(st.integers(1, 30))
def test_pauses_grow_up_to_eight_seconds(attempt: int) -> None:
    least = min(0.2 * 2 ** (attempt - 1), 8.0)

    assert least <= seconds_to_wait(failed(status(503), attempt)) <= least + 0.2


@pytest.mark.parametrize("error", [status(429, retry_after=5.0), status(503, retry_after=5.0)])
def test_a_longer_wait_that_the_server_asks_for_is_kept(error: RerankStatusError) -> None:
    assert seconds_to_wait(failed(error)) == 5.0


def test_a_key_that_an_answer_repeats_is_not_shown() -> None:
    request = build_request(VLLMRanker(HOST, api_key="sk-secret"), "q", ["a"])
    refusal = httpx.Response(401, json={"error": {"message": "wrong API key: sk-secret"}})

    error = status_error(refusal, request)

    assert "sk-secret" not in f"{error} {error.body} {request!r}"
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
        read_scores(httpx.Response(200, text=text), build_request(VLLMRanker(HOST), "q", ["a"]))
