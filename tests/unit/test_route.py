"""Who reranks, and why: every row of the table that `route` begins with, to the letter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import httpx
import pytest

from milvus_vllm_retrievers import ConfigurationError, VLLMRanker
from milvus_vllm_retrievers._core.route import Facts, Route, asks_for_models, provider_of, route
from milvus_vllm_retrievers._core.server import Server

URL = "http://localhost:8000"
LITE = "milvus_lite-3.2.2"
WAY_OUT = "Rerank from this process: mode='auto' or 'client', or VLLMRerank"
NAME_A_KEY = "name a key of milvus.yaml with credential='...'"


def facts(version: str, **more: Any) -> Facts:
    return Facts(Server.from_version(version), "text", **more)


def ranker(mode: Any, arguments: Mapping[str, Any]) -> VLLMRanker:
    return VLLMRanker(**{"endpoint": URL, "mode": mode, **arguments})


# What the ranker asks that Milvus would drop: its arguments, and the reason.
DROPPED: list[tuple[dict[str, Any], str]] = [
    ({"instruction": "find code"}, "Milvus does not send an instruction (leave it out)"),
    ({"extra_body": {"user": "a"}}, "Milvus does not send extra_body (leave it out)"),
    (
        {"endpoint": "http://gw/team-a"},
        "Milvus drops the path of the endpoint (give it a server_endpoint without one)",
    ),
    (
        {"rerank_path": "/rank"},
        "Milvus asks /rerank in place of rerank_path (give it a server_endpoint that serves "
        "/rerank)",
    ),
    ({"api_key": "sk-key"}, f"Milvus does not send the api_key: {NAME_A_KEY}"),
    ({"api_key": lambda: "sk-key"}, f"Milvus does not send the api_key: {NAME_A_KEY}"),
    ({"headers": {"x-tenant": "a"}}, f"Milvus does not send headers: {NAME_A_KEY}"),
    ({"http_client": httpx.Client()}, f"Milvus does not use an http_client: {NAME_A_KEY}"),
    (
        {"async_http_client": httpx.AsyncClient()},
        f"Milvus does not use an http_client: {NAME_A_KEY}",
    ),
    (
        {"api_key": "sk-key", "instruction": "find code"},
        "Milvus does not send an instruction (leave it out); "
        f"Milvus does not send the api_key: {NAME_A_KEY}",
    ),
]
# What depends on the collection or the endpoint: the ranker's arguments, the facts, the reason.
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        {},
        {"text_may_be_null": True},
        "Milvus 2.6.4 refuses to rerank by 'text', whose values may be null (Milvus 3.0 takes it)",
    ),
    (
        {"model": "a"},
        {"served": ["b"]},
        f"Milvus sends no model name, and {URL} serves 'b', not 'a' alone",
    ),
    (
        {"model": "a"},
        {"served": ["a", "b"]},
        f"Milvus sends no model name, and {URL} serves 'a', 'b', not 'a' alone",
    ),
    (
        {"model": "a"},
        {"served": []},
        f"Milvus sends no model name, and {URL} serves none, not 'a' alone",
    ),
]
# What Milvus does as it is asked.
SERVED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("2.6.4", {}, {}),
    ("v2.6.4-dev", {}, {}),
    ("3.0.1", {}, {"text_may_be_null": True}),
    ("2.6.4", {"model": "a"}, {"served": ["a"]}),
    ("2.6.4", {"model": "a"}, {"served": None}),
    ("2.6.4", {"api_key": "sk-key", "credential": "vllm"}, {}),
    ("2.6.4", {"headers": {"x-tenant": "a"}, "credential": "vllm"}, {}),
    ("2.6.4", {"endpoint": "http://gw/team-a", "server_endpoint": "http://vllm:8000"}, {}),
]
NOT_LEFT_TO_MILVUS = [
    ("no version", "the version 'no version' does not tell what Milvus can do"),
    ("2.5.14", "Milvus 2.5.14 is older than 2.6 and cannot rerank"),
    ("v2.3.5-lite", "Milvus v2.3.5-lite is older than 2.6 and cannot rerank"),
    (LITE, "Milvus Lite does not know the provider 'vllm'"),
    ("milvus_lite-2.5.1", "Milvus Lite does not know the provider 'vllm'"),
]


def test_without_a_ranker_nobody_reranks() -> None:
    assert route(None, facts("2.6.4")) == Route(None, "no ranker was given")


# mode="client"


@pytest.mark.parametrize("version", ["2.6.4", "2.5.14", LITE, "no version"])
@pytest.mark.parametrize("arguments", [{}, {"model": "a", "instruction": "find code"}])
def test_mode_client_reranks_from_here_whatever_milvus_can_do(
    version: str, arguments: dict[str, Any]
) -> None:
    known = facts(version, served=["b"], text_may_be_null=True)

    assert route(ranker("client", arguments), known) == Route("client", "mode='client'")


# mode="server"


@pytest.mark.parametrize("version", ["2.5.14", "v2.3.5-lite", "milvus_lite-2.5.1"])
def test_mode_server_is_refused_by_a_milvus_that_would_ignore_it(version: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        route(ranker("server", {}), facts(version))

    assert str(caught.value) == (
        f"mode='server' needs Milvus 2.6 or later; this server is {version!r} and would ignore "
        f"the ranker in silence. {WAY_OUT}"
    )


@pytest.mark.parametrize(("arguments", "known", "reason"), REFUSED)
def test_mode_server_is_refused_where_milvus_cannot_do_what_is_asked(
    arguments: dict[str, Any], known: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        route(ranker("server", arguments), facts("2.6.4", **known))

    assert str(caught.value) == f"mode='server' cannot be used: {reason}. {WAY_OUT}"


@pytest.mark.parametrize(("arguments", "reason"), DROPPED)
def test_mode_server_is_refused_at_construction_for_what_milvus_would_drop(
    arguments: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(reason)):
        ranker("server", arguments)


@pytest.mark.parametrize(("version", "arguments", "known"), SERVED)
def test_mode_server_has_milvus_rerank_what_it_can(
    version: str, arguments: dict[str, Any], known: dict[str, Any]
) -> None:
    found = route(ranker("server", arguments), facts(version, **known))

    assert found == Route("milvus", "mode='server'", "vllm")


@pytest.mark.parametrize(("version", "provider"), [(LITE, "cohere"), ("no version", "vllm")])
def test_mode_server_trusts_milvus_lite_and_a_version_that_cannot_be_read(
    version: str, provider: Any
) -> None:
    known = facts(version, text_may_be_null=True)

    assert route(ranker("server", {}), known) == Route("milvus", "mode='server'", provider)


# mode="auto"


@pytest.mark.parametrize(("version", "why"), NOT_LEFT_TO_MILVUS)
def test_auto_reranks_from_here_where_milvus_may_not_be_able_to(version: str, why: str) -> None:
    assert route(ranker("auto", {}), facts(version)) == Route("client", why)


@pytest.mark.parametrize(("arguments", "reason"), DROPPED)
def test_auto_reranks_from_here_what_milvus_would_drop(
    arguments: dict[str, Any], reason: str
) -> None:
    assert route(ranker("auto", arguments), facts("2.6.4")) == Route("client", reason)


@pytest.mark.parametrize(("arguments", "known", "reason"), REFUSED)
def test_auto_reranks_from_here_what_milvus_would_refuse(
    arguments: dict[str, Any], known: dict[str, Any], reason: str
) -> None:
    found = route(ranker("auto", arguments), facts("2.6.4", **known))

    assert found == Route("client", reason)


@pytest.mark.parametrize(("version", "arguments", "known"), SERVED)
def test_auto_leaves_the_rest_to_milvus(
    version: str, arguments: dict[str, Any], known: dict[str, Any]
) -> None:
    found = route(ranker("auto", arguments), facts(version, **known))

    assert found == Route("milvus", f"Milvus {version} knows the provider 'vllm'", "vllm")


# What has to be reranked by Milvus


def test_what_needs_milvus_is_refused_in_its_own_name_and_told_the_way_out() -> None:
    with pytest.raises(ConfigurationError, match=r"MilvusVLLMRerank needs Milvus 2\.6 or later"):
        provider_of(ranker("auto", {}), facts("2.5.14"), "MilvusVLLMRerank")
    with pytest.raises(
        ConfigurationError, match=r"MilvusVLLMRerank cannot be used: .*or VLLMRerank"
    ):
        provider_of(ranker("auto", {"api_key": "sk-key"}), facts("2.6.4"), "MilvusVLLMRerank")


@pytest.mark.parametrize(("version", "provider"), [("2.6.4", "vllm"), (LITE, "cohere")])
def test_what_needs_milvus_is_told_its_provider_whatever_the_mode(
    version: str, provider: str
) -> None:
    for mode in ("auto", "client", "server"):
        assert provider_of(ranker(mode, {}), facts(version), "MilvusVLLMRerank") == provider


# Whether the served models matter


@pytest.mark.parametrize(
    ("mode", "version", "arguments", "asks"),
    [
        ("auto", "2.6.4", {"model": "a"}, True),
        ("server", "2.6.4", {"model": "a"}, True),
        ("server", "no version", {"model": "a"}, True),
        ("auto", "2.6.4", {}, False),
        ("client", "2.6.4", {"model": "a"}, False),
        ("auto", "2.5.14", {"model": "a"}, False),
        ("auto", "no version", {"model": "a"}, False),
        ("auto", LITE, {"model": "a"}, False),
        ("server", LITE, {"model": "a"}, False),
        ("auto", "2.6.4", {"model": "a", "instruction": "find code"}, False),
        ("auto", "2.6.4", {"model": "a", "api_key": "sk-key"}, False),
    ],
)
def test_the_served_models_are_asked_for_only_where_they_decide_something(
    mode: str, version: str, arguments: dict[str, Any], asks: bool
) -> None:
    assert asks_for_models(ranker(mode, arguments), Server.from_version(version)) is asks
