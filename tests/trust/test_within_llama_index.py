"""LlamaIndex: a retriever made by `within` finds one tenant's rows, whatever it is given."""

from __future__ import annotations

import copy
import pickle
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import QueryFusionRetriever, RouterRetriever
from llama_index.core.selectors import LLMSingleSelector
from llama_index.core.tools import RetrieverTool
from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
)
from pymilvus import DataType, MilvusClient, MilvusException

from milvus_vllm_retrievers import ConfigurationError, SearchError
from milvus_vllm_retrievers.llama_index import MilvusVLLMRetriever, VLLMRanker
from tests.fakes import FakeVLLM, LetterEmbeddings
from tests.llama_index.test_engines import Scripted
from tests.trust import hostile

NAME = "tenants_within_llama"
# Tenants whose names are expressions, patterns, or nearly "a".
OTHERS = ["b", "A", "a ", "", "%", "true", "1", 'a" or tenant != "b', "a' or 'a' == 'a", "a\\"]

Retrieve = Callable[..., Awaitable[list[str]]]


@pytest.fixture(scope="module", autouse=True)
def _rows(lite: MilvusClient) -> None:
    lite.drop_collection(NAME)
    schema = lite.create_schema(enable_dynamic_field=True)
    schema.add_field("pk", DataType.INT64, is_primary=True)
    schema.add_field("text", DataType.VARCHAR, max_length=1000)
    schema.add_field("tenant", DataType.VARCHAR, max_length=100)
    schema.add_field("dense", DataType.FLOAT_VECTOR, dim=LetterEmbeddings.dim)
    index = lite.prepare_index_params()
    index.add_index("dense", index_type="AUTOINDEX", metric_type="COSINE")
    lite.create_collection(NAME, schema=schema, index_params=index, consistency_level="Strong")
    vector = LetterEmbeddings().embed_query("a note")
    tenants = ["a", "a", *(tenant for tenant in OTHERS for _ in "12")]
    lite.insert(
        NAME,
        [
            {
                "pk": pk,
                "text": f"a note of {tenant}",
                "tenant": tenant,
                "dense": vector,
                "page": pk % 2,
            }
            for pk, tenant in enumerate(tenants)
        ],
    )


def where(key: str, value: Any, operator: FilterOperator = FilterOperator.EQ) -> MetadataFilters:
    test = MetadataFilter.model_construct(key=key, value=value, operator=operator)
    return MetadataFilters(filters=[test])


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def is_async(request: pytest.FixtureRequest) -> bool:
    """Whether a test asks in an event loop: each does in one run and not in the other."""
    return request.param


@pytest.fixture
def retrieve(is_async: bool) -> Retrieve:
    """Ask a retriever; the tenants of the rows come back."""

    async def ask(retriever: Any, query: str = "a note") -> list[str]:
        nodes = await retriever.aretrieve(query) if is_async else retriever.retrieve(query)
        return [node.metadata["tenant"] for node in nodes]

    return ask


@pytest.fixture
async def everyone(lite_uri: str) -> AsyncIterator[MilvusVLLMRetriever]:
    """The retriever of the application, over all tenants' rows."""
    async with MilvusVLLMRetriever(
        NAME,
        None,
        uri=lite_uri,
        embed_model=MockEmbedding(LetterEmbeddings.dim),
        similarity_top_k=100,
    ) as retriever:
        yield retriever


@pytest.fixture
def mine(everyone: MilvusVLLMRetriever) -> MilvusVLLMRetriever:
    """Tenant a's."""
    return everyone.within(filters=where("tenant", "a"))


def with_filters(retriever: MilvusVLLMRetriever, value: str) -> MilvusVLLMRetriever:
    retriever.filters = MetadataFilters(
        filters=[*where("page", value, FilterOperator.NE).filters, *where("tenant", value).filters],
        condition=FilterCondition.OR,
    )
    return retriever


def with_filters_key(retriever: MilvusVLLMRetriever, value: str) -> MilvusVLLMRetriever:
    retriever.filters = where(value, "b", FilterOperator.NE)
    return retriever


def with_expr(retriever: MilvusVLLMRetriever, value: str) -> MilvusVLLMRetriever:
    retriever.expr = value
    return retriever


def with_template(retriever: MilvusVLLMRetriever, value: str) -> MilvusVLLMRetriever:
    retriever.expr, retriever.expr_params = "page >= {x}", {"x": 0, value: "b"}
    return retriever


WAYS: list[Callable[[MilvusVLLMRetriever, str], MilvusVLLMRetriever]] = [
    with_filters,
    with_filters_key,
    with_expr,
    with_template,
    lambda retriever, value: retriever.within(expr=value),
    lambda retriever, value: retriever.within(filters=where("tenant", value)),
    lambda retriever, value: retriever.within(filters=where(value, "b", FilterOperator.NE)),
    lambda retriever, value: retriever.within(partition_names=[value]),
]
WAY_IDS = [
    *("filters", "a filter's key", "expr", "a template's name"),
    *("within expr", "within filters", "within a filter's key", "within partitions"),
]


@pytest.mark.parametrize("way", WAYS, ids=WAY_IDS)
async def test_no_hostile_value_shows_a_row_of_another_tenant(
    everyone: MilvusVLLMRetriever, retrieve: Retrieve, way: Any
) -> None:
    answered = 0

    for string in hostile.STRINGS:
        try:
            shown = await retrieve(way(everyone.within(filters=where("tenant", "a")), string))
        except ConfigurationError:
            continue
        except SearchError as error:
            assert error.reason is None  # noqa: PT017 - it came to be read, and was refused
            assert isinstance(error.__cause__, MilvusException)  # noqa: PT017
            continue
        answered += 1
        assert set(shown) <= {"a"}, string[:200]

    assert len(hostile.STRINGS) >= 200
    assert answered or way in (with_template, WAYS[-1])


@pytest.mark.parametrize("tenant", ["a", *OTHERS, *hostile.STRINGS[::8]])
async def test_the_tenants_name_is_taken_as_it_is(
    everyone: MilvusVLLMRetriever, retrieve: Retrieve, tenant: str
) -> None:
    try:
        shown = await retrieve(everyone.within(filters=where("tenant", tenant)))
    except ConfigurationError:
        shown = []

    stored = ["a", *OTHERS]
    assert shown == ([tenant] * 2 if tenant in stored else [])


async def test_the_open_retriever_goes_on_finding_everything(
    everyone: MilvusVLLMRetriever, mine: MilvusVLLMRetriever, retrieve: Retrieve
) -> None:
    assert await retrieve(mine) == ["a", "a"]
    assert set(await retrieve(everyone)) == {"a", *OTHERS}


# --- what it is confined to stays as it was


async def test_what_the_open_retriever_filters_by_stays_with_those_made_from_it(
    everyone: MilvusVLLMRetriever, retrieve: Retrieve
) -> None:
    everyone.filters = where("tenant", "a")
    everyone.expr = "page == 0"
    narrowed = everyone.within(expr="pk >= 0")

    everyone.filters.filters[0].value = "b"
    assert await retrieve(everyone) == ["b"]  # those of the open one can be edited in place
    everyone.filters = everyone.expr = None

    assert await retrieve(narrowed) == ["a"]


async def test_changing_the_filters_that_were_given_changes_nothing(
    everyone: MilvusVLLMRetriever, retrieve: Retrieve
) -> None:
    names, partitions = ["a"], ["_default"]
    filters = where("tenant", names, FilterOperator.IN)
    narrowed = everyone.within(filters=filters, partition_names=partitions)

    names.append("b")
    filters.filters[0].value = ["b"]
    filters.filters.clear()
    partitions.append("other")

    assert await retrieve(narrowed) == ["a", "a"]


async def test_setting_its_own_filters_to_nothing_or_to_others_widens_nothing(
    mine: MilvusVLLMRetriever, retrieve: Retrieve
) -> None:
    assert (mine.filters, mine.expr, mine.expr_params) == (None, None, None)
    mine.filters = mine.expr = mine.expr_params = None
    everything = await retrieve(mine)
    mine.filters = where("tenant", "b")
    nothing = await retrieve(mine)

    assert (everything, nothing) == (["a", "a"], [])


@pytest.mark.parametrize("name", ["partition_names", "collection_name", "scope", "client", "uri"])
def test_what_it_is_over_cannot_be_set(mine: MilvusVLLMRetriever, name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} cannot be set"):
        setattr(mine, name, ["_default"])


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_it_is_neither_copied_nor_pickled(mine: MilvusVLLMRetriever, copied: Any) -> None:
    with pytest.raises(TypeError, match="neither pickled nor copied"):
        copied(mine)


async def test_one_within_another_narrows_further(
    mine: MilvusVLLMRetriever, retrieve: Retrieve
) -> None:
    half = mine.within(expr="page == 0")
    other = half.within(filters=where("tenant", "b"))

    assert (await retrieve(half), await retrieve(other)) == (["a"], [])


def test_partitions_beyond_those_it_is_confined_to_are_refused(mine: MilvusVLLMRetriever) -> None:
    narrowed = mine.within(partition_names=["_default"])

    with pytest.raises(ConfigurationError, match="confined to"):
        narrowed.within(partition_names=["_default", "b"])


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"filters": None, "expr": None},
        {"filters": MetadataFilters(filters=[])},
        {"filters": MetadataFilters(filters=[MetadataFilters(filters=[])])},
        {"filters": MetadataFilters(filters=[]), "expr": "pk > 0"},
        {"filters": {"tenant": "a"}},
        {"expr": " "},
        {"expr": "a == 'b"},
        {"partition_names": []},
    ],
)
def test_nothing_to_narrow_by_is_refused(
    everyone: MilvusVLLMRetriever, arguments: dict[str, Any]
) -> None:
    with pytest.raises(ConfigurationError):
        everyone.within(**arguments)


async def test_its_instruction_is_what_the_model_is_told(
    lite_uri: str, fake_vllm: FakeVLLM, retrieve: Retrieve
) -> None:
    ranker = VLLMRanker(fake_vllm.url, instruction="old")
    model = MockEmbedding(LetterEmbeddings.dim)
    async with MilvusVLLMRetriever(NAME, ranker, uri=lite_uri, embed_model=model) as everyone:
        await retrieve(everyone.within(instruction="find the newest"))

    assert "find the newest" in str(fake_vllm.received[0].body)


# --- connections


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What clients of Milvus are made and asked, those of blocking calls."""
    heard: list[str] = []

    def note(method: str) -> None:
        original = getattr(MilvusClient, method)

        def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
            heard.append(method)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(MilvusClient, method, noted)

    for method in ("__init__", "close", "describe_collection", "search"):
        note(method)
    return heard


@pytest.mark.parametrize("is_async", [False], ids=["sync"])
async def test_it_shares_connection_and_layout_and_closing_it_closes_nothing(
    everyone: MilvusVLLMRetriever, retrieve: Retrieve, calls: list[str]
) -> None:
    await retrieve(everyone)
    calls.clear()

    with everyone.within(filters=where("tenant", "a")) as narrowed:
        assert calls == []  # making one asks Milvus nothing
        await retrieve(narrowed)
    async with narrowed:
        await retrieve(narrowed)
    narrowed.close()
    await narrowed.aclose()
    await retrieve(everyone)

    assert calls == ["search"] * 3


def test_making_one_needs_no_server() -> None:
    nowhere = MilvusVLLMRetriever(NAME, None, uri="http://127.0.0.1:1")

    assert nowhere.within(filters=where("tenant", "a")).similarity_top_k == 2


# --- inside LlamaIndex's own


def engine(mine: MilvusVLLMRetriever) -> Any:
    return RetrieverQueryEngine.from_args(mine, llm=MockLLM())


def router(mine: MilvusVLLMRetriever) -> Any:
    choice = Scripted(text='[{"choice": 1, "reason": "the only one"}]')
    tools = [RetrieverTool.from_defaults(mine, description="notes")]
    return RouterRetriever(LLMSingleSelector.from_defaults(choice), tools, llm=choice)


def fusion(mine: MilvusVLLMRetriever) -> Any:
    return QueryFusionRetriever([mine], llm=MockLLM(), num_queries=1, similarity_top_k=100)


@pytest.mark.parametrize("made_of", [engine, router, fusion])
async def test_what_llama_index_makes_of_it_is_confined_too(
    mine: MilvusVLLMRetriever, retrieve: Retrieve, made_of: Any
) -> None:
    for question in ["a note", 'tenant != "a"', "{'filters': None}"]:
        assert await retrieve(made_of(mine), question) == ["a", "a"]


async def test_no_argument_of_a_tool_widens(mine: MilvusVLLMRetriever, *, is_async: bool) -> None:
    tool = RetrieverTool.from_defaults(mine)
    for arguments in (
        {"input": "a note"},
        {"input": "a note", "expr": "pk >= 0", "filters": None, "similarity_top_k": 100},
        {"input": "a note", "filters": {"tenant": "b"}, "partition_names": ["b"]},
    ):
        output = await tool.acall(**arguments) if is_async else tool.call(**arguments)
        assert [node.metadata["tenant"] for node in output.raw_output] == ["a", "a"]


async def test_several_queries_at_once_are_confined_too(
    mine: MilvusVLLMRetriever, *, is_async: bool
) -> None:
    queries = ["a note", "another"]

    found = await mine.aretrieve_many(queries) if is_async else mine.retrieve_many(queries)

    assert [[n.metadata["tenant"] for n in nodes] for nodes in found] == [["a", "a"]] * 2
