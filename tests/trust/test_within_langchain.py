"""A LangChain retriever made by `within` shows one tenant's rows, whatever it is given later.

Each way in which something hostile can come later is tried with every hostile string: the
arguments of a call, `bind`, `configurable_fields`, attributes, copies. There is an error of this
package, or an answer of tenant a's rows alone.
"""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.runnables import ConfigurableField, Runnable
from pymilvus import MilvusClient, MilvusException

from milvus_vllm_retrievers import ConfigurationError, SearchError, VLLMRanker
from milvus_vllm_retrievers.langchain import MilvusVLLMRetriever
from tests.fakes import FakeVLLM, LetterEmbeddings
from tests.trust import hostile
from tests.trust.test_tenants import Server, can_be_stored, expressions, few_examples, filled, texts

QUESTION = "a note"


@pytest.fixture(scope="module")
def server(lite_uri: str, lite: MilvusClient) -> Server:
    """Milvus Lite with the tenants' collections."""
    return filled(lite_uri, lite)


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def is_async(request: pytest.FixtureRequest) -> bool:
    """Whether a test asks in an event loop."""
    return request.param


@pytest.fixture
async def retriever(server: Server) -> AsyncIterator[MilvusVLLMRetriever]:
    """A retriever that is open to all tenants' rows."""
    async with MilvusVLLMRetriever(
        "tenants", None, uri=server.uri, embedding=LetterEmbeddings(), k=100
    ) as made:
        yield made


def configured(retriever: MilvusVLLMRetriever, **values: Any) -> Runnable[str, Any]:
    """The retriever with fields configured by a config, as a server passes one on."""
    fields = {name: ConfigurableField(id=name) for name in values}
    return retriever.configurable_fields(**fields).with_config(configurable=values)


def assigned(retriever: MilvusVLLMRetriever, **values: Any) -> MilvusVLLMRetriever:
    for name, value in values.items():
        setattr(retriever, name, value)
    return retriever


Later = Callable[[MilvusVLLMRetriever, str], tuple[Runnable[str, Any], dict[str, Any]]]
WAYS: dict[str, Later] = {
    "filters of a call": lambda r, s: (r, {"filters": {"tenant": s}}),
    "a list in filters of a call": lambda r, s: (r, {"filters": {"tenant": ["b", s]}}),
    "a field in filters of a call": lambda r, s: (r, {"filters": {s: "b"}}),
    "expr of a call": lambda r, s: (r, {"expr": s}),
    "expr_params of a call": lambda r, s: (r, {"expr": "pk > {x}", "expr_params": {s: 0, "x": 0}}),
    "an instruction of a call": lambda r, s: (r, {"instruction": s}),
    "bind(expr)": lambda r, s: (r.bind(expr=s), {}),
    "bind(filters)": lambda r, s: (r.bind(filters={"tenant": s}), {}),
    "bind, replaced by a call": lambda r, s: (r.bind(expr="pk < 0"), {"expr": s}),
    "configured expr": lambda r, s: (configured(r, expr=s), {}),
    "configured filters": lambda r, s: (configured(r, filters={"tenant": ["b", s]}), {}),
    "configured to nothing": lambda r, s: (configured(r, expr=None, filters=None), {"expr": s}),
    "configured scope": lambda r, s: (configured(r, scope=None), {"expr": s}),
    "assigned expr": lambda r, s: (assigned(r, expr=s), {}),
    "assigned filters": lambda r, s: (assigned(r, filters={"tenant": [s, "b"]}), {}),
    "assigned, then nothing": lambda r, s: (assigned(r, expr=s, filters=None), {"expr": s}),
    "assigned scope": lambda r, s: (assigned(r, scope=None), {"expr": s}),
    "copied expr": lambda r, s: (r.model_copy(update={"expr": s}), {}),
    "copied filters": lambda r, s: (r.model_copy(update={"filters": {"tenant": ["b", s]}}), {}),
    "copied to nothing": lambda r, s: (
        r.model_copy(update={"expr": None, "filters": None, "partition_names": None}),
        {"expr": s},
    ),
    "copied scope": lambda r, s: (r.model_copy(update={"scope": None}), {"expr": s}),
    "within": lambda r, s: (r.within(expr=s), {}),
    "within, by filters": lambda r, s: (r.within(filters={"tenant": ["b", s]}), {}),
    "with_retry": lambda r, s: (r.with_retry(stop_after_attempt=1), {"expr": s}),
    "with_config": lambda r, s: (
        r.with_config(configurable={"expr": s, "filters": None}, metadata={"expr": s}),
        {},
    ),
}


async def tenants(
    later: Later, confined: MilvusVLLMRetriever, string: str, *, is_async: bool
) -> set[str]:
    """Whose rows came; none where it was refused, here or by Milvus."""
    try:
        asked, per_call = later(confined, string)
        if is_async:
            found = await asked.ainvoke(QUESTION, **per_call)
        else:
            found = asked.invoke(QUESTION, **per_call)
    except ConfigurationError:
        return set()
    except SearchError as error:
        if error.reason is not None or not isinstance(error.__cause__, MilvusException):
            raise  # it did not come to be read
        return set()
    return {document.metadata["tenant"] for document in found}


@pytest.mark.parametrize("way", WAYS)
async def test_nothing_that_comes_later_shows_a_row_of_another_tenant(
    retriever: MilvusVLLMRetriever, way: str, *, is_async: bool
) -> None:
    # Half of the strings in either run: each string meets each way.
    for string in hostile.STRINGS[is_async::2]:
        confined = retriever.within(filters={"tenant": "a"})
        came = await tenants(WAYS[way], confined, string, is_async=is_async)

        assert came <= {"a"}, f"{way}: {string[:200]!r} shows rows of {came}"
    assert await tenants(lambda r, _: (r, {}), confined, "", is_async=is_async) <= {"a"}


@pytest.mark.parametrize(
    "way", ["bind(expr)", "configured filters", "assigned filters", "copied filters"]
)
async def test_on_the_open_retriever_the_same_would_show_them(
    retriever: MilvusVLLMRetriever, way: str, *, is_async: bool
) -> None:
    string = 'tenant == "b"' if "expr" in way else "b"

    assert await tenants(WAYS[way], retriever, string, is_async=is_async) == {"b"}


async def test_a_hostile_value_of_filters_is_a_value(
    retriever: MilvusVLLMRetriever, *, is_async: bool
) -> None:
    strings = [string for string in hostile.STRINGS[is_async::2] if can_be_stored(string)]
    labels = retriever.model_copy(update={"collection_name": "tenant_labels"})
    mine = labels.within(filters={"tenant": "a"})

    for string in strings:
        filters = {"category": string}
        by_within = labels.within(filters={"tenant": "a", **filters})
        found = [
            by_within.invoke(QUESTION),
            mine.within(filters=filters).invoke(QUESTION),
            *(
                [await mine.ainvoke(QUESTION, filters=filters)]
                if is_async
                else mine.batch([QUESTION], filters=filters)
            ),
        ]
        # Just the one row of tenant a that has the string as its category.
        for documents in found:
            assert [(d.metadata["tenant"], d.metadata["category"]) for d in documents] == [
                ("a", string)
            ]
    await labels.aclose()
    assert len(strings) >= 100


@pytest.mark.parametrize("mode", ["auto", "client"])
async def test_the_rerank_model_sees_no_text_of_another_tenant(
    retriever: MilvusVLLMRetriever, fake_vllm: FakeVLLM, mode: Any, *, is_async: bool
) -> None:
    ranker = VLLMRanker(fake_vllm.url, mode=mode, on_error="skip")
    async with retriever.model_copy(update={"ranker": ranker}) as reranked:
        for string in hostile.PRECEDENCE:
            for way in ("expr of a call", "bind(expr)", "configured expr", "copied expr"):
                confined = reranked.within(filters={"tenant": "a"})
                await tenants(WAYS[way], confined, string, is_async=is_async)

    sent = {text for received in fake_vllm.received for text in received.body["documents"]}
    assert sent == {"a note of tenant a"}


STEPS: dict[str, Callable[[MilvusVLLMRetriever, str], MilvusVLLMRetriever]] = {
    "assign expr": lambda r, s: assigned(r, expr=s),
    "assign filters": lambda r, s: assigned(r, filters={"tenant": ["b", s]}),
    "assign nothing": lambda r, s: assigned(r, expr=None, filters=None),
    "copy": lambda r, s: copy.copy(r),
    "copy with expr": lambda r, s: r.model_copy(update={"expr": s, "filters": None}),
    "copy with filters": lambda r, s: r.model_copy(update={"filters": {"owner": s}}),
    "within": lambda r, s: r.within(expr=s),
    "within filters": lambda r, s: r.within(filters={"owner": [s, "b"]}),
}


@few_examples
@given(
    steps=st.lists(st.tuples(st.sampled_from(sorted(STEPS)), expressions | texts), max_size=4),
    way=st.sampled_from(sorted(WAYS)),
    last=expressions,
)
async def test_no_chain_of_such_steps_shows_a_row_of_another_tenant(
    server: Server, steps: list[tuple[str, str]], way: str, last: str
) -> None:
    async with MilvusVLLMRetriever(
        "tenants", None, uri=server.uri, embedding=LetterEmbeddings(), k=100
    ) as opened:
        confined = opened.within(filters={"tenant": "a"})
        for step, string in steps:
            with suppress(ConfigurationError):
                confined = STEPS[step](confined, string)

        assert await tenants(WAYS[way], confined, last, is_async=True) <= {"a"}
        assert await tenants(WAYS[way], confined, last, is_async=False) <= {"a"}
