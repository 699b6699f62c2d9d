"""LangChain's callbacks for several queries that are retrieved together: one run for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from langchain_core.callbacks import (
    AsyncCallbackManager,
    AsyncCallbackManagerForRetrieverRun,
    CallbackManager,
    CallbackManagerForRetrieverRun,
)
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableConfig

from milvus_vllm_retrievers._core.hits import Hit
from milvus_vllm_retrievers._core.query import Query
from milvus_vllm_retrievers.errors import ConfigurationError
from milvus_vllm_retrievers.langchain._convert import to_document

Outcome = list[Document] | Exception


def start_runs(
    retriever: BaseRetriever, queries: list[str], configs: list[RunnableConfig]
) -> list[CallbackManagerForRetrieverRun]:
    """Start a run for each query, as `invoke` does."""
    return [
        CallbackManager.configure(**callbacks).on_retriever_start(None, query, **start)
        for query, callbacks, start in _runs(retriever, queries, configs)
    ]


async def astart_runs(
    retriever: BaseRetriever, queries: list[str], configs: list[RunnableConfig]
) -> list[AsyncCallbackManagerForRetrieverRun]:
    """Start a run for each query, as `ainvoke` does."""
    return [
        await AsyncCallbackManager.configure(**callbacks).on_retriever_start(None, query, **start)
        for query, callbacks, start in _runs(retriever, queries, configs)
    ]


def to_queries(texts: Sequence[str]) -> list[Query | ConfigurationError]:
    """Read the queries' texts; one that is none has its error in its place."""
    return [_to_query(text) for text in texts]


def _to_query(text: str) -> Query | ConfigurationError:
    try:
        return Query(text)
    except ConfigurationError as error:
        return error


def in_place(
    queries: Sequence[Query | ConfigurationError], found: Sequence[list[Hit] | Exception]
) -> list[Outcome]:
    """Return each query's documents or error, from what was found for those that are queries."""
    rest = iter(found)
    outcomes = [next(rest) if isinstance(query, Query) else query for query in queries]
    return [
        outcome if isinstance(outcome, Exception) else [to_document(hit) for hit in outcome]
        for outcome in outcomes
    ]


def answers(outcomes: Sequence[Outcome], *, return_exceptions: bool) -> list[Any]:
    """Return what `batch` returns, or raise the first error, as LangChain does."""
    failed = next((outcome for outcome in outcomes if isinstance(outcome, Exception)), None)
    if failed is not None and not return_exceptions:
        raise failed
    return list(outcomes)


def _runs(
    retriever: BaseRetriever, queries: list[str], configs: list[RunnableConfig]
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield each query, its callbacks, and what starts its run."""
    for query, one in zip(queries, configs, strict=True):
        traced = {**(one.get("metadata") or {}), **retriever._get_ls_params()}
        callbacks = {
            "inheritable_callbacks": one.get("callbacks"),
            "local_callbacks": None,
            "verbose": False,
            "inheritable_tags": one.get("tags"),
            "local_tags": retriever.tags,
            "inheritable_metadata": traced,
            "local_metadata": retriever.metadata,
        }
        start = {
            "name": one.get("run_name") or retriever.get_name(),
            "run_id": one.get("run_id"),
        }
        yield query, callbacks, start
