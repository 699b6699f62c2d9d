"""Calls of Milvus within a flow: what they need to rerank, and what their failures mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from milvus_vllm_retrievers._core.deadline import Deadline
from milvus_vllm_retrievers._core.requests import SearchCall
from milvus_vllm_retrievers._core.server import Server
from milvus_vllm_retrievers._core.steps import CallMilvus, Flow, Together
from milvus_vllm_retrievers._core.target import Target
from milvus_vllm_retrievers.errors import (
    ConfigurationError,
    MilvusVLLMError,
    RerankTimeoutError,
    SearchError,
    SearchFailure,
)
from milvus_vllm_retrievers.ranker import OnError, Provider

# What a search with a ranker may use of the time left where a fallback is to follow: one that
# searches and reranks takes longer than one that only searches.
_SHARE_BEFORE_FALLBACK: dict[OnError, float] = {"raise": 1.0, "client": 0.5, "skip": 0.75}


def before_fallback(deadline: Deadline, on_error: OnError) -> Deadline:
    """Return when a search with a ranker must be done, so that its fallback has time."""
    return deadline.share(_SHARE_BEFORE_FALLBACK[on_error])


def provider_of(server: Server, what: str) -> Provider:
    """Return the provider through which the server reranks.

    Raises:
        ConfigurationError: It has none, and would ignore a ranker in silence.
    """
    if server.provider is None:
        raise ConfigurationError(
            f"{what} needs Milvus 2.6 or later; this server is {server.version!r} and would "
            "ignore the ranker in silence. Rerank from this process: mode='auto' or 'client', "
            "or VLLMRerank"
        )
    return server.provider


def call_once(target: Target, call: SearchCall, deadline: Deadline) -> Flow[Any]:
    """Search once, and return the rows of every query."""
    answer = (yield from call_all(target, [call], deadline))[0]
    if isinstance(answer, MilvusVLLMError):
        raise answer
    return answer


def call_all(
    target: Target, calls: Sequence[SearchCall], deadline: Deadline, limit: int = 1
) -> Flow[list[Any]]:
    """Search, at most `limit` calls at once; return each one's rows, or its error in their place.

    A collection that turns out to be released is loaded first.
    """
    name = target.layout.name
    steps = [
        CallMilvus(f"{call.method} of collection {name!r}", call.method, call.arguments, deadline)
        for call in calls
    ]
    answers = yield from _all(steps, limit)
    released = [i for i, answer in enumerate(answers) if _failed_as(answer, "not_loaded")]
    if released:
        yield CallMilvus(
            f"loading collection {name!r}", "load_collection", {"collection_name": name}, deadline
        )
        again = yield from _all([steps[i] for i in released], limit)
        for i, answer in zip(released, again, strict=True):
            answers[i] = answer
    return answers


def _all(steps: Sequence[CallMilvus], limit: int) -> Flow[list[Any]]:
    if len(steps) > 1:
        answers: list[Any] = yield Together(steps, limit, errors_apart=True)
        return answers
    try:
        return [(yield steps[0])]
    except MilvusVLLMError as error:
        return [error]


def _failed_as(answer: Any, reason: SearchFailure) -> bool:
    return isinstance(answer, SearchError) and answer.reason == reason


def meant_in_reranking(error: MilvusVLLMError) -> MilvusVLLMError:
    """Return what a failed search with a rerank Function means: a server's time limit is its."""
    if not _failed_as(error, "rerank_timeout"):
        return error
    late = RerankTimeoutError(f"reranking inside Milvus took too long: {error}")
    late.__cause__ = error
    return late
