"""The mix of calls: makes up the same ones every time, and makes them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.soak.frameworks import Servers, aask, ask, items_of, make
from benchmarks.soak.questions import HIGH, REAL_SETUPS, ROWS, SETUPS, Question, Setup
from benchmarks.soak.right import Item

# How a call is made, and how often among a hundred. Most use what is long-lived and shared, as in
# production.
_BLOCKING = {
    "blocking": 32,
    "batch": 5,
    "batch, errors apart": 4,
    "in an event loop of its own": 6,
    "made, used and closed": 2,
    "made, used and dropped": 2,
}
_ASYNC = {
    "async": 32,
    "abatch": 5,
    "abatch, errors apart": 4,
    "given up by the caller": 4,
    "made, used and closed, async": 2,
    "made, used and dropped, async": 2,
}
_WEIGHTS = _BLOCKING | _ASYNC
_REAL_SHARE = 0.06  # of the calls, where there is a real vLLM: 300 of 5,000

Answer = list[Item] | BaseException


class GivenUp(Exception):  # noqa: N818 - it is no error
    """The caller did not want to wait any longer."""


@dataclass(frozen=True)
class Call:
    """One of the calls that are made.

    Attributes:
        name: How it is made.
        setup: What it is made on.
        questions: What is asked: several in a batch.
        patience: Seconds until it is given up, where it is.
    """

    name: str
    setup: Setup
    questions: Sequence[Question]
    patience: float = 0.0

    @property
    def is_async(self) -> bool:
        """Whether it is made on the event loop, or else on a thread."""
        return self.name in _ASYNC

    @property
    def limit(self) -> float:
        """Seconds it may take."""
        # Each query of a batch has the timeout for itself, and may wait for its turn.
        return self.setup.timeout * len(self.questions)

    @property
    def batch(self) -> dict[str, Any]:
        """The arguments of a LangChain batch."""
        return {
            "inputs": [question.text for question in self.questions],
            "return_exceptions": "errors apart" in self.name,
            **self.questions[0].per_call,
        }


class Mix:
    """Makes up calls, the same ones every time, and makes them.

    Args:
        servers: Where everything is.
        queries: What is asked.

    Attributes:
        things: The long-lived retrievers and rerankers.
    """

    def __init__(self, servers: Servers, queries: Sequence[str]) -> None:
        self._servers = servers
        self._queries = queries
        self._rng = random.Random(6)
        setups = SETUPS + (REAL_SETUPS if servers.real_vllm else ())
        self.things = {setup: make(setup, servers) for setup in setups}

    def call(self) -> Call:
        """Make up the next call."""
        rng = self._rng
        if self._servers.real_vllm and rng.random() < _REAL_SHARE:
            setup, name = rng.choice(REAL_SETUPS), rng.choice(("blocking", "async"))
            return Call(name, setup, [self._question(setup)])
        name = rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
        if "batch" not in name:
            setup = rng.choice(SETUPS)
            patience = rng.choice((0.0, 0.01, 0.05, 0.2))
            return Call(name, setup, [self._question(setup)], patience)
        setup = rng.choice([each for each in SETUPS if each.has_batch])
        first = self._question(setup)
        texts = rng.sample(self._queries, rng.randint(2, 5))
        return Call(name, setup, [replace(first, text=text) for text in texts])

    def _question(self, setup: Setup) -> Question:
        rng = self._rng
        text = rng.choice(self._queries)
        if setup.kind != "retriever":
            return Question(text, items=tuple(rng.sample(range(ROWS), rng.randint(setup.k, 16))))
        if setup.front == "llama_index":
            return Question(text)
        return Question(text, k=rng.choice((None, 1, 3, 8)), high=rng.choice((None, HIGH)))

    def run(self, call: Call) -> list[Answer]:
        """Make a blocking call, and return an answer to each question."""
        setup, question = call.setup, call.questions[0]
        match call.name:
            case "batch" | "batch, errors apart":
                return _answers(self.things[setup].batch(**call.batch))
            case "in an event loop of its own":
                return [asyncio.run(aask(self.things[setup], setup, question))]
            case "made, used and closed":
                with make(setup, self._servers) as thing:
                    return [ask(thing, setup, question)]
            case "made, used and dropped":
                return [ask(make(setup, self._servers), setup, question)]
        return [ask(self.things[setup], setup, question)]

    async def arun(self, call: Call) -> list[Answer]:
        """Make an async call, and return an answer to each question."""
        setup, question = call.setup, call.questions[0]
        match call.name:
            case "abatch" | "abatch, errors apart":
                return _answers(await self.things[setup].abatch(**call.batch))
            case "given up by the caller":
                return [await self._given_up(call)]
            case "made, used and closed, async":
                async with make(setup, self._servers) as thing:
                    return [await aask(thing, setup, question)]
            case "made, used and dropped, async":
                return [await aask(make(setup, self._servers), setup, question)]
        return [await aask(self.things[setup], setup, question)]

    async def _given_up(self, call: Call) -> list[Item]:
        thing = self.things[call.setup]
        asked = asyncio.ensure_future(aask(thing, call.setup, call.questions[0]))
        done, _ = await asyncio.wait([asked], timeout=call.patience)
        if not done:
            asked.cancel()
        try:
            return await asked
        except asyncio.CancelledError as error:
            raise GivenUp from error


def _answers(batch: Sequence[Any]) -> list[Answer]:
    return [each if isinstance(each, BaseException) else items_of(each) for each in batch]
