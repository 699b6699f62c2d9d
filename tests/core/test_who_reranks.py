"""Who reranks, on servers: what Milvus would drop or refuse is reranked from here, or refused."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import httpx
import pytest
from pymilvus import MilvusClient

from milvus_vllm_retrievers import ConfigurationError, RerankStatusError, VLLMRanker
from milvus_vllm_retrievers._core.hits import NO_TEXT, Hit
from milvus_vllm_retrievers._core.query import Item, Query, SearchOptions
from tests.core.conftest import Call, Make, questions
from tests.corpus import TEXTS, create_collection
from tests.fakes import FakeVLLM, Received, Reply

NAME = "who_reranks"
QUERY = Query("whales")
OPTIONS = SearchOptions(k=4)
LOGGER = "milvus_vllm_retrievers"


@pytest.fixture(scope="module", autouse=True)
def _collection(milvus26: MilvusClient) -> None:
    create_collection(milvus26, NAME)


def reranked_by(hits: list[Hit]) -> set[str | None]:
    return {hit.reranked_by for hit in hits}


def logged(caplog: pytest.LogCaptureFixture, part: str) -> list[str]:
    messages = [r.getMessage() for r in caplog.records if r.name == LOGGER]
    return [message for message in messages if part in message]


# What Milvus would not send


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"api_key": "sk-who"}, "does not send the api_key"),
        ({"api_key": lambda: "sk-who"}, "does not send the api_key"),
        ({"headers": {"x-gateway": "sk-who"}}, "does not send headers"),
        ({"http_client": True, "async_http_client": True}, "does not use an http_client"),
    ],
)
async def test_a_key_that_milvus_would_not_send_is_sent_from_here(
    make: Make,
    milvus26_uri: str,
    fake_vllm: FakeVLLM,
    call: Call,
    arguments: dict[str, Any],
    reason: str,
) -> None:
    with httpx.Client() as client:
        async with httpx.AsyncClient() as aclient:
            clients = {"http_client": client, "async_http_client": aclient}
            given = {name: clients.get(name, value) for name, value in arguments.items()}
            adapter = make(milvus26_uri, NAME, VLLMRanker(fake_vllm.url, **given))

            hits = await call(adapter, "retrieve", QUERY, OPTIONS)
            plan = (await call(adapter, "explained", QUERY, OPTIONS))[2]

    assert reranked_by(hits) == {"client"}
    assert plan.reranked_by == "client"
    assert reason in plan.why
    assert "credential='...'" in plan.why
    secret = fake_vllm.received[0].headers
    sent = f"{secret.get('authorization')} {secret.get('x-gateway')}"
    assert ("sk-who" in sent) is ("http_client" not in arguments)


async def test_a_credential_has_milvus_rerank_in_spite_of_a_key(
    make: Make, milvus26_uri: str, fake_vllm: FakeVLLM, call: Call
) -> None:
    ranker = VLLMRanker(fake_vllm.url, api_key="sk-who", credential="not_in_milvus_yaml")

    with pytest.raises(Exception, match=r"milvus\.yaml"):
        await call(make(milvus26_uri, NAME, ranker), "retrieve", QUERY, OPTIONS)


# The models that are served


@pytest.mark.parametrize(
    ("served", "who"),
    [
        (["a-model"], "milvus"),
        (["another"], "client"),
        (["a-model", "b"], "client"),
        ([], "client"),
    ],
)
async def test_a_model_that_is_not_the_only_one_served_is_asked_for_from_here(
    make: Make,
    milvus26_uri: str,
    fake_vllm: FakeVLLM,
    call: Call,
    served: list[str],
    who: str,
) -> None:
    fake_vllm.models = served
    adapter = make(milvus26_uri, NAME, VLLMRanker(fake_vllm.url, model="a-model"))

    for query in questions(3):
        assert reranked_by(await call(adapter, "retrieve", query, OPTIONS)) == {who}
    outcomes = await call(adapter, "retrieve_many", questions(3), OPTIONS)

    assert [reranked_by(hits) for hits in outcomes] == [{who}] * 3
    assert fake_vllm.asked_for_models == 1
    models = {received.body.get("model") for received in fake_vllm.received}
    assert models == ({None} if who == "milvus" else {"a-model"})


async def test_no_query_of_several_that_come_first_is_scored_by_another_model(
    make: Make, milvus26_uri: str, fake_vllm: FakeVLLM, call: Call
) -> None:
    fake_vllm.models = ["another"]
    adapter = make(milvus26_uri, NAME, VLLMRanker(fake_vllm.url, model="a-model"))

    found = await asyncio.gather(
        *(call(adapter, "retrieve", query, OPTIONS) for query in questions(8))
    )

    assert [reranked_by(hits) for hits in found] == [{"client"}] * 8


async def test_mode_server_refuses_a_model_that_is_not_served_with_the_way_out(
    make: Make, milvus26_uri: str, fake_vllm: FakeVLLM, call: Call
) -> None:
    fake_vllm.models = ["another"]
    ranker = VLLMRanker(fake_vllm.url, model="a-model", mode="server")
    adapter = make(milvus26_uri, NAME, ranker)
    refusal = re.escape(
        f"mode='server' cannot be used: Milvus sends no model name, and {fake_vllm.url} serves "
        "'another', not 'a-model' alone. Rerank from this process: mode='auto' or 'client'"
    )

    with pytest.raises(ConfigurationError, match=refusal):
        await call(adapter, "retrieve", QUERY, OPTIONS)
    for outcome in await call(adapter, "retrieve_many", questions(2), OPTIONS):
        assert isinstance(outcome, ConfigurationError)
    with pytest.raises(ConfigurationError, match="MilvusVLLMRerank cannot be used"):
        await call(adapter, "rank", QUERY, [Item("a text", "1")], OPTIONS)
    assert fake_vllm.received == []
    assert fake_vllm.asked_for_models == 1


async def test_who_cannot_be_asked_is_trusted_and_asked_once(
    make: Make,
    milvus26_uri: str,
    fake_vllm: FakeVLLM,
    call: Call,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", LOGGER)
    adapter = make(milvus26_uri, NAME, VLLMRanker(fake_vllm.url, model="a-model"))

    for query in questions(3):
        assert reranked_by(await call(adapter, "retrieve", query, OPTIONS)) == {"milvus"}
    await call(adapter, "retrieve_many", questions(3), OPTIONS)

    assert fake_vllm.asked_for_models == 1
    (told,) = logged(caplog, "which models it serves")
    assert fake_vllm.url in told
    assert "trusting that Milvus finds 'a-model' there" in told


async def test_a_key_that_only_async_callers_can_ask_for_does_not_keep_milvus_from_reranking(
    make: Make, milvus26_uri: str, fake_vllm: FakeVLLM, caplog: pytest.LogCaptureFixture
) -> None:
    """A blocking call cannot ask which models are served; Milvus uses a key of its own."""
    caplog.set_level("INFO", LOGGER)

    async def key() -> str:
        return "sk-who"

    ranker = VLLMRanker(fake_vllm.url, model="a-model", api_key=key, credential="not_there")
    adapter = make(milvus26_uri, NAME, ranker)

    with pytest.raises(Exception, match=r"milvus\.yaml"):
        await asyncio.to_thread(adapter.retrieve, QUERY, OPTIONS)
    assert len(logged(caplog, "which models it serves")) == 1


async def test_refresh_asks_again_which_models_are_served(
    make: Make, milvus26_uri: str, fake_vllm: FakeVLLM, call: Call
) -> None:
    fake_vllm.models = ["another"]
    adapter = make(milvus26_uri, NAME, VLLMRanker(fake_vllm.url, model="a-model"))
    assert reranked_by(await call(adapter, "retrieve", QUERY, OPTIONS)) == {"client"}

    fake_vllm.models = ["a-model"]
    await call(adapter, "refresh", 10.0)

    assert reranked_by(await call(adapter, "retrieve", QUERY, OPTIONS)) == {"milvus"}
    assert fake_vllm.asked_for_models == 2


@pytest.mark.parametrize("arguments", [{}, {"mode": "client", "model": "a"}])
async def test_the_models_are_not_asked_for_where_they_decide_nothing(
    make: Make, milvus26_uri: str, fake_vllm: FakeVLLM, call: Call, arguments: dict[str, Any]
) -> None:
    adapter = make(milvus26_uri, NAME, VLLMRanker(fake_vllm.url, **arguments))

    await call(adapter, "retrieve", QUERY, OPTIONS)

    assert fake_vllm.asked_for_models == 0


# What is told


async def test_each_path_is_logged_once_with_its_reason(
    make: Make,
    milvus26_uri: str,
    fake_vllm: FakeVLLM,
    call: Call,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", LOGGER)
    adapter = make(milvus26_uri, NAME, VLLMRanker(fake_vllm.url))
    told_to = SearchOptions(k=4, instruction="find animals")

    for options in (OPTIONS, told_to, OPTIONS, told_to):
        await call(adapter, "retrieve", QUERY, options)
        await call(adapter, "retrieve_many", questions(2), options)
        await call(adapter, "explained", QUERY, options)

    assert len(logged(caplog, "reranked inside Milvus (Milvus 2.6.4 knows")) == 1
    assert len(logged(caplog, "from this process (Milvus does not send an instruction")) == 1
    assert {r.levelname for r in caplog.records if r.name == LOGGER} == {"INFO"}


# Texts that may be null


NULLABLE = [TEXTS[0], None, TEXTS[2], "", TEXTS[4], None]
NO_TEXTS: list[str | None] = [None, None, None]


def scores(hits: list[Hit]) -> list[tuple[int | str, bool, str | None]]:
    return [(hit.pk, hit.relevance_score is not None, hit.rerank_error) for hit in hits]


@pytest.mark.parametrize(("server", "who"), [("milvus26", "client"), ("milvus30", "milvus")])
async def test_a_text_that_may_be_null_is_reranked_by_who_can(
    request: pytest.FixtureRequest,
    make: Make,
    fake_vllm: FakeVLLM,
    call: Call,
    server: str,
    who: str,
) -> None:
    create_collection(
        request.getfixturevalue(server), "may_be_null", texts=NULLABLE, bm25=False, nullable=True
    )
    uri = request.getfixturevalue(f"{server}_uri")
    adapter = make(uri, "may_be_null", VLLMRanker(fake_vllm.url))

    hits = await call(adapter, "retrieve", QUERY, SearchOptions(k=6))
    (many,) = await call(adapter, "retrieve_many", [QUERY], SearchOptions(k=6))

    assert [hit.reranked_by for hit in hits] == [who] * 3 + [None] * 3
    assert scores(hits)[3:] == [(1, False, NO_TEXT), (3, False, NO_TEXT), (5, False, NO_TEXT)]
    assert many == hits


async def test_mode_server_refuses_a_text_that_may_be_null_where_milvus_would(
    make: Make, milvus26: MilvusClient, milvus26_uri: str, fake_vllm: FakeVLLM, call: Call
) -> None:
    create_collection(milvus26, "may_be_null", texts=NULLABLE, bm25=False, nullable=True)
    adapter = make(milvus26_uri, "may_be_null", VLLMRanker(fake_vllm.url, mode="server"))

    with pytest.raises(ConfigurationError, match=r"by 'document', whose values may be null"):
        await call(adapter, "retrieve", QUERY, OPTIONS)


@pytest.mark.parametrize(
    ("texts", "nullable"),
    [
        (NULLABLE, True),
        ([None, *TEXTS[:5]], True),
        (NO_TEXTS, True),
        (TEXTS[:5], True),
        ([TEXTS[0], "", TEXTS[2], " "], False),
    ],
)
@pytest.mark.parametrize("k", [2, 6])
async def test_milvus_lite_ranks_what_has_a_text_as_if_the_rest_were_not_there(
    make: Make,
    lite: MilvusClient,
    lite_uri: str,
    fake_vllm: FakeVLLM,
    call: Call,
    texts: list[str | None],
    nullable: bool,
    k: int,
) -> None:
    refuse_nulls(fake_vllm)
    create_collection(lite, "lite_nulls", texts=texts, bm25=False, nullable=nullable)
    adapter = make(lite_uri, "lite_nulls", VLLMRanker(fake_vllm.url, mode="server"))

    hits = await call(adapter, "retrieve", QUERY, SearchOptions(k=k))

    filled = [i for i, text in enumerate(texts) if text and text.strip()]
    best = sorted(filled, key=lambda i: (-len(texts[i] or ""), i))
    rest = [i for i in range(len(texts)) if i not in filled]
    wanted = [(i, True, None) for i in best] + [(i, False, NO_TEXT) for i in rest]
    assert scores(hits) == wanted[:k]
    assert [hit.relevance_score for hit in hits if hit.pk in filled] == [
        len(texts[i] or "") for i in best[:k]
    ]
    assert {hit.reranked_by for hit in hits if hit.pk in filled} <= {"milvus"}


def refuse_nulls(fake: FakeVLLM) -> None:
    """Answer as vLLM does to a document that is null."""
    answer = fake.answer

    def refusing(received: Received) -> Reply:
        if None in received.body["documents"]:
            return Reply.json(400, {"error": {"message": "Input should be a valid string"}})
        return answer(received)

    fake.answer = refusing  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def _answers_as_ever(_fake_vllm: FakeVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fake_vllm, "answer", _fake_vllm.answer)


async def test_a_failure_on_milvus_lite_is_told_though_texts_may_be_null(
    make: Make, lite: MilvusClient, lite_uri: str, fake_vllm: FakeVLLM, call: Call
) -> None:
    create_collection(lite, "lite_nulls", texts=NULLABLE, bm25=False, nullable=True)
    fake_vllm.always = Reply.json(400, {"error": {"message": "too long"}})
    adapter = make(lite_uri, "lite_nulls", VLLMRanker(fake_vllm.url, mode="server"))

    with pytest.raises(RerankStatusError, match="too long"):
        await call(adapter, "retrieve", QUERY, OPTIONS)
