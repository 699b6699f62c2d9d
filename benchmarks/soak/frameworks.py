"""The two frameworks: makes retrievers and rerankers and asks them, blocking and async."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode
from tests.existing.models import LetterEmbedModel
from tests.fakes import LetterEmbeddings

from benchmarks.soak.questions import COLLECTION, FETCH_K, TEXTS, Front, Question, Setup
from benchmarks.soak.right import Item, WrongAnswerError
from milvus_vllm_retrievers import langchain as for_langchain
from milvus_vllm_retrievers import llama_index as for_llama_index
from milvus_vllm_retrievers.ranker import VLLMRanker

RANKER_TIMEOUT = 3.0
_COOL_DOWN = 0.2


@dataclass(frozen=True)
class Servers:
    """Where everything is.

    Attributes:
        milvus: Milvus's URI.
        vllm: The URL of the vLLM that fails.
        real_vllm: A real vLLM's URL.
    """

    milvus: str
    vllm: str
    real_vllm: str | None


def make(setup: Setup, servers: Servers) -> Any:
    """Make the retriever or reranker."""
    fronts: dict[Front, Any] = {"langchain": for_langchain, "llama_index": for_llama_index}
    front, ranker = fronts[setup.front], _ranker(setup, servers)
    if setup.kind == "texts":
        return front.VLLMRerank(ranker=ranker, top_n=setup.k, timeout=setup.timeout)
    common = {"uri": servers.milvus, "ranker": ranker, "timeout": setup.timeout}
    if setup.kind == "rows":
        return front.MilvusVLLMRerank(COLLECTION, **common)
    of_framework = (
        {"embedding": LetterEmbeddings(), "k": setup.k}
        if setup.front == "langchain"
        else {"embed_model": LetterEmbedModel(), "similarity_top_k": setup.k}
    )
    return front.MilvusVLLMRetriever(
        COLLECTION,
        vector_field=list(setup.fields),
        fetch_k=FETCH_K,
        expr=f"number >= {setup.low}" if setup.low else None,
        **common,
        **of_framework,
    )


def _ranker(setup: Setup, servers: Servers) -> VLLMRanker:
    endpoint = servers.real_vllm if setup.real else servers.vllm
    assert endpoint is not None
    return VLLMRanker(
        endpoint,
        mode=setup.mode,
        on_error=setup.on_error,
        timeout=setup.timeout / 2 if setup.real else RANKER_TIMEOUT,
        cool_down=_COOL_DOWN,
        max_client_batch_size=setup.batch,
    )


def ask(thing: Any, setup: Setup, question: Question) -> list[Item]:
    """Ask a retriever or reranker, blocking."""
    match setup:
        case Setup("langchain", "retriever"):
            return items_of(thing.invoke(question.text, **question.per_call))
        case Setup("langchain", _):
            return items_of(thing.compress_documents(_documents(question), question.text))
        case Setup(_, "retriever"):
            return _items_of_nodes(thing.retrieve(question.text))
    return _items_of_nodes(thing.postprocess_nodes(_nodes(question), query_str=question.text))


async def aask(thing: Any, setup: Setup, question: Question) -> list[Item]:
    """Ask a retriever or reranker, async."""
    match setup:
        case Setup("langchain", "retriever"):
            return items_of(await thing.ainvoke(question.text, **question.per_call))
        case Setup("langchain", _):
            return items_of(await thing.acompress_documents(_documents(question), question.text))
        case Setup(_, "retriever"):
            return _items_of_nodes(await thing.aretrieve(question.text))
    nodes = await thing.apostprocess_nodes(_nodes(question), query_str=question.text)
    return _items_of_nodes(nodes)


def items_of(documents: Sequence[Document]) -> list[Item]:
    """Return what LangChain's documents say."""
    return [_item(str(each.id), each.page_content, each.metadata) for each in documents]


def _items_of_nodes(nodes: Sequence[NodeWithScore]) -> list[Item]:
    for each in nodes:
        if each.metadata["reranked_by"] and each.score != each.metadata["relevance_score"]:
            raise WrongAnswerError(f"score {each.score}, metadata {each.metadata}")
    return [_item(each.node_id, each.text, each.metadata) for each in nodes]


def _item(key: str, text: str, metadata: Mapping[str, Any]) -> Item:
    return Item(
        key,
        text,
        metadata["relevance_score"],
        metadata["reranked_by"],
        metadata.get("rerank_error"),
    )


def _documents(question: Question) -> list[Document]:
    return [Document(id=str(key), page_content=TEXTS[key]) for key in question.items]


def _nodes(question: Question) -> list[NodeWithScore]:
    return [
        NodeWithScore(node=TextNode(id_=str(key), text=TEXTS[key]), score=0.5)
        for key in question.items
    ]
