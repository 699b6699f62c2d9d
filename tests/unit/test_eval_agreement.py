"""The evaluation's comparison of two ways of asking, and the memory that makes it fair."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import httpx
import pytest
from benchmarks.eval.agreement import Ranked, compare
from benchmarks.eval.memory import remembering

from milvus_vllm_retrievers.langchain import VLLMRanker, VLLMRerank
from tests.fakes import FakeVLLM, Reply, running_fake_vllm


@pytest.fixture
def vllm() -> Iterator[FakeVLLM]:
    with running_fake_vllm() as fake:
        yield fake


@pytest.fixture
def endpoint(vllm: FakeVLLM) -> Iterator[str]:
    with remembering(vllm.url) as url:
        yield url


def rerank(url: str, *documents: str, **body: object) -> list[tuple[int, float]]:
    answer = httpx.post(f"{url}/rerank", json={"query": "q", "documents": documents, **body})
    return [(r["index"], r["relevance_score"]) for r in answer.json()["results"]]


def test_lists_are_the_same_if_ids_order_and_float32_scores_are() -> None:
    ranked = Ranked(("a", "b"), (0.9, 0.1))

    assert ranked.same_as(Ranked(("a", "b"), (0.9 + 1e-12, 0.1)))
    assert not ranked.same_as(Ranked(("b", "a"), (0.1, 0.9)))
    assert not ranked.same_as(Ranked(("a", "b"), (0.9, 0.1001)))
    assert not ranked.same_as(Ranked(("a",), (0.9,)))


def test_a_comparison_counts_lists_and_names_the_queries_that_differ() -> None:
    one = [Ranked(("a", "b"), (0.9, 0.1)), Ranked(("a",), (0.5,)), Ranked(("a",), (None,))]
    other = [Ranked(("b", "a"), (0.9, 0.1)), Ranked(("a",), (0.75,)), Ranked(("a",), (None,))]

    agreement = compare("modes", ["q1", "q2", "q3"], one, other)

    assert (agreement.lists, agreement.same, agreement.same_ids) == (3, 1, 2)
    assert agreement.differing == ("q1", "q2")
    assert agreement.score_difference == pytest.approx(0.8)
    assert not agreement.complete


def test_a_pair_is_scored_once_and_then_remembered(vllm: FakeVLLM, endpoint: str) -> None:
    count = itertools.count()
    vllm.score = lambda query, document: float(next(count))

    first = rerank(endpoint, "a", "b", "a")
    second = rerank(endpoint, "b", "c", "a")

    assert first == [(1, 1.0), (0, 0.0), (2, 0.0)]
    assert second == [(1, 2.0), (0, 1.0), (2, 0.0)]
    assert [received.body["documents"] for received in vllm.received] == [["a", "b"], ["c"]]


def test_who_names_the_model_gets_the_same_scores(vllm: FakeVLLM, endpoint: str) -> None:
    rerank(endpoint, "a")

    rerank(endpoint, "a", model="the only one")

    assert len(vllm.received) == 1


def test_what_is_asked_in_another_way_is_scored_anew(vllm: FakeVLLM, endpoint: str) -> None:
    rerank(endpoint, "a", truncate_prompt_tokens=-1)

    rerank(endpoint, "a", truncate_prompt_tokens=5)

    assert [received.body["truncate_prompt_tokens"] for received in vllm.received] == [-1, 5]


def test_a_failure_is_passed_on_and_not_remembered(vllm: FakeVLLM, endpoint: str) -> None:
    vllm.replies = [Reply.json(400, {"error": {"message": "too long"}})]
    body = {"query": "q", "documents": ["a"]}

    failed = httpx.post(f"{endpoint}/v1/rerank", json=body)
    answered = httpx.post(f"{endpoint}/v1/rerank", json=body)

    assert (failed.status_code, failed.json()) == (400, {"error": {"message": "too long"}})
    assert answered.status_code == 200


def test_the_package_reranks_with_it_as_with_vllm(vllm: FakeVLLM, endpoint: str) -> None:
    from langchain_core.documents import Document

    documents = [Document(page_content="a"), Document(page_content="aaa")]

    found = VLLMRerank(ranker=VLLMRanker(endpoint)).compress_documents(documents, "q")

    assert [document.page_content for document in found] == ["aaa", "a"]
