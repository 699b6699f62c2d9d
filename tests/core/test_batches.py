"""Many queries at once, on servers: what is in flight, what one failure does, whose clock runs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import pytest
from pymilvus import DataType, MilvusClient

from milvus_vllm_retrievers import (
    ConfigurationError,
    MilvusVLLMError,
    RerankStatusError,
    SearchError,
    VLLMRanker,
)
from milvus_vllm_retrievers._core import retrieve as retrieve_module
from milvus_vllm_retrievers._core.query import Encoder, Query, SearchOptions, sparse_encoder
from tests.core.conftest import LETTERS, Call, Make, questions
from tests.corpus import TEXTS, create_collection
from tests.fakes import FakeVLLM, LetterEmbeddings, Received, Reply

NAME = "batches"
OPTIONS = SearchOptions(k=4, fetch_k=4)
PATIENCE = 20.0  # seconds after which a meeting that never happens fails its test
CALLER: ContextVar[str] = ContextVar("caller", default="nobody")


@pytest.fixture(scope="module", autouse=True)
def _collection(milvus26: MilvusClient) -> None:
    create_collection(milvus26, NAME, dense=1)


@pytest.fixture(autouse=True)
def _answers_as_ever(_fake_vllm: FakeVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fake_vllm, "answer", _fake_vllm.answer)


class MeetingEncoder:
    """Encodes only when as many queries as expected are being encoded, and counts them."""

    def __init__(self, expected: int, limit: int | None = None) -> None:
        self.most = 0
        self._now = 0
        self._lock = threading.Lock()
        self._meeting = threading.Barrier(expected)
        self._expected = expected
        self._waiting: list[asyncio.Future[None]] = []
        self.seen: list[Query] = []
        self.encoder = Encoder(self.encode, self.aencode, limit)

    def _enter(self, query: Query) -> None:
        with self._lock:
            self.seen.append(query)
            self._now += 1
            self.most = max(self.most, self._now)

    def _leave(self, query: Query) -> list[float]:
        with self._lock:
            self._now -= 1
        return LetterEmbeddings().embed_query(query.text)

    def encode(self, query: Query) -> list[float]:
        self._enter(query)
        self._meeting.wait(PATIENCE)
        return self._leave(query)

    async def aencode(self, query: Query) -> list[float]:
        self._enter(query)
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        if len(self._waiting) == self._expected:
            for each in self._waiting:
                each.set_result(None)
            self._waiting.clear()
        await asyncio.wait_for(future, PATIENCE)
        return self._leave(query)


# How much is in flight


@pytest.mark.parametrize("mode", [None, "client", "server"])
@pytest.mark.parametrize(
    ("max_concurrency", "of_encoder", "expected"),
    [(None, None, 16), (2, None, 2), (None, 3, 3), (1, None, 1), (12, None, 12)],
)
async def test_so_many_queries_are_embedded_at_once_and_no_more(
    make: Make,
    milvus26_uri: str,
    fake_vllm: FakeVLLM,
    call: Call,
    mode: Any,
    max_concurrency: int | None,
    of_encoder: int | None,
    expected: int,
) -> None:
    meeting = MeetingEncoder(expected, of_encoder)
    ranker = mode and VLLMRanker(fake_vllm.url, mode=mode)
    adapter = make(milvus26_uri, NAME, ranker, fields=["dense"], dense=meeting.encoder)

    outcomes = await call(adapter, "retrieve_many", questions(48), OPTIONS, max_concurrency)

    assert [len(hits) for hits in outcomes] == [4] * 48
    assert meeting.most == expected
    assert sorted(query.text for query in meeting.seen) == sorted(q.text for q in questions(48))


@pytest.mark.parametrize("mode", ["client", "server"])
async def test_one_at_a_time_is_one_request_in_flight(
    make: Make, milvus26_uri: str, fake_vllm: FakeVLLM, call: Call, mode: Any
) -> None:
    ranker = VLLMRanker(fake_vllm.url, mode=mode, max_client_batch_size=1)
    adapter = make(milvus26_uri, NAME, ranker)

    outcomes = await call(adapter, "retrieve_many", questions(4), OPTIONS, 1)

    assert [len(hits) for hits in outcomes] == [4] * 4
    assert fake_vllm.most_in_flight == 1
    assert len(fake_vllm.received) >= 16


@pytest.mark.parametrize("size", [None, 1])
async def test_a_batch_has_as_many_requests_in_flight_as_the_ranker_allows(
    make: Make, milvus26_uri: str, fake_vllm: FakeVLLM, call: Call, size: int | None
) -> None:
    fake_vllm.gate = threading.Barrier(4)  # each request waits until there are four
    ranker = VLLMRanker(fake_vllm.url, mode="client", max_client_batch_size=size, max_concurrency=4)
    adapter = make(milvus26_uri, NAME, ranker, fields=["dense"])

    outcomes = await call(adapter, "retrieve_many", questions(8), OPTIONS)

    assert [hits[0].reranked_by for hits in outcomes] == ["client"] * 8
    assert fake_vllm.most_in_flight == 4


# Several fields


@pytest.mark.parametrize("mode", [None, "client", "server"])
async def test_two_fields_of_five_candidates_serve_ten_results(
    make: Make, milvus26_uri: str, fake_vllm: FakeVLLM, call: Call, mode: Any
) -> None:
    ranker = mode and VLLMRanker(fake_vllm.url, mode=mode)
    adapter = make(milvus26_uri, NAME, ranker, fields=["dense", "sparse"])
    options = SearchOptions(k=10, fetch_k=5)

    hits = await call(adapter, "retrieve", Query("violin bees bridge bread car"), options)

    assert 5 < len(hits) <= 10


async def test_one_field_of_five_candidates_for_ten_results_is_refused(
    make: Make, milvus26_uri: str, fake_vllm: FakeVLLM, call: Call
) -> None:
    adapter = make(milvus26_uri, NAME, VLLMRanker(fake_vllm.url), fields=["dense"])
    options = SearchOptions(k=10, fetch_k=5)

    with pytest.raises(ConfigurationError, match=r"fetch_k \(5\) .* Pass fetch_k=10 or more"):
        await call(adapter, "retrieve", Query("whales"), options)
    for outcome in await call(adapter, "retrieve_many", questions(2), options):
        assert isinstance(outcome, ConfigurationError)


# What one search can bring


@pytest.fixture(scope="module")
def heavy(milvus26: MilvusClient) -> str:
    """A collection of fifty texts of 20 kB."""
    texts = [f"{i} " + 3_333 * "whale " for i in range(50)]
    create_collection(milvus26, "heavy", texts=texts, bm25=False)
    return "heavy"


WIDE = SearchOptions(k=50)


async def test_three_hundred_queries_of_a_megabyte_each_succeed(
    make: Make, milvus26_uri: str, heavy: str, call: Call
) -> None:
    adapter = make(milvus26_uri, heavy)

    outcomes = await call(adapter, "retrieve_many", questions(300), WIDE)

    assert [len(hits) if isinstance(hits, list) else hits for hits in outcomes] == [50] * 300


async def test_what_proves_too_much_for_one_search_is_searched_for_one_by_one(
    make: Make, milvus26_uri: str, heavy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real RESOURCE_EXHAUSTED, of 300 MB; blocking only, since the flow is the same."""
    adapter = make(milvus26_uri, heavy)
    queries = questions(300)
    monkeypatch.setattr(retrieve_module, "_share", lambda row_bytes, rows: 300)
    asked: list[int] = []
    search = MilvusClient.search

    def counted(self: MilvusClient, *args: Any, **kwargs: Any) -> Any:
        asked.append(len(kwargs["data"]))
        return search(self, *args, **kwargs)

    monkeypatch.setattr(MilvusClient, "search", counted)

    outcomes = await asyncio.to_thread(adapter.retrieve_many, queries, WIDE)

    assert asked == [300] + 300 * [1]
    assert [len(hits) if isinstance(hits, list) else hits for hits in outcomes] == [50] * 300
    assert outcomes[7] == await adapter.aretrieve(queries[7], WIDE)


# Time


class Hung:
    """An answer that does not come until the test is over."""

    body, headers = b"", {}  # type: ignore[var-annotated]

    def __init__(self, over: threading.Event) -> None:
        self._over = over

    @property
    def status(self) -> int:
        self._over.wait(PATIENCE)
        return 200


@pytest.fixture
def hanging(fake_vllm: FakeVLLM) -> Iterator[FakeVLLM]:
    """A vLLM that does not answer to queries with the word "hang"."""
    over = threading.Event()
    answer = fake_vllm.answer

    def answer_unless_hung(received: Received) -> Any:
        return Hung(over) if "hang" in received.body["query"] else answer(received)

    fake_vllm.answer = answer_unless_hung  # type: ignore[method-assign]
    yield fake_vllm
    over.set()


@pytest.mark.parametrize("mode", ["client", "server"])
async def test_a_query_that_hangs_fails_alone_and_the_message_names_what_to_raise(
    make: Make, milvus26_uri: str, hanging: FakeVLLM, call: Call, mode: Any
) -> None:
    """With one slot, the others wait longer for their turn than their own time is."""
    ranker = VLLMRanker(hanging.url, mode=mode, max_concurrency=1, timeout=None)
    adapter = make(milvus26_uri, NAME, ranker)
    await call(adapter, "retrieve", Query("warm up"), OPTIONS)
    queries = [Query("hang"), Query("hang on"), *questions(10)]

    outcomes = await call(
        adapter, "retrieve_many", queries, SearchOptions(k=4, fetch_k=4, timeout=2.0)
    )

    for outcome in outcomes[:2]:
        assert isinstance(outcome, MilvusVLLMError)
        assert "raise" in str(outcome)
        assert "timeout" in str(outcome)
        assert "the ranker's timeout" not in str(outcome)
    who = {"client": "client", "server": "milvus"}[mode]
    assert [hits[0].reranked_by for hits in outcomes[2:]] == [who] * 10


async def test_a_query_that_hangs_alone_is_told_by_the_same_message(
    make: Make, milvus26_uri: str, hanging: FakeVLLM, call: Call
) -> None:
    ranker = VLLMRanker(hanging.url, mode="client", timeout=None)
    adapter = make(milvus26_uri, NAME, ranker)

    with pytest.raises(MilvusVLLMError, match="raise the call's timeout"):
        await call(adapter, "retrieve", Query("hang"), SearchOptions(timeout=1.0))


# Context variables


def noted(seen: list[str]) -> Encoder:
    async def aencode(query: Query) -> list[float]:
        seen.append(CALLER.get())
        return await LETTERS.aencode(query)

    def encode(query: Query) -> list[float]:
        seen.append(CALLER.get())
        return LETTERS.encode(query)

    return Encoder(encode, aencode)


@pytest.mark.parametrize("size", [None, 1])
@pytest.mark.parametrize("method", ["retrieve", "retrieve_many"])
async def test_the_callers_context_variables_are_seen_wherever_its_queries_are_served(
    make: Make,
    milvus26_uri: str,
    fake_vllm: FakeVLLM,
    how: str,
    method: str,
    size: int | None,
) -> None:
    """By the encoder, and by an api_key that is asked in the thread that sends the request."""
    encoding: list[str] = []
    sending: list[str] = []

    def key() -> str:
        sending.append(CALLER.get())
        return "sk-batches"

    ranker = VLLMRanker(fake_vllm.url, mode="client", api_key=key, max_client_batch_size=size)
    adapter = make(milvus26_uri, NAME, ranker, fields=["dense"], dense=noted(encoding))
    asked = questions(4) if method == "retrieve_many" else questions(1)[0]
    CALLER.set("me")

    if how == "sync":
        getattr(adapter, method)(asked, OPTIONS)
    else:
        await getattr(adapter, f"a{method}")(asked, OPTIONS)

    assert set(encoding) == {"me"}
    assert set(sending) == {"me"}
    count = 4 if method == "retrieve_many" else 1
    assert (len(encoding), len(sending)) == (count, count * (1 if size is None else 4))


# Sparse encoders


@pytest.fixture(scope="module")
def learned(milvus26: MilvusClient) -> str:
    """A collection with a sparse field that is not BM25."""
    name = "learned"
    milvus26.drop_collection(name)
    schema = milvus26.create_schema()
    schema.add_field("pk", DataType.INT64, is_primary=True)
    schema.add_field("text", DataType.VARCHAR, max_length=1000)
    schema.add_field("sparse", DataType.SPARSE_FLOAT_VECTOR)
    indexes = milvus26.prepare_index_params()
    indexes.add_index("sparse", index_type="SPARSE_INVERTED_INDEX", metric_type="IP")
    milvus26.create_collection(name, schema=schema, index_params=indexes)
    rows = [{"pk": i, "text": text, "sparse": weights(text)} for i, text in enumerate(TEXTS)]
    milvus26.insert(name, rows)
    return name


def weights(text: str) -> dict[int, float]:
    return {ord(letter): 1.0 for letter in set(text)}


async def test_a_sparse_encoder_without_an_async_twin_does_not_hold_up_the_event_loop(
    make: Make, milvus26_uri: str, learned: str
) -> None:
    """Five calls go on only when all five are encoding."""
    meeting = threading.Barrier(5)

    def encode(text: str) -> dict[int, float]:
        meeting.wait(PATIENCE)
        return weights(text)

    adapter = make(milvus26_uri, learned, dense=None, sparse=sparse_encoder(encode))

    found = await asyncio.gather(*(adapter.aretrieve(query, OPTIONS) for query in questions(5)))

    assert [len(hits) for hits in found] == [4] * 5


# One query's failure


@pytest.mark.parametrize("mode", ["client", "server"])
async def test_one_poisoned_query_among_twenty_fails_alone(
    make: Make, milvus26_uri: str, fake_vllm: FakeVLLM, call: Call, mode: Any
) -> None:
    answer = fake_vllm.answer
    poison = Reply.json(400, {"error": {"message": "no such luck"}})
    fake_vllm.answer = lambda r: poison if "poison" in r.body["query"] else answer(r)  # type: ignore[method-assign]
    adapter = make(milvus26_uri, NAME, VLLMRanker(fake_vllm.url, mode=mode))
    queries = questions(20)
    queries[7] = Query("poison")

    outcomes = await call(adapter, "retrieve_many", queries, OPTIONS)

    assert isinstance(outcomes.pop(7), RerankStatusError)
    assert [len(hits) for hits in outcomes] == [4] * 19


@pytest.mark.parametrize("mode", [None, "client", "server"])
async def test_a_query_that_cannot_be_embedded_fails_alone_with_its_own_error(
    make: Make, milvus26_uri: str, fake_vllm: FakeVLLM, call: Call, mode: Any
) -> None:
    def encode(query: Query) -> list[float]:
        if "poison" in query.text:
            raise ZeroDivisionError("the user's own")
        return LETTERS.encode(query)

    async def aencode(query: Query) -> list[float]:
        return encode(query)

    ranker = mode and VLLMRanker(fake_vllm.url, mode=mode)
    encoder = Encoder(encode, aencode)
    adapter = make(milvus26_uri, NAME, ranker, fields=["dense"], dense=encoder)

    first, second, third = await call(
        adapter, "retrieve_many", [Query("a"), Query("poison"), Query("b")], OPTIONS
    )

    assert (len(first), len(third)) == (4, 4)
    assert isinstance(second, ZeroDivisionError)


async def test_a_query_without_a_vector_does_not_fail_those_that_bring_theirs(
    make: Make, milvus26_uri: str, call: Call
) -> None:
    adapter = make(milvus26_uri, NAME, fields=["dense"], dense=None)
    own = Query("whales", embedding=LetterEmbeddings().embed_query("whales"))

    first, second = await call(adapter, "retrieve_many", [Query("whales"), own], OPTIONS)

    assert isinstance(first, ConfigurationError)
    assert "pass an embedding model" in str(first)
    assert len(second) == 4


async def test_what_fails_every_query_is_the_outcome_of_each(
    make: Make, milvus26_uri: str, call: Call
) -> None:
    outcomes = await call(make(milvus26_uri, "not_there"), "retrieve_many", questions(3), OPTIONS)

    assert [type(outcome) for outcome in outcomes] == [SearchError] * 3


@pytest.mark.parametrize("mode", ["client", "server"])
async def test_a_service_that_is_down_is_spared_by_most_of_a_batch(
    make: Make, milvus26_uri: str, fake_vllm: FakeVLLM, call: Call, mode: Any
) -> None:
    fake_vllm.always = Reply.json(503, {"error": {"message": "the queue is full"}})
    ranker = VLLMRanker(fake_vllm.url, mode=mode, on_error="skip", max_retries=0, max_concurrency=4)
    adapter = make(milvus26_uri, NAME, ranker)

    outcomes = await call(adapter, "retrieve_many", questions(40), OPTIONS)

    marks = [hit.rerank_error for hits in outcomes for hit in hits]
    assert len(marks) == 160
    assert all("the queue is full" in mark for mark in marks)
    asked = {received.body["query"] for received in fake_vllm.received}
    assert 3 <= len(asked) <= 6  # three failures, and who had begun before the third


async def test_no_query_is_no_search(make: Make, milvus26_uri: str, call: Call) -> None:
    assert await call(make(milvus26_uri, "not_there"), "retrieve_many", [], OPTIONS) == []
