"""VLLMRerank: documents reranked straight against vLLM."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever

from milvus_vllm_retrievers import ConfigurationError, RerankConnectionError
from milvus_vllm_retrievers.langchain import VLLMRanker, VLLMRerank
from tests.corpus import TEXTS
from tests.fakes import FakeVLLM

Compress = Callable[..., Awaitable[Sequence[Document]]]


@pytest.fixture(params=["sync", "async"])
def compress(request: pytest.FixtureRequest) -> Compress:
    async def run(reranker: VLLMRerank, documents: list[Document], query: str) -> Any:
        try:
            if request.param == "sync":
                return reranker.compress_documents(documents, query)
            return await reranker.acompress_documents(documents, query)
        finally:
            await reranker.aclose()

    return run


@pytest.fixture
def documents() -> list[Document]:
    return [Document(page_content=t, metadata={"row": i}) for i, t in enumerate(TEXTS)]


async def test_copies_come_back_most_relevant_first_with_their_scores(
    fake_vllm: FakeVLLM, compress: Compress, documents: list[Document]
) -> None:
    reranked = await compress(VLLMRerank(endpoint=fake_vllm.url, top_n=3), documents, "longest")

    assert [len(d.page_content) for d in reranked] == sorted(map(len, TEXTS), reverse=True)[:3]
    assert reranked[0].metadata["relevance_score"] == len(reranked[0].page_content)
    assert reranked[0].metadata["reranked_by"] == "client"
    assert reranked[0].metadata["row"] == TEXTS.index(reranked[0].page_content)


async def test_the_given_documents_stay_as_they_are(
    fake_vllm: FakeVLLM, compress: Compress, documents: list[Document]
) -> None:
    before = [d.model_copy(deep=True) for d in documents]

    await compress(VLLMRerank(endpoint=fake_vllm.url), documents, "longest")

    assert documents == before


async def test_equal_scores_keep_the_given_order(
    fake_vllm: FakeVLLM, compress: Compress, documents: list[Document]
) -> None:
    fake_vllm.score = lambda query, document: 1.0

    reranked = await compress(VLLMRerank(endpoint=fake_vllm.url), documents, "any")

    assert [d.metadata["row"] for d in reranked] == list(range(len(TEXTS)))


async def test_no_documents_send_no_request(fake_vllm: FakeVLLM, compress: Compress) -> None:
    assert await compress(VLLMRerank(endpoint=fake_vllm.url), [], "any") == []
    assert fake_vllm.received == []


async def test_a_batch_size_splits_the_request_and_the_concurrency_is_used(
    fake_vllm: FakeVLLM, compress: Compress, documents: list[Document]
) -> None:
    import threading

    fake_vllm.gate = threading.Barrier(2)
    ranker = VLLMRanker(fake_vllm.url, max_client_batch_size=3, max_concurrency=2)

    reranked = await compress(VLLMRerank(ranker), documents, "longest")

    assert [len(r.body["documents"]) for r in fake_vllm.received] == [3, 3, 3, 3]
    assert fake_vllm.most_in_flight == 2
    assert [len(d.page_content) for d in reranked] == sorted(map(len, TEXTS), reverse=True)


async def test_model_instruction_key_and_further_fields_are_sent(
    fake_vllm: FakeVLLM, compress: Compress, documents: list[Document]
) -> None:
    ranker = VLLMRanker(
        f"{fake_vllm.url}/team-a/v1",
        model="bge",
        api_key="key",
        instruction="find answers",
        extra_body={"use_activation": False},
    )

    await compress(VLLMRerank(ranker=ranker), documents, "any")

    request = fake_vllm.received[0]
    assert request.path == "/team-a/v1/rerank"
    assert request.headers["authorization"] == "Bearer key"
    assert request.body == {
        "model": "bge",
        "query": "any",
        "documents": TEXTS,
        "truncate_prompt_tokens": -1,
        "instruction": "find answers",
        "use_activation": False,
    }


async def test_skip_returns_the_given_order_marked(
    compress: Compress, documents: list[Document]
) -> None:
    ranker = VLLMRanker("http://127.0.0.1:1", on_error="skip", max_retries=0)

    reranked = await compress(VLLMRerank(ranker, top_n=2), documents, "any")

    assert [d.metadata["row"] for d in reranked] == [0, 1]
    assert all(d.metadata["reranked_by"] is None for d in reranked)
    assert all("could not be reached" in d.metadata["rerank_error"] for d in reranked)


async def test_an_unreachable_vllm_raises_by_default(
    compress: Compress, documents: list[Document]
) -> None:
    ranker = VLLMRanker("http://127.0.0.1:1", max_retries=0)

    with pytest.raises(RerankConnectionError, match=r"127\.0\.0\.1:1"):
        await compress(VLLMRerank(ranker), documents, "any")


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"ranker": VLLMRanker("http://localhost"), "endpoint": "http://localhost"},
        {"endpoint": "localhost:8000"},
        {"endpoint": "http://localhost", "top_n": 0},
        {"endpoint": "http://localhost", "top_k": 3},
    ],
)
def test_a_bad_argument_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        VLLMRerank(**arguments)


@pytest.mark.real_vllm
async def test_it_compresses_what_another_retriever_finds(
    vllm: str, documents: list[Document]
) -> None:
    class Everything(BaseRetriever):
        def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
            return documents

    compressor = VLLMRerank(endpoint=vllm, model="all-MiniLM-L6-v2", top_n=2)
    retriever = ContextualCompressionRetriever(
        base_compressor=compressor, base_retriever=Everything()
    )

    blocking = retriever.invoke("animals that live in the sea")
    concurrent = await retriever.ainvoke("animals that live in the sea")
    await compressor.aclose()

    assert [d.metadata["row"] for d in blocking] == [d.metadata["row"] for d in concurrent]
    assert blocking[0].page_content == TEXTS[2]
