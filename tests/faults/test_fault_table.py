"""Every row of the table about vLLM: both front ends, blocking and async, and the rerankers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
from pymilvus import MilvusClient

from milvus_vllm_retrievers import RerankError, SearchError, VLLMRanker
from tests.corpus import create_collection
from tests.fakes import FakeVLLM, Reply
from tests.faults.callers import (
    FRONT_ENDS,
    HOWS,
    MARGIN,
    TEXTS,
    THRESHOLD,
    FrontEnd,
    Got,
    How,
    K,
    check,
    got,
)
from tests.faults.servers import failing
from tests.faults.table import (
    MODES,
    ON_ERROR,
    ROWS,
    Answers,
    GoesAway,
    Hangs,
    IsKilled,
    Mode,
    OnError,
    Outcome,
    Raises,
    Reranked,
    Row,
    Unranked,
    always,
)

Subject = Literal["MilvusVLLMRetriever", "VLLMRerank", "MilvusVLLMRerank"]
Made = tuple[Got, float]
LITE_COLLECTION = "fault_docs_in_lite"


@dataclass(frozen=True)
class Case:
    """One call: a cell of the table, and who makes the call.

    Attributes:
        subject: The class that is called.
        row: The row.
        mode: The ranker's mode.
        on_error: The ranker's `on_error`.
        front_end: Whose class it is.
        how: Blocking or async.
        nowhere: Whether, in mode "server", vLLM fails this process too.
    """

    subject: Subject
    row: Row
    mode: Mode
    on_error: OnError
    front_end: FrontEnd
    how: How
    nowhere: bool = False

    def __str__(self) -> str:
        return f"{self.front_end}-{self.how}-{self.mode}-{self.on_error}-{self.row}"

    @property
    def expected(self) -> Outcome:
        """What the table says."""
        column = self.row.client if self.nowhere else self.row.column(self.mode)
        assert column is not None
        return column[self.on_error]

    @property
    def threshold(self) -> float | None:
        """What a scored item must reach; only retrievers have a threshold."""
        return THRESHOLD if self.subject == "MilvusVLLMRetriever" else None


# Which calls


def cases(
    subject: Subject, mode: Mode, rows: Sequence[Row], on_error: Sequence[OnError] = ON_ERROR
) -> list[Case]:
    return [
        Case(subject, row, mode, each, front_end, how)
        for row in rows
        for each in on_error
        for front_end in FRONT_ENDS
        for how in HOWS
    ]


def fails_in_milvus(row: Row) -> bool:
    """Whether Milvus notices the fault."""
    return row.server is not None and isinstance(row.server["raise"], Raises)


# These two take more than one call: see test_degradation and test_real_vllm.
ROWS_HERE = [row for row in ROWS if not isinstance(row.fault, GoesAway | IsKilled)]
SERVER_ROWS = [row for row in ROWS_HERE if row.server is not None]

RETRIEVER = [
    *cases("MilvusVLLMRetriever", "server", SERVER_ROWS),
    *cases("MilvusVLLMRetriever", "client", ROWS_HERE),
]
RETRIEVER_NOWHERE = [
    Case("MilvusVLLMRetriever", row, "server", "client", front_end, how, nowhere=True)
    for row in filter(fails_in_milvus, ROWS_HERE)
    for front_end in FRONT_ENDS
    for how in HOWS
]
DIRECT = cases("VLLMRerank", "client", ROWS_HERE)
# One row of each kind; and none in which it matters in what order Milvus sends the documents.
KINDS = (
    "refuses connections",
    "takes longer than the ranker's `timeout`",
    "answers 400",
    "answers 429 once, and then as it should",
    "answers with something that is no JSON",
    "gives every document the same score",
)
THROUGH_MILVUS = cases(
    "MilvusVLLMRerank", "server", [row for row in SERVER_ROWS if row.name in KINDS]
)


# The calls


@dataclass(frozen=True)
class World:
    """Where Milvus and the fakes of vLLM are."""

    milvus: str
    collection: str
    ill: FakeVLLM
    well: FakeVLLM

    async def make(self, case: Case) -> Made:
        """Make the call of a case, with its fault in place."""
        with failing(case.row.fault, self.ill) as url:
            subject = self.subject(case, self.ranker(case, url))
            async with subject:
                if case.subject == "MilvusVLLMRetriever":
                    return await got(case.front_end.retrieve(subject, case.how))
                return await got(case.front_end.rerank(subject, case.how))

    def ranker(self, case: Case, ill_url: str) -> VLLMRanker:
        """Return a ranker whose way to vLLM fails; in mode "server", only Milvus's way."""
        only_milvus = case.mode == "server" and not case.nowhere
        return VLLMRanker(
            self.well.url if only_milvus else ill_url,
            server_endpoint=ill_url if only_milvus else None,
            mode=case.mode,
            on_error=case.on_error,
            **case.row.ranker,
        )

    def subject(self, case: Case, ranker: VLLMRanker) -> Any:
        timeout, module = case.row.timeout, case.front_end.module
        if case.subject == "MilvusVLLMRetriever":
            return case.front_end.retriever(
                self.collection,
                self.milvus,
                ranker,
                timeout=timeout,
                score_threshold=case.threshold,
            )
        if case.subject == "VLLMRerank":
            return module.VLLMRerank(ranker=ranker, top_n=K, timeout=timeout)
        return module.MilvusVLLMRerank(
            self.collection, ranker=ranker, uri=self.milvus, top_n=K, timeout=timeout
        )


@pytest.fixture
def world(milvus26_uri: str, collection: str, ill_vllm: FakeVLLM, well_vllm: FakeVLLM) -> World:
    return World(milvus26_uri, collection, ill_vllm, well_vllm)


@pytest.fixture(scope="module")
def waited(milvus26_uri: str, collection: str, steady_vllm: FakeVLLM) -> dict[str, Made]:
    """What the calls of a vLLM that hangs brought; they are made beside each other."""
    world = World(milvus26_uri, collection, steady_vllm, steady_vllm)
    every = [*RETRIEVER, *RETRIEVER_NOWHERE, *DIRECT, *THROUGH_MILVUS]
    hanging = [case for case in every if isinstance(case.row.fault, Hangs)]
    # The stand-in for Milvus has ten threads; one that waits for vLLM and one that answers the
    # fallback are two.
    with ThreadPoolExecutor(5) as few, ThreadPoolExecutor(8) as many:
        made = {
            key(case): (few if case.mode == "server" else many).submit(
                asyncio.run, world.make(case)
            )
            for case in hanging
        }
    return {name: future.result() for name, future in made.items()}


def key(case: Case) -> str:
    return f"{case.subject}-{case.nowhere}-{case}"


@pytest.fixture
async def made(request: pytest.FixtureRequest, case: Case) -> Made:
    """What the call of a case brought, and the seconds that it took."""
    if isinstance(case.row.fault, Hangs):
        return request.getfixturevalue("waited")[key(case)]
    return await request.getfixturevalue("world").make(case)


# The table


def check_in_time(case: Case, made: Made) -> None:
    """Check that a call has brought what its row says, within its deadline."""
    result, seconds = made

    check(result, case.expected, least=case.threshold)
    assert seconds < case.row.timeout + MARGIN


@pytest.mark.parametrize("case", RETRIEVER, ids=str)
async def test_a_retriever_gives_what_the_table_says_in_time(case: Case, made: Made) -> None:
    check_in_time(case, made)


@pytest.mark.parametrize("case", RETRIEVER_NOWHERE, ids=str)
async def test_where_vllm_fails_milvus_and_the_fallback_the_error_is_the_fallbacks(
    case: Case, made: Made
) -> None:
    check_in_time(case, made)


@pytest.mark.parametrize("case", DIRECT, ids=str)
async def test_a_direct_reranker_gives_what_the_table_says_in_time(case: Case, made: Made) -> None:
    check_in_time(case, made)


@pytest.mark.parametrize("case", THROUGH_MILVUS, ids=str)
async def test_a_reranker_through_milvus_gives_what_the_table_says_in_time(
    case: Case, made: Made
) -> None:
    check_in_time(case, made)


# Beside the table: Milvus Lite, which tries once and fails in words of its own

LITE_KINDS = (
    "refuses connections",
    "breaks off in the middle of an answer",
    "answers 400",
    "answers 500",
    "is hidden by a gateway's 502 page in HTML",
    "answers with something that is no JSON",
)
IN_LITE = cases(
    "MilvusVLLMRetriever", "server", [row for row in SERVER_ROWS if row.name in LITE_KINDS]
)


@pytest.fixture(scope="module")
def lite_world(lite: MilvusClient, lite_uri: str, steady_vllm: FakeVLLM) -> World:
    create_collection(lite, LITE_COLLECTION, texts=TEXTS)
    return World(lite_uri, LITE_COLLECTION, steady_vllm, steady_vllm)


@pytest.mark.parametrize("case", IN_LITE, ids=str)
async def test_milvus_lite_is_made_up_for_in_the_same_way(
    case: Case, lite_world: World, ill_vllm: FakeVLLM
) -> None:
    result, seconds = await replace(lite_world, ill=ill_vllm).make(case)

    match case.on_error:
        case "raise":
            assert isinstance(result, RerankError | SearchError)
        case "client":
            check(result, Reranked("client"), least=case.threshold)
        case "skip":
            check(result, Unranked(""), least=case.threshold)
    assert seconds < case.row.timeout + MARGIN


# Beside the table: what is logged, and the table itself


@pytest.mark.parametrize(
    "case",
    [
        case
        for case in [*RETRIEVER, *DIRECT, *THROUGH_MILVUS]
        if case.row.warns and case.on_error == "raise"
    ],
    ids=lambda case: f"{case.subject}-{case}",
)
async def test_what_cannot_be_an_error_is_logged(
    case: Case, caplog: pytest.LogCaptureFixture, world: World
) -> None:
    await world.make(case)

    assert [case.row.warns in message for message in warnings(caplog)].count(True) == 1


@pytest.mark.parametrize("subject", ["MilvusVLLMRetriever", "VLLMRerank", "MilvusVLLMRerank"])
async def test_where_nothing_is_wrong_nothing_is_warned_of(
    subject: Subject,
    front_end: FrontEnd,
    how: How,
    caplog: pytest.LogCaptureFixture,
    world: World,
) -> None:
    mode: Mode = "client" if subject == "VLLMRerank" else "server"
    well = Row("is well", Answers(Reply(200, b""), once=False), always("milvus"), always("client"))
    case = Case(subject, well, mode, "raise", front_end, how)
    async with world.subject(case, world.ranker(case, world.well.url)) as called:
        result, _ = await got(front_end.call(called, how))

    check(result, case.expected, least=case.threshold)
    assert warnings(caplog) == []


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "milvus_vllm_retrievers" and record.levelno >= logging.WARNING
    ]


def test_every_row_says_what_comes_for_every_on_error() -> None:
    columns = [row.column(mode) for row in ROWS for mode in MODES]

    assert all(set(column) == set(ON_ERROR) for column in columns if column is not None)
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert {row.name for row in ROWS} >= {*KINDS, *LITE_KINDS}
