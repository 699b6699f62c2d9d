"""What of the table a real vLLM can show: that it is killed at work, and what it refuses."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace

import pytest
from pymilvus import MilvusClient
from tools import vllm_server

from milvus_vllm_retrievers import RerankStatusError, VLLMRanker
from tests.corpus import create_collection
from tests.fakes import running_fake_vllm
from tests.faults.callers import FRONT_ENDS, HOWS, MARGIN, FrontEnd, Got, How, K, check, got
from tests.faults.servers import wait_until
from tests.faults.table import (
    MODES,
    ON_ERROR,
    ROWS,
    IsKilled,
    Mode,
    OnError,
    Outcome,
    Raises,
    Reranked,
    Unranked,
)
from tests.milvus26 import running_milvus26

pytestmark = pytest.mark.real_vllm

NAME = "real_faults_docs"


# It is killed in the middle of a request

KILLED = next(row for row in ROWS if isinstance(row.fault, IsKilled))
COUNT = 200
LONG_TEXTS = [" ".join(["key"] * (COUNT - i) + ["door"] * i) for i in range(COUNT)]
"""In retrieval order; so many, and so long, that reranking them takes seconds."""


@dataclass(frozen=True)
class Case:
    """One call that is under way when vLLM is killed."""

    mode: Mode
    on_error: OnError
    front_end: FrontEnd
    how: How

    def __str__(self) -> str:
        return f"{self.front_end}-{self.how}-{self.mode}-{self.on_error}"

    @property
    def expected(self) -> Outcome:
        """What the table says, for these documents."""
        column = KILLED.column(self.mode)
        assert column is not None
        outcome = column[self.on_error]
        if isinstance(outcome, Reranked):
            scores = tuple(fallback_score("", text) for text in LONG_TEXTS)
            return replace(outcome, scores=scores)
        return outcome


CASES = [
    Case(mode, on_error, front_end, how)
    for mode in MODES
    for on_error in ON_ERROR
    for front_end in FRONT_ENDS
    for how in HOWS
]


def fallback_score(query: str, document: str) -> float:
    """What the fallback's vLLM, which is not killed, thinks."""
    return float(document.count("door") % 7)


@pytest.fixture(scope="module")
def doomed_vllm() -> Iterator[vllm_server.Server]:
    """A real vLLM of this module's own."""
    if not vllm_server.STAMP.exists():
        pytest.skip("a vLLM to kill needs .venv-vllm (make test installs it)")
    with vllm_server.serving("to-be-killed", vllm_server.minilm(), dtype="bfloat16") as server:
        vllm_server.wait_until_healthy([server])
        yield server


@pytest.fixture(scope="module")
def milvus_of_each(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[FrontEnd, str]]:
    """A stand-in for Milvus 2.6 for each front end, since each has ten threads only."""
    with ExitStack() as stack:
        uris = {}
        for front_end in FRONT_ENDS:
            folder = tmp_path_factory.mktemp("real_faults")
            uris[front_end] = stack.enter_context(running_milvus26(folder))
            client = MilvusClient(uris[front_end])
            create_collection(client, NAME, texts=LONG_TEXTS)
            client.close()
        yield uris


@pytest.fixture(scope="module")
def brought(
    doomed_vllm: vllm_server.Server, milvus_of_each: dict[FrontEnd, str]
) -> Iterator[dict[Case, tuple[Got, float]]]:
    """What every call brought, and in how many seconds after vLLM was killed."""
    with running_fake_vllm() as well, ThreadPoolExecutor(len(CASES)) as threads:
        well.score = fallback_score
        calls = {}
        for case in CASES:
            ranker = killed_ranker(case, doomed_vllm.endpoint, well.url)
            call = make(case, milvus_of_each[case.front_end], ranker)
            calls[case] = threads.submit(asyncio.run, call)
        wait_until(
            lambda: requests_seen(doomed_vllm) >= len(CASES) * COUNT, "every request has come in"
        )
        assert not any(call.done() for call in calls.values())
        os.killpg(doomed_vllm.process.pid, signal.SIGKILL)
        killed_at = time.monotonic()
        yield {case: seconds_after(killed_at, call.result()) for case, call in calls.items()}


def killed_ranker(case: Case, doomed: str, well: str) -> VLLMRanker:
    where = (
        {"endpoint": well, "server_endpoint": doomed}
        if case.mode == "server"
        else {"endpoint": doomed}
    )
    return VLLMRanker(**where, mode=case.mode, on_error=case.on_error, timeout=KILLED.timeout)


async def make(case: Case, milvus: str, ranker: VLLMRanker) -> tuple[Got, float]:
    """Make a call; return what it brought, and when."""
    retriever = case.front_end.retriever(
        NAME, milvus, ranker, fetch_k=COUNT, timeout=KILLED.timeout
    )
    async with retriever:
        result, _ = await got(case.front_end.retrieve(retriever, case.how))
    return result, time.monotonic()


def seconds_after(start: float, brought: tuple[Got, float]) -> tuple[Got, float]:
    result, at = brought
    return result, at - start


def requests_seen(server: vllm_server.Server) -> int:
    """Count the texts that a vLLM works on or has worked on: the documents and the queries."""
    with urllib.request.urlopen(f"{server.endpoint}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    names = "num_requests_running|num_requests_waiting|request_success_total"
    counts = re.findall(rf"(?m)^vllm:(?:{names})\{{.*\}} ([0-9.e+]+)$", text)
    return round(sum(map(float, counts)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_vllm_that_is_killed_at_work_gives_what_the_table_says(
    case: Case, brought: dict[Case, tuple[Got, float]]
) -> None:
    result, seconds = brought[case]

    check(result, case.expected, texts=LONG_TEXTS)
    assert 0 < seconds < MARGIN


# It refuses

TOO_LONG = ["key " * 2_000, "door " * 1_999 + "key"]
"""In retrieval order; the model takes 256 tokens."""


@pytest.fixture(scope="module")
def long_documents(milvus26: MilvusClient) -> str:
    """A collection of documents that are longer than the model takes."""
    name = "real_long_docs"
    create_collection(milvus26, name, texts=TOO_LONG)
    return name


@pytest.fixture(params=ON_ERROR)
def on_error(request: pytest.FixtureRequest) -> OnError:
    """Every `on_error`."""
    return request.param


@pytest.mark.parametrize("mode", MODES)
async def test_a_document_that_is_too_long_and_may_not_be_truncated_fails_its_query(
    mode: Mode,
    on_error: OnError,
    front_end: FrontEnd,
    how: How,
    vllm: str,
    milvus26_uri: str,
    long_documents: str,
) -> None:
    ranker = VLLMRanker(vllm, mode=mode, on_error=on_error, truncate_prompt_tokens=None)
    async with front_end.retriever(long_documents, milvus26_uri, ranker) as retriever:
        result, _ = await got(front_end.retrieve(retriever, how))

    # The fallback asks the same vLLM, and is refused too.
    phrase = "maximum context length"
    refused = Raises(RerankStatusError, phrase, 400)
    check(result, Unranked(phrase) if on_error == "skip" else refused, texts=TOO_LONG)


@pytest.mark.parametrize("mode", MODES)
async def test_a_document_that_is_too_long_is_truncated_by_default(
    mode: Mode, front_end: FrontEnd, how: How, vllm: str, milvus26_uri: str, long_documents: str
) -> None:
    ranker = VLLMRanker(vllm, mode=mode)
    async with front_end.retriever(long_documents, milvus26_uri, ranker) as retriever:
        found = await front_end.retrieve(retriever, how)

    assert {item.reranked_by for item in found} == {"milvus" if mode == "server" else "client"}
    assert sorted(item.id for item in found) == [0, 1]


@pytest.mark.parametrize(
    ("path", "model", "phrase"),
    [
        ("", "no-such-model", "The model `no-such-model` does not exist"),
        ("/no/such/prefix", None, "Not Found"),
    ],
    ids=["unknown model", "unknown path"],
)
async def test_a_model_or_path_that_vllm_does_not_have_is_a_404(
    path: str,
    model: str | None,
    phrase: str,
    on_error: OnError,
    front_end: FrontEnd,
    how: How,
    vllm: str,
    milvus26_uri: str,
    collection: str,
) -> None:
    ranker = VLLMRanker(vllm + path, model=model, mode="client", on_error=on_error)
    retriever = front_end.retriever(collection, milvus26_uri, ranker)
    reranker = front_end.module.VLLMRerank(ranker=ranker, top_n=K)
    for subject in (retriever, reranker):
        async with subject:
            result, _ = await got(front_end.call(subject, how))

        refused = Raises(RerankStatusError, phrase, 404)
        check(result, Unranked(phrase) if on_error == "skip" else refused)
