"""LangChain's MilvusVLLMRerank over the stand-in for Milvus 2.6."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from langchain_core.documents import Document
from pymilvus import DataType, MilvusClient

from milvus_vllm_retrievers import ConfigurationError, RerankConnectionError, SearchError
from milvus_vllm_retrievers.langchain import MilvusVLLMRerank, VLLMRanker
from tests.corpus import TEXTS, create_collection
from tests.fakes import FakeVLLM

NAME = "milvus_rerank_docs"
NAMED_KEYS = "milvus_rerank_named"
NO_DENSE_FIELD = "milvus_rerank_bm25"
LONGEST = sorted(range(len(TEXTS)), key=lambda i: -len(TEXTS[i]))

Compress = Callable[..., Awaitable[Sequence[Document]]]


@pytest.fixture(scope="module", autouse=True)
def _collections(milvus26: MilvusClient) -> None:
    create_collection(milvus26, NAME, bm25=False)
    create_collection(milvus26, NAMED_KEYS, bm25=False, keys=DataType.VARCHAR, primary_key="isbn")
    create_collection(milvus26, NO_DENSE_FIELD, dense=0)


@pytest.fixture
def make(fake_vllm: FakeVLLM, milvus26_uri: str) -> Callable[..., MilvusVLLMRerank]:
    """Make a compressor over the stand-in; the fake scores by the text's length."""

    def over(collection: str = NAME, ranker: VLLMRanker | None = None, **more: Any) -> Any:
        ranker = ranker or VLLMRanker(fake_vllm.url)
        return MilvusVLLMRerank(collection, ranker=ranker, uri=milvus26_uri, **more)

    return over


@pytest.fixture(params=["sync", "async"])
def compress(request: pytest.FixtureRequest) -> Compress:
    """Call a compressor, blocking in one run of the test and async in the other."""

    async def run(reranker: MilvusVLLMRerank, documents: list[Document]) -> Sequence[Document]:
        try:
            if request.param == "sync":
                return reranker.compress_documents(documents, "longest")
            return await reranker.acompress_documents(documents, "longest")
        finally:
            await reranker.aclose()

    return run


@pytest.fixture
def documents() -> list[Document]:
    """A document for each row, as another retriever might have found them."""
    return [Document(id=str(i), page_content=t, metadata={"row": i}) for i, t in enumerate(TEXTS)]


async def test_copies_come_back_most_relevant_first_with_their_scores(
    make: Any, compress: Compress, documents: list[Document]
) -> None:
    reranked = await compress(make(top_n=3), documents)

    assert [d.id for d in reranked] == [str(i) for i in LONGEST[:3]]
    assert reranked[0].metadata == {
        "row": LONGEST[0],
        "relevance_score": float(len(TEXTS[LONGEST[0]])),
        "reranked_by": "milvus",
    }


async def test_the_given_documents_stay_as_they_are(
    make: Any, compress: Compress, documents: list[Document]
) -> None:
    before = [d.model_copy(deep=True) for d in documents]

    await compress(make(), documents)

    assert documents == before


async def test_milvus_asks_the_model_once_about_the_texts_it_has_stored(
    make: Any, compress: Compress, fake_vllm: FakeVLLM
) -> None:
    elsewhere = [Document(id=str(i), page_content="kept here") for i in (5, 8, 2)]

    reranked = await compress(make(), elsewhere)

    (request,) = fake_vllm.received
    assert request.path == "/rerank"  # what Milvus asks; this process would ask /v1/rerank
    assert sorted(request.body["documents"]) == sorted(TEXTS[i] for i in (5, 8, 2))
    assert [d.id for d in reranked] == ["2", "8", "5"]
    assert {d.page_content for d in reranked} == {"kept here"}


async def test_keys_may_be_texts_and_equal_scores_are_in_their_order(
    make: Any, compress: Compress, fake_vllm: FakeVLLM
) -> None:
    fake_vllm.score = lambda query, document: 1.0
    named = [Document(id=f"id-{i}", page_content="") for i in (8, 11, 2)]

    reranked = await compress(make(NAMED_KEYS), named)

    assert [d.id for d in reranked] == ["id-11", "id-2", "id-8"]


@pytest.mark.parametrize(
    ("collection", "metadata"),
    [(NAME, [{"pk": 5}, {"pk": 2}]), (NAMED_KEYS, [{"isbn": "id-5"}, {"isbn": "id-2"}])],
)
async def test_the_key_may_be_in_the_metadata(
    make: Any, compress: Compress, collection: str, metadata: list[dict[str, Any]]
) -> None:
    without_id = [Document(page_content="", metadata=keys) for keys in metadata]

    reranked = await compress(make(collection), without_id)

    assert [d.metadata["relevance_score"] for d in reranked] == [len(TEXTS[2]), len(TEXTS[5])]


async def test_a_document_given_twice_comes_back_twice(
    make: Any, compress: Compress, documents: list[Document]
) -> None:
    reranked = await compress(make(), [documents[3], documents[2], documents[3]])

    assert [d.id for d in reranked] == ["2", "3", "3"]


async def test_no_documents_send_no_request(
    make: Any, compress: Compress, fake_vllm: FakeVLLM
) -> None:
    assert await compress(make(), []) == []
    assert fake_vllm.received == []


@pytest.mark.parametrize(
    "lost", [Document(id="99", page_content="gone"), Document(page_content="no key")]
)
async def test_documents_without_a_row_are_reported(
    make: Any, compress: Compress, documents: list[Document], lost: Document
) -> None:
    with pytest.raises(SearchError, match=f"1 of 13 items have no row .* id {lost.id!r}"):
        await compress(make(), [*documents, lost])


async def test_documents_without_a_row_can_be_kept_last_and_marked(
    make: Any, compress: Compress, documents: list[Document]
) -> None:
    lost = Document(id="99", page_content="gone")

    reranked = await compress(make(on_missing="keep"), [lost, *documents])

    assert [d.id for d in reranked] == [*map(str, LONGEST), "99"]
    assert reranked[-1].metadata["reranked_by"] is None
    assert "has no row" in reranked[-1].metadata["rerank_error"]
    assert not any("rerank_error" in d.metadata for d in reranked[:-1])


async def test_where_milvus_cannot_reach_the_model_the_call_fails(
    make: Any, compress: Compress, documents: list[Document]
) -> None:
    with pytest.raises(RerankConnectionError, match="must be reachable from Milvus"):
        await compress(make(ranker=VLLMRanker("http://127.0.0.1:1")), documents)


async def test_where_milvus_cannot_reach_the_model_this_process_can_take_over(
    make: Any, compress: Compress, documents: list[Document], fake_vllm: FakeVLLM
) -> None:
    ranker = VLLMRanker(fake_vllm.url, server_endpoint="http://127.0.0.1:1", on_error="client")

    reranked = await compress(make(ranker=ranker), documents)

    assert [d.id for d in reranked] == [str(i) for i in LONGEST]
    assert {d.metadata["reranked_by"] for d in reranked} == {"client"}
    assert [r.path for r in fake_vllm.received] == ["/v1/rerank"]


async def test_where_milvus_cannot_reach_the_model_the_given_order_can_be_kept(
    make: Any, compress: Compress, documents: list[Document]
) -> None:
    ranker = VLLMRanker("http://127.0.0.1:1", on_error="skip")

    reranked = await compress(make(ranker=ranker, top_n=2), documents)

    assert [d.id for d in reranked] == ["0", "1"]
    assert all("inside Milvus failed" in d.metadata["rerank_error"] for d in reranked)


async def test_a_document_that_is_reranked_after_all_is_marked_no_longer(
    make: Any, compress: Compress, documents: list[Document]
) -> None:
    unreachable = VLLMRanker("http://127.0.0.1:1", on_error="skip")
    skipped = await compress(make(ranker=unreachable), documents)

    reranked = await compress(make(), list(skipped))

    assert not any("rerank_error" in d.metadata for d in reranked)


async def test_a_collection_without_a_dense_field_is_refused(
    make: Any, compress: Compress, documents: list[Document]
) -> None:
    with pytest.raises(ConfigurationError, match="has no dense vector field"):
        await compress(make(NO_DENSE_FIELD), documents)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranker": VLLMRanker("http://localhost", mode="client")}, "reranks from this process"),
        ({"ranker": VLLMRanker("http://localhost/team-a")}, "drops the path"),
        ({}, "'ranker' is required"),
        ({"ranker": VLLMRanker("http://localhost"), "k": 3}, "unknown argument 'k'"),
        ({"ranker": VLLMRanker("http://localhost"), "on_missing": "drop"}, "on_missing"),
        ({"ranker": VLLMRanker("http://localhost"), "top_n": 0}, "top_n"),
    ],
)
def test_what_milvus_cannot_do_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        MilvusVLLMRerank(NAME, **arguments)

    assert message in str(caught.value)


def test_secrets_are_in_no_repr() -> None:
    reranker = MilvusVLLMRerank(
        NAME,
        ranker=VLLMRanker("http://localhost", api_key="hidden", credential="vllm"),
        uri="http://root:hidden@127.0.0.1:1",
        token="hidden",
        connection_args={"password": "hidden"},
    )

    assert "hidden" not in repr(reranker)
    assert "hidden" not in str(reranker)
