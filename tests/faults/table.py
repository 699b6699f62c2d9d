"""The fault table: what a caller gets, for each fault, mode and `on_error`.

The tests beside it assert every cell; ``python -m tests.faults.render`` writes it into
docs/what-happens.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from milvus_vllm_retrievers import (
    MilvusVLLMError,
    RerankConnectionError,
    RerankResponseError,
    RerankStatusError,
    RerankTimeoutError,
    SearchError,
)
from milvus_vllm_retrievers.errors import SearchFailure
from tests.fakes import Reply

OnError = Literal["raise", "client", "skip"]
Mode = Literal["server", "client"]
By = Literal["milvus", "client"]

ON_ERROR: tuple[OnError, ...] = ("raise", "client", "skip")
MODES: tuple[Mode, ...] = ("server", "client")

RELEVANCE = (0.5, 0.125, 0.75, 0.25, 0.875)
"""What the rerank model thinks of the five documents, by their place in retrieval order."""


# What a caller gets


@dataclass(frozen=True)
class Raises:
    """An error; its message holds the phrase."""

    error: type[MilvusVLLMError]
    phrase: str
    status: int | None = None


@dataclass(frozen=True)
class Reranked:
    """The documents in the order of these scores, and who asked for them."""

    by: By
    scores: tuple[float, ...] = RELEVANCE


@dataclass(frozen=True)
class Unranked:
    """The retrieval order; every item says, with the phrase, why it was not reranked."""

    phrase: str


Outcome = Raises | Reranked | Unranked
Column = Mapping[OnError, Outcome]


def fails(error: type[MilvusVLLMError], phrase: str, status: int | None = None) -> dict[Mode, Any]:
    """Return what the package's rules make of a failure, in both modes."""
    raised = Raises(error, phrase, status)
    return {
        "server": {"raise": raised, "client": Reranked("client"), "skip": Unranked(phrase)},
        "client": {"raise": raised, "client": raised, "skip": Unranked(phrase)},
    }


def failure_in_milvus(
    error: type[MilvusVLLMError], phrase: str, status: int | None = None
) -> Column:
    """Return what becomes of a failure inside Milvus: it can be made up for from here."""
    return fails(error, phrase, status)["server"]


def failure_from_here(
    error: type[MilvusVLLMError], phrase: str, status: int | None = None
) -> Column:
    """Return what becomes of a failure of this process's own request: nothing is left to try."""
    return fails(error, phrase, status)["client"]


def always(by: By, scores: tuple[float, ...] = RELEVANCE) -> Column:
    """Return the same for every `on_error`: nothing failed, as far as anybody noticed."""
    return dict.fromkeys(ON_ERROR, Reranked(by, scores))


# What fails


@dataclass(frozen=True)
class Answers:
    """A vLLM, or a gateway before it, that gives this answer; only the first time if `once`."""

    reply: Reply
    once: bool = False


@dataclass(frozen=True)
class Refuses:
    """Nobody listens there."""


@dataclass(frozen=True)
class Hangs:
    """Takes the request and never answers."""


@dataclass(frozen=True)
class BreaksOff:
    """Closes the connection in the middle of its answer."""


@dataclass(frozen=True)
class Floods:
    """Answers with a body that no rerank request asks for."""

    body: bytes


@dataclass(frozen=True)
class GoesAway:
    """Stops listening after it has served, and comes back later."""


@dataclass(frozen=True)
class IsKilled:
    """A real vLLM that is killed while it works on the request."""


Fault = Answers | Refuses | Hangs | BreaksOff | Floods | GoesAway | IsKilled


@dataclass(frozen=True)
class Row:
    """One way for vLLM to fail.

    Attributes:
        name: What vLLM does, to go on with "vLLM ...".
        fault: How that is brought about.
        server: What a caller gets in mode "server", by `on_error`; None where the stand-in for
            Milvus 2.6 does not do what Milvus does, so that it cannot be shown.
        client: The same for mode "client" and for VLLMRerank.
        ranker: Further arguments of the ranker.
        timeout: Seconds for the whole call.
        milvus_itself: What to know of mode "server" where Milvus, not this package, decides.
        warns: What the log says beside.
        then: What the same retriever does once vLLM is well.
    """

    name: str
    fault: Fault
    server: Column | None
    client: Column
    ranker: Mapping[str, Any] = field(default_factory=dict)
    timeout: float = 10.0
    milvus_itself: str = ""
    warns: str = ""
    then: str = ""

    def __str__(self) -> str:
        return self.name

    def column(self, mode: Mode) -> Column | None:
        """Return what a caller gets in a mode."""
        return self.server if mode == "server" else self.client


def _error(status: int, message: str, **headers: str) -> Answers:
    return Answers(Reply.json(status, {"error": {"message": message}}, **headers))


def _results(*scores: tuple[int, float]) -> Answers:
    return Answers(Reply(200, _body(*scores), {"content-type": "application/json"}))


def _body(*scores: tuple[int, float]) -> bytes:
    results = [{"index": index, "relevance_score": score} for index, score in scores]
    return json.dumps({"results": results}).encode()


_EVERY = tuple(enumerate(RELEVANCE))
_BY_POSITION = (
    "Milvus sorts the results by index and then reads them by position, unchecked: scores land on "
    "the wrong documents, and nothing shows it. vLLM itself does not do this; where a gateway "
    'might, use mode `"client"`'
)

ROWS: tuple[Row, ...] = (
    Row(
        "refuses connections",
        Refuses(),
        server=failure_in_milvus(RerankConnectionError, "vLLM must be reachable from Milvus"),
        client=failure_from_here(RerankConnectionError, "is vLLM running there?"),
    ),
    Row(
        "takes longer than the ranker's `timeout`",
        Hangs(),
        server=failure_in_milvus(RerankTimeoutError, "reranking inside Milvus took too long"),
        client=failure_from_here(RerankTimeoutError, "did not answer in time"),
        ranker={"timeout": 0.5},
    ),
    Row(
        "takes longer than the whole call's `timeout`",
        Hangs(),
        server=failure_in_milvus(SearchError, "raise timeout"),
        client=failure_from_here(RerankTimeoutError, "did not answer in time"),
        ranker={"timeout": None},
        timeout=1.5,
    ),
    Row(
        "breaks off in the middle of an answer",
        BreaksOff(),
        server=failure_in_milvus(RerankConnectionError, "the connection broke"),
        client=failure_from_here(RerankConnectionError, "could not be reached or broke off"),
    ),
    Row(
        "answers 400",
        _error(400, "This model's maximum context length is 512 tokens"),
        server=failure_in_milvus(RerankStatusError, "keep truncate_prompt_tokens=-1", 400),
        client=failure_from_here(RerankStatusError, "keep truncate_prompt_tokens=-1", 400),
    ),
    Row(
        "answers 401",
        Answers(Reply.json(401, {"error": "Unauthorized"})),
        server=failure_in_milvus(RerankStatusError, "Unauthorized", 401),
        client=failure_from_here(RerankStatusError, "Check the ranker's api_key", 401),
    ),
    Row(
        "answers 404",
        _error(404, "The model `x` does not exist."),
        server=failure_in_milvus(RerankStatusError, "Check the ranker's model name", 404),
        client=failure_from_here(RerankStatusError, "Check the ranker's model name", 404),
    ),
    Row(
        "answers 429 and asks to wait an hour",
        _error(429, "slow down", **{"retry-after": "3600"}),
        server=failure_in_milvus(RerankStatusError, "lower the ranker's max_concurrency", 429),
        client=failure_from_here(RerankStatusError, "slow down", 429),
        milvus_itself="Milvus does not read `Retry-After`; it tries three times in all",
    ),
    Row(
        "answers 429 once, and then as it should",
        Answers(Reply.json(429, {"error": "slow down"}, **{"retry-after": "0"}), once=True),
        server=always("milvus"),
        client=always("client"),
        milvus_itself="Milvus tries three times in all, whatever the failure",
    ),
    Row(
        "answers 500",
        _error(500, "the engine died"),
        server=failure_in_milvus(RerankStatusError, "the engine died", 500),
        client=failure_from_here(RerankStatusError, "the engine died", 500),
    ),
    Row(
        "answers 503",
        _error(503, "the queue is full"),
        server=failure_in_milvus(RerankStatusError, "lower the ranker's max_concurrency", 503),
        client=failure_from_here(RerankStatusError, "the queue is full", 503),
    ),
    Row(
        "is hidden by a gateway's 502 page in HTML",
        Answers(Reply(502, b"<html>Bad Gateway</html>", {"content-type": "text/html"})),
        server=failure_in_milvus(RerankStatusError, "Bad Gateway", 502),
        client=failure_from_here(RerankStatusError, "Bad Gateway", 502),
    ),
    Row(
        "answers with a redirect to another host",
        Answers(Reply(307, b"", {"location": "http://gpu.example/v1/rerank"})),
        server=None,
        client=failure_from_here(RerankStatusError, "pass endpoint='http://gpu.example'", 307),
        milvus_itself="Milvus follows redirects; what comes of it depends on where they lead",
    ),
    Row(
        "answers with redirects that never end",
        Answers(Reply(307, b"", {"location": "/v1/rerank"})),
        server=None,
        client=failure_from_here(RerankStatusError, "after 3 redirects already", 307),
        milvus_itself="Milvus follows redirects; what comes of it depends on where they lead",
    ),
    Row(
        "answers with something that is no JSON",
        Answers(Reply(200, b"<html>hello</html>", {"content-type": "text/html"})),
        server=failure_in_milvus(RerankResponseError, "unmarshal response failed"),
        client=failure_from_here(RerankResponseError, "something other than rerank results"),
    ),
    Row(
        "leaves one document out",
        _results(*_EVERY[:1], *_EVERY[2:]),
        server=always("milvus", (0.5, 0.75, 0.25, 0.875, 0.0)),
        client=failure_from_here(RerankResponseError, "4 results for 5 documents"),
        milvus_itself=f"{_BY_POSITION}. A score that is missing at the end counts as 0",
    ),
    Row(
        "scores one document twice, with one result too many",
        _results(*_EVERY, (2, 0.0)),
        server=failure_in_milvus(SearchError, "index out of range"),
        client=failure_from_here(RerankResponseError, "6 results for 5 documents"),
        milvus_itself="Milvus fails on more results than documents, in words of its own",
    ),
    Row(
        "scores one document twice and another not at all",
        _results(*_EVERY[1:], (4, 0.5)),
        server=always("milvus", (0.125, 0.75, 0.25, 0.875, 0.5)),
        client=failure_from_here(RerankResponseError, "1 of them without a score"),
        milvus_itself=_BY_POSITION,
    ),
    Row(
        "gives a score to a document that was not sent",
        _results((0, 0.5), (99, 0.125), *_EVERY[2:]),
        server=always("milvus", (0.5, 0.75, 0.25, 0.875, 0.125)),
        client=failure_from_here(RerankResponseError, "1 of them without a score"),
        milvus_itself=_BY_POSITION,
    ),
    Row(
        "gives a score that is not a number (NaN)",
        _results((0, float("nan")), *_EVERY[1:]),
        server=failure_in_milvus(RerankResponseError, "unmarshal response failed"),
        client=failure_from_here(RerankResponseError, "not a finite number"),
    ),
    Row(
        "gives every document the same score",
        _results(*((index, 0.75) for index in range(5))),
        server=always("milvus", (0.75,) * 5),
        client=always("client", (0.75,) * 5),
        warns="the same score",
    ),
    Row(
        "answers with 50 MB",
        Floods(_body(*_EVERY).ljust(50_000_000)),
        server=always("milvus"),
        client=failure_from_here(RerankResponseError, "answered with more than"),
        milvus_itself="Milvus reads an answer of any size",
    ),
    Row(
        "stops listening",
        GoesAway(),
        server=failure_in_milvus(RerankConnectionError, "vLLM must be reachable from Milvus"),
        client=failure_from_here(RerankConnectionError, "is vLLM running there?"),
        then="the same retriever is reranked again once vLLM is back (see the cool-down)",
    ),
    Row(
        "is killed in the middle of a request",
        IsKilled(),
        server=failure_in_milvus(RerankConnectionError, "vLLM must be reachable from Milvus"),
        client=failure_from_here(RerankConnectionError, "could not be reached or broke off"),
        timeout=120.0,
    ),
)


# Milvus


@dataclass(frozen=True)
class MilvusRow:
    """One way for Milvus to fail: the same in every mode and for every `on_error`.

    Attributes:
        name: What Milvus does, to go on with "Milvus ...".
        call: What a call gets: an error, or the documents as if nothing were.
        reasons: What `SearchError.reason` then is, one of these.
        then: What the same retriever does in the calls after it.
    """

    name: str
    call: Raises | Literal["works"]
    reasons: tuple[SearchFailure | None, ...] = ()
    then: str = "works again once Milvus does"

    def __str__(self) -> str:
        return self.name


MILVUS_ROWS: Mapping[str, MilvusRow] = {
    row.name: row
    for row in (
        MilvusRow(
            "refuses connections",
            Raises(SearchError, "Fail connecting to server"),
            reasons=("disconnected",),
        ),
        MilvusRow(
            "takes the first connection and never answers",
            Raises(SearchError, ""),
            reasons=("timeout", "disconnected"),
        ),
        MilvusRow(
            "stops answering between two calls",
            Raises(SearchError, "raise timeout"),
            reasons=("timeout",),
        ),
        MilvusRow(
            "is killed between two calls",
            Raises(SearchError, "Fail connecting to server"),
            reasons=("disconnected",),
        ),
        MilvusRow(
            "is killed in the middle of a search",
            Raises(SearchError, "Fail connecting to server"),
            reasons=("disconnected",),
        ),
        MilvusRow("is killed and restarted between two calls", "works", then="works"),
        MilvusRow("has released the collection", "works", then="works"),
        MilvusRow(
            "has dropped the collection",
            Raises(SearchError, "check collection_name"),
            reasons=(None,),
            then="works once the collection is there again, with whatever schema",
        ),
        MilvusRow(
            "has had the collection made anew with other fields",
            Raises(SearchError, ""),
            reasons=(None,),
            then="reads the collection anew, and works",
        ),
    )
}
