"""Calls of Milvus within a flow: when they are tried again, and what they need before."""

from __future__ import annotations

from typing import Any

from milvus_vllm_retrievers._core.deadline import Deadline
from milvus_vllm_retrievers._core.milvus_errors import with_advice
from milvus_vllm_retrievers._core.requests import SearchCall
from milvus_vllm_retrievers._core.steps import CallMilvus, Flow, Pause
from milvus_vllm_retrievers.errors import RerankError, SearchError
from milvus_vllm_retrievers.ranker import OnError, VLLMRanker

# What a search with a ranker may use of the time left where a fallback is to follow: one that
# searches and reranks takes longer than one that only searches.
_SHARE_BEFORE_FALLBACK: dict[OnError, float] = {"raise": 1.0, "client": 0.5, "skip": 0.75}

# A Milvus that restarts is waited for longer than gRPC waits before it connects anew. A client
# that turned out to be closed is replaced at once.
_PAUSES = (0.0, 0.1, 0.2, 0.4, 0.8, 0.8)
_PATIENCE = 2.0


def call(step: CallMilvus) -> Flow[Any]:
    """Call Milvus, again for about two seconds where the connection is at fault, not the call.

    Raises:
        SearchError: It failed. Where the deadline leaves no time for another try, the error tells
            what the last one met that had time for it.
    """
    failed: SearchError | None = None
    patience = Deadline()
    for pause in (*_PAUSES, None):
        try:
            return (yield step)
        except SearchError as error:
            if not (error.is_of_connection or (failed and error.reason == "timeout")):
                raise
            if failed is None:
                patience = Deadline.after(_PATIENCE)
            failed = error if error.is_of_connection else failed
            assert failed is not None
            if error.reason == "timeout" or step.deadline.passes_within(pause or 0.0):
                told = f"{failed}; the call's timeout left no time to try again (raise timeout)"
                raise SearchError(told, reason=failed.reason) from failed
            if pause is None or patience.passes_within(pause):
                raise
        yield Pause(pause)
    raise AssertionError  # the last try returns or raises


def search(collection: str, wanted: SearchCall, deadline: Deadline) -> Flow[Any]:
    """Search, and return the rows of every query; a collection that is released is loaded first."""
    step = CallMilvus(
        f"{wanted.method} of collection {collection!r}", wanted.method, wanted.arguments, deadline
    )
    return (yield from loaded(collection, step))


def search_and_rerank(
    collection: str, wanted: SearchCall, ranker: VLLMRanker, deadline: Deadline
) -> Flow[Any]:
    """Search with a rerank Function; leave time for the fallback that the ranker asks for.

    Raises:
        RerankError: The rerank service failed.
        SearchError: The search failed.
    """
    limit = deadline.share(_SHARE_BEFORE_FALLBACK[ranker.on_error])
    try:
        return (yield from search(collection, wanted, limit))
    except (RerankError, SearchError) as error:
        failed = with_advice(error, ranker)
    raise failed


def loaded(collection: str, step: CallMilvus) -> Flow[Any]:
    """Call Milvus; a collection that turns out to be released is loaded first."""
    try:
        return (yield from call(step))
    except SearchError as error:
        if error.reason != "not_loaded":
            raise
    what, arguments = f"loading collection {collection!r}", {"collection_name": collection}
    yield from call(CallMilvus(what, "load_collection", arguments, step.deadline))
    return (yield from call(step))
