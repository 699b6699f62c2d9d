"""LangChain and LlamaIndex give the same answers, however the candidates are reranked."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from pymilvus import MilvusClient

from milvus_vllm_retrievers import langchain, llama_index
from milvus_vllm_retrievers.ranker import VLLMRanker
from tests.corpus import TEXTS, create_collection

pytestmark = pytest.mark.real_vllm

NAME = "both_frameworks"
QUESTIONS = ["animals that live in the sea", "baking at home", "how do I fix my vehicle?"]
# Beside other texts in one batch, a text may score a bfloat16 rounding apart.
TOLERANCE = 1e-3

Found = list[tuple[str, float]]
Ask = Callable[[Any, str], Awaitable[Found]]


@pytest.fixture(scope="module", autouse=True)
def _collection(milvus26: MilvusClient, vllm: str) -> None:
    create_collection(milvus26, NAME, text_embedding=vllm)


async def ask_langchain(retriever: langchain.MilvusVLLMRetriever, question: str) -> Found:
    documents = retriever.invoke(question)
    return [(str(d.id), d.metadata["relevance_score"]) for d in documents]


async def aask_langchain(retriever: langchain.MilvusVLLMRetriever, question: str) -> Found:
    documents = await retriever.ainvoke(question)
    return [(str(d.id), d.metadata["relevance_score"]) for d in documents]


async def ask_llama_index(retriever: llama_index.MilvusVLLMRetriever, question: str) -> Found:
    return [(n.node_id, n.get_score()) for n in retriever.retrieve(question)]


async def aask_llama_index(retriever: llama_index.MilvusVLLMRetriever, question: str) -> Found:
    return [(n.node_id, n.get_score()) for n in await retriever.aretrieve(question)]


@pytest.mark.parametrize("question", QUESTIONS)
async def test_the_same_question_gets_the_same_answer_in_either_framework_and_every_way(
    milvus26_uri: str, vllm: str, question: str
) -> None:
    answers = {}
    for mode in ("server", "client"):
        common: Any = {"ranker": VLLMRanker(vllm, mode=mode), "uri": milvus26_uri, "fetch_k": 12}
        async with (
            langchain.MilvusVLLMRetriever(NAME, k=5, **common) as chain_side,
            llama_index.MilvusVLLMRetriever(NAME, similarity_top_k=5, **common) as index_side,
        ):
            answers[mode, "LangChain"] = await ask_langchain(chain_side, question)
            answers[mode, "LangChain, async"] = await aask_langchain(chain_side, question)
            answers[mode, "LlamaIndex"] = await ask_llama_index(index_side, question)
            answers[mode, "LlamaIndex, async"] = await aask_llama_index(index_side, question)

    expected = answers["server", "LangChain"]
    assert len(expected) == 5
    for way, found in answers.items():
        assert [id_ for id_, _ in found] == [id_ for id_, _ in expected], way
        assert [s for _, s in found] == pytest.approx([s for _, s in expected], abs=TOLERANCE), way


@pytest.mark.parametrize("question", QUESTIONS)
async def test_query_engines_that_rerank_the_same_candidates_anywhere_give_the_same_order(
    milvus26_uri: str, vllm: str, question: str
) -> None:
    ranker = VLLMRanker(vllm)
    common: Any = {"uri": milvus26_uri, "vector_field": "embedded"}
    reranking = llama_index.MilvusVLLMRetriever(
        NAME, ranker, similarity_top_k=5, fetch_k=len(TEXTS), **common
    )
    candidates = llama_index.MilvusVLLMRetriever(NAME, None, similarity_top_k=len(TEXTS), **common)
    straight = llama_index.VLLMRerank(ranker, top_n=5)
    through_milvus = llama_index.MilvusVLLMRerank(NAME, ranker=ranker, uri=milvus26_uri, top_n=5)
    ways = {
        "the retriever": (reranking, []),
        "VLLMRerank": (candidates, [straight]),
        "MilvusVLLMRerank": (candidates, [through_milvus]),
    }

    orders = {}
    for way, (retriever, postprocessors) in ways.items():
        engine = RetrieverQueryEngine.from_args(
            retriever, llm=MockLLM(), node_postprocessors=postprocessors
        )
        orders[way] = [n.node_id for n in engine.query(question).source_nodes]
        answer = await engine.aquery(question)
        orders[f"{way}, async"] = [n.node_id for n in answer.source_nodes]
    for resource in (reranking, candidates, straight, through_milvus):
        await resource.aclose()

    expected = orders["the retriever"]
    assert len(expected) == 5
    assert orders == dict.fromkeys(orders, expected)
