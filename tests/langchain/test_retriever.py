"""MilvusVLLMRetriever over the stand-in for Milvus 2.6 and over Milvus Lite."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from pymilvus import AsyncMilvusClient, DataType, MilvusClient

from milvus_vllm_retrievers import ConfigurationError, SearchError
from milvus_vllm_retrievers.langchain import MilvusVLLMRetriever, VLLMRanker
from tests.conftest import Ask
from tests.corpus import TEXTS, create_collection
from tests.fakes import FakeVLLM, LetterEmbeddings

NAME = "retriever_docs"


@pytest.fixture(scope="module", autouse=True)
def _collections(milvus26: MilvusClient, lite: MilvusClient) -> None:
    for client in (milvus26, lite):
        create_collection(client, NAME)


@pytest.fixture(params=["server", "client"])
def retriever(
    request: pytest.FixtureRequest, milvus26_uri: str, fake_vllm: FakeVLLM
) -> MilvusVLLMRetriever:
    """A retriever over two legs of the stand-in; the fake scores by the text's length."""
    return MilvusVLLMRetriever(
        collection_name=NAME,
        uri=milvus26_uri,
        embedding=LetterEmbeddings(),
        ranker=VLLMRanker(fake_vllm.url, mode=request.param),
        k=3,
    )


LONGEST = sorted(range(len(TEXTS)), key=lambda i: -len(TEXTS[i]))


async def test_documents_come_back_in_the_order_of_their_relevance(
    retriever: MilvusVLLMRetriever, ask: Ask
) -> None:
    documents = await ask(retriever, "what is the longest text?")

    assert [d.page_content for d in documents] == [TEXTS[i] for i in LONGEST[:3]]
    assert [d.metadata["relevance_score"] for d in documents] == [
        float(len(d.page_content)) for d in documents
    ]


async def test_a_document_carries_id_metadata_and_where_it_was_reranked(
    retriever: MilvusVLLMRetriever, ask: Ask
) -> None:
    document = (await ask(retriever, "longest"))[0]

    assert retriever.ranker is not None
    origin = {"server": "milvus", "client": "client"}[retriever.ranker.mode]
    assert document.id == str(LONGEST[0])
    assert document.metadata["pk"] == LONGEST[0]
    assert document.metadata["number"] == LONGEST[0]
    assert document.metadata["reranked_by"] == origin
    assert ("retrieval_score" in document.metadata) == (origin == "client")
    assert not {"dense", "sparse"} & set(document.metadata)


async def test_k_fetch_k_and_expr_can_be_given_per_call(
    retriever: MilvusVLLMRetriever, ask: Ask, fake_vllm: FakeVLLM
) -> None:
    documents = await ask(retriever, "whales", k=2, fetch_k=4, expr="number < 5")

    assert len(documents) == 2
    assert all(d.metadata["number"] < 5 for d in documents)
    assert 4 <= len(fake_vllm.received[-1].body["documents"]) <= 5


async def test_a_filter_per_call_narrows_the_one_of_the_constructor(
    milvus26_uri: str, fake_vllm: FakeVLLM, ask: Ask
) -> None:
    retriever = MilvusVLLMRetriever(
        collection_name=NAME,
        uri=milvus26_uri,
        vector_field="sparse",
        expr="number < 2 or number > 10",
        ranker=VLLMRanker(fake_vllm.url),
    )

    documents = await ask(retriever, "the a of", expr="number > 0 or number == 5")

    assert {d.metadata["number"] for d in documents} <= {1, 11}


async def test_a_call_asks_for_more_than_the_default_pool_by_k_alone(
    retriever: MilvusVLLMRetriever, ask: Ask
) -> None:
    documents = await ask(retriever, "everything", k=60)

    assert len(documents) == len(TEXTS)


async def test_documents_below_the_score_threshold_are_left_out(
    milvus26_uri: str, fake_vllm: FakeVLLM, ask: Ask
) -> None:
    retriever = MilvusVLLMRetriever(
        collection_name=NAME,
        uri=milvus26_uri,
        embedding=LetterEmbeddings(),
        ranker=VLLMRanker(fake_vllm.url),
        k=12,
        score_threshold=45,
    )

    documents = await ask(retriever, "long texts")

    assert {d.page_content for d in documents} == {text for text in TEXTS if len(text) >= 45}


async def test_without_a_ranker_the_legs_are_fused_and_nothing_is_called_reranked(
    milvus26_uri: str, fake_vllm: FakeVLLM, ask: Ask
) -> None:
    retriever = MilvusVLLMRetriever(
        collection_name=NAME, ranker=None, uri=milvus26_uri, embedding=LetterEmbeddings()
    )

    documents = await ask(retriever, "whales in the ocean")

    assert documents[0].page_content == TEXTS[2]
    assert documents[0].metadata["reranked_by"] is None
    assert documents[0].metadata["relevance_score"] is None
    assert documents[0].metadata["retrieval_score"] > 0
    assert fake_vllm.received == []


@pytest.mark.parametrize("keys", [DataType.INT64, DataType.VARCHAR])
@pytest.mark.parametrize("mode", ["server", "client"])
async def test_keys_of_either_type_under_any_name_become_the_documents_id(
    milvus26: MilvusClient, milvus26_uri: str, fake_vllm: FakeVLLM, keys: DataType, mode: str
) -> None:
    create_collection(milvus26, "other_keys", keys=keys, primary_key="isbn", text_field="body")
    retriever = MilvusVLLMRetriever(
        collection_name="other_keys", uri=milvus26_uri, ranker=VLLMRanker(fake_vllm.url, mode=mode)
    )

    with retriever:
        document = retriever.invoke("violin")[0]

    assert document.id == ("id-8" if keys == DataType.VARCHAR else "8")
    assert document.metadata["isbn"] == ("id-8" if keys == DataType.VARCHAR else 8)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
async def test_texts_that_are_null_or_empty_come_last_unscored_on_both_paths(
    milvus30: MilvusClient, milvus30_uri: str, fake_vllm: FakeVLLM, ask: Ask, k: int
) -> None:
    fake_vllm.score = lambda query, document: -float(len(document))  # "" would be the best
    texts = ["", "a longer text", None, "some text"]
    create_collection(milvus30, "nulls", texts=texts, nullable=True, bm25=False)

    for mode in ("server", "client"):
        retriever = MilvusVLLMRetriever(
            collection_name="nulls",
            uri=milvus30_uri,
            embedding=LetterEmbeddings(),
            ranker=VLLMRanker(fake_vllm.url, mode=mode),
            k=k,
        )
        documents = await ask(retriever, "anything")
        found = [(d.id, d.metadata["reranked_by"], d.page_content) for d in documents]
        assert (
            found
            == [
                ("3", {"server": "milvus"}.get(mode, mode), "some text"),
                ("1", {"server": "milvus"}.get(mode, mode), "a longer text"),
                ("0", None, ""),
                ("2", None, ""),
            ][:k]
        )


Batch = Callable[..., Awaitable[list[Any]]]


@pytest.fixture(params=["sync", "async"])
def batch(request: pytest.FixtureRequest) -> Batch:
    async def run(retriever: MilvusVLLMRetriever, *arguments: Any, **more: Any) -> list[Any]:
        async with retriever:
            if request.param == "sync":
                return retriever.batch(*arguments, **more)
            return await retriever.abatch(*arguments, **more)

    return run


QUERIES = ["whales in the ocean", "a violin", "bread", "glaciers", "bees"]


async def test_a_batch_gives_each_query_what_it_gets_alone(
    retriever: MilvusVLLMRetriever, fake_vllm: FakeVLLM, batch: Batch
) -> None:
    fake_vllm.score = lambda query, document: float(len(query) * len(document) % 13)

    together = await batch(retriever, QUERIES, k=2)

    alone = [retriever.invoke(query, k=2) for query in QUERIES]
    assert together == alone
    retriever.close()


@pytest.mark.parametrize(("mode", "searches"), [("server", [1, 1, 1, 1]), ("client", [4])])
async def test_the_queries_of_a_batch_share_a_search_unless_milvus_would_rerank_them_in_turn(
    milvus26_uri: str,
    fake_vllm: FakeVLLM,
    batch: Batch,
    monkeypatch: pytest.MonkeyPatch,
    mode: Any,
    searches: list[int],
) -> None:
    sizes = []
    for client in (MilvusClient, AsyncMilvusClient):
        search = client.search

        def counted(self: Any, *args: Any, search: Any = search, **kwargs: Any) -> Any:
            sizes.append(len(kwargs["data"]))
            return search(self, *args, **kwargs)

        monkeypatch.setattr(client, "search", counted)
    retriever = MilvusVLLMRetriever(
        collection_name=NAME,
        uri=milvus26_uri,
        vector_field="sparse",
        ranker=VLLMRanker(fake_vllm.url, mode=mode),
        k=4,
        fetch_k=4,
    )

    answers = await batch(retriever, QUERIES[:4])

    assert len(answers) == 4
    assert sizes == searches
    assert len(fake_vllm.received) == 4


async def test_the_queries_of_a_batch_are_embedded_at_once(
    milvus26_uri: str, fake_vllm: FakeVLLM, batch: Batch
) -> None:
    two = threading.Barrier(2, timeout=30)

    class InPairs(LetterEmbeddings):
        def embed_query(self, text: str) -> list[float]:
            two.wait()  # until another query is embedded too
            return super().embed_query(text)

    retriever = MilvusVLLMRetriever(
        collection_name=NAME,
        uri=milvus26_uri,
        embedding=InPairs(),
        ranker=VLLMRanker(fake_vllm.url),
    )

    answers = await batch(retriever, QUERIES[:4])

    assert [len(documents) for documents in answers] == [4, 4, 4, 4]
    assert not two.broken


@dataclass
class Runs(BaseCallbackHandler):
    """Which query each run is for, and how it ended."""

    queries: dict[Any, str] = field(default_factory=dict)
    ends: dict[Any, list[Any]] = field(default_factory=dict)

    def on_retriever_start(self, _: Any, query: str, *, run_id: Any, **__: Any) -> None:
        self.queries[run_id] = query
        self.ends[run_id] = []

    def on_retriever_end(self, documents: Any, *, run_id: Any, **_: Any) -> None:
        self.ends[run_id].append([d.id for d in documents])

    def on_retriever_error(self, error: BaseException, *, run_id: Any, **_: Any) -> None:
        self.ends[run_id].append(error)


@pytest.mark.parametrize("bad", [[], ["whales", " "]])
async def test_each_query_of_a_batch_is_one_run_with_its_own_id_and_one_outcome(
    retriever: MilvusVLLMRetriever, batch: Batch, bad: list[str]
) -> None:
    runs, queries = Runs(), ["a violin", *bad, "bees"]
    ids = [uuid4() for _ in queries]
    configs = [{"callbacks": [runs], "run_id": run_id} for run_id in ids]

    answers = await batch(retriever, queries, configs, return_exceptions=True)

    assert runs.queries == dict(zip(ids, queries, strict=True))
    assert [runs.ends[run_id] for run_id in ids] == [
        [answer] if isinstance(answer, Exception) else [[d.id for d in answer]]
        for answer in answers
    ]
    assert [type(answer) for answer in answers].count(ConfigurationError) == len(bad) / 2


async def test_a_bad_query_of_a_batch_raises_where_exceptions_are_not_returned(
    retriever: MilvusVLLMRetriever, batch: Batch
) -> None:
    runs = Runs()

    with pytest.raises(ConfigurationError, match="non-empty text"):
        await batch(retriever, ["whales", " "], {"callbacks": [runs]})

    ends = {runs.queries[run_id]: ends for run_id, ends in runs.ends.items()}
    assert len(ends["whales"][0]) == 3
    assert isinstance(ends[" "][0], ConfigurationError)


async def test_an_argument_that_a_batch_does_not_have_ends_every_run_with_the_error(
    retriever: MilvusVLLMRetriever, batch: Batch
) -> None:
    runs = Runs()

    answers = await batch(
        retriever, QUERIES, {"callbacks": [runs]}, return_exceptions=True, exprs="x"
    )

    assert [str(answer) for answer in answers] == [str(answers[0])] * len(QUERIES)
    assert "unknown argument 'exprs' (did you mean 'expr'?)" in str(answers[0])
    assert list(runs.ends.values()) == [[answers[0]]] * len(QUERIES)


class Meeting:
    """Takes place if so many callers are ever there at once."""

    def __init__(self, size: int, *, expected: bool) -> None:
        self.took_place = False
        self._barrier = threading.Barrier(size, timeout=30 if expected else 0.5)

    def wait(self, timeout: float = 0) -> None:
        with suppress(threading.BrokenBarrierError):
            self._barrier.wait()
            self.took_place = True
            self._barrier.abort()  # nobody need wait any more


@pytest.mark.parametrize(("limit", "is_list"), [(1, False), (2, False), (2, True), (None, False)])
async def test_a_batchs_max_concurrency_bounds_embeddings_and_rerank_requests(
    milvus26_uri: str, fake_vllm: FakeVLLM, batch: Batch, limit: int | None, is_list: bool
) -> None:
    too_many = (limit or 2) + 1
    embedding = Meeting(too_many, expected=limit is None)
    fake_vllm.gate = reranking = Meeting(too_many, expected=limit is None)

    class Waiting(LetterEmbeddings):
        def embed_query(self, text: str) -> list[float]:
            embedding.wait()
            return super().embed_query(text)

    config: Any = {} if limit is None else {"max_concurrency": limit}
    retriever = MilvusVLLMRetriever(
        NAME,
        VLLMRanker(fake_vllm.url, mode="client", max_client_batch_size=3),
        uri=milvus26_uri,
        embedding=Waiting(),
    )

    answers = await batch(retriever, [*QUERIES, "rain"], [config] * 6 if is_list else config)

    assert [len(documents) for documents in answers] == [4] * 6
    assert embedding.took_place == reranking.took_place == (limit is None)


async def test_queries_are_embedded_as_queries_by_embed_query_or_its_async_twin(
    milvus26_uri: str, fake_vllm: FakeVLLM, batch: Batch
) -> None:
    class Asymmetric(LetterEmbeddings):
        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            raise AssertionError("queries are no documents")

    retriever = MilvusVLLMRetriever(
        NAME, VLLMRanker(fake_vllm.url), uri=milvus26_uri, embedding=Asymmetric()
    )

    answers = await batch(retriever, QUERIES)

    assert [len(documents) for documents in answers] == [4] * len(QUERIES)


async def test_what_is_called_for_a_query_sees_the_callers_context_variables(
    milvus26_uri: str, fake_vllm: FakeVLLM, batch: Batch
) -> None:
    request_id: ContextVar[str] = ContextVar("request_id")
    seen = set()

    class Tracing(LetterEmbeddings):
        def embed_query(self, text: str) -> list[float]:
            seen.add(request_id.get("lost"))
            return super().embed_query(text)

    retriever = MilvusVLLMRetriever(
        NAME, VLLMRanker(fake_vllm.url), uri=milvus26_uri, embedding=Tracing()
    )
    request_id.set("42")

    await batch(retriever, QUERIES)

    assert seen == {"42"}


async def test_a_batch_as_completed_gives_each_querys_place_and_documents(
    retriever: MilvusVLLMRetriever,
) -> None:
    with retriever:
        blocking = dict(retriever.batch_as_completed(QUERIES, k=2))
    async with retriever:
        concurrent = {i: found async for i, found in retriever.abatch_as_completed(QUERIES, k=2)}
        together = await retriever.abatch(QUERIES, k=2)

    assert blocking == concurrent == dict(enumerate(together))


async def test_fewer_candidates_than_documents_are_refused(
    milvus26_uri: str, fake_vllm: FakeVLLM, ask: Ask
) -> None:
    retriever = MilvusVLLMRetriever(
        NAME, VLLMRanker(fake_vllm.url), uri=milvus26_uri, k=9, fetch_k=5
    )

    with pytest.raises(ConfigurationError, match=r"fetch_k \(5\) is smaller than k \(9\)"):
        await ask(retriever, "whales")


async def test_an_empty_batch_sends_nothing(
    retriever: MilvusVLLMRetriever, fake_vllm: FakeVLLM, batch: Batch
) -> None:
    assert await batch(retriever, []) == []
    assert fake_vllm.received == []


async def test_borrowed_clients_are_used_and_left_open(
    milvus26: MilvusClient, milvus26_uri: str, fake_vllm: FakeVLLM, ask: Ask
) -> None:
    async_client = AsyncMilvusClient(milvus26_uri)
    retriever = MilvusVLLMRetriever(
        collection_name=NAME,
        client=milvus26,
        async_client=async_client,
        ranker=VLLMRanker(fake_vllm.url),
    )

    documents = await ask(retriever, "violin")

    assert documents[0].id == "8"
    assert milvus26.has_collection(NAME)
    assert await async_client.has_collection(NAME)
    await async_client.close()


async def test_a_borrowed_blocking_client_is_enough_for_async_calls(
    milvus26: MilvusClient, fake_vllm: FakeVLLM, ask: Ask
) -> None:
    retriever = MilvusVLLMRetriever(
        collection_name=NAME, client=milvus26, ranker=VLLMRanker(fake_vllm.url)
    )

    assert (await ask(retriever, "violin"))[0].id == "8"


async def test_a_released_collection_is_loaded(
    milvus26: MilvusClient, milvus26_uri: str, fake_vllm: FakeVLLM, ask: Ask
) -> None:
    milvus26.release_collection(NAME)
    retriever = MilvusVLLMRetriever(
        collection_name=NAME, uri=milvus26_uri, ranker=VLLMRanker(fake_vllm.url)
    )

    assert (await ask(retriever, "violin"))[0].id == "8"


async def test_explain_tells_each_results_place_before_and_after(
    retriever: MilvusVLLMRetriever,
) -> None:
    explanation = await retriever.aexplain("whales in the ocean", k=3)
    assert explanation == retriever.explain("whales in the ocean", k=3)
    await retriever.aclose()

    assert [row.hit.pk for row in explanation.hits] == LONGEST[:3]
    assert [row.rank for row in explanation.hits] == [1, 2, 3]
    assert all(row.retrieval_rank for row in explanation.hits)
    whale = explanation.candidates
    assert whale == len(TEXTS)


async def test_partitions_and_search_params_reach_milvus(
    milvus26: MilvusClient, milvus26_uri: str, fake_vllm: FakeVLLM, ask: Ask
) -> None:
    create_collection(milvus26, "parted", bm25=False)
    milvus26.create_partition("parted", "extra")
    row = {"pk": 99, "document": "a whale", "dense": LetterEmbeddings().embed_query("a whale")}
    milvus26.insert("parted", [row], partition_name="extra")
    retriever = MilvusVLLMRetriever(
        collection_name="parted",
        uri=milvus26_uri,
        embedding=LetterEmbeddings(),
        partition_names=["extra"],
        search_params={"dense": {"params": {}}},
        consistency_level="Strong",
        ranker=VLLMRanker(fake_vllm.url),
    )

    assert [d.id for d in await ask(retriever, "whale")] == ["99"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k must be between 1"),
        ({"fetch_k": 0}, "fetch_k must be between 1"),
        ({"reranker": None}, "did you mean 'ranker'"),
        ({"timeout": 0}, "timeout must be a positive number"),
        ({"expr": "a == 'b"}, "expr is not complete"),
        ({"embedding": "text-embedding-3"}, "embedding"),
        ({"sparse_embedding": 5}, "sparse encoder must be a callable"),
    ],
)
def test_a_bad_argument_is_refused_before_anything_is_sent(
    arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        MilvusVLLMRetriever(**{"collection_name": NAME, **arguments})

    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vector_field": "densee"}, "did you mean 'dense'"),
        ({"vector_field": "dense"}, "needs query vectors: pass an embedding model"),
        ({"vector_field": "number"}, "has no vector field 'number'"),
        ({"text_field": "documents"}, "did you mean 'document'"),
        ({"text_field": "pk"}, "it is the primary key"),
        ({"text_field": "dense"}, "it is not VARCHAR"),
    ],
)
async def test_what_does_not_fit_the_collection_is_named(
    milvus26_uri: str, ask: Ask, arguments: dict[str, object], message: str
) -> None:
    retriever = MilvusVLLMRetriever(
        collection_name=NAME, ranker=None, uri=milvus26_uri, **arguments
    )

    with pytest.raises(ConfigurationError) as caught:
        await ask(retriever, "violin")

    assert message in str(caught.value)


@pytest.mark.parametrize("query", ["", "  \n"])
async def test_an_empty_query_is_refused(
    retriever: MilvusVLLMRetriever, ask: Ask, query: str
) -> None:
    with pytest.raises(ConfigurationError, match="non-empty text"):
        await ask(retriever, query)


async def test_a_collection_no_query_can_reach_says_why(
    milvus26: MilvusClient, milvus26_uri: str, ask: Ask
) -> None:
    create_collection(milvus26, "dense_only", bm25=False)
    retriever = MilvusVLLMRetriever(collection_name="dense_only", ranker=None, uri=milvus26_uri)

    with pytest.raises(ConfigurationError, match="pass an embedding model"):
        await ask(retriever, "violin")


async def test_an_embedding_of_other_dimensions_is_refused(milvus26_uri: str, ask: Ask) -> None:
    class Short(LetterEmbeddings):
        def embed_query(self, text: str) -> list[float]:
            return super().embed_query(text)[:5]

    retriever = MilvusVLLMRetriever(
        collection_name=NAME, ranker=None, uri=milvus26_uri, embedding=Short()
    )

    with pytest.raises(ConfigurationError, match="made 5 dimensions, but field 'dense' has 8"):
        await ask(retriever, "violin")


async def test_a_missing_collection_is_named(milvus26_uri: str, ask: Ask) -> None:
    retriever = MilvusVLLMRetriever(collection_name="nowhere", ranker=None, uri=milvus26_uri)

    with pytest.raises(SearchError, match="nowhere"):
        await ask(retriever, "violin")


async def test_milvus_lite_says_what_to_pass_in_place_of_a_filter_template(
    lite: MilvusClient, lite_uri: str, ask: Ask
) -> None:
    retriever = MilvusVLLMRetriever(
        collection_name=NAME, ranker=None, uri=lite_uri, expr="number == {n}", expr_params={"n": 1}
    )

    with pytest.raises(ConfigurationError, match="pass the values as filters="):
        await ask(retriever, "violin")


async def test_a_server_that_is_not_there_is_named(ask: Ask) -> None:
    retriever = MilvusVLLMRetriever(
        collection_name=NAME, ranker=None, uri="http://root:hidden@127.0.0.1:1", timeout=5
    )

    with pytest.raises(SearchError) as caught:
        await ask(retriever, "violin")

    assert "127.0.0.1:1" in str(caught.value)
    assert "hidden" not in str(caught.value)


def test_secrets_are_in_no_repr(fake_vllm: FakeVLLM) -> None:
    retriever = MilvusVLLMRetriever(
        collection_name=NAME,
        uri="http://root:hidden@127.0.0.1:1",
        token="hidden",
        connection_args={"password": "hidden"},
        ranker=VLLMRanker(fake_vllm.url, api_key="hidden"),
    )

    assert "hidden" not in repr(retriever)
    assert "hidden" not in str(retriever)


@pytest.mark.parametrize("ranked", [True, False])
@pytest.mark.parametrize("asked", [None, ["rerank_error", "retrieval_score"]])
async def test_own_fields_with_the_names_of_scores_come_back_as_stored(
    milvus26: MilvusClient,
    milvus26_uri: str,
    fake_vllm: FakeVLLM,
    ask: Ask,
    ranked: bool,
    asked: list[str] | None,
) -> None:
    create_collection(milvus26, "stored_scores", texts=[], dense=0)
    row = {"pk": 1, "document": "a whale", "rerank_error": "own", "retrieval_score": 0.99}
    milvus26.insert("stored_scores", [row])
    retriever = MilvusVLLMRetriever(
        collection_name="stored_scores",
        uri=milvus26_uri,
        ranker=VLLMRanker(fake_vllm.url) if ranked else None,
        output_fields=asked,
    )

    (document,) = await ask(retriever, "whale")

    assert document.metadata.pop("retrieval_score", None) != 0.99
    assert document.metadata == {
        "pk": 1,
        "stored_rerank_error": "own",
        "stored_retrieval_score": 0.99,
        "relevance_score": 7.0 if ranked else None,
        "reranked_by": "milvus" if ranked else None,
    }


async def test_search_params_for_a_field_that_is_not_there_are_refused(
    milvus26_uri: str, ask: Ask
) -> None:
    retriever = MilvusVLLMRetriever(
        collection_name=NAME, ranker=None, uri=milvus26_uri, search_params={"spars": {"params": {}}}
    )

    with pytest.raises(ConfigurationError, match="did you mean 'sparse'"):
        await ask(retriever, "whale")


async def test_a_field_that_no_query_reaches_is_named_once(
    milvus26_uri: str, ask: Ask, caplog: pytest.LogCaptureFixture
) -> None:
    retriever = MilvusVLLMRetriever(collection_name=NAME, ranker=None, uri=milvus26_uri)

    await ask(retriever, "whale")
    await ask(retriever, "whale")

    messages = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert len(messages) == 1
    assert "dense field 'dense' needs query vectors" in messages[0]


async def test_an_instruction_of_a_call_has_this_process_rerank_since_milvus_cannot_send_it(
    milvus26_uri: str, fake_vllm: FakeVLLM, ask: Ask
) -> None:
    retriever = MilvusVLLMRetriever(
        NAME, VLLMRanker(fake_vllm.url), uri=milvus26_uri, vector_field="sparse"
    )

    told = await ask(retriever, "whales", instruction="find animals")
    untold = await ask(retriever, "whales")

    assert [d.metadata["reranked_by"] for d in (*told, *untold)] == ["client", "milvus"]
    assert [r.body.get("instruction") for r in fake_vllm.received] == ["find animals", None]
