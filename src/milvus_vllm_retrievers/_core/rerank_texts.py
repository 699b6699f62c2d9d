"""Scoring and ranking texts from this process, straight against the rerank service."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from milvus_vllm_retrievers._core import hits as hits_
from milvus_vllm_retrievers._core import services
from milvus_vllm_retrievers._core.cool_down import Health
from milvus_vllm_retrievers._core.deadline import Deadline
from milvus_vllm_retrievers._core.hits import Ranking
from milvus_vllm_retrievers._core.query import Query
from milvus_vllm_retrievers._core.steps import Flow, Pause, Send, Together
from milvus_vllm_retrievers.errors import RerankError
from milvus_vllm_retrievers.ranker import VLLMRanker

Scores = list[float | None]
"""One score per text; None for a text that is null or empty."""


def rank_texts(
    ranker: VLLMRanker,
    health: Health,
    query: Query,
    texts: Sequence[str | None],
    deadline: Deadline,
) -> Flow[list[Ranking]]:
    """Rank given texts; with `on_error="skip"` a failure keeps their order, marked."""
    try:
        scores = yield from scores_from_here(ranker, health, query.text, texts, deadline)
    except RerankError as error:
        if ranker.on_error != "skip":
            raise
        return hits_.as_given(range(len(texts)), str(error))
    return hits_.ranked_by_client(scores)


def scores_from_here(
    ranker: VLLMRanker,
    health: Health,
    query: str,
    texts: Sequence[str | None],
    deadline: Deadline,
    in_flight: int | None = None,
) -> Flow[Scores]:
    """Score texts, and note how that went; a service that is spared raises without being asked.

    Args:
        ranker: The model and how it is asked.
        health: How the service has been doing.
        query: What the texts are scored against.
        texts: The texts.
        deadline: When all must be done.
        in_flight: Requests at once; None is the ranker's `max_concurrency`.
    """
    may_fail = ranker.on_error == "skip"
    if may_fail and (spared := health.from_here.rest()):
        raise spared
    try:
        limit = in_flight or ranker.max_concurrency
        scores = yield from scores_of(ranker, health, query, texts, deadline, limit)
    except RerankError as error:
        if may_fail:
            health.from_here.note([error], worked=False)
        raise
    health.check_spread(texts, scores)
    if may_fail:
        health.from_here.note([], worked=any(score is not None for score in scores))
    return scores


def scores_of(
    ranker: VLLMRanker,
    health: Health,
    query: str,
    texts: Sequence[str | None],
    deadline: Deadline,
    in_flight: int,
) -> Flow[Scores]:
    """Score texts in requests of `max_client_batch_size`, several at once.

    Texts that are null or empty are not sent: some models refuse them, and their whole request.
    """
    places = [i for i, text in enumerate(texts) if hits_.has_text(text)]
    filled = [text for text in texts if hits_.has_text(text)]
    scores: Scores = [None] * len(texts)
    size = ranker.max_client_batch_size or len(filled)
    if len(filled) <= size:
        found = [(yield from scored(ranker, health, query, filled, deadline))] if filled else []
    else:
        parts = [filled[start : start + size] for start in range(0, len(filled), size)]
        flows = [scored(ranker, health, query, part, deadline) for part in parts]
        found = yield Together(flows, in_flight)
    for i, score in zip(places, (score for part in found for score in part), strict=True):
        scores[i] = score
    return scores


def scored(
    ranker: VLLMRanker, health: Health, query: str, texts: Sequence[str], deadline: Deadline
) -> Flow[list[float]]:
    """Score texts in one request, tried again as the ranker says.

    Raises:
        RerankError: No try brought a score for every text.
    """
    request = services.build_request(ranker, query, texts)
    for attempt in count(1):
        try:
            answer = yield Send(request, deadline)
            scores = services.read_scores(answer, request)
        except RerankError as error:
            left = deadline.remaining()
            pause = services.pause_before_retry(error, attempt, ranker, left)
            if pause is None:
                raise
        else:
            health.model = health.model or services.read_model(answer)
            return scores
        yield Pause(pause)
    raise AssertionError  # the last try returns or raises


def served_models(ranker: VLLMRanker, deadline: Deadline) -> Flow[list[str]]:
    """Ask once which models the ranker's endpoint serves.

    Raises:
        RerankError: It could not be asked.
    """
    request = services.build_models_request(ranker)
    return services.read_models((yield Send(request, deadline)), request)
