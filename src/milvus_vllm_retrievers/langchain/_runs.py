"""LangChain's callbacks for several queries that are retrieved together: one run for each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from langchain_core.callbacks import (
    AsyncCallbackManager,
    AsyncCallbackManagerForRetrieverRun,
    CallbackManager,
    CallbackManagerForRetrieverRun,
)
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import get_config_list

Config = RunnableConfig | list[RunnableConfig] | None


def start_runs(
    retriever: BaseRetriever, queries: list[str], config: Config
) -> list[CallbackManagerForRetrieverRun]:
    """Start a run for each query, as `invoke` does."""
    return [
        CallbackManager.configure(**callbacks).on_retriever_start(None, query, **start)
        for query, callbacks, start in _runs(retriever, queries, config)
    ]


async def astart_runs(
    retriever: BaseRetriever, queries: list[str], config: Config
) -> list[AsyncCallbackManagerForRetrieverRun]:
    """Start a run for each query, as `ainvoke` does."""
    return [
        await AsyncCallbackManager.configure(**callbacks).on_retriever_start(None, query, **start)
        for query, callbacks, start in _runs(retriever, queries, config)
    ]


def _runs(
    retriever: BaseRetriever, queries: list[str], config: Config
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield each query, its callbacks, and what starts its run."""
    for query, one in zip(queries, get_config_list(config, len(queries)), strict=True):
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
