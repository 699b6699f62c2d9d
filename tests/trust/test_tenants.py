"""One tenant's filter holds, whatever stands in the filter, the value, the key or the question.

The retrievers here are tenant a's by their constructors. Whatever else they are given, there is an
error of this package, or an answer of tenant a's rows alone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain_core.tools import StructuredTool, create_retriever_tool
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.tools import RetrieverTool
from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
)
from milvus_lite.search.filter.exceptions import FilterParseError
from milvus_lite.search.filter.tokens import tokenize
from pymilvus import AsyncMilvusClient, DataType, MilvusClient, MilvusException

from milvus_vllm_retrievers import ConfigurationError, SearchError, VLLMRanker, langchain
from milvus_vllm_retrievers import llama_index as li
from milvus_vllm_retrievers._core.expressions import all_of, checked_expr, literal
from milvus_vllm_retrievers._core.query import SearchOptions
from tests.fakes import FakeVLLM, LetterEmbeddings
from tests.trust import hostile

ROWS, LABELS, PARTS = "tenants", "tenant_labels", "tenant_parts"
# Tenants whose names are expressions, patterns, templates, or nearly "a".
OTHERS = [
    *("b", "A", "aa", "a ", " a", "\u0430", "\u00e1", "", "%", "_", "*", "null", "true", "1", "0"),
    *('a" or tenant == "b', "a' or 'a' == 'a", "a\\", "{tenant}", "${tenant}", "a\nb", "a) or (b"),
]
OWN = 'tenant == "a"'
REFUSED_HERE, REFUSED_THERE = "refused here", "refused by Milvus"

Found = list[dict[str, Any]]
"""The metadata of what a retriever returned."""
Retrieve = Callable[..., Awaitable[Found]]

few_examples = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
many_examples = settings(few_examples, max_examples=500)

texts = st.text(max_size=40) | st.sampled_from(hostile.STRINGS)
expressions = st.lists(st.sampled_from(hostile.TOKENS), min_size=1, max_size=12).map(" ".join)


@dataclass(frozen=True)
class Server:
    """A Milvus that holds the tenants' rows."""

    uri: str
    client: MilvusClient

    @property
    def strings(self) -> list[str]:
        """The hostile strings to try: the stand-in reads filters as Lite does, so fewer there."""
        return hostile.STRINGS if self.uri.endswith(".db") else hostile.STRINGS[::4]


@pytest.fixture(scope="session")
def on_lite(lite_uri: str, lite: MilvusClient) -> Server:
    """Milvus Lite with the tenants' collections."""
    return filled(lite_uri, lite)


@pytest.fixture(scope="session")
def on_milvus26(milvus26_uri: str, milvus26: MilvusClient) -> Server:
    """The stand-in for Milvus 2.6 with the tenants' collections."""
    return filled(milvus26_uri, milvus26)


@pytest.fixture(params=["lite", "milvus26"])
def server(request: pytest.FixtureRequest) -> Server:
    """Either of the two."""
    return request.getfixturevalue(f"on_{request.param}")


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def is_async(request: pytest.FixtureRequest) -> bool:
    """Whether a test asks in an event loop: each does in one run and not in the other."""
    return request.param


@pytest.fixture
def strings(server: Server, is_async: bool) -> list[str]:
    """A half of the hostile strings for the blocking run of a test, the other for the async one."""
    return server.strings[is_async::2]


@pytest.fixture
def retrieve(is_async: bool) -> Retrieve:
    """Ask a retriever of either framework."""

    async def ask(retriever: Any, query: str = "a note", **per_call: Any) -> Found:
        if isinstance(retriever, langchain.MilvusVLLMRetriever):
            if is_async:
                return [d.metadata for d in await retriever.ainvoke(query, **per_call)]
            return [d.metadata for d in retriever.invoke(query, **per_call)]
        nodes = await retriever.aretrieve(query) if is_async else retriever.retrieve(query)
        return [node.metadata for node in nodes]

    return ask


@pytest.fixture
async def llama(server: Server) -> AsyncIterator[Callable[..., li.MilvusVLLMRetriever]]:
    """Make LlamaIndex retrievers that share their clients, since each filter needs a retriever."""
    async_client = AsyncMilvusClient(server.uri)

    def make(collection: str = ROWS, **arguments: Any) -> li.MilvusVLLMRetriever:
        given = {"similarity_top_k": 100, "embed_model": MockEmbedding(LetterEmbeddings.dim)}
        clients = {"client": server.client, "async_client": async_client}
        return li.MilvusVLLMRetriever(collection, None, **{**given, **clients, **arguments})

    yield make
    await async_client.close()


@pytest.fixture
async def mine(server: Server) -> AsyncIterator[langchain.MilvusVLLMRetriever]:
    """LangChain's retriever of tenant a."""
    async with lang(server.uri) as retriever:
        yield retriever


def lang(uri: str, collection: str = ROWS, **arguments: Any) -> langchain.MilvusVLLMRetriever:
    given = {"uri": uri, "expr": OWN, "k": 100, "embedding": LetterEmbeddings(), "ranker": None}
    return langchain.MilvusVLLMRetriever(collection_name=collection, **{**given, **arguments})


def filled(uri: str, client: MilvusClient) -> Server:
    """Make the collections: a few rows of every tenant; hostile strings as labels; partitions."""
    rows = [("a", category) for category in "xxyz"] + [
        (other, "x") for other in OTHERS for _ in "12"
    ]
    create(client, ROWS, rows)
    labels = [label for label in hostile.STRINGS if can_be_stored(label)]
    create(client, LABELS, [(tenant, label) for label in labels for tenant in "ab"])
    create(client, PARTS, [])
    for number, partition in enumerate(["a", "b", "a-1_$x"]):
        client.create_partition(PARTS, partition)
        client.insert(PARTS, [row(number, partition, "x")], partition_name=partition)
    return Server(uri, client)


def create(client: MilvusClient, name: str, rows: Iterable[tuple[str, str]]) -> None:
    client.drop_collection(name)
    schema = client.create_schema(enable_dynamic_field=True)
    schema.add_field("pk", DataType.INT64, is_primary=True)
    schema.add_field("text", DataType.VARCHAR, max_length=1000)
    schema.add_field("tenant", DataType.VARCHAR, max_length=100)
    schema.add_field("dense", DataType.FLOAT_VECTOR, dim=LetterEmbeddings.dim)
    index = client.prepare_index_params()
    index.add_index("dense", index_type="AUTOINDEX", metric_type="COSINE")
    client.create_collection(name, schema=schema, index_params=index, consistency_level="Strong")
    numbered = [row(pk, tenant, category) for pk, (tenant, category) in enumerate(rows)]
    if numbered:
        client.insert(name, numbered)


def row(pk: int, tenant: str, category: str) -> dict[str, Any]:
    """A row; its tenant stands in a field of the schema and in a dynamic one."""
    text = f"a note of tenant {tenant}"
    vector = LetterEmbeddings().embed_query(text)
    labels = {"owner": tenant, "category": category}
    return {"pk": pk, "text": text, "tenant": tenant, "dense": vector, **labels}


def can_be_stored(text: str) -> bool:
    return len(text) <= 1000 and text.isprintable()


def tenants_of(found: Found) -> set[str]:
    return {metadata["tenant"] for metadata in found}


async def outcome(call: Awaitable[Found]) -> str | frozenset[str]:
    """Return whose rows came, or who refused; a refusal of Milvus's is one of the request."""
    try:
        return frozenset(tenants_of(await call))
    except ConfigurationError:
        return REFUSED_HERE
    except SearchError as error:
        if error.reason is not None or not isinstance(error.__cause__, MilvusException):
            raise  # it did not come to be read
        return REFUSED_THERE


async def outcomes(
    make_call: Callable[[str], Awaitable[Found]], strings: Iterable[str]
) -> Counter[str | frozenset[str]]:
    """Try strings one after another; what shows a row of another tenant is named at once."""
    counts: Counter[str | frozenset[str]] = Counter()
    for string in strings:
        came = await outcome(make_call(string))
        assert isinstance(came, str) or came <= {"a"}, f"{string[:200]!r} shows rows of {set(came)}"
        counts[came] += 1
    return counts


def is_sensible(counts: Counter[str | frozenset[str]]) -> bool:
    """Tell whether all four outcomes came, none of them rarely."""
    shares = {came: count / counts.total() for came, count in counts.items()}
    came = (REFUSED_HERE, REFUSED_THERE, frozenset("a"), frozenset())
    return set(shares) == set(came) and min(shares.values()) > 0.03


# The strings


def test_there_are_enough_hostile_strings_and_no_two_are_the_same() -> None:
    assert len(hostile.STRINGS) >= 200
    assert len(set(hostile.STRINGS)) == len(hostile.STRINGS)


async def test_without_the_tenants_filter_the_hostile_strings_would_show_rows(
    server: Server, retrieve: Retrieve
) -> None:
    unguarded = lang(server.uri, expr=None)
    shown = set()
    async with unguarded:
        for string in hostile.PRECEDENCE + hostile.WORDS:
            came = await outcome(retrieve(unguarded, expr=string))
            shown |= came if isinstance(came, frozenset) else set()

    assert shown == {"a", *OTHERS}


# LangChain: a filter per call


async def test_a_hostile_filter_of_a_call_shows_no_row_of_another_tenant(
    server: Server, mine: langchain.MilvusVLLMRetriever, retrieve: Retrieve
) -> None:
    counts = await outcomes(lambda string: retrieve(mine, expr=string), server.strings)

    # Most are no expressions at all; those that are sound narrow what tenant a sees.
    assert is_sensible(counts)


async def test_a_sound_filter_of_a_call_narrows(
    mine: langchain.MilvusVLLMRetriever, retrieve: Retrieve
) -> None:
    everything = await retrieve(mine)
    some = await retrieve(mine, expr='category == "x"')
    joined = await retrieve(mine, expr='category == "y" or category == "z"')
    none = await retrieve(mine, expr='tenant == "b"')

    assert [m["tenant"] for m in everything] == ["a"] * 4
    assert [m["category"] for m in some] == ["x", "x"]
    assert sorted(m["category"] for m in joined) == ["y", "z"]
    assert none == []


async def test_hostile_filters_show_nothing_in_a_batch_either(
    mine: langchain.MilvusVLLMRetriever, *, is_async: bool
) -> None:
    async def batch(expr: str) -> Found:
        queries = ["a note", "another"]
        if is_async:
            found = await mine.abatch(queries, expr=expr)
        else:
            found = mine.batch(queries, expr=expr)
        return [document.metadata for documents in found for document in documents]

    await outcomes(batch, hostile.PRECEDENCE[::2] + hostile.LEAVING_THE_PARENTHESES[::4])


@pytest.mark.parametrize("mode", ["auto", "client"])
async def test_the_rerank_model_sees_no_text_of_another_tenant(
    server: Server, retrieve: Retrieve, fake_vllm: FakeVLLM, mode: Any
) -> None:
    ranker = VLLMRanker(fake_vllm.url, mode=mode, on_error="skip")
    async with lang(server.uri, ranker=ranker) as reranked:
        await outcomes(lambda string: retrieve(reranked, expr=string), hostile.PRECEDENCE[::2])

    sent = {text for received in fake_vllm.received for text in received.body["documents"]}
    assert sent == {"a note of tenant a"}


@few_examples
@given(expr=expressions)
async def test_no_expression_anyone_can_write_shows_a_row_of_another_tenant(
    on_lite: Server, retrieve: Retrieve, expr: str
) -> None:
    async with lang(on_lite.uri) as mine:
        await outcomes(lambda string: retrieve(mine, expr=string), [expr])


@many_examples
@given(expr=expressions | texts)
def test_an_accepted_filter_is_read_in_its_parentheses_as_it_is_read_alone(expr: str) -> None:
    try:
        checked_expr(expr)
        alone = [token.text for token in tokenize(expr)][:-1]
        joined = all_of(OWN, expr if expr.strip() else None)
    except (ConfigurationError, FilterParseError):
        return

    inner = ["and", "(", *alone, ")"] if alone else []
    outer = ["(", "tenant", "==", '"a"', ")"] if alone else ["tenant", "==", '"a"']
    assert [token.text for token in tokenize(str(joined))][:-1] == [*outer, *inner]


def test_what_a_call_asks_stands_right_of_the_constructors_filter() -> None:
    # On Milvus, some conditions take over the one to their left.
    options = SearchOptions(expr=OWN).narrowed(expr="pk > 1")

    assert options.expr == '(tenant == "a") and (pk > 1)'


@pytest.mark.parametrize("expr", ["random_sample(0.5)", "pk > 1 and Element_Filter (tags, $ > 0)"])
async def test_a_call_cannot_add_what_takes_over_other_conditions_of_a_filter(
    server: Server, mine: langchain.MilvusVLLMRetriever, retrieve: Retrieve, expr: str
) -> None:
    with pytest.raises(ConfigurationError, match="write all of it into one"):
        await retrieve(mine, expr=expr)


# LangChain: what a language model puts into a tool's arguments


async def called(tool: Any, arguments: dict[str, Any], *, is_async: bool) -> Found:
    """Call a tool as an agent does and return the metadata of its artifact."""
    call = {"type": "tool_call", "id": "1", "name": tool.name, "args": arguments}
    message = await tool.ainvoke(call) if is_async else tool.invoke(call)
    return [document.metadata for document in message.artifact]


@pytest.fixture
def tool(mine: langchain.MilvusVLLMRetriever) -> Any:
    """The retriever as a tool."""
    form = "content_and_artifact"
    return create_retriever_tool(mine, "search", "Search the notes.", response_format=form)


async def test_a_hostile_question_to_a_tool_finds_what_any_question_finds(
    strings: list[str], tool: Any, *, is_async: bool
) -> None:
    async def ask(string: str) -> Found:
        return await called(tool, {"query": string}, is_async=is_async)

    counts = await outcomes(ask, strings)

    # A question is no filter: none is refused, and none narrows.
    assert counts == {frozenset("a"): len(strings)}


@pytest.mark.parametrize(
    "more",
    [
        {"expr": 'tenant == "b"'},
        {"filter": 'tenant == "b"'},
        {"filters": {"tenant": "b"}},
        {"partition_names": ["b"]},
        {"k": 100, "collection_name": "others"},
        {"expr_params": {"tenant": "b"}},
        {"config": {"configurable": {"expr": "pk >= 0"}}},
    ],
    ids=" and ".join,
)
async def test_an_argument_that_a_tool_does_not_have_changes_nothing(
    tool: Any, more: dict[str, Any], *, is_async: bool
) -> None:
    found = await called(tool, {"query": "a note", **more}, is_async=is_async)

    assert [metadata["tenant"] for metadata in found] == ["a"] * 4


@few_examples
@given(question=texts)
async def test_no_question_anyone_can_ask_shows_a_row_of_another_tenant(
    on_lite: Server, retrieve: Retrieve, question: str
) -> None:
    async with lang(on_lite.uri) as mine:
        came = await outcome(retrieve(mine, question))

    assert came == (frozenset("a") if question.strip() else REFUSED_HERE)


async def test_a_value_that_a_language_model_chose_is_bound_as_a_value(
    server: Server, strings: list[str], *, is_async: bool
) -> None:
    async with lang(server.uri, LABELS) as mine:

        def search(query: str, category: str) -> tuple[str, Any]:
            found = mine.invoke(query, expr=f"category == {literal(category)}")
            return "found", found

        async def asearch(query: str, category: str) -> tuple[str, Any]:
            found = await mine.ainvoke(query, expr=f"category == {literal(category)}")
            return "found", found

        form = "content_and_artifact"
        by_category = StructuredTool.from_function(
            search, asearch, "search", "Search a category.", response_format=form
        )
        found = {
            string: await called(
                by_category, {"query": "a note", "category": string}, is_async=is_async
            )
            for string in filter(can_be_stored, strings)
        }

    # Just the one row of tenant a that has the string as its category: not tenant b's with the
    # same, and not what the string would say as an expression.
    assert {string: named(came) for string, came in found.items()} == {
        string: [("a", string)] for string in found
    }
    assert len(found) >= len(strings) / 2


def named(found: Found) -> list[tuple[str, str]]:
    return [(metadata["tenant"], metadata["category"]) for metadata in found]


# LlamaIndex: filters and expressions of the constructor


def where(
    *tests: MetadataFilter | MetadataFilters, condition: FilterCondition = FilterCondition.AND
) -> MetadataFilters:
    return MetadataFilters(filters=list(tests), condition=condition)


OWNED = MetadataFilter(key="owner", value="a")


async def test_a_hostile_expression_beside_metadata_filters_shows_no_row_of_another_tenant(
    strings: list[str], llama: Callable[..., Any], retrieve: Retrieve
) -> None:
    async def ask(string: str) -> Found:
        return await retrieve(llama(filters=where(OWNED), expr=string))

    assert is_sensible(await outcomes(ask, strings))


async def test_a_hostile_value_of_a_metadata_filter_is_a_value(
    strings: list[str], llama: Callable[..., Any], retrieve: Retrieve
) -> None:
    found = {}
    for string in filter(can_be_stored, strings):
        filters = where(OWNED, MetadataFilter(key="category", value=string))
        found[string] = named(await retrieve(llama(LABELS, filters=filters)))

    assert found == {string: [("a", string)] for string in found}


@pytest.mark.parametrize(
    "operator",
    [
        FilterOperator.NE,
        FilterOperator.TEXT_MATCH,
        FilterOperator.NIN,
        FilterOperator.ANY,
    ],
)
async def test_a_hostile_value_under_any_operator_shows_no_row_of_another_tenant(
    llama: Callable[..., Any], retrieve: Retrieve, operator: FilterOperator
) -> None:
    async def ask(string: str) -> Found:
        takes_list = operator in {FilterOperator.NIN, FilterOperator.ANY}
        value = [string, "x"] if takes_list else string
        test = MetadataFilter(key="category", value=value, operator=operator)
        return await retrieve(llama(expr=OWN, filters=where(test)))

    await outcomes(ask, hostile.QUOTES[::2] + hostile.LEAVING_THE_PARENTHESES[::4])


async def test_a_hostile_key_of_a_metadata_filter_shows_no_row_of_another_tenant(
    strings: list[str], llama: Callable[..., Any], retrieve: Retrieve
) -> None:
    async def ask(string: str) -> Found:
        test = MetadataFilter(key=string, value="b", operator=FilterOperator.NE)
        return await retrieve(llama(expr=OWN, filters=where(test)))

    counts = await outcomes(ask, strings)

    # No row has such a key, so all of tenant a's match: the key is a name and nothing else.
    assert counts[frozenset("a")] >= len(strings) / 2
    assert counts[REFUSED_HERE] >= 2


async def test_a_hostile_key_in_the_group_of_the_tenants_own_filter_is_a_key(
    strings: list[str], llama: Callable[..., Any], retrieve: Retrieve
) -> None:
    async def ask(string: str) -> Found:
        return await retrieve(llama(filters=where(OWNED, MetadataFilter(key=string, value="b"))))

    counts = await outcomes(ask, [*hostile.PATHS, *hostile.QUOTES, *strings[::8]])

    # A key that is nobody's finds nothing, and none finds a row of tenant a.
    assert set(counts) <= {frozenset(), REFUSED_HERE, REFUSED_THERE}
    assert counts[frozenset()] >= len(hostile.PATHS)


@pytest.mark.parametrize(
    "asked",
    [
        where(MetadataFilter(key="owner", value="b")),
        where(MetadataFilter(key="owner", value="b"), OWNED, condition=FilterCondition.OR),
        where(OWNED, condition=FilterCondition.NOT),
        where(where(OWNED, condition=FilterCondition.NOT), OWNED, condition=FilterCondition.OR),
        where(MetadataFilter(key="owner", value="a", operator=FilterOperator.NE)),
        where(MetadataFilter(key="owner", value=["a", "b"], operator=FilterOperator.IN)),
        where(MetadataFilter(key="nothing", value=["a"], operator=FilterOperator.NIN)),
        where(MetadataFilter(key="nothing", value=None, operator=FilterOperator.IS_EMPTY)),
    ],
    ids=str,
)
async def test_no_condition_among_metadata_filters_widens_an_expression(
    llama: Callable[..., Any], retrieve: Retrieve, asked: MetadataFilters
) -> None:
    assert tenants_of(await retrieve(llama(expr=OWN, filters=asked))) <= {"a"}


@pytest.mark.parametrize(
    "asked",
    [
        where(),
        where(condition=FilterCondition.OR),
        where(OWNED, where(condition=FilterCondition.NOT)),
        where(MetadataFilter(key="nothing", value=[], operator=FilterOperator.NIN)),
        where(MetadataFilter(key="owner", value=None, operator=FilterOperator.NE)),
        where(MetadataFilter.model_construct(key="owner", value=float("nan"))),
    ],
    ids=str,
)
async def test_metadata_filters_that_would_match_everything_are_refused(
    llama: Callable[..., Any], retrieve: Retrieve, asked: MetadataFilters
) -> None:
    with pytest.raises(ConfigurationError):
        await retrieve(llama(filters=asked))


async def test_sound_metadata_filters_narrow(llama: Callable[..., Any], retrieve: Retrieve) -> None:
    category = MetadataFilter(key="category", value="x")

    everything = await retrieve(llama(filters=where(OWNED)))
    some = await retrieve(llama(filters=where(OWNED), expr='category == "x"'))
    beside = await retrieve(llama(expr=OWN, filters=where(category)))

    assert [m["tenant"] for m in everything] == ["a"] * 4
    assert [m["category"] for m in some] == [m["category"] for m in beside] == ["x", "x"]


async def test_a_hostile_question_to_a_tool_of_llama_index_finds_what_any_question_finds(
    strings: list[str], llama: Callable[..., Any], *, is_async: bool
) -> None:
    by_tool = RetrieverTool.from_defaults(llama(filters=where(OWNED)), name="search")

    async def ask(string: str) -> Found:
        output = await by_tool.acall(string) if is_async else by_tool.call(string)
        return [node.metadata for node in output.raw_output]

    counts = await outcomes(ask, strings)

    assert counts == {frozenset("a"): len(strings)}


@few_examples
@given(key=texts, value=texts | st.lists(texts, max_size=3) | st.integers() | st.floats())
async def test_no_metadata_filter_anyone_can_write_shows_a_row_of_another_tenant(
    on_lite: Server, retrieve: Retrieve, key: str, value: Any
) -> None:
    takes_list = isinstance(value, list)
    operator = FilterOperator.NIN if takes_list else FilterOperator.NE
    test = MetadataFilter.model_construct(key=key, value=value, operator=operator)

    async def ask(_: str) -> Found:
        embed_model = MockEmbedding(LetterEmbeddings.dim)
        arguments = {"expr": OWN, "filters": where(test), "similarity_top_k": 100}
        async with li.MilvusVLLMRetriever(
            ROWS, None, uri=on_lite.uri, embed_model=embed_model, **arguments
        ) as mine:
            return await retrieve(mine)

    await outcomes(ask, [json.dumps([key, repr(value)])])


# Templates


@pytest.mark.parametrize("name", ["tenant", "x", *hostile.TEMPLATES, *hostile.QUOTES])
def test_a_call_cannot_bind_a_template_of_the_constructor_anew(name: str) -> None:
    options = SearchOptions(expr="tenant == {tenant}", expr_params={"tenant": "a", name: "a"})

    with pytest.raises(ConfigurationError, match="are bound by the retriever already"):
        options.narrowed(expr="pk > {y}", expr_params={"y": 1, name: "b"})


async def test_hostile_names_of_templates_show_no_row_of_another_tenant(
    server: Server, mine: langchain.MilvusVLLMRetriever, retrieve: Retrieve
) -> None:
    async def ask(string: str) -> Found:
        return await retrieve(mine, expr="pk >= {x}", expr_params={"x": 0, string: "b"})

    counts = await outcomes(ask, hostile.TEMPLATES + hostile.QUOTES + hostile.CONTROL_CHARACTERS)

    # Neither Milvus Lite nor the stand-in, which is made of it, knows templates.
    assert set(counts) <= {REFUSED_HERE, REFUSED_THERE}


# Partitions


@pytest.mark.parametrize("names", [[], (), "a", "", 5, ["a", ""], ["a", 5], [None], ["a", ["b"]]])
def test_what_is_no_list_of_names_is_refused_as_partitions(names: Any) -> None:
    for make in (
        lambda: langchain.MilvusVLLMRetriever(collection_name=PARTS, partition_names=names),
        lambda: li.MilvusVLLMRetriever(PARTS, None, partition_names=names),
        lambda: langchain.MilvusVLLMRerank(
            PARTS, ranker=VLLMRanker("http://vllm"), partition_names=names
        ),
        lambda: li.MilvusVLLMRerank(PARTS, ranker=VLLMRanker("http://vllm"), partition_names=names),
    ):
        with pytest.raises(ConfigurationError, match="partition_names"):
            make()


async def test_a_hostile_name_of_a_partition_shows_no_row_of_another(
    server: Server, retrieve: Retrieve
) -> None:
    async def ask(string: str) -> Found:
        async with lang(server.uri, PARTS, expr=None, partition_names=[string]) as mine:
            return await retrieve(mine)

    counts = await outcomes(ask, [string for string in hostile.STRINGS if string != "b"])

    # One is the name of tenant a's partition; few others can be names at all.
    assert counts[frozenset("a")] == 1
    assert counts[REFUSED_HERE] >= 350


@pytest.mark.parametrize("names", [["a"], ["a", "a-1_$x"], ("b",), ["_default"]])
async def test_a_partition_that_is_there_is_searched_and_no_other(
    server: Server, retrieve: Retrieve, names: list[str]
) -> None:
    async with lang(server.uri, PARTS, expr=None, partition_names=names) as mine:
        found = await retrieve(mine)

    assert tenants_of(found) == set(names) - {"_default"}


async def test_a_call_cannot_choose_other_partitions(server: Server, *, is_async: bool) -> None:
    async with lang(server.uri, PARTS, expr=None, partition_names=["a"]) as mine:
        ask = mine.ainvoke if is_async else mine.invoke
        with pytest.raises(ConfigurationError, match="partition_names"):
            await ask("a note", partition_names=["b"])
