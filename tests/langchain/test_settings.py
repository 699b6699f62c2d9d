"""What may be set, what a copy shares, and who closes what."""

from __future__ import annotations

import copy
import pickle
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx
import pytest
from langchain_core.documents import Document
from langchain_core.runnables import ConfigurableField
from pymilvus import AsyncMilvusClient, MilvusClient

from milvus_vllm_retrievers import ConfigurationError, RerankTimeoutError
from milvus_vllm_retrievers.langchain import (
    MilvusVLLMRerank,
    MilvusVLLMRetriever,
    VLLMRanker,
    VLLMRerank,
)
from tests.corpus import TEXTS, create_collection
from tests.fakes import FakeVLLM, tcp_server

NAME = "settings_docs"
LONGEST = sorted(range(len(TEXTS)), key=lambda i: -len(TEXTS[i]))


@pytest.fixture(scope="module", autouse=True)
def _collection(milvus26: MilvusClient) -> None:
    create_collection(milvus26, NAME)
    create_collection(milvus26, "settings_other", texts=["from another collection"])


@pytest.fixture
def retriever(milvus26_uri: str, fake_vllm: FakeVLLM) -> Any:
    """A retriever over BM25; the fake scores by the text's length."""
    with MilvusVLLMRetriever(
        NAME, VLLMRanker(fake_vllm.url, mode="client"), uri=milvus26_uri, vector_field="sparse", k=2
    ) as made:
        yield made


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch, milvus26: MilvusClient) -> list[type]:
    """The clients that were made since; that of the tests themselves is there already."""
    made: list[type] = []
    for client in (MilvusClient, AsyncMilvusClient):
        initialise = client.__init__

        def counted(self: Any, *args: Any, initialise: Any = initialise, **kwargs: Any) -> None:
            made.append(type(self))
            initialise(self, *args, **kwargs)

        monkeypatch.setattr(client, "__init__", counted)
    return made


Find = Callable[..., Awaitable[list[str | None]]]


@pytest.fixture(params=["sync", "async"])
def find(request: pytest.FixtureRequest) -> Find:
    """The ids that a retriever finds; the async connections are closed by its maker."""

    async def run(retriever: Any, maker: Any = None, **per_call: Any) -> list[str | None]:
        question = "the a of in to from"
        if request.param == "sync":
            return [d.id for d in retriever.invoke(question, **per_call)]
        try:
            return [d.id for d in await retriever.ainvoke(question, **per_call)]
        finally:
            await (maker or retriever).aclose()

    return run


SETTINGS: list[tuple[str, Any]] = [
    ("k", 3),
    ("fetch_k", 6),
    ("filters", {"number": [5, 6]}),
    ("expr", "number in [5, 6]"),
    ("score_threshold", 50),
    ("timeout", 1e-9),
]


@pytest.mark.parametrize(("name", "value"), SETTINGS)
async def test_a_setting_takes_effect_as_if_the_retriever_were_made_with_it(
    retriever: MilvusVLLMRetriever, find: Find, name: str, value: Any
) -> None:
    async def outcome(asked: MilvusVLLMRetriever) -> Any:
        try:
            return await find(asked)
        except Exception as error:  # noqa: BLE001 - which it is, is compared
            return type(error)

    before = await outcome(retriever)
    arguments = {n: getattr(retriever, n) for n in type(retriever).model_fields if n != "scope"}
    with MilvusVLLMRetriever(**{**arguments, name: value}) as made_with_it:
        expected = await outcome(made_with_it)

    setattr(retriever, name, value)

    assert await outcome(retriever) == expected
    assert expected != before or name == "fetch_k"


async def test_settings_keep_the_connections(
    retriever: MilvusVLLMRetriever, connected: list[type]
) -> None:
    for _ in range(2):
        retriever.invoke("the a of")
        await retriever.ainvoke("the a of")
        for name, value in SETTINGS[:-1]:
            setattr(retriever, name, value)
        retriever.tags, retriever.metadata, retriever.name = ["x"], {"a": 1}, "named"

    await retriever.aclose()
    assert sorted(client.__name__ for client in connected) == ["AsyncMilvusClient", "MilvusClient"]
    assert retriever.get_name() == "named"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("k", 0), ("k", True), ("k", "many"), ("fetch_k", 0), ("timeout", 0)],
        *[("timeout", True), ("expr", "a == 'b"), ("expr", 5), ("filters", {})],
        *[("score_threshold", float("nan")), ("expr_params", 5)],
    ],
)
def test_a_setting_that_is_refused_changes_nothing(
    retriever: MilvusVLLMRetriever, name: str, value: Any
) -> None:
    before, options = getattr(retriever, name), retriever._options

    with pytest.raises(ConfigurationError, match=name):
        setattr(retriever, name, value)

    assert getattr(retriever, name) == before
    assert retriever._options is options


SETTABLE = {
    *("k", "fetch_k", "filters", "expr", "expr_params", "score_threshold", "timeout"),
    *("name", "tags", "metadata"),
}


@pytest.mark.parametrize("name", sorted(MilvusVLLMRetriever.model_fields.keys() - SETTABLE))
def test_what_is_decided_when_a_retriever_is_made_says_how_to_get_another(name: str) -> None:
    retriever = MilvusVLLMRetriever("notes", None)
    way_out = "within()" if name == "scope" else f"model_copy(update={{'{name}': ...}})"

    with pytest.raises(ConfigurationError, match=re.escape(way_out)):
        setattr(retriever, name, None)


@pytest.mark.parametrize(
    ("made", "settable"),
    [
        (VLLMRerank(endpoint="http://localhost:8000"), {"top_n", "timeout"}),
        (MilvusVLLMRerank("notes", VLLMRanker("http://localhost")), {"top_n", "timeout"}),
    ],
)
def test_what_is_decided_when_a_reranker_is_made_says_how_to_get_another(
    made: Any, settable: set[str]
) -> None:
    for name in type(made).model_fields.keys() - settable:
        with pytest.raises(ConfigurationError, match=r"model_copy\(update="):
            setattr(made, name, None)


def test_an_attribute_that_does_not_exist_says_which_is_meant() -> None:
    with pytest.raises(ConfigurationError, match="it is k= here"):
        MilvusVLLMRetriever("notes", None).top_k = 3
    with pytest.raises(ConfigurationError, match="it is top_n= here"):
        VLLMRerank(endpoint="http://localhost").k = 3


# Rerankers


Compress = Callable[..., Awaitable[Sequence[Document]]]


@pytest.fixture(params=["sync", "async"])
def compress(request: pytest.FixtureRequest) -> Compress:
    """Rerank a document for each row."""

    async def run(reranker: Any) -> Sequence[Document]:
        documents = [Document(id=str(i), page_content=text) for i, text in enumerate(TEXTS)]
        try:
            if request.param == "sync":
                return reranker.compress_documents(documents, "longest")
            return await reranker.acompress_documents(documents, "longest")
        finally:
            await reranker.aclose()

    return run


@pytest.fixture(params=["texts", "rows"])
def reranker(request: pytest.FixtureRequest, fake_vllm: FakeVLLM, milvus26_uri: str) -> Any:
    """Either compressor."""
    if request.param == "texts":
        return VLLMRerank(endpoint=fake_vllm.url)
    return MilvusVLLMRerank(NAME, VLLMRanker(fake_vllm.url), uri=milvus26_uri)


async def test_a_rerankers_top_n_takes_effect(reranker: Any, compress: Compress) -> None:
    reranker.top_n = 3

    assert [d.id for d in await compress(reranker)] == [str(i) for i in LONGEST[:3]]


@pytest.mark.parametrize(
    ("name", "value"),
    [("top_n", -2), ("top_n", 0), ("top_n", True), ("timeout", 0), ("timeout", True)],
)
async def test_a_rerankers_setting_that_is_refused_changes_nothing(
    reranker: Any, compress: Compress, name: str, value: Any
) -> None:
    with pytest.raises(ConfigurationError, match=name):
        setattr(reranker, name, value)

    assert len(await compress(reranker)) == len(TEXTS)


async def test_a_rerankers_timeout_takes_effect(compress: Compress) -> None:
    def listen(connection: socket.socket) -> None:
        while connection.recv(65_536):
            pass

    with tcp_server(listen) as never_answers:
        reranker = VLLMRerank(VLLMRanker(never_answers, timeout=None))
        reranker.timeout = 0.05

        with pytest.raises(RerankTimeoutError):
            await compress(reranker)


async def test_the_timeout_of_a_reranker_of_rows_takes_effect(
    milvus26_uri: str, fake_vllm: FakeVLLM, compress: Compress
) -> None:
    reranker = MilvusVLLMRerank(NAME, VLLMRanker(fake_vllm.url), uri=milvus26_uri)
    reranker.timeout = 1e-9

    with pytest.raises(Exception, match="timeout"):
        await compress(reranker)


async def test_a_copy_of_a_reranker_is_one_with_other_arguments(
    reranker: Any, compress: Compress
) -> None:
    copied = reranker.model_copy(update={"top_n": 1})

    assert [d.id for d in await compress(copied)] == [str(LONGEST[0])]
    assert len(await compress(reranker)) == len(TEXTS)
    with pytest.raises(ConfigurationError, match="top_n"):
        reranker.model_copy(update={"top_n": -2})


# Copies


async def test_a_copy_with_other_settings_shares_the_connections_and_does_not_close_them(
    retriever: MilvusVLLMRetriever, find: Find, connected: list[type]
) -> None:
    few = retriever.model_copy(update={"k": 1, "search_params": {"sparse": {"params": {}}}})
    async with few, copy.copy(retriever) as same:
        found = await find(few, maker=few), await find(same, maker=same)
    again = await find(retriever)

    assert found == (again[:1], again)
    assert len(connected) == 1


async def test_a_copy_over_another_collection_has_connections_of_its_own(
    retriever: MilvusVLLMRetriever, find: Find, connected: list[type]
) -> None:
    copied = retriever.model_copy(update={"collection_name": "settings_other"})

    with copied:
        assert await find(copied) == ["0"]
    assert len(await find(retriever)) == 2

    assert len(connected) == 2


async def test_a_retriever_configured_at_run_time_shares_the_connections(
    retriever: MilvusVLLMRetriever, find: Find, connected: list[type]
) -> None:
    configurable = retriever.configurable_fields(
        k=ConfigurableField(id="k"), filters=ConfigurableField(id="where")
    )

    found = {
        k: await find(configurable.with_config(configurable={"k": k}), maker=retriever)
        for k in (1, 3)
    }
    here = configurable.with_config(configurable={"where": {"number": 6}})

    assert [len(ids) for ids in found.values()] == [1, 3]
    assert await find(here, maker=retriever) == ["6"]
    assert len(set(connected)) == 1
    assert len(connected) <= 3  # async ones are closed after each call here


def test_langchain_can_describe_what_is_configured(retriever: MilvusVLLMRetriever) -> None:
    fields = {name: ConfigurableField(id=name) for name in ("k", "filters", "timeout")}
    configurable = retriever.within(expr="pk > 0").configurable_fields(**fields)

    described = configurable.get_config_jsonschema()["$defs"]["Configurable"]["properties"]

    assert {name: described[name]["default"] for name in fields} == {
        "k": 2,
        "filters": None,
        "timeout": 60.0,
    }


def test_a_retriever_is_neither_pickled_nor_copied_deeply(retriever: MilvusVLLMRetriever) -> None:
    for each in (retriever, retriever.within(expr="pk > 0")):
        with pytest.raises(TypeError, match="neither pickled nor copied"):
            pickle.dumps(each)
        with pytest.raises(TypeError, match="neither pickled nor copied"):
            copy.deepcopy(each)


# Refreshing


async def test_a_refreshed_retriever_sees_at_once_what_its_alias_stands_for_now(
    milvus26: MilvusClient, milvus26_uri: str, fake_vllm: FakeVLLM, find: Find
) -> None:
    create_collection(milvus26, "settings_v1", texts=["the old text"], text_field="old")
    create_collection(milvus26, "settings_v2", texts=["the new text"], text_field="new")
    milvus26.create_alias("settings_v1", "settings_current")
    retriever = MilvusVLLMRetriever(
        "settings_current", VLLMRanker(fake_vllm.url), uri=milvus26_uri, vector_field="sparse"
    )
    old = retriever.invoke("text")

    milvus26.alter_alias("settings_v2", "settings_current")
    retriever.refresh()
    new = retriever.invoke("text")
    milvus26.alter_alias("settings_v1", "settings_current")
    await retriever.arefresh()
    old_again = await retriever.ainvoke("text")
    await retriever.aclose()
    milvus26.drop_alias("settings_current")

    assert [d.page_content for d in (*old, *new, *old_again)] == [
        *("the old text", "the new text", "the old text")
    ]


# Classes built on these


class OfOneTenant(MilvusVLLMRetriever):
    """A retriever whose constructor takes something else."""

    def __init__(self, tenant: str) -> None:
        super().__init__("docs", VLLMRanker("http://vllm"), filters={"tenant": tenant})


def test_a_class_with_a_constructor_of_its_own_can_be_set_and_copied() -> None:
    retriever = OfOneTenant("a")

    retriever.k = 7
    copied = retriever.model_copy(update={"fetch_k": 70})

    assert (retriever.k, copied.k, copied.fetch_k) == (7, 7, 70)
    assert copied.filters == {"tenant": "a"}
    with pytest.raises(ConfigurationError, match="k must be between"):
        retriever.model_copy(update={"k": 0})


def test_another_http_client_is_another_ranker(retriever: MilvusVLLMRetriever) -> None:
    """A copy with a CA or a proxy of its own must not go on with the old client."""
    own = httpx.Client()

    copied = retriever.model_copy(
        update={"ranker": VLLMRanker("http://vllm", mode="client", http_client=own)}
    )

    assert copied._adapter is not retriever._adapter
    assert copied._adapter._client._ranker.http_client is own
    own.close()
