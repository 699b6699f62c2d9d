"""The six classes of both front ends, and how each is asked for the text that fits a word best."""

from __future__ import annotations

from typing import Any

from langchain_core.documents import Document
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.schema import NodeWithScore, TextNode

from milvus_vllm_retrievers import VLLMRanker, langchain
from milvus_vllm_retrievers import llama_index as li
from tests.corpus import TEXTS
from tests.fakes import LetterEmbeddings
from tests.trust.forking import WORDS

NAMES = ("MilvusVLLMRetriever", "VLLMRerank", "MilvusVLLMRerank")
CLASSES = [getattr(module, name) for module in (langchain, li) for name in NAMES]
WITH_MILVUS = [class_ for class_ in CLASSES if class_.__name__ != "VLLMRerank"]

EXPECTED = dict(zip(WORDS, TEXTS, strict=True))

_DOCUMENTS = [Document(id=str(i), page_content=text) for i, text in enumerate(TEXTS)]
_NODES = [NodeWithScore(node=TextNode(id_=str(i), text=text)) for i, text in enumerate(TEXTS)]


def fits(word: str, text: str) -> float:
    """Score a text as the rerank model of these tests does."""
    return 0.5 + (word in text)


def name_of(class_: type) -> str:
    """Name a class and its framework, for a test's id."""
    return f"{class_.__module__.split('.')[1]}.{class_.__name__}"


def make(class_: type, collection: str, milvus: str, ranker: VLLMRanker, **arguments: Any) -> Any:
    """Make an object of a class; a retriever finds every text, so that the model decides alone."""
    if class_.__name__ == "VLLMRerank":
        return class_(ranker)
    if class_ is langchain.MilvusVLLMRetriever:
        arguments = {"vector_field": "dense", "embedding": LetterEmbeddings(), **arguments}
    if class_ is li.MilvusVLLMRetriever:
        embed_model = MockEmbedding(LetterEmbeddings.dim)
        arguments = {"vector_field": "dense", "embed_model": embed_model, **arguments}
    return class_(collection_name=collection, ranker=ranker, uri=milvus, **arguments)


def best(subject: Any, word: str) -> str:
    """Ask an object, blocking, and return the text it has first."""
    if isinstance(subject, langchain.MilvusVLLMRetriever):
        return subject.invoke(word)[0].page_content
    if isinstance(subject, li.MilvusVLLMRetriever):
        return subject.retrieve(word)[0].text
    if type(subject).__module__.startswith(langchain.__name__):
        return subject.compress_documents(_DOCUMENTS, word)[0].page_content
    return subject.postprocess_nodes(_NODES, query_str=word)[0].text


async def abest(subject: Any, word: str) -> str:
    """Ask an object; the async twin of `best`."""
    if isinstance(subject, langchain.MilvusVLLMRetriever):
        return (await subject.ainvoke(word))[0].page_content
    if isinstance(subject, li.MilvusVLLMRetriever):
        return (await subject.aretrieve(word))[0].text
    if type(subject).__module__.startswith(langchain.__name__):
        return (await subject.acompress_documents(_DOCUMENTS, word))[0].page_content
    return (await subject.apostprocess_nodes(_NODES, query_str=word))[0].text
