"""VLLMRanker: the endpoint as it is understood, what is refused, what Milvus is told."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from functools import partial
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import RootModel, SecretStr, TypeAdapter, ValidationError
from pymilvus import FunctionType

from milvus_vllm_retrievers import ConfigurationError, VLLMRanker, langchain, llama_index
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


@pytest.mark.parametrize(
    ("endpoint", "base"),
    [
        ("https://gw/rerank/v1/rerank", "https://gw/rerank"),
        ("https://gw/v1/v1/rerank", "https://gw/v1"),
        ("https://gw/rerank/v1/", "https://gw/rerank"),
        ("https://gw/v2/rerank/rerank", "https://gw/v2/rerank"),
        ("https://gw/v1", "https://gw"),
    ],
)
def test_a_prefix_that_ends_like_a_route_is_kept_where_a_route_follows_it(
    endpoint: str, base: str
) -> None:
    assert asked_at(VLLMRanker(endpoint)) == f"{base}/v1/rerank"


@pytest.mark.parametrize("endpoint", ["https://gw/v1", "https://gw/v1/"])
def test_an_endpoint_beside_a_rerank_path_is_taken_as_it_is_written(endpoint: str) -> None:
    assert asked_at(VLLMRanker(endpoint, rerank_path="/rerank")) == "https://gw/v1/rerank"


@pytest.mark.parametrize("path", ["", "rerank", "/rerank?key=sk-secret", "/rerank#top", "/a\nb"])
def test_a_rerank_path_that_is_none_is_refused(path: str) -> None:
    with pytest.raises(ConfigurationError, match="rerank_path: must be a path that begins with"):
        VLLMRanker(HOST, rerank_path=path)


def asked_at(ranker: VLLMRanker) -> str:
    return ranker.endpoint + (ranker.rerank_path or "/v1/rerank")


prefixes = st.lists(st.sampled_from(["team-a", "v1", "v10", "rerank", "reranker"]), max_size=3)
suffixes = st.sampled_from(["", "/", "/v1", "/v2/", "/rerank", "/v1/rerank/", "/v2/rerank"])
COPIES: list[Callable[[VLLMRanker], VLLMRanker]] = [
    lambda ranker: replace(ranker, model="m"),
    lambda ranker: pickle.loads(pickle.dumps(ranker)),
    lambda ranker: ADAPTER.validate_python(ADAPTER.dump_python(ranker)),
    lambda ranker: ADAPTER.validate_json(ADAPTER.dump_json(ranker)),
]
ADAPTER = TypeAdapter(VLLMRanker)


@given(prefixes, suffixes, st.sampled_from(COPIES))
def test_a_ranker_that_is_copied_or_read_back_asks_where_it_asked_before(
    prefix: list[str], suffix: str, copied: Callable[[VLLMRanker], VLLMRanker]
) -> None:
    ranker = VLLMRanker("/".join(["https://gw:1", *prefix]) + suffix)

    again = copied(copied(ranker))

    assert asked_at(again) == asked_at(ranker)
    assert again.endpoint == ranker.endpoint


@given(prefixes)
def test_every_prefix_can_be_used_by_writing_its_route_out(prefix: list[str]) -> None:
    url = "/".join(["https://gw:1", *prefix]) + "/v1/rerank"

    assert asked_at(VLLMRanker(url)) == url


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


NUMBERS = [
    "truncate_prompt_tokens",
    "max_client_batch_size",
    "max_concurrency",
    "timeout",
    "max_retries",
    "cool_down",
]


@pytest.mark.parametrize("value", [True, False, np.True_])
@pytest.mark.parametrize("argument", NUMBERS)
def test_a_bool_is_no_number(argument: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"{argument}: must be a number, not True or Fal"):
        VLLMRanker(HOST, **{argument: value})


@pytest.mark.parametrize("value", [np.int64(2), np.int8(2), np.uint32(2)])
@pytest.mark.parametrize("argument", NUMBERS)
def test_an_integer_of_numpy_is_a_number(argument: str, value: Any) -> None:
    kept = getattr(VLLMRanker(HOST, **{argument: value}), argument)

    assert kept == 2
    assert type(kept) in {int, float}


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
    ({"endpoint": HOST, "rerank_path": "/api/rank"}, "asks /rerank in place of rerank_path"),
]
WITHOUT_CREDENTIAL = [
    ({"endpoint": HOST, "api_key": "sk-secret"}, "does not send the api_key: name .* credential="),
    ({"endpoint": HOST, "api_key": lambda: "sk-secret"}, "does not send the api_key"),
    ({"endpoint": HOST, "headers": {"x-tenant": "sk-secret"}}, "does not send headers"),
    ({"endpoint": HOST, "http_client": httpx.Client()}, "does not use an http_client"),
    ({"endpoint": HOST, "async_http_client": httpx.AsyncClient()}, "does not use an http_client"),
]
ONLY_FROM_HERE += WITHOUT_CREDENTIAL


@pytest.mark.parametrize(("arguments", "reason"), WITHOUT_CREDENTIAL)
def test_with_a_credential_milvus_has_a_key_of_its_own(
    arguments: dict[str, Any], reason: str
) -> None:
    ranker = VLLMRanker(**arguments, credential="vllm", mode="server")

    assert ranker.client_only_reasons == ()
    assert ranker.to_function("q", "document").params["credential"] == "vllm"


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank"])
def test_a_rerank_path_that_milvus_asks_too_keeps_it_from_nothing(path: str) -> None:
    assert VLLMRanker(HOST, rerank_path=path, mode="server").client_only_reasons == ()


def test_a_server_endpoint_of_its_own_makes_up_for_a_rerank_path() -> None:
    ranker = VLLMRanker("http://gw", rerank_path="/api/rank", server_endpoint=HOST, mode="server")

    assert ranker.to_function("q", "document").params["endpoint"] == HOST


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
        "timeout_ms": 30_000,
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
        ({"api_key": "sk-secret", "credential": "vllm"}, "api_key"),
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
    ranker = VLLMRanker(HOST, api_key="sk-secret", credential="vllm")

    assert "sk-secret" not in str(ranker.to_function("q", "document").params)
    with pytest.raises(ConfigurationError, match="would carry the api_key in clear"):
        ranker.to_function("q", "document", provider="cohere")


def test_a_ranker_without_a_key_is_pickled() -> None:
    ranker = VLLMRanker(HOST, model="bge", extra_body={"use_activation": False})

    assert pickle.loads(pickle.dumps(ranker)) == ranker


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"api_key": "sk-secret"}, "an api_key"),
        ({"api_key": len}, "an api_key"),
        ({"headers": {"x": "sk-secret"}}, "headers"),
        ({"http_client": httpx.Client(), "headers": {"x": "1"}}, "headers and an http_client"),
    ],
)
def test_a_ranker_with_what_only_this_process_may_have_is_not_pickled(
    arguments: dict[str, Any], what: str
) -> None:
    with pytest.raises(TypeError, match=f"with {what} is not pickled.*make it anew"):
        pickle.dumps(VLLMRanker(HOST, **arguments))


def test_a_copy_of_a_ranker_is_the_ranker_with_its_key() -> None:
    ranker = VLLMRanker(HOST, api_key="sk-secret")

    assert copy.copy(ranker) is copy.deepcopy(ranker) is ranker


def test_a_truncation_that_milvus_lite_would_not_do_is_refused() -> None:
    ranker = VLLMRanker(HOST, truncate_prompt_tokens=256)

    with pytest.raises(ConfigurationError, match="Milvus Lite cannot truncate"):
        ranker.to_function("q", "document", provider="cohere")


def test_a_function_is_bound_to_each_of_a_requests_queries() -> None:
    assert VLLMRanker(HOST).to_function(("a", "b"), "document").params["queries"] == ["a", "b"]


@pytest.mark.parametrize(
    "queries",
    ["", " ", [], ["a", ""], ["a", None], {"a": "b"}, {"a"}, b"a", [b"a"], None, iter(["a"])],
)
def test_a_function_needs_a_text_for_every_query(queries: Any) -> None:
    with pytest.raises(ConfigurationError, match="one or more non-empty texts"):
        VLLMRanker(HOST).to_function(queries, "document")


@pytest.mark.parametrize("provider", ["tei", "VLLM", "", None])
def test_a_function_is_for_a_provider_that_reaches_vllm(provider: Any) -> None:
    with pytest.raises(ConfigurationError, match="provider must be 'vllm' or 'cohere'"):
        VLLMRanker(HOST).to_function("q", "document", provider=provider)


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


@pytest.mark.parametrize("mask", ["**********", "***", SecretStr("**********")])
@pytest.mark.parametrize("argument", ["api_key", "headers"])
def test_a_mask_is_no_secret(argument: str, mask: Any) -> None:
    value = {"x-key": mask} if argument == "headers" else mask

    with pytest.raises(ConfigurationError, match=f"{argument}: is the mask .* pass the secret its"):
        VLLMRanker(HOST, **{argument: value})


def secretive() -> VLLMRanker:
    return VLLMRanker(HOST, api_key="sk-secret", headers={"x-key": "sk-header"})


class Holder(RootModel[VLLMRanker]):
    """A model of a user's that holds a ranker."""


ROUND_TRIPS: dict[str, Callable[[VLLMRanker], Any]] = {
    "python": lambda ranker: ADAPTER.validate_python(ADAPTER.dump_python(ranker)),
    "json": lambda ranker: ADAPTER.validate_json(ADAPTER.dump_json(ranker)),
    "root": lambda ranker: Holder.model_validate(Holder(ranker).model_dump()).root,
    "root, json": lambda ranker: Holder.model_validate_json(Holder(ranker).model_dump_json()).root,
    "langchain": lambda ranker: (
        langchain.VLLMRerank.model_validate(langchain.VLLMRerank(ranker).model_dump()).ranker
    ),
    "langchain, json": lambda ranker: (
        langchain.VLLMRerank.model_validate_json(
            langchain.VLLMRerank(ranker).model_dump_json()
        ).ranker
    ),
    "llama_index": lambda ranker: (
        llama_index.VLLMRerank.from_dict(llama_index.VLLMRerank(ranker=ranker).to_dict()).ranker
    ),
    "llama_index, json": lambda ranker: (
        llama_index.VLLMRerank.from_json(llama_index.VLLMRerank(ranker=ranker).to_json()).ranker
    ),
}
every_round_trip = pytest.mark.parametrize("round_trip", ROUND_TRIPS.values(), ids=ROUND_TRIPS)


@every_round_trip
def test_a_ranker_without_secrets_is_read_back_as_it_was_written(
    round_trip: Callable[[VLLMRanker], Any],
) -> None:
    ranker = VLLMRanker(
        "https://gw/v1/v1", model="bge", max_retries=0, extra_body={"use_activation": False}
    )

    assert round_trip(ranker) == ranker


@every_round_trip
def test_a_ranker_with_secrets_is_not_read_back_with_their_masks(
    round_trip: Callable[[VLLMRanker], Any],
) -> None:
    with pytest.raises((ConfigurationError, ValidationError), match="pass the secret itself"):
        round_trip(secretive())


@every_round_trip
def test_a_callable_key_is_not_read_back_either(round_trip: Callable[[VLLMRanker], Any]) -> None:
    with pytest.raises((ConfigurationError, ValidationError), match="pass the secret itself"):
        round_trip(VLLMRanker(HOST, api_key=lambda: "sk-secret"))


@pytest.mark.parametrize(
    "ranker",
    [
        secretive(),
        VLLMRanker(HOST, api_key=partial(str, "sk-secret")),
        VLLMRanker(
            HOST, http_client=httpx.Client(headers={"authorization": "Bearer sk-of-client"})
        ),
    ],
)
def test_a_ranker_is_written_without_its_secrets_and_clients(ranker: VLLMRanker) -> None:
    ways = [repr(ranker), str(ADAPTER.dump_python(ranker)), str(ADAPTER.dump_json(ranker))]
    _ = ranker.secrets, ranker.plain_key, ranker.plain_headers
    ways.append(str(vars(ranker)))

    assert "sk-" not in " ".join(ways)
    assert "Client" not in " ".join(ways[:3])
    assert not {"http_client", "async_http_client"} & ADAPTER.dump_python(ranker).keys()


def test_the_values_of_headers_are_masked_and_their_names_are_not() -> None:
    assert ADAPTER.dump_python(secretive())["headers"] == {"x-key": "**********"}
    assert "sk-" not in str(dataclasses.asdict(secretive()))


def test_what_must_not_be_shown_is_the_key_and_what_headers_hold() -> None:
    headers = {"authorization": "Bearer sk-header", "x-priority": "1"}

    assert set(VLLMRanker(HOST, headers=headers).secrets) == {"Bearer sk-header", "sk-header"}
    assert VLLMRanker(HOST, api_key="sk-secret").secrets == ("sk-secret",)
    assert VLLMRanker(HOST, api_key=lambda: "sk-secret").secrets == ()


@pytest.mark.parametrize(
    ("headers", "problem"),
    [
        ({"x key": "a"}, "must have names that HTTP allows"),
        ({"": "a"}, "must have names that HTTP allows"),
        ({1: "a"}, "must have names that HTTP allows"),
        ({"Content-Length": "3"}, "must not set Content-Length"),
        ({"x": "sk-\nsecret"}, "must be plain ASCII"),
        ({"x": b"sk-secret"}, "must be text, not bytes"),
        ("x: sk-secret", "must be a mapping"),
    ],
)
def test_headers_that_cannot_be_sent_are_refused_unseen(headers: Any, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=f"headers: {problem}") as caught:
        VLLMRanker(HOST, headers=headers)

    assert "sk-" not in str(caught.value)


def test_a_key_is_given_in_one_place() -> None:
    with pytest.raises(ConfigurationError, match="either as api_key or as a header"):
        VLLMRanker(HOST, api_key="sk-a", headers={"Authorization": "Bearer sk-b"})


def test_a_client_of_the_wrong_kind_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"http_client: .*instance of Client"):
        VLLMRanker(HOST, http_client=httpx.AsyncClient())  # type: ignore[arg-type]


def test_rankers_with_different_clients_differ_and_are_hashed() -> None:
    ranker = VLLMRanker(HOST, http_client=httpx.Client(), headers={"x": "1"})

    assert ranker == replace(ranker)
    assert ranker != replace(ranker, http_client=None)
    assert hash(ranker) == hash(replace(ranker))


def test_a_program_that_holds_a_ranker_can_say_so_in_a_json_schema() -> None:
    properties = ADAPTER.json_schema()["properties"]

    assert {"endpoint", "api_key", "headers", "rerank_path"} <= properties.keys()


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
    with pytest.raises(ConfigurationError, match=r"'endpoint' must be given by name, such as mod"):
        VLLMRanker(HOST, "model")  # type: ignore[misc]


def test_milvus_lite_has_no_credentials() -> None:
    with pytest.raises(ConfigurationError, match="Milvus Lite has no credentials"):
        VLLMRanker(HOST, credential="prod").to_function("q", "text", provider="cohere")


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ("modle", "did you mean 'model'"),
        ("top_n", "how many come back is the retriever's k"),
    ],
)
def test_an_argument_that_a_ranker_does_not_have_leads_to_the_one_that_is_meant(
    argument: str, hint: str
) -> None:
    with pytest.raises(ConfigurationError, match=hint):
        VLLMRanker("http://vllm:8000", **{argument: "x"})
