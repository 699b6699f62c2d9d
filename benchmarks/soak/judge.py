"""Judges what each call brought: an answer that is right, an error that is, or a failure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.soak.mix import Answer, Call, GivenUp
from benchmarks.soak.questions import Question
from benchmarks.soak.reference import Reference
from benchmarks.soak.right import WrongAnswerError, right_of
from milvus_vllm_retrievers.errors import (
    ConfigurationError,
    MilvusVLLMError,
    MissingDependencyError,
    RerankError,
    SearchError,
)


@dataclass
class Tally:
    """What came of the calls so far.

    Attributes:
        calls: How many have ended.
        outcomes: How often an answer came about in each way.
        errors: How often each error was raised.
        names: How often a call was made in each way.
        examples: One message of each error.
        failures: What was wrong, and what hung.
        longest: Seconds of the longest call, and how it was made.
    """

    calls: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    names: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    longest: tuple[float, str] = (0.0, "")

    @property
    def questions(self) -> int:
        """How many questions were answered, rightly or by an error."""
        return self.outcomes.total() + self.errors.total()

    def as_json(self) -> dict[str, Any]:
        """Return it for the report."""
        return {**vars(self), "questions": self.questions}


@dataclass(frozen=True)
class Judge:
    """Judges calls, and counts.

    Attributes:
        reference: What is right.
        tally: Where to count.
    """

    reference: Reference
    tally: Tally

    def ended(
        self, call: Call, answers: Sequence[Answer], seconds: float, *, disturbed: bool
    ) -> None:
        """Judge a call.

        Args:
            call: It.
            answers: What came back for each of its questions.
            seconds: How long it took.
            disturbed: Whether Milvus was down, or just up again, at some moment of that.
        """
        self.tally.longest = max(self.tally.longest, (seconds, call.name))
        self.tally.calls += 1
        self.tally.names[call.name] += 1
        for question, answer in zip(call.questions, answers, strict=True):
            try:
                self._judge(call, question, answer, disturbed=disturbed)
            except WrongAnswerError as wrong:
                self.tally.failures.append(f"{call.name} on {call.setup}, {question}: {wrong}")

    def _judge(self, call: Call, question: Question, answer: Answer, *, disturbed: bool) -> None:
        if isinstance(answer, BaseException):
            self._judge_error(call, answer, disturbed=disturbed)
        else:
            right = right_of(self.reference, call.setup, question)
            self.tally.outcomes[right.judge(answer)] += 1

    def _judge_error(self, call: Call, error: BaseException, *, disturbed: bool) -> None:
        if isinstance(error, WrongAnswerError):
            raise error
        if isinstance(error, GivenUp):
            self.tally.outcomes["given up by the caller"] += 1
            return
        kind = type(error).__name__
        self.tally.errors[kind] += 1
        self.tally.examples.setdefault(kind, f"{call.name} on {call.setup.kind}: {error}")
        if not isinstance(error, MilvusVLLMError):
            raise WrongAnswerError(f"an error of another kind: {error!r}") from error
        if isinstance(error, (ConfigurationError, MissingDependencyError)):
            raise WrongAnswerError(f"nothing is configured wrongly: {error!r}") from error
        if isinstance(error, RerankError) and call.setup.on_error == "skip":
            raise WrongAnswerError(f"on_error='skip' raised {error!r}") from error
        if isinstance(error, SearchError) and not disturbed:
            raise WrongAnswerError(f"Milvus was up: {error!r}") from error
