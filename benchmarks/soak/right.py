"""What an answer is, and which answers to a question are right."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.soak.faulty_vllm import float32, score
from benchmarks.soak.questions import TEXTS, Question, Setup
from benchmarks.soak.reference import Reference, Scored


@dataclass(frozen=True)
class Item:
    """One returned item, whatever the framework.

    Attributes:
        key: The primary key as text.
        text: Its text.
        score: The relevance score.
        by: Who reranked it.
        error: Why it was not reranked.
    """

    key: str
    text: str
    score: float | None
    by: str | None
    error: str | None


class WrongAnswerError(Exception):
    """An answer is not what it should be."""


def right_of(reference: Reference, setup: Setup, question: Question) -> Right | RightOfRealModel:
    """Return what may be answered to a question."""
    keys = list(question.items)
    if setup.kind == "retriever":
        retrieved = reference.retrieved(question, setup)
        keys = [int(key) for key, _ in retrieved]
    else:
        retrieved = [(str(key), -float(place)) for place, key in enumerate(keys)]
    k = len(keys) if setup.kind == "rows" else question.k or setup.k
    if setup.real:
        return RightOfRealModel(setup.rerankers, set(map(str, keys)), k, setup.kind == "retriever")
    as_given = {key: place for place, key in enumerate(keys)}
    by_key = {key: key for key in keys}
    ties = {"milvus": by_key, "client": by_key if setup.kind == "retriever" else as_given}
    ranked = {who: _by_score(question.text, keys, ties[who].__getitem__) for who in setup.rerankers}
    return Right(ranked, retrieved if setup.on_error == "skip" else None, k)


def _by_score(query: str, keys: Sequence[int], ties: Callable[[int], int]) -> Scored:
    """Order rows by the model's score for the query."""
    scores = {key: float32(score(query, TEXTS[key])) for key in keys}
    ordered = sorted(scores, key=lambda key: (-scores[key], ties(key)))
    return [(str(key), scores[key]) for key in ordered]


@dataclass(frozen=True)
class Right:
    """What may be answered to a question.

    Attributes:
        ranked: The answer, for each that may have reranked it.
        retrieved: The order without reranking; None if that is no answer. Items of equal score
            may stand in any order.
        k: How many items come back.
    """

    ranked: Mapping[str, Scored]
    retrieved: Scored | None
    k: int

    def judge(self, items: Sequence[Item]) -> str:
        """Return how the answer came about.

        Raises:
            WrongAnswerError: It is wrong.
        """
        wrong_texts = [item.key for item in items if item.text != TEXTS[int(item.key)]]
        if wrong_texts:
            raise WrongAnswerError(f"items with another row's text: {wrong_texts}")
        rerankers = {item.by for item in items}
        if len(rerankers) != 1:
            raise WrongAnswerError(f"reranked by {rerankers}, {len(items)} items")
        reranker = rerankers.pop()
        if reranker is None:
            self._judge_degraded(items)
            return "degraded"
        self._judge_ranked(reranker, items)
        return f"reranked by {reranker}"

    def _judge_ranked(self, reranker: str, items: Sequence[Item]) -> None:
        if reranker not in self.ranked:
            raise WrongAnswerError(f"reranked by {reranker}, which was not asked for")
        found, right = [(item.key, item.score) for item in items], self.ranked[reranker][: self.k]
        if found != right:
            raise WrongAnswerError(f"reranked by {reranker}: {found} in place of {right}")
        if any(item.error for item in items):
            raise WrongAnswerError("reranked, and marked as not reranked")

    def _judge_degraded(self, items: Sequence[Item]) -> None:
        if self.retrieved is None:
            raise WrongAnswerError(f"degraded, which on_error forbids: {items[0].error}")
        if any(not item.error or item.score is not None for item in items):
            raise WrongAnswerError("degraded without a mark, or with a score")
        scores = dict(self.retrieved)
        found = [scores.get(item.key) for item in items]
        right = [score for _, score in self.retrieved[: self.k]]
        if found != right or len({item.key for item in items}) != len(items):
            keys = [item.key for item in items]
            raise WrongAnswerError(f"degraded: {keys} in place of {self.retrieved[: self.k]}")


@dataclass(frozen=True)
class RightOfRealModel:
    """What may be answered where a real model gives the scores: any, in order.

    Attributes:
        rerankers: Who may have reranked it.
        candidates: The keys it must come from.
        k: How many items come back.
        by_key: Whether equal scores are ordered by key.
    """

    rerankers: set[str]
    candidates: set[str]
    k: int
    by_key: bool

    def judge(self, items: Sequence[Item]) -> str:
        """Return how the answer came about.

        Raises:
            WrongAnswerError: It is wrong.
        """
        order = [(-(item.score or 0.0), int(item.key) if self.by_key else 0) for item in items]
        keys = {item.key for item in items}
        if order != sorted(order) or len(items) != self.k:
            raise WrongAnswerError(f"real vLLM: {order}")
        if len(keys) != len(items) or not keys <= self.candidates:
            raise WrongAnswerError(f"real vLLM: {keys} are not all of {self.candidates}")
        if any(item.by not in self.rerankers or item.score is None for item in items):
            raise WrongAnswerError("real vLLM: not reranked as asked")
        return "reranked by the real vLLM"
