"""VLLMRanker: the endpoint as it is understood, what is refused, what Milvus is told."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pymilvus import FunctionType

from milvus_vllm_retrievers import ConfigurationError, VLLMRanker
from milvus_vllm_retrievers.ranker import ranker_from, server_ranker

HOST = "http://vllm:8000"


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://vllm:8000",
        "http://vllm:8000/",
        "http://vllm:8000/v1",
        "http://vllm:8000/v1/",
        "http://vllm:8000/v2",
        "http://vllm:8000/rerank",
        "http://vllm:8000/v1/rerank",
        "http://vllm:8000/v2/rerank/",
        "  http://vllm:8000/v1/rerank\n",
    ],
)
def test_every_usual_way_to_write_an_endpoint_is_understood(endpoint: str) -> None:
    assert VLLMRanker(endpoint).endpoint == HOST


@pytest.mark.parametrize(
    ("endpoint", "kept"),
    [
        ("https://gw/team-a/v1/rerank", "https://gw/team-a"),
        ("https://gw/team-a/", "https://gw/team-a"),
        ("https://gw/rerankers", "https://gw/rerankers"),
        ("https://gw/api/v10", "https://gw/api/v10"),
        ("http://[::1]:8000/v1", "http://[::1]:8000"),
    ],
)
def test_a_path_in_the_endpoint_is_kept_as_a_gateway_prefix(endpoint: str, kept: str) -> None:
    assert VLLMRanker(endpoint).endpoint == kept


prefixes = st.lists(st.sampled_from(["team-a", "gw", "v10", "reranker"]), max_size=3)
suffixes = st.sampled_from(["", "/", "/v1", "/v2/", "/rerank", "/v1/rerank/", "/v2/rerank"])


@given(prefixes, suffixes)
def test_normalising_an_endpoint_twice_changes_nothing(prefix: list[str], suffix: str) -> None:
    ranker = VLLMRanker("/".join(["https://gw:1", *prefix]) + suffix)

    assert VLLMRanker(ranker.endpoint).endpoint == ranker.endpoint


@pytest.mark.parametrize(
    ("endpoint", "reason"),
    [
        ("vllm:8000", "must be an http:// or https:// URL"),
        ("grpc://vllm:8000", "must be an http:// or https:// URL"),
        ("http://", "must be an http:// or https:// URL"),
        ("", "must be an http:// or https:// URL"),
        ("http://vllm:port", "Port could not be cast"),
        ("http://vllm:99999", "Port out of range"),
        ("http://root:sk-secret@vllm", "must not hold credentials"),
        ("http://sk-secret@vllm", "must not hold credentials"),
        ("http://:sk-secret@vllm", "must not hold credentials"),
        ("http://vllm?key=sk-secret", "must not have a query"),
        ("http://vllm#top", "must not have a query or a fragment"),
    ],
)
@pytest.mark.parametrize("argument", ["endpoint", "server_endpoint"])
def test_an_endpoint_that_cannot_be_one_is_refused_without_quoting_it(
    argument: str, endpoint: str, reason: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        VLLMRanker(**{"endpoint": HOST, argument: endpoint})

    assert f"{argument}: {reason}" in str(caught.value)
    assert "sk-secret" not in str(caught.value)


def test_a_server_endpoint_with_a_prefix_is_refused_since_milvus_drops_it() -> None:
    with pytest.raises(ConfigurationError, match="a gateway prefix is lost"):
        VLLMRanker(HOST, server_endpoint="http://gw/team-a")


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("model", ""),
        ("credential", ""),
        ("instruction", ""),
        ("mode", "remote"),
        ("on_error", "ignore"),
        ("truncate_prompt_tokens", -2),
        ("max_client_batch_size", 0),
        ("max_concurrency", 0),
        ("timeout", 0),
        ("timeout", float("inf")),
        ("max_retries", -1),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(argument: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"^VLLMRanker: {argument}: "):
        VLLMRanker(HOST, **{argument: value})


def test_an_unknown_argument_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'max_retries'"):
        VLLMRanker(HOST, max_retry=3)  # type: ignore[call-arg]


@pytest.mark.parametrize("field", ["query", "documents", "top_n"])
def test_extra_body_cannot_replace_what_the_reranker_sets(field: str) -> None:
    with pytest.raises(ConfigurationError, match=f"extra_body: must not set {field}"):
        VLLMRanker(HOST, extra_body={field: 1})


ONLY_FROM_HERE = [
    ({"endpoint": HOST, "instruction": "find code"}, "does not send an instruction"),
    ({"endpoint": HOST, "extra_body": {"use_activation": False}}, "does not send extra_body"),
    ({"endpoint": "http://gw/team-a"}, "drops the path of the endpoint"),
]


@pytest.mark.parametrize(("arguments", "reason"), ONLY_FROM_HERE)
def test_server_mode_is_refused_with_what_milvus_would_drop(
    arguments: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        VLLMRanker(**arguments, mode="server")


@pytest.mark.parametrize(("arguments", "reason"), ONLY_FROM_HERE)
def test_no_function_is_built_that_milvus_would_apply_in_part(
    arguments: dict[str, Any], reason: str
) -> None:
    ranker = VLLMRanker(**arguments)

    with pytest.raises(ConfigurationError, match=reason):
        ranker.to_function("q", "document")


def test_a_server_endpoint_of_its_own_makes_up_for_a_prefix() -> None:
    ranker = VLLMRanker("http://gw/team-a", server_endpoint="http://vllm:8000/v1", mode="server")

    assert ranker.to_function("q", "document").params["endpoint"] == HOST


def test_a_ranker_cannot_be_changed_but_copied_with_other_values() -> None:
    ranker = VLLMRanker(HOST, model="m")

    with pytest.raises(FrozenInstanceError):
        ranker.model = "other"  # type: ignore[misc]
    assert replace(ranker, mode="client") == VLLMRanker(HOST, model="m", mode="client")


def test_the_api_key_is_not_shown() -> None:
    assert "sk-secret" not in repr(VLLMRanker(HOST, api_key="sk-secret"))


def test_a_function_reranks_one_field_by_the_provider_vllm() -> None:
    function = VLLMRanker(HOST).to_function("what is it?", "document")

    assert function.type == FunctionType.RERANK
    assert list(function.input_field_names) == ["document"]
    assert function.params == {
        "reranker": "model",
        "provider": "vllm",
        "queries": ["what is it?"],
        "endpoint": HOST,
        "max_client_batch_size": 1_000_000,
        "truncate_prompt_tokens": -1,
        "timeout_ms": 10_000,
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"server_endpoint": "http://inside"}, {"endpoint": "http://inside"}),
        ({"max_client_batch_size": 16}, {"max_client_batch_size": 16}),
        ({"truncate_prompt_tokens": 256}, {"truncate_prompt_tokens": 256}),
        ({"credential": "vllm_key"}, {"credential": "vllm_key"}),
        ({"timeout": 0.25}, {"timeout_ms": 250}),
    ],
)
def test_milvus_is_told_what_the_ranker_says(
    arguments: dict[str, Any], expected: dict[str, Any]
) -> None:
    params = VLLMRanker(HOST, **arguments).to_function("q", "document").params

    assert {name: params[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        ({"truncate_prompt_tokens": None}, "truncate_prompt_tokens"),
        ({"timeout": None}, "timeout_ms"),
        ({}, "credential"),
        ({"model": "bge"}, "model"),
        ({"api_key": "sk-secret"}, "api_key"),
    ],
)
def test_milvus_is_not_told_what_is_unset_or_what_it_never_sends(
    arguments: dict[str, Any], absent: str
) -> None:
    params = VLLMRanker(HOST, **arguments).to_function("q", "document").params

    assert absent not in params


@pytest.mark.parametrize(("arguments", "model_name"), [({}, ""), ({"model": "bge"}, "bge")])
def test_milvus_lite_reaches_vllm_as_cohere(arguments: dict[str, Any], model_name: str) -> None:
    function = VLLMRanker(HOST, **arguments).to_function("q", "document", provider="cohere")

    assert function.params == {
        "reranker": "model",
        "provider": "cohere",
        "queries": ["q"],
        "base_url": f"{HOST}/v2",
        "model_name": model_name,
        "api_key": "unused",
    }


def test_an_api_key_never_goes_into_a_function() -> None:
    ranker = VLLMRanker(HOST, api_key="sk-secret")

    assert "sk-secret" not in str(ranker.to_function("q", "document").params)
    with pytest.raises(ConfigurationError, match="would carry the api_key in clear"):
        ranker.to_function("q", "document", provider="cohere")


def test_a_ranker_without_a_key_is_pickled_and_one_with_a_key_is_not() -> None:
    ranker = VLLMRanker(HOST, model="bge", extra_body={"use_activation": False})

    assert pickle.loads(pickle.dumps(ranker)) == ranker
    with pytest.raises(TypeError, match="make it anew"):
        pickle.dumps(VLLMRanker(HOST, api_key="sk-secret"))


def test_a_copy_of_a_ranker_is_the_ranker_with_its_key() -> None:
    ranker = VLLMRanker(HOST, api_key="sk-secret")

    assert copy.copy(ranker) is copy.deepcopy(ranker) is ranker


def test_a_truncation_that_milvus_lite_would_not_do_is_refused() -> None:
    ranker = VLLMRanker(HOST, truncate_prompt_tokens=256)

    with pytest.raises(ConfigurationError, match="Milvus Lite cannot truncate"):
        ranker.to_function("q", "document", provider="cohere")


def test_a_function_is_bound_to_each_of_a_requests_queries() -> None:
    assert VLLMRanker(HOST).to_function(("a", "b"), "document").params["queries"] == ["a", "b"]


@pytest.mark.parametrize("queries", ["", " ", [], ["a", ""], ["a", None]])
def test_a_function_needs_a_text_for_every_query(queries: Any) -> None:
    with pytest.raises(ConfigurationError, match="one or more non-empty texts"):
        VLLMRanker(HOST).to_function(queries, "document")


def test_a_ranker_is_taken_as_given_or_made_of_endpoint_and_model() -> None:
    ranker = VLLMRanker(HOST)

    assert ranker_from(ranker) is ranker
    assert ranker_from(None, HOST, "bge") == VLLMRanker(HOST, model="bge")


@pytest.mark.parametrize(
    "arguments",
    [
        (None,),
        (None, None, "bge"),
        (VLLMRanker(HOST), HOST),
        (VLLMRanker(HOST), None, "bge"),
    ],
)
def test_neither_or_both_of_ranker_and_endpoint_is_refused(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigurationError, match="pass either ranker="):
        ranker_from(*arguments)


@pytest.mark.parametrize("mode", ["auto", "server"])
def test_a_ranker_that_milvus_can_serve_is_taken_for_it(mode: Any) -> None:
    ranker = VLLMRanker(HOST, mode=mode)

    assert server_ranker(ranker) is ranker


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [*ONLY_FROM_HERE, ({"endpoint": HOST, "mode": "client"}, "mode='client' reranks from this")],
)
def test_a_ranker_for_the_client_is_refused_where_only_milvus_reranks(
    arguments: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigurationError, match=rf"{reason}.*Use VLLMRerank"):
        server_ranker(VLLMRanker(**arguments))


@pytest.mark.parametrize(
    "host", ["http://h/a\x01b", "http://[::1]x/", "http://xn--a/", f"http://{'a' * 70}"]
)
def test_an_endpoint_that_no_client_can_ask_is_refused(host: str) -> None:
    with pytest.raises(ConfigurationError, match="endpoint: "):
        VLLMRanker(host)


@pytest.mark.parametrize(
    ("given", "kept"), [("sk-secret\n", "sk-secret"), (" sk-secret ", "sk-secret"), ("", None)]
)
def test_a_key_read_from_a_file_loses_its_line_break_and_an_empty_one_is_none(
    given: str, kept: str | None
) -> None:
    key = VLLMRanker(HOST, api_key=given).api_key

    assert (key and key.get_secret_value()) == kept


@pytest.mark.parametrize("key", ["sk-s\u00e9cret", "sk-\nsecret"])
def test_a_key_that_no_header_can_hold_is_refused_unseen(key: str) -> None:
    with pytest.raises(ConfigurationError, match="api_key: must be plain ASCII") as caught:
        VLLMRanker(HOST, api_key=key)

    assert "sk-" not in str(caught.value)


def test_a_known_route_in_the_prefix_stays_lost_when_a_ranker_is_copied() -> None:
    ranker = VLLMRanker("http://gw/rerank/v1")

    assert dataclasses.replace(ranker, model="m").endpoint == ranker.endpoint


def test_a_ranker_with_extra_body_can_be_hashed() -> None:
    assert hash(VLLMRanker(HOST, extra_body={"a": 1})) == hash(VLLMRanker(HOST))


@pytest.mark.parametrize("value", [{1, 2}, float("nan")])
def test_extra_body_must_be_json(value: Any) -> None:
    with pytest.raises(ConfigurationError, match="extra_body: must be what JSON can hold"):
        VLLMRanker(HOST, extra_body={"a": value})


def test_a_wrong_positional_endpoint_is_named() -> None:
    with pytest.raises(ConfigurationError, match="endpoint: must be an http"):
        VLLMRanker("localhost:8000")


def test_only_the_endpoint_may_be_given_by_position() -> None:
    with pytest.raises(ConfigurationError, match="must be given by name"):
        VLLMRanker(HOST, "model")  # type: ignore[misc]


def test_milvus_lite_has_no_credentials() -> None:
    with pytest.raises(ConfigurationError, match="Milvus Lite has no credentials"):
        VLLMRanker(HOST, credential="prod").to_function("q", "text", provider="cohere")
