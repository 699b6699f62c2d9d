"""Having Milvus rank items by the primary keys of their rows."""

from __future__ import annotations

from collections.abc import Sequence

from milvus_vllm_retrievers._core import hits as hits_
from milvus_vllm_retrievers._core import requests
from milvus_vllm_retrievers._core.deadline import Deadline
from milvus_vllm_retrievers._core.hits import PrimaryKey, Ranking
from milvus_vllm_retrievers._core.milvus_calls import call, search_and_rerank
from milvus_vllm_retrievers._core.query import MAX_LIMIT, Item, OnMissing, Query, SearchOptions
from milvus_vllm_retrievers._core.rerank_texts import rank_texts
from milvus_vllm_retrievers._core.steps import CallMilvus, Flow
from milvus_vllm_retrievers._core.target import Reranking, Target
from milvus_vllm_retrievers.errors import ConfigurationError, RerankError, SearchError


def rank_rows(
    target: Target,
    reranking: Reranking,
    query: Query,
    items: Sequence[Item],
    options: SearchOptions,
    deadline: Deadline,
    on_missing: OnMissing,
) -> Flow[list[Ranking]]:
    """Have Milvus rank items by their primary keys.

    Args:
        target: The collection.
        reranking: The model, and Milvus's provider for it.
        query: The question.
        items: What to rank.
        options: Partitions, consistency level and search parameters.
        deadline: When it must be done.
        on_missing: What to do with items that have no row: raise, or keep them last, marked.
    """
    ranker, _, health = reranking
    keys = [target.layout.keys_of(item) for item in items]
    try:
        spared = health.in_milvus.rest() if ranker.on_error != "raise" else None
        if spared is not None:
            raise spared
        scores = yield from _scores_by_key(target, reranking, query, keys, options, deadline)
    except (RerankError, SearchError) as error:
        if ranker.on_error == "raise":
            raise
        if isinstance(error, RerankError):
            health.in_milvus.note([error], worked=False)
        if ranker.on_error == "client":
            texts = [item.text for item in items]
            return (yield from rank_texts(ranker, health, query, texts, deadline))
        return hits_.as_given(range(len(items)), str(error))
    health.in_milvus.note([], worked=bool(scores))
    rankings = hits_.ranked_by_milvus(keys, scores, target.layout.name)
    health.check_spread(
        [items[ranking.index].text for ranking in rankings],
        [ranking.relevance_score for ranking in rankings],
    )
    missing = [ranking.index for ranking in rankings if ranking.reranked_by is None]
    if missing and on_missing == "raise":
        raise SearchError(
            f"{len(missing)} of {len(items)} items have no row in collection "
            f"{target.layout.name!r}, the first has id {items[missing[0]].id!r}. Pass "
            "on_missing='keep' to get such items last, marked"
        )
    return rankings


def _scores_by_key(
    target: Target,
    reranking: Reranking,
    query: Query,
    keys: Sequence[Sequence[PrimaryKey]],
    options: SearchOptions,
    deadline: Deadline,
) -> Flow[dict[PrimaryKey, float]]:
    """Score the rows whose primary key belongs to one of the items."""
    layout = target.layout
    asked = list(dict.fromkeys(key for may_be in keys for key in may_be))
    if len(asked) > MAX_LIMIT:
        raise ConfigurationError(f"at most {MAX_LIMIT:,} items can be reranked at once")
    if not asked:
        return {}
    function = reranking.function(query, target)
    expr = target.spelled(requests.has_key_in(layout, asked))
    wanted = requests.rows_call(layout, expr, len(asked), options, function)
    found = search_and_rerank(layout.name, wanted, reranking.ranker, deadline)
    rows = (yield from found)[0]
    scores = target.rows.scores(rows)
    lost = [key for may_be in keys if not scores.keys() & set(may_be) for key in may_be]
    if lost:
        yield from _check_gone(target, lost, options, deadline)
    return scores


def _check_gone(
    target: Target, keys: Sequence[PrimaryKey], options: SearchOptions, deadline: Deadline
) -> Flow[None]:
    """Make sure that rows which a search has not returned are gone, not just not found."""
    layout = target.layout
    expr = target.spelled(requests.has_key_in(layout, keys))
    arguments = requests.lookup_arguments(layout, expr, len(keys), options)
    what = f"query of collection {layout.name!r}"
    rows = yield from call(CallMilvus(what, "query", arguments, deadline))
    if rows:
        raise SearchError(
            f"the index of collection {layout.name!r} did not return {len(rows)} rows that are "
            f"there, the first has key {rows[0][layout.primary_key]!r}: it is approximate. Pass "
            "search_params that have it look everywhere, or use VLLMRerank"
        )
