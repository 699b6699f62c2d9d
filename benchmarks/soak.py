"""A soak: thousands of mixed calls, 32 at a time, while the servers fail again and again.

    python -m benchmarks.soak                   5,000 calls
    python -m benchmarks.soak --queries 1000    a shorter run

Every call, of both frameworks, blocking and async, must bring the one right answer that its
`on_error` allows (the items, their order and their scores are known beforehand), or an error of
this package, in time. Nothing may pile up: file descriptors, threads, memory and tasks are measured
after the first 500 calls and at the end. Where VLLM_ENDPOINT is set, a part of the calls reranks
with that real vLLM. `make soak` runs it beside one.

The other processes are Milvus (`tests.milvus26`, killed and restarted on the way) and a vLLM that
fails (`benchmarks.faulty_vllm`), so that what is measured is the client alone. The figures are
printed and written to benchmarks/soak.json; the exit code is 1 if anything went wrong or grew.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import faulthandler
import gc
import json
import logging
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, Literal

import httpx
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode
from pymilvus import AnnSearchRequest, MilvusClient, RRFRanker
from tests import corpus
from tests.existing.models import LetterEmbedModel
from tests.fakes import LetterEmbeddings
from tests.milvus26.process import running_module

from benchmarks.faulty_vllm import float32, score
from benchmarks.harness import ROOT, describe_machine, package_versions, real_vllm
from milvus_vllm_retrievers import langchain as for_langchain
from milvus_vllm_retrievers import llama_index as for_llama_index
from milvus_vllm_retrievers.errors import (
    ConfigurationError,
    MilvusVLLMError,
    MissingDependencyError,
    RerankError,
    SearchError,
)
from milvus_vllm_retrievers.ranker import Mode, OnError, VLLMRanker

CALLS = 5000
BEFORE_FIRST_FIGURES = 500
IN_FLIGHT = 32
REAL_SHARE = 0.06  # of the calls, where there is a real vLLM: 300 of 5,000
FAULT_EVERY = 50
RESULTS = Path(__file__).with_name("soak.json")

# What may be there at the end beyond what was there after the first 500 calls. A pool of
# connections may hold one more here, one fewer there.
MORE_FDS = 8
MORE_THREADS = 8
MORE_RSS, MORE_RSS_MB = 1.10, 20.0

RANKER_TIMEOUT = 3.0
STALL = 4.0  # longer than the ranker waits
CALL_TIMEOUT = 15.0
REAL_TIMEOUT = 60.0  # how fast a real model is on a busy machine is not the question here
MARGIN = 5.0  # of a call beyond its timeout, before it counts as hanging; two cores are busy
GIVE_UP_AFTER = 60.0  # beyond that: it will not come back
COOL_DOWN = 0.2
# A Milvus that is up again is found again within gRPC's second and our own two of retries.
GRACE = 4.0
KEEP_ALIVE = 3.5  # idle connections are let go of on the first use after that

COLLECTION = "soak"
ROWS = 200
QUERIES = 32
FETCH_K = 20
LOW, HIGH = 40, 120  # filters on the rows' numbers, fixed and per call
WORDS = sorted(set(" ".join(corpus.TEXTS).lower().replace(".", "").replace(",", "").split()))


def say(text: str) -> None:
    """Tell the person who waits."""
    print(f"[soak] {text}", flush=True)


# --- What is asked, and what is right -------------------------------------------------------------

Kind = Literal["retriever", "texts", "rows"]
Front = Literal["langchain", "llama_index"]
Scored = list[tuple[str, float]]
"""Primary keys as texts, with scores, best first."""


@dataclass(frozen=True)
class Setup:
    """A retriever or reranker: what it is and what it does when reranking fails.

    Attributes:
        front: The framework.
        kind: A retriever, a VLLMRerank ("texts") or a MilvusVLLMRerank ("rows").
        mode: Who reranks.
        on_error: What happens if that fails.
        fields: The vector fields that are searched.
        k: How many items come back.
        low: The rows' least number, its own filter.
        batch: Documents per rerank request.
        real: Whether it uses the real vLLM.
    """

    front: Front
    kind: Kind
    mode: Mode
    on_error: OnError
    fields: tuple[str, ...] = ("sparse", "dense")
    k: int = 5
    low: int = 0
    batch: int | None = None
    real: bool = False

    @property
    def timeout(self) -> float:
        """Seconds one call may take."""
        return REAL_TIMEOUT if self.real else CALL_TIMEOUT

    @property
    def has_batch(self) -> bool:
        """Whether it takes several questions in one call."""
        return self.front == "langchain" and self.kind == "retriever"

    @property
    def rerankers(self) -> set[str]:
        """Who may have reranked an answer."""
        if self.mode == "client" or self.kind == "texts":
            return {"client"}
        return {"milvus", "client"} if self.on_error == "client" else {"milvus"}


SETUPS = (
    Setup("langchain", "retriever", "server", "raise"),
    Setup("langchain", "retriever", "server", "client", ("sparse",), low=LOW),
    Setup("langchain", "retriever", "server", "skip", ("dense",), k=FETCH_K),
    Setup("langchain", "retriever", "client", "raise", ("dense",), batch=8),
    Setup("langchain", "retriever", "client", "skip", low=LOW),
    Setup("langchain", "retriever", "auto", "client"),
    Setup("llama_index", "retriever", "server", "raise", ("sparse",), low=LOW),
    Setup("llama_index", "retriever", "server", "client"),
    Setup("llama_index", "retriever", "client", "raise", ("dense",)),
    Setup("llama_index", "retriever", "client", "skip", batch=8),
    Setup("llama_index", "retriever", "auto", "skip", low=LOW),
    Setup("langchain", "texts", "client", "raise", batch=4),
    Setup("langchain", "texts", "client", "skip"),
    Setup("llama_index", "texts", "client", "raise"),
    Setup("llama_index", "texts", "client", "skip", batch=4),
    Setup("langchain", "rows", "server", "raise"),
    Setup("langchain", "rows", "auto", "client"),
    Setup("llama_index", "rows", "server", "skip"),
    Setup("llama_index", "rows", "server", "client"),
)
REAL_SETUPS = (
    Setup("langchain", "retriever", "server", "raise", ("sparse",), real=True),
    Setup("langchain", "retriever", "client", "raise", ("dense",), real=True),
    Setup("llama_index", "retriever", "client", "raise", real=True),
    Setup("llama_index", "texts", "client", "raise", real=True),
)


@dataclass(frozen=True)
class Question:
    """One query, and what goes with it.

    Attributes:
        text: The query.
        items: The rows that are to be reranked, in the order they are given.
        k: How many items are to come back; None leaves it to the retriever.
        high: The rows' highest number, exclusive: a filter per call; None is no filter.
    """

    text: str
    items: tuple[int, ...] = ()
    k: int | None = None
    high: int | None = None

    @property
    def per_call(self) -> dict[str, Any]:
        """What a LangChain retriever is given beside the query."""
        given = {"k": self.k, "expr": self.high and f"number < {self.high}"}
        return {name: value for name, value in given.items() if value}


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


def _texts() -> list[str]:
    rng = random.Random(4)
    return [
        " ".join(rng.choices(WORDS, k=rng.randrange(8, 60))) + f" {number}"
        for number in range(ROWS)
    ]


TEXTS = _texts()


def by_score(question: str, keys: Sequence[int], ties: Callable[[int], int]) -> Scored:
    """Order rows by the model's score for the question."""
    scores = {key: float32(score(question, TEXTS[key])) for key in keys}
    ordered = sorted(scores, key=lambda key: (-scores[key], ties(key)))
    return [(str(key), scores[key]) for key in ordered]


class Reference:
    """What Milvus finds for every question, asked beforehand with plain pymilvus.

    Questions whose candidates end between two equal scores are left out: for them, more than one
    pool is right.

    Args:
        client: The client to ask with.
    """

    def __init__(self, client: MilvusClient) -> None:
        self._client = client
        self._legs: dict[tuple[str, str, int, int], Scored] = {}
        self._fused: dict[tuple[str, int, int], Scored] = {}
        self.questions: list[str] = []
        rng = random.Random(5)
        while len(self.questions) < QUERIES:
            text = " ".join(rng.sample(WORDS, 3))
            if text not in self.questions and all(self._ask(text, *f) for f in self._filters()):
                self.questions.append(text)

    def retrieved(self, question: Question, setup: Setup) -> Scored:
        """Return the candidates in the order in which they are found."""
        low, high = setup.low, question.high or ROWS
        if len(setup.fields) == 1:
            return self._legs[question.text, setup.fields[0], low, high]
        return self._fused[question.text, low, high]

    @staticmethod
    def _filters() -> list[tuple[int, int]]:
        return [(low, high) for low in (0, LOW) for high in (HIGH, ROWS)]

    def _ask(self, text: str, low: int, high: int) -> bool:
        """Ask with every field, alone and together; tell whether the candidates are definite."""
        expr = f"number >= {low} and number < {high}"
        data = {"sparse": text, "dense": LetterEmbeddings().embed_query(text)}
        for name, value in data.items():
            found = self._client.search(
                COLLECTION, [value], anns_field=name, limit=FETCH_K + 1, filter=expr
            )
            leg = _scored(found[0])
            if len(leg) <= FETCH_K or leg[FETCH_K - 1][1] == leg[FETCH_K][1]:
                return False
            self._legs[text, name, low, high] = leg[:FETCH_K]
        requests = [
            AnnSearchRequest([value], name, {}, FETCH_K, expr=expr) for name, value in data.items()
        ]
        fused = self._client.hybrid_search(COLLECTION, requests, RRFRanker(), 2 * FETCH_K)
        self._fused[text, low, high] = _scored(fused[0])
        return True


def _scored(rows: Sequence[Mapping[str, Any]]) -> Scored:
    return [(str(row["pk"]), float(row["distance"])) for row in rows]


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
    ranked = {who: by_score(question.text, keys, ties[who].__getitem__) for who in setup.rerankers}
    return Right(ranked, retrieved if setup.on_error == "skip" else None, k)


# --- The two frameworks ---------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """Where everything is.

    Attributes:
        milvus: Milvus's URI.
        vllm: The URL of the vLLM that fails.
        reference: What is right.
        real_vllm: A real vLLM's URL.
    """

    milvus: str
    vllm: str
    reference: Reference
    real_vllm: str | None

    def make(self, setup: Setup) -> Any:
        """Make the retriever or reranker."""
        fronts: dict[Front, Any] = {"langchain": for_langchain, "llama_index": for_llama_index}
        front, ranker = fronts[setup.front], self._ranker(setup)
        if setup.kind == "texts":
            return front.VLLMRerank(ranker=ranker, top_n=setup.k, timeout=setup.timeout)
        common = {"uri": self.milvus, "ranker": ranker, "timeout": setup.timeout}
        if setup.kind == "rows":
            return front.MilvusVLLMRerank(COLLECTION, **common)
        of_framework = (
            {"embedding": LetterEmbeddings(), "k": setup.k}
            if setup.front == "langchain"
            else {"embed_model": LetterEmbedModel(), "similarity_top_k": setup.k}
        )
        return front.MilvusVLLMRetriever(
            COLLECTION,
            vector_field=list(setup.fields),
            fetch_k=FETCH_K,
            expr=f"number >= {setup.low}" if setup.low else None,
            **common,
            **of_framework,
        )

    def _ranker(self, setup: Setup) -> VLLMRanker:
        endpoint = self.real_vllm if setup.real else self.vllm
        assert endpoint is not None
        return VLLMRanker(
            endpoint,
            mode=setup.mode,
            on_error=setup.on_error,
            timeout=REAL_TIMEOUT / 2 if setup.real else RANKER_TIMEOUT,
            cool_down=COOL_DOWN,
            max_client_batch_size=setup.batch,
        )


def ask(thing: Any, setup: Setup, question: Question) -> list[Item]:
    """Ask a retriever or reranker, blocking."""
    match setup:
        case Setup("langchain", "retriever"):
            return _of_documents(thing.invoke(question.text, **question.per_call))
        case Setup("langchain", _):
            return _of_documents(thing.compress_documents(_documents(question), question.text))
        case Setup(_, "retriever"):
            return _of_nodes(thing.retrieve(question.text))
    return _of_nodes(thing.postprocess_nodes(_nodes(question), query_str=question.text))


async def aask(thing: Any, setup: Setup, question: Question) -> list[Item]:
    """Ask a retriever or reranker, async."""
    match setup:
        case Setup("langchain", "retriever"):
            return _of_documents(await thing.ainvoke(question.text, **question.per_call))
        case Setup("langchain", _):
            return _of_documents(
                await thing.acompress_documents(_documents(question), question.text)
            )
        case Setup(_, "retriever"):
            return _of_nodes(await thing.aretrieve(question.text))
    return _of_nodes(await thing.apostprocess_nodes(_nodes(question), query_str=question.text))


def _documents(question: Question) -> list[Document]:
    return [Document(id=str(key), page_content=TEXTS[key]) for key in question.items]


def _nodes(question: Question) -> list[NodeWithScore]:
    return [
        NodeWithScore(node=TextNode(id_=str(key), text=TEXTS[key]), score=0.5)
        for key in question.items
    ]


def _of_documents(documents: Sequence[Document]) -> list[Item]:
    return [_item(str(each.id), each.page_content, each.metadata) for each in documents]


def _of_nodes(nodes: Sequence[NodeWithScore]) -> list[Item]:
    for each in nodes:
        if each.metadata["reranked_by"] and each.score != each.metadata["relevance_score"]:
            raise WrongAnswerError(f"score {each.score}, metadata {each.metadata}")
    return [_item(each.node_id, each.text, each.metadata) for each in nodes]


def _item(key: str, text: str, metadata: Mapping[str, Any]) -> Item:
    return Item(
        key,
        text,
        metadata["relevance_score"],
        metadata["reranked_by"],
        metadata.get("rerank_error"),
    )


# --- The mix --------------------------------------------------------------------------------------

Answer = list[Item] | BaseException

# How a call is made, and how often among a hundred. Most use what is long-lived and shared, as in
# production.
BLOCKING = {
    "blocking": 32,
    "batch": 5,
    "batch, errors apart": 4,
    "in an event loop of its own": 6,
    "made, used and closed": 2,
    "made, used and dropped": 2,
}
ASYNC = {
    "async": 32,
    "abatch": 5,
    "abatch, errors apart": 4,
    "given up by the caller": 4,
    "made, used and closed, async": 2,
    "made, used and dropped, async": 2,
}
WEIGHTS = BLOCKING | ASYNC


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
    def limit(self) -> float:
        """Seconds it may take."""
        # A batch that fails is asked for again, each question by itself, as long again.
        return self.setup.timeout * (2 if "errors apart" in self.name else 1)

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
        world: Where everything is.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._rng = random.Random(6)
        setups = SETUPS + (REAL_SETUPS if world.real_vllm else ())
        self.things = {setup: world.make(setup) for setup in setups}

    def call(self) -> Call:
        """Make up the next call."""
        rng = self._rng
        if self._world.real_vllm and rng.random() < REAL_SHARE:
            setup, name = rng.choice(REAL_SETUPS), rng.choice(("blocking", "async"))
            return Call(name, setup, [self._question(setup)])
        name = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        if "batch" not in name:
            setup = rng.choice(SETUPS)
            patience = rng.choice((0.0, 0.01, 0.05, 0.2))
            return Call(name, setup, [self._question(setup)], patience)
        setup = rng.choice([each for each in SETUPS if each.has_batch])
        first = self._question(setup)
        texts = rng.sample(self._world.reference.questions, rng.randint(2, 5))
        return Call(name, setup, [replace(first, text=text) for text in texts])

    def _question(self, setup: Setup) -> Question:
        rng = self._rng
        text = rng.choice(self._world.reference.questions)
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
                with self._world.make(setup) as thing:
                    return [ask(thing, setup, question)]
            case "made, used and dropped":
                return [ask(self._world.make(setup), setup, question)]
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
                async with self._world.make(setup) as thing:
                    return [await aask(thing, setup, question)]
            case "made, used and dropped, async":
                return [await aask(self._world.make(setup), setup, question)]
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
    return [each if isinstance(each, BaseException) else _of_documents(each) for each in batch]


# --- Milvus, and what happens to it ---------------------------------------------------------------


class Milvus:
    """The stand-in for Milvus, which is killed and comes back where it was.

    Args:
        folder: Where its data and its log are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.socket() as finder:
            finder.bind(("127.0.0.1", 0))
            self._port = finder.getsockname()[1]
        self._process: subprocess.Popen[str] | None = None

    @property
    def uri(self) -> str:
        """Return where clients reach it."""
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start it, and return when it answers."""
        command = [sys.executable, "-m", "tests.milvus26", "--data-dir", str(self._folder / "data")]
        command += ["--port", str(self._port), "--retry-wait", "0.05", "--stop-at-eof"]
        log_file = self._folder / "milvus.log"
        with log_file.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise RuntimeError(f"Milvus did not start: {log_file.read_text()[-2000:]}")

    def kill(self) -> None:
        """End it without warning."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


@contextmanager
def running_milvus() -> Iterator[Milvus]:
    """Run it with its data in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        milvus = Milvus(Path(folder))
        try:
            milvus.start()
            yield milvus
        finally:
            milvus.kill()


class Disturbances:
    """What happens on the way, besides the faults that come with every so-manieth request.

    Args:
        milvus: The Milvus that is disturbed.
        vllm: The URL of the vLLM that fails.
        calls: How many calls there are; disturbances are spread over them.
    """

    def __init__(self, milvus: Milvus, vllm: str, calls: int) -> None:
        self._milvus = milvus
        self._vllm = vllm
        self.counts: Counter[str] = Counter()
        self._windows: list[list[float]] = []
        self._running: set[asyncio.Future[None]] = set()
        # Started beforehand, so that it counts from the first figures on.
        self._thread = ThreadPoolExecutor(1)
        self._thread.submit(int).result()
        parts: dict[float, Callable[[], None]] = {
            0.15: partial(self._restart, down=0.0),
            0.30: self._release,
            0.45: partial(self._restart, down=3.0),
            0.60: partial(self._outage, seconds=2.0),
            0.75: partial(self._restart, down=1.0),
            0.90: partial(self._outage, seconds=1.0),
        }
        self._at = {round(calls * part): what for part, what in parts.items()}

    def happen(self, call: int) -> None:
        """Start what is to happen at this call."""
        if call in self._at:
            done = asyncio.get_running_loop().run_in_executor(self._thread, self._at[call])
            self._running.add(done)

    async def finished(self) -> None:
        """Wait for what is going on."""
        await asyncio.gather(*self._running)
        self._running.clear()

    def of_milvus(self, started: float, ended: float) -> bool:
        """Tell whether Milvus was disturbed at some moment between the two."""
        return any(start < ended and started < end for start, end in self._windows)

    def close(self) -> None:
        """Let go of the thread."""
        self._thread.shutdown()

    @contextmanager
    def _of_milvus(self) -> Iterator[None]:
        window = [time.monotonic(), float("inf")]
        self._windows.append(window)
        yield
        window[1] = time.monotonic() + GRACE

    def _restart(self, down: float) -> None:
        with self._of_milvus():
            self.counts["Milvus killed and restarted"] += 1
            say(f"Milvus is killed, and down for {down:.0f} s")
            self._milvus.kill()
            time.sleep(down)
            self._milvus.start()

    def _release(self) -> None:
        with self._of_milvus():
            self.counts["collection released"] += 1
            say("the collection is released")
            client = MilvusClient(self._milvus.uri)
            client.release_collection(COLLECTION)
            client.close()

    def _outage(self, seconds: float) -> None:
        self.counts["vLLM outage"] += 1
        say(f"vLLM answers nothing but 503 for {seconds:.0f} s")
        for sender in ("milvus", "client"):
            outage(self._vllm, seconds, of=sender)


def outage(vllm: str, seconds: float, *, of: str) -> None:
    """Have the vLLM that fails refuse everything that Milvus, or the client, asks."""
    httpx.post(f"{vllm}/outage", params={"seconds": seconds, "of": of}).raise_for_status()


# --- Figures --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Usage:
    """What the process holds, once it has come to rest."""

    calls: int
    fds: int
    threads: int
    python_threads: int
    tasks: int
    rss_mb: float
    fds_by_kind: Mapping[str, int]

    @classmethod
    def now(cls, calls: int) -> Usage:
        """Measure."""
        status = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
        )
        kinds: Counter[str] = Counter()
        for descriptor in Path("/proc/self/fd").iterdir():
            with suppress(OSError):  # the one that lists the folder is gone again
                kinds[str(descriptor.readlink()).split(":[")[0]] += 1
        return cls(
            calls=calls,
            fds=sum(kinds.values()),
            threads=int(status["Threads"]),
            python_threads=threading.active_count(),
            tasks=len(asyncio.all_tasks()),
            rss_mb=round(int(status["VmRSS"].split()[0]) / 1024, 1),
            fds_by_kind=dict(kinds),
        )


@dataclass
class Tally:
    """What came of the calls so far."""

    calls: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    names: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    longest: tuple[float, str] = (0.0, "")
    failed_while_milvus_was_up: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return it for the report."""
        return {**vars(self), "questions": self.outcomes.total() + self.errors.total()}


@dataclass
class InFlight:
    """A call that is being made."""

    call: Call
    started: float
    task: asyncio.Task[Any] | None
    overdue: bool = False


class Watch(threading.Thread):
    """Looks for calls that hang, and says now and then how far it is.

    Args:
        tally: Where to note them.
        calls: How many calls there are.
    """

    SAY_EVERY = 5.0

    def __init__(self, tally: Tally, calls: int) -> None:
        super().__init__(name="watch", daemon=True)
        self._tally = tally
        self._calls = calls
        self._ended = threading.Event()
        self.in_flight: dict[int, InFlight] = {}

    def run(self) -> None:
        """Watch until the end."""
        said = time.monotonic(), 0
        while not self._ended.wait(0.5):
            now = time.monotonic()
            for each in list(self.in_flight.values()):
                self._look_at(each, now - each.started - each.call.limit - MARGIN)
            if now > said[0] + self.SAY_EVERY:
                self._say(said, now)
                said = now, self._tally.calls

    def end(self) -> None:
        """Stop watching."""
        self._ended.set()
        self.join()

    def _look_at(self, each: InFlight, too_long: float) -> None:
        if too_long > 0 and not each.overdue:
            each.overdue = True
            self._tally.failures.append(
                f"{each.call.name} on {each.call.setup} took longer than {each.call.limit:.0f} s"
            )
            say(f"HANGS: {self._tally.failures[-1]}")
            if each.task is not None:
                each.task.print_stack(file=sys.stderr)
            faulthandler.dump_traceback(all_threads=True)
        if too_long > GIVE_UP_AFTER:
            say("FAILED: it does not come back")
            # Its thread would never end. The servers end when their standard input closes.
            os._exit(1)

    def _say(self, said: tuple[float, int], now: float) -> None:
        tally = self._tally
        rate = (tally.calls - said[1]) / (now - said[0])
        say(
            f"{tally.calls:,} of {self._calls:,} calls, {rate:.0f}/s; "
            f"{tally.outcomes['degraded']:,} degraded, {tally.errors.total():,} errors, "
            f"{len(tally.failures):,} wrong"
        )


class Strays(logging.Handler):
    """Collects what nobody was there to catch, and counts what the package logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: Counter[str] = Counter()
        self.logged: Counter[str] = Counter()

    def install(self, loop: asyncio.AbstractEventLoop) -> None:
        """Listen everywhere."""
        # It reports every failed call on its own, with a traceback.
        logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
        for name in ("asyncio", "milvus_vllm_retrievers"):
            logging.getLogger(name).addHandler(self)
            logging.getLogger(name).propagate = False
        loop.set_exception_handler(lambda _loop, context: self._note("loop", context))
        sys.unraisablehook = lambda context: self._note("unraisable", vars_of(context))
        threading.excepthook = lambda context: self._note("thread", vars_of(context))
        warnings.simplefilter("always", ResourceWarning)
        warnings.showwarning = lambda message, *_args, **_named: self._note(
            "warning", {"message": str(message)}
        )

    def emit(self, record: logging.LogRecord) -> None:
        """Take a line of a log."""
        if record.name.startswith("milvus_vllm_retrievers"):
            self.logged[str(record.msg)] += 1
        else:
            self._note(record.name, {"message": record.getMessage()[:300]})

    def _note(self, where: str, context: Mapping[str, Any]) -> None:
        error = context.get("exception") or context.get("exc_value")
        message = context.get("message") or context.get("err_msg") or ""
        text = f"{where}: {message} {error!r}"[:200]
        self.found[re.sub(r"\d+", "N", text)] += 1


def vars_of(context: Any) -> dict[str, Any]:
    """Return the attributes of what a hook is given."""
    return {name: getattr(context, name) for name in dir(context) if not name.startswith("_")}


# --- The run --------------------------------------------------------------------------------------


class Soak:
    """The run itself.

    Args:
        world: Where everything is.
        disturbances: What happens on the way.
        calls: How many calls to make.
    """

    def __init__(self, world: World, disturbances: Disturbances, calls: int) -> None:
        self._world = world
        self._disturbances = disturbances
        self._mix = Mix(world)
        self._calls = calls
        self._threads = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="call")
        self.tally = Tally()
        self.strays = Strays()
        self.usages: list[Usage] = []
        self.seconds = 0.0
        self.closed: Usage
        self._watch = Watch(self.tally, calls)

    async def run(self) -> None:
        """Make all calls, and measure at the beginning, at the end and on the way."""
        self.strays.install(asyncio.get_running_loop())
        self._start_threads()
        self._watch.start()
        made = 0
        for mark in marks(self._calls):
            started = time.monotonic()
            numbers = iter(range(made + 1, mark + 1))
            await asyncio.gather(*(self._work(numbers) for _ in range(IN_FLIGHT)))
            await self._disturbances.finished()
            self.seconds += time.monotonic() - started
            made = mark
            await self._rest()
            self.usages.append(Usage.now(made))
            say(f"at rest after {made:,} calls: {describe(self.usages[-1])}")
        await self._close()
        self._watch.end()

    def _start_threads(self) -> None:
        together = threading.Barrier(IN_FLIGHT)
        for waiting in [self._threads.submit(together.wait, 30) for _ in range(IN_FLIGHT)]:
            waiting.result()

    async def _work(self, numbers: Iterator[int]) -> None:
        for number in numbers:
            self._disturbances.happen(number)
            await self._make(number, self._mix.call())

    async def _make(self, number: int, call: Call) -> None:
        started = time.monotonic()
        self._watch.in_flight[number] = InFlight(call, started, asyncio.current_task())
        answers: Sequence[Answer]
        try:
            answers = await self._run(call)
        except Exception as error:  # noqa: BLE001 - which ones are right is judged below
            answers = [error] * len(call.questions)
        ended = time.monotonic()
        del self._watch.in_flight[number]
        self.tally.longest = max(self.tally.longest, (ended - started, call.name))
        self.tally.calls += 1
        self.tally.names[call.name] += 1
        disturbed = self._disturbances.of_milvus(started, ended)
        for question, answer in zip(call.questions, answers, strict=True):
            self._judge(call, question, answer, disturbed=disturbed)

    async def _run(self, call: Call) -> Sequence[Answer]:
        if call.name in ASYNC:
            return await self._mix.arun(call)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._mix.run, call)

    def _judge(self, call: Call, question: Question, answer: Answer, *, disturbed: bool) -> None:
        try:
            if isinstance(answer, BaseException):
                self._judge_error(call, answer, disturbed=disturbed)
                return
            right = right_of(self._world.reference, call.setup, question)
            self.tally.outcomes[right.judge(answer)] += 1
        except WrongAnswerError as wrong:
            self.tally.failures.append(f"{call.name} on {call.setup}, {question}: {wrong}")

    def _judge_error(self, call: Call, error: BaseException, *, disturbed: bool) -> None:
        kind = type(error).__name__
        if isinstance(error, WrongAnswerError):
            raise error
        if isinstance(error, GivenUp):
            self.tally.outcomes["given up by the caller"] += 1
            return
        self.tally.errors[kind] += 1
        self.tally.examples.setdefault(kind, f"{call.name} on {call.setup.kind}: {error}")
        if not isinstance(error, MilvusVLLMError):
            raise WrongAnswerError(f"an error of another kind: {error!r}") from error
        if isinstance(error, (ConfigurationError, MissingDependencyError)):
            raise WrongAnswerError(f"nothing is configured wrongly: {error!r}") from error
        if isinstance(error, RerankError) and call.setup.on_error == "skip":
            raise WrongAnswerError(f"on_error='skip' raised {error!r}") from error
        if isinstance(error, SearchError) and not disturbed:
            self.tally.failed_while_milvus_was_up += 1
            raise WrongAnswerError(f"Milvus was up: {error!r}") from error

    async def _rest(self) -> None:
        """Let what is idle go, so that only what stays is measured.

        A pool closes connections that were idle for too long when it is next used, so every pool
        is used: that of a fallback too, for which the vLLM refuses Milvus for a while.
        """
        await asyncio.sleep(KEEP_ALIVE)
        for setup in self._mix.things:
            await self._use_once(setup)
        outage(self._world.vllm, seconds=KEEP_ALIVE, of="milvus")
        for setup in self._mix.things:
            if setup.on_error == "client":
                await self._use_once(setup)
        await asyncio.sleep(KEEP_ALIVE)
        gc.collect()
        await asyncio.sleep(0.1)  # what the collector has dropped in an event loop is closed there
        gc.collect()
        # What is free and kept by the allocator is nobody's memory.
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)

    async def _use_once(self, setup: Setup) -> None:
        thing = self._mix.things[setup]
        items = tuple(range(8)) if setup.kind != "retriever" else ()
        question = Question(self._world.reference.questions[0], items)
        loop = asyncio.get_running_loop()
        with suppress(MilvusVLLMError):
            await loop.run_in_executor(self._threads, ask, thing, setup, question)
        with suppress(MilvusVLLMError):
            await aask(thing, setup, question)

    async def _close(self) -> None:
        """Close what is long-lived, and measure what is left then."""
        for thing in self._mix.things.values():
            await thing.aclose()
        await asyncio.sleep(0.5)
        gc.collect()
        self.closed = Usage.now(self._calls)
        self._threads.shutdown()


def marks(calls: int) -> list[int]:
    """Return after how many calls to measure: the first 500, all, and in a long run between."""
    first = min(BEFORE_FIRST_FIGURES, calls // 4)
    between = [calls // 3, calls * 2 // 3] if calls > 4 * BEFORE_FIRST_FIGURES else []
    return [first, *between, calls]


def describe(usage: Usage) -> str:
    """Return the figures in words."""
    return (
        f"{usage.fds} file descriptors, {usage.threads} threads ({usage.python_threads} of "
        f"Python), {usage.tasks} tasks, {usage.rss_mb:.0f} MB"
    )


def grown(first: Usage, last: Usage) -> list[str]:
    """Return what has grown beyond its limit."""
    limits = {
        "file descriptors": (first.fds, last.fds, first.fds + MORE_FDS),
        "threads": (first.threads, last.threads, first.threads + MORE_THREADS),
        "MB of memory": (first.rss_mb, last.rss_mb, first.rss_mb * MORE_RSS + MORE_RSS_MB),
        "tasks": (first.tasks, last.tasks, first.tasks),
    }
    return [
        f"{what}: {after:.0f} at the end, {before:.0f} after the first {first.calls:,} calls, "
        f"limit {limit:.0f}"
        for what, (before, after, limit) in limits.items()
        if after > limit
    ]


def report(soak: Soak, disturbances: Disturbances, faults: dict[str, Any]) -> list[str]:
    """Print the figures and write them down; return what is wrong."""
    tally, first, last = soak.tally, soak.usages[0], soak.usages[-1]
    broken = grown(first, last)
    wrong = [*tally.failures, *broken]
    RESULTS.write_text(
        json.dumps(
            {
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "machine": describe_machine(),
                "versions": package_versions(),
                "seconds": round(soak.seconds, 1),
                "calls_per_second": round(tally.calls / soak.seconds, 1),
                "tally": tally.as_json(),
                "faults": faults,
                "disturbances": disturbances.counts,
                "usage": [asdict(usage) for usage in soak.usages],
                "usage_after_closing": asdict(soak.closed),
                "log": soak.strays.logged,
                "strays": soak.strays.found,
                "wrong": wrong,
            },
            indent=2,
        )
        + "\n"
    )
    show(soak, disturbances, faults)
    return wrong


def show(soak: Soak, disturbances: Disturbances, faults: dict[str, Any]) -> None:
    """Print the figures."""
    tally = soak.tally
    rows: list[tuple[str, Any]] = [
        ("calls", f"{tally.calls:,} in {soak.seconds:.0f} s: {tally.calls / soak.seconds:.0f}/s"),
        ("the longest", f"{tally.longest[0]:.1f} s ({tally.longest[1]})"),
        ("questions", f"{tally.as_json()['questions']:,}"),
    ]
    rows += [(f"  {what}", f"{n:,}") for what, n in tally.outcomes.most_common()]
    rows += [(f"  {what}", f"{n:,}") for what, n in tally.errors.most_common()]
    rows += [("rerank requests", f"{sum(faults['requests'].values()):,}")]
    rows += [(f"  {what}", f"{n:,}") for what, n in sorted(faults["injected"].items())]
    rows += [("  the same again, for a retry", sum(faults["repeated"].values()))]
    rows += [("  refused during an outage", faults["during_outage"])]
    rows += list(disturbances.counts.items())
    rows += [(f"after {usage.calls:,} calls", describe(usage)) for usage in soak.usages]
    rows += [("after closing", describe(soak.closed))]
    for what, figure in rows:
        print(f"{what:32} {figure}")
    for kind, example in tally.examples.items():
        print(f"{kind}, for example: {example[:300]}")
    for stray, count in soak.strays.found.items():
        print(f"left to the event loop or the garbage collector, {count} times: {stray}")


def soak_test(calls: int) -> list[str]:
    """Start the servers, run, report; return what is wrong."""
    with ExitStack() as stack:
        milvus = stack.enter_context(running_milvus())
        vllm = stack.enter_context(
            running_module(
                "benchmarks.faulty_vllm", "--every", str(FAULT_EVERY), "--stall", str(STALL)
            )
        )
        client = MilvusClient(milvus.uri)
        corpus.create_collection(client, COLLECTION, texts=TEXTS)
        world = World(milvus.uri, vllm, Reference(client), real_vllm())
        client.close()
        disturbances = Disturbances(milvus, vllm, calls)
        stack.callback(disturbances.close)
        with_real = "with" if world.real_vllm else "without"
        say(f"{calls:,} calls, {IN_FLIGHT} at a time, {with_real} a real vLLM")
        soak = Soak(world, disturbances, calls)
        asyncio.run(soak.run())
        return report(soak, disturbances, httpx.get(f"{vllm}/stats").json())


def main() -> int:
    """Run it and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--queries", type=int, default=CALLS, help="how many calls to make")
    wrong = soak_test(max(parser.parse_args().queries, 4))
    for line in wrong[:20]:
        say(f"WRONG: {line[:1000]}")
    say(f"written to {RESULTS}; " + (f"{len(wrong)} wrong" if wrong else "nothing went wrong"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
