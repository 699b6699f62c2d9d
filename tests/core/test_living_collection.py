"""A collection that changes while it is searched: an alias that is swapped, fields that come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest
from pymilvus import DataType, MilvusClient

from milvus_vllm_retrievers import SearchError
from milvus_vllm_retrievers._core.adapter import LOOK_AGAIN_AFTER, MilvusVLLMAdapter
from milvus_vllm_retrievers._core.hits import Hit
from milvus_vllm_retrievers._core.milvus import ConnectionSettings, MilvusConnection
from milvus_vllm_retrievers._core.query import Encoders, Query, SearchOptions
from milvus_vllm_retrievers._core.target import TargetSettings
from tests.core.conftest import LETTERS, Call, Described, Make, questions
from tests.corpus import TEXTS
from tests.fakes import Clock, LetterEmbeddings

ALIAS = "living_docs"
QUERY = Query("whales")
OPTIONS = SearchOptions(k=10)


def make_version(client: MilvusClient, number: int) -> None:
    """Make a version of the collection: the second has one more dense and one more scalar field."""
    schema = client.create_schema()
    schema.add_field("pk", DataType.INT64, is_primary=True)
    schema.add_field("text", DataType.VARCHAR, max_length=1000)
    indexes = client.prepare_index_params()
    dense = ["dense", "dense_2"][:number]
    for name in dense:
        schema.add_field(name, DataType.FLOAT_VECTOR, dim=LetterEmbeddings.dim)
        indexes.add_index(name, index_type="AUTOINDEX", metric_type="COSINE")
    if number > 1:
        schema.add_field("language", DataType.VARCHAR, max_length=10)
    name = f"{ALIAS}_v{number}"
    client.drop_collection(name)
    client.create_collection(name, schema=schema, index_params=indexes)
    rows = [
        {
            "pk": 100 * number + i,
            "text": text,
            **dict.fromkeys(dense, LetterEmbeddings().embed_query(text)),
            **({"language": "en"} if number > 1 else {}),
        }
        for i, text in enumerate(TEXTS[: 4 * number])
    ]
    client.insert(name, rows)


Swap = Callable[[], None]


@pytest.fixture(scope="module", params=["lite", "milvus26"])
def server(request: pytest.FixtureRequest) -> tuple[str, MilvusClient]:
    """A server that has both versions."""
    client = request.getfixturevalue(request.param)
    for number in (1, 2):
        make_version(client, number)
    return request.getfixturevalue(f"{request.param}_uri"), client


@pytest.fixture
def uri(server: tuple[str, MilvusClient]) -> Iterator[str]:
    """Where the alias stands for the first version."""
    uri, client = server
    client.create_alias(f"{ALIAS}_v1", ALIAS)
    yield uri
    client.drop_alias(ALIAS)


@pytest.fixture
def swap(server: tuple[str, MilvusClient], uri: str) -> Swap:
    """Give the alias to the second version."""
    return lambda: server[1].alter_alias(f"{ALIAS}_v2", ALIAS)


def fields_of(hits: list[Hit]) -> set[str]:
    return {name for hit in hits for name in hit.fields}


async def test_a_living_retriever_finds_what_a_new_one_finds_once_the_alias_was_swapped(
    make: Make, uri: str, swap: Swap, call: Call, looking: Clock
) -> None:
    living = make(uri, ALIAS)
    assert len(await call(living, "retrieve", QUERY, OPTIONS)) == 4

    swap()
    looking.now += LOOK_AGAIN_AFTER + 1
    found = await call(living, "retrieve", QUERY, OPTIONS)

    assert found == await call(make(uri, ALIAS), "retrieve", QUERY, OPTIONS)
    assert len(found) == 8
    assert fields_of(found) == {"pk", "language"}
    plan = (await call(living, "explained", QUERY, OPTIONS))[2]
    assert [name for name, _ in plan.vector_fields] == ["dense", "dense_2"]


async def test_a_batch_notices_the_swap_too(
    make: Make, uri: str, swap: Swap, call: Call, looking: Clock
) -> None:
    living = make(uri, ALIAS)
    await call(living, "retrieve", QUERY, OPTIONS)

    swap()
    looking.now += LOOK_AGAIN_AFTER + 1
    outcomes = await call(living, "retrieve_many", [QUERY, QUERY], OPTIONS)

    assert [len(hits) for hits in outcomes] == [8, 8]


async def test_refresh_notices_the_swap_at_once(
    make: Make, uri: str, swap: Swap, call: Call
) -> None:
    living = make(uri, ALIAS)
    await call(living, "retrieve", QUERY, OPTIONS)

    swap()
    await call(living, "refresh", 10.0)

    assert fields_of(await call(living, "retrieve", QUERY, OPTIONS)) == {"pk", "language"}


async def test_the_collection_is_described_once_in_a_while_however_many_queries_come(
    make: Make, uri: str, call: Call, looking: Clock, described: Described
) -> None:
    living = make(uri, ALIAS)
    for query in questions(3):
        await call(living, "retrieve", query, OPTIONS)
    assert described.times == 1

    for _ in range(2):
        looking.now += LOOK_AGAIN_AFTER + 1
        described.times = 0
        await asyncio.gather(
            *(call(living, "retrieve", query, OPTIONS) for query in questions(10)),
            call(living, "retrieve_many", questions(10), OPTIONS),
        )
        assert described.times == 1


async def test_a_collection_that_has_changed_is_described_once_too(
    make: Make, uri: str, swap: Swap, call: Call, looking: Clock, described: Described
) -> None:
    living = make(uri, ALIAS)
    await call(living, "retrieve", QUERY, OPTIONS)

    swap()
    looking.now += LOOK_AGAIN_AFTER + 1
    described.times = 0
    await asyncio.gather(*(call(living, "retrieve", query, OPTIONS) for query in questions(10)))

    assert described.times == 1


def test_event_loops_that_come_and_go_share_what_is_known(uri: str, described: Described) -> None:
    settings = TargetSettings(collection_name=ALIAS, encoders=Encoders(dense=LETTERS))
    living = MilvusVLLMAdapter(MilvusConnection(ConnectionSettings(uri=uri)), settings)

    async def once() -> int:
        try:
            return len(await living.aretrieve(QUERY, OPTIONS))
        finally:
            await living.aclose()

    assert [asyncio.run(once()) for _ in range(3)] == [4, 4, 4]
    assert described.times == 1


async def test_a_look_that_fails_does_not_fail_the_query_and_is_not_repeated_by_the_next(
    make: Make, uri: str, call: Call, looking: Clock, described: Described
) -> None:
    living = make(uri, ALIAS)
    await call(living, "retrieve", QUERY, OPTIONS)

    looking.now += LOOK_AGAIN_AFTER + 1
    described.times, described.failure = 0, RuntimeError("permission denied")
    for _ in range(3):
        assert len(await call(living, "retrieve", QUERY, OPTIONS)) == 4

    assert described.times == 1


async def test_what_a_first_look_fails_with_is_told(
    make: Make, uri: str, call: Call, described: Described
) -> None:
    described.failure = RuntimeError("permission denied")

    with pytest.raises(SearchError, match="permission denied"):
        await call(make(uri, ALIAS), "retrieve", QUERY, OPTIONS)


async def test_a_change_is_logged(
    make: Make,
    uri: str,
    swap: Swap,
    call: Call,
    looking: Clock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "milvus_vllm_retrievers")
    living = make(uri, ALIAS)
    await call(living, "retrieve", QUERY, OPTIONS)
    swap()
    looking.now += LOOK_AGAIN_AFTER + 1
    await call(living, "retrieve", QUERY, OPTIONS)

    told = [record.getMessage() for record in caplog.records]
    assert sum(f"collection {ALIAS!r} has changed" in each for each in told) == 1
    assert sum("'dense_2' (" in each for each in told) == 1
