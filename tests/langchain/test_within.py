"""`within`: a narrower retriever on the same connections. Whether it holds: tests/trust."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from langchain_core.runnables import ConfigurableField, RunnableLambda
from langchain_core.tools import create_retriever_tool
from pymilvus import AsyncMilvusClient, MilvusClient

from milvus_vllm_retrievers import ConfigurationError
from milvus_vllm_retrievers.langchain import MilvusVLLMRetriever, VLLMRanker
from tests.corpus import TEXTS, create_collection
from tests.fakes import FakeVLLM, LetterEmbeddings

NAME = "within_docs"
QUESTION = "the a of in to"
Numbers = Callable[..., Awaitable[list[int]]]


@pytest.fixture(scope="module", autouse=True)
def _collection(milvus26: MilvusClient) -> None:
    create_collection(milvus26, NAME)
    create_collection(milvus26, "within_parts", bm25=False)
    for number, part in enumerate(("north", "south")):
        milvus26.create_partition("within_parts", part)
        vector = LetterEmbeddings().embed_query(part)
        row = {"pk": 100 + number, "document": part, "number": 100 + number, "dense": vector}
        milvus26.insert("within_parts", [row], partition_name=part)


@pytest.fixture
def retriever(milvus26_uri: str, fake_vllm: FakeVLLM) -> Any:
    """An open retriever that finds every row."""
    ranker = VLLMRanker(fake_vllm.url, mode="client")
    with MilvusVLLMRetriever(
        NAME, ranker, uri=milvus26_uri, embedding=LetterEmbeddings(), k=20
    ) as made:
        yield made


@pytest.fixture(params=["sync", "async"])
def numbers(request: pytest.FixtureRequest, retriever: MilvusVLLMRetriever) -> Numbers:
    """The numbers of the rows that something made of the retriever finds, sorted."""

    async def run(asked: Any, *config: Any, **per_call: Any) -> list[int]:
        if request.param == "sync":
            found = asked.invoke(QUESTION, *config, **per_call)
        else:
            try:
                found = await asked.ainvoke(QUESTION, *config, **per_call)
            finally:
                await retriever.aclose()
        return sorted(document.metadata["number"] for document in found)

    return run


async def test_it_finds_what_matches_filters_and_expression(
    retriever: MilvusVLLMRetriever, numbers: Numbers
) -> None:
    confined = retriever.within(filters={"number": {"gte": 3}}, expr="number < 6")

    assert await numbers(confined) == [3, 4, 5]
    assert await numbers(retriever) == list(range(len(TEXTS)))


async def test_within_of_within_narrows_further(
    retriever: MilvusVLLMRetriever, numbers: Numbers
) -> None:
    once = retriever.within(filters={"number": [1, 2, 3]})
    twice = once.within(expr="number in [2, 3, 4]").within(filters={"number": {"ne": 2}})

    assert await numbers(twice) == [3]
    assert await numbers(once) == [1, 2, 3]


async def test_the_filters_of_the_retriever_it_is_made_of_stay(
    retriever: MilvusVLLMRetriever, numbers: Numbers
) -> None:
    narrowed = retriever.model_copy(
        update={"filters": {"number": [1, 2, 3, 4]}, "expr": "number > 1"}
    )
    confined = narrowed.within(filters={"number": {"lt": 4}})

    narrowed.filters = narrowed.expr = None

    assert await numbers(confined) == [2, 3]
    assert await numbers(narrowed) == list(range(len(TEXTS)))


def test_what_a_retrievers_filters_were_made_of_may_change_afterwards(
    retriever: MilvusVLLMRetriever,
) -> None:
    numbers, allowed = [1, 2], ["a"]
    update = {"filters": {"number": numbers}, "expr": "t in {t}", "expr_params": {"t": allowed}}
    narrowed = retriever.model_copy(update=update)
    confined = narrowed.within(filters={"pk": numbers}, partition_names=allowed)
    before = repr(confined.scope)

    numbers.append(3)
    allowed.append("b")
    assert narrowed.expr_params is not None
    narrowed.expr_params["t"].append("c")

    assert repr(confined.scope) == before


async def test_what_a_call_asks_is_joined_to_it(
    retriever: MilvusVLLMRetriever, numbers: Numbers
) -> None:
    confined = retriever.within(filters={"number": [1, 2, 3]})

    assert await numbers(confined, filters={"number": [3, 4]}) == [3]
    assert await numbers(confined, expr="number != 3") == [1, 2]
    assert await numbers(confined, filters={"number": 9}) == []
    assert len(await numbers(confined, k=2)) == 2


async def test_langchain_does_with_it_what_it_does_with_any_retriever(
    retriever: MilvusVLLMRetriever, numbers: Numbers
) -> None:
    confined = retriever.within(filters={"number": [1, 2, 3]})
    configurable = confined.configurable_fields(k=ConfigurableField(id="k"))
    alternatives = confined.configurable_alternatives(
        ConfigurableField(id="which"), default_key="mine", none=RunnableLambda(lambda _: [])
    )

    for asked in (
        confined.bind(expr="number < 3"),
        confined.with_config({"tags": ["x"]}).bind(filters={"number": {"lt": 3}}),
        confined.with_retry(stop_after_attempt=2).bind(expr="number < 3"),
        confined.model_copy(update={"filters": {"number": [1, 2]}}),
        RunnableLambda(lambda question: question) | confined.bind(expr="number < 3"),
    ):
        assert await numbers(asked) == [1, 2]
    assert await numbers(alternatives) == [1, 2, 3]
    assert await numbers(alternatives, {"configurable": {"which": "none"}}) == []
    assert len(await numbers(configurable, {"configurable": {"k": 1}})) == 1
    assert await numbers(configurable, {"configurable": {"k": 9}}) == [1, 2, 3]


async def test_a_batch_and_a_tool_and_explain_see_its_rows_only(
    retriever: MilvusVLLMRetriever,
) -> None:
    confined = retriever.within(filters={"number": [1, 2, 3]})
    tool = create_retriever_tool(
        confined, "search", "Search.", response_format="content_and_artifact"
    )
    call = {"type": "tool_call", "id": "1", "name": "search", "args": {"query": QUESTION}}

    answers = [
        *confined.batch([QUESTION, "whales"]),
        *await confined.abatch([QUESTION, "whales"]),
        tool.invoke(call).artifact,
        (await tool.ainvoke(call)).artifact,
    ]
    explained = [confined.explain(QUESTION), await confined.aexplain(QUESTION)]
    await retriever.aclose()

    assert [{d.metadata["number"] for d in found} for found in answers] == [{1, 2, 3}] * 6
    assert [e.candidates for e in explained] == [3, 3]
    assert [{row.hit.pk for row in e.hits} for e in explained] == [{1, 2, 3}] * 2


async def test_it_may_be_of_some_partitions(
    retriever: MilvusVLLMRetriever, numbers: Numbers, milvus26_uri: str
) -> None:
    parted = retriever.model_copy(update={"collection_name": "within_parts"})
    with parted:
        north = parted.within(partition_names=["north"])
        both = parted.within(partition_names=["north", "south"])

        found = [
            each.invoke(QUESTION) for each in (parted, both, north, both.within(expr="pk>100"))
        ]
        with pytest.raises(ConfigurationError, match="'south' is not among the partitions"):
            north.model_copy(update={"partition_names": ["south"]}).invoke(QUESTION)
        with pytest.raises(ConfigurationError, match="'south' is not among the partitions"):
            north.within(partition_names=["south"])

    assert [len(documents) for documents in found] == [len(TEXTS) + 2, 2, 1, 1]


async def test_its_instruction_holds_unless_a_call_has_another(
    retriever: MilvusVLLMRetriever, numbers: Numbers, fake_vllm: FakeVLLM
) -> None:
    confined = retriever.within(instruction="find what the tenant owns")

    await numbers(confined, k=1)
    await numbers(confined, k=1, instruction="find anything")
    await numbers(retriever, k=1)

    assert [received.body.get("instruction") for received in fake_vllm.received] == [
        *("find what the tenant owns", "find anything", None)
    ]


@pytest.mark.parametrize(
    "nothing", [{}, {"filters": {}}, {"expr": ""}, {"expr": "  "}, {"partition_names": []}]
)
def test_with_nothing_to_narrow_by_it_is_refused(
    retriever: MilvusVLLMRetriever, nothing: dict[str, Any]
) -> None:
    with pytest.raises(ConfigurationError):
        retriever.within(**nothing)


async def test_making_and_using_many_makes_no_connection_and_no_look_at_the_collection(
    retriever: MilvusVLLMRetriever, numbers: Numbers, monkeypatch: pytest.MonkeyPatch
) -> None:
    retriever.invoke(QUESTION)
    calls = []
    for client, names in (
        (MilvusClient, ("__init__", "describe_collection", "search", "hybrid_search")),
        (AsyncMilvusClient, ("describe_collection",)),
    ):
        for name in names:
            method = getattr(client, name)

            def counted(
                self: Any, *args: Any, name: str = name, method: Any = method, **kwargs: Any
            ) -> Any:
                calls.append(name)
                return method(self, *args, **kwargs)

            monkeypatch.setattr(client, name, counted)

    confined = [retriever.within(filters={"number": i}) for i in range(50)]
    assert calls == []
    found = [await numbers(each) for each in confined[:6]]

    assert found == [[i] for i in range(6)]
    assert not {"__init__", "describe_collection"} & set(calls)


async def test_closing_it_closes_nothing(
    retriever: MilvusVLLMRetriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []
    for client in (MilvusClient, AsyncMilvusClient):
        close = client.close

        def counted(self: Any, close: Any = close) -> Any:
            closed.append(type(self))
            return close(self)

        monkeypatch.setattr(client, "close", counted)
    retriever.invoke(QUESTION)
    await retriever.ainvoke(QUESTION)

    with retriever.within(expr="pk > 0") as confined:
        confined.invoke(QUESTION)
        confined.close()
    async with retriever.within(expr="pk > 0") as confined:
        await confined.ainvoke(QUESTION)
        await confined.aclose()
    with confined.model_copy(update={"k": 2}) as copied:
        copied.invoke(QUESTION)
    assert closed == []

    await retriever.aclose()
    assert len(closed) == 2


def test_its_scope_is_in_no_repr_and_it_is_not_written_out(
    retriever: MilvusVLLMRetriever,
) -> None:
    confined = retriever.within(filters={"number": 4321})

    for shown in (repr(confined), str(confined)):
        assert "4321" not in shown
        assert "scope" not in shown
    for write in (confined.model_dump, confined.model_dump_json):
        with pytest.raises(ConfigurationError, match="call within\\(\\) again"):
            write()


def test_an_open_retrievers_scope_is_not_taken_over(retriever: MilvusVLLMRetriever) -> None:
    confined = retriever.within(filters={"number": 3})

    with pytest.raises(ConfigurationError, match="use within"):
        confined.model_copy(update={"scope": retriever.scope})
    with pytest.raises(ConfigurationError, match="unknown argument 'scope'"):
        confined.invoke("q", scope=retriever.scope)
