"""Scoring and ranking texts from this process, straight against vLLM."""

from __future__ import annotations

from collections.abc import Sequence

from milvus_vllm_retrievers._core import hits as hits_
from milvus_vllm_retrievers._core.cool_down import RerankService
from milvus_vllm_retrievers._core.deadline import Deadline
from milvus_vllm_retrievers._core.hits import Ranking
from milvus_vllm_retrievers._core.query import Query
from milvus_vllm_retrievers._core.steps import Flow, Rerank, Together
from milvus_vllm_retrievers.errors import MilvusVLLMError
from milvus_vllm_retrievers.ranker import VLLMRanker

Scores = list[float | None]
"""One score per text of a pool; None for a text that is null or empty."""


def rerank_texts(
    ranker: VLLMRanker,
    pools: Sequence[tuple[str, Sequence[str | None]]],
    deadline: Deadline,
    *,
    errors_apart: bool = False,
) -> Flow[list[Scores | MilvusVLLMError]]:
    """Score each query's texts in requests of `max_client_batch_size`, several at once.

    Texts that are null or empty are not sent: some models refuse them, and their whole request.

    Args:
        ranker: The model, the size of a request and how many may be in flight.
        pools: Query text and candidate texts, for each query.
        deadline: When all must be done.
        errors_apart: Whether a query's error takes the place of its scores.

    Returns:
        For each query one score per text, in the texts' order.
    """
    steps: list[Rerank] = []
    owners: list[tuple[int, list[int]]] = []  # for each step, its pool and its texts' places
    for owner, (query, texts) in enumerate(pools):
        filled = {i: text for i, text in enumerate(texts) if hits_.has_text(text)}
        size = ranker.max_client_batch_size or max(len(filled), 1)
        places = list(filled)
        for start in range(0, len(places), size):
            part = places[start : start + size]
            steps.append(Rerank(query, [filled[i] for i in part], deadline))
            owners.append((owner, part))
    results = (yield Together(steps, ranker.max_concurrency, errors_apart)) if steps else []
    scores: list[Scores | MilvusVLLMError] = [[None] * len(texts) for _, texts in pools]
    for (owner, part), result in zip(owners, results, strict=True):
        own = scores[owner]
        if isinstance(result, MilvusVLLMError):
            scores[owner] = result
        elif not isinstance(own, MilvusVLLMError):
            for i, score in zip(part, result, strict=True):
                own[i] = score
    return scores


def rank_texts(
    service: RerankService, query: Query, texts: Sequence[str], deadline: Deadline
) -> Flow[list[Ranking]]:
    """Rank given texts; with `on_error="skip"` a failure keeps their order, marked."""
    scores = (yield from scores_from_here(service, [(query.text, texts)], deadline))[0]
    if isinstance(scores, MilvusVLLMError):
        return hits_.as_given(range(len(texts)), str(scores))
    return hits_.ranked_by_client(scores)


def scores_from_here(
    service: RerankService,
    pools: Sequence[tuple[str, Sequence[str | None]]],
    deadline: Deadline,
) -> Flow[list[Scores | MilvusVLLMError]]:
    """Score pools; with `on_error="skip"` an error takes the place of a pool's scores."""
    may_fail = service.ranker.on_error == "skip"
    rest = service.from_here.rest() if may_fail else None
    if rest is not None:
        return [rest] * len(pools)
    scored = yield from rerank_texts(service.ranker, pools, deadline, errors_apart=may_fail)
    for (_, texts), scores in zip(pools, scored, strict=True):
        if not isinstance(scores, MilvusVLLMError):
            service.check_spread(texts, scores)
    if may_fail:
        service.from_here.note(
            [scores for scores in scored if isinstance(scores, MilvusVLLMError)],
            worked=any(map(_has_scores, scored)),
        )
    return scored


def _has_scores(scores: Scores | MilvusVLLMError) -> bool:
    return not isinstance(scores, MilvusVLLMError) and any(score is not None for score in scores)
