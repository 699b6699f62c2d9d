"""Driving flows by hand: a collection, what Milvus and vLLM answer, and how to hand it over."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx
import pytest

from milvus_vllm_retrievers import RerankConnectionError, VLLMRanker
from milvus_vllm_retrievers._core.cool_down import Health
from milvus_vllm_retrievers._core.deadline import Deadline
from milvus_vllm_retrievers._core.hits import Hit, RowReader
from milvus_vllm_retrievers._core.layout import TextField
from milvus_vllm_retrievers._core.query import Encoder, Encoders, Query
from milvus_vllm_retrievers._core.route import route
from milvus_vllm_retrievers._core.server import Server
from milvus_vllm_retrievers._core.services import Answer
from milvus_vllm_retrievers._core.steps import CallMilvus, Flow, Send, Step, Together
from milvus_vllm_retrievers._core.target import Reranking, Target, TargetSettings, fingerprint
from tests.unit.builders import DENSE, FROM_TEXT, KEY, SPARSE, TEXT, description, layout

URL = "http://vllm"
DEADLINE = Deadline(at=1e12)
DOWN = RerankConnectionError("vLLM is down")
QUESTION = Query("a question")
LITE = "milvus_lite-3.2.2"


async def _aencode(query: Query) -> list[float]:
    raise NotImplementedError


ENCODER = Encoder(lambda query: [], _aencode)
FIELDS = (KEY, TEXT, DENSE, {**DENSE, "name": "dense_2"}, SPARSE)


def target(
    server: str = "2.6.4",
    fields: Sequence[str] | None = ("sparse",),
    encoders: Encoders = Encoders(dense=ENCODER),  # noqa: B008 - frozen
    *,
    nullable: bool = False,
) -> Target:
    """The collection docs: `pk`, the text `document`, two dense fields and a BM25 field."""
    return Target(
        settings=TargetSettings(collection_name="docs", vector_field=fields, encoders=encoders),
        fingerprint=fingerprint(description(*FIELDS, functions=[FROM_TEXT])),
        layout=layout(*FIELDS, functions=[FROM_TEXT]),
        server=Server.from_version(server),
        text=TextField("document", "the only VARCHAR field", nullable),
        output_fields=("pk", "document"),
        rows=RowReader("pk", "document"),
    )


def reranking(ranker: VLLMRanker, on: Target, health: Health | None = None) -> Reranking:
    """How the adapter would have the ranker asked."""
    return Reranking(ranker, route(ranker, on.facts(None)), health or Health(ranker.cool_down))


def rows(*triples: tuple[int, str | None, float]) -> list[Mapping[str, Any]]:
    """One query's answer: key, text and score of each hit."""
    return [
        {"pk": pk, "distance": score, "entity": {"pk": pk, "document": text}}
        for pk, text, score in triples
    ]


FOUND = rows((1, "one", 0.9), (2, "two", 0.8), (3, "three", 0.7))


def scored(*scores: float) -> Answer:
    """What vLLM answers to a request for so many scores."""
    results = [{"index": i, "relevance_score": score} for i, score in enumerate(scores)]
    return Answer(200, httpx.Headers(), json.dumps({"results": results}))


def body(step: Step) -> dict[str, Any]:
    """What a step sends to vLLM."""
    assert isinstance(step, Send)
    sent: dict[str, Any] = json.loads(step.request.content)
    return sent


def finish(flow: Flow[Any], answer: Any) -> Any:
    """Send the answer of the last step and return the flow's result."""
    with pytest.raises(StopIteration) as end:
        flow.send(answer)
    return end.value.value


def keys(hits: Sequence[Hit]) -> list[int | str]:
    return [hit.pk for hit in hits]


class ByHand:
    """Drives flows that run together, one after another, and keeps their steps.

    Args:
        answer: What each step brings; an error that it returns is thrown into the flow.
    """

    def __init__(self, answer: Callable[[Step], Any]) -> None:
        self._answer = answer
        self.steps: list[Step] = []

    def run(self, flow: Flow[Any]) -> Any:
        try:
            step = next(flow)
            while True:
                self.steps.append(step)
                result = self._together(step) if isinstance(step, Together) else self._answer(step)
                step = flow.throw(result) if isinstance(result, Exception) else flow.send(result)
        except StopIteration as end:
            return end.value

    def _together(self, step: Together) -> Any:
        results: list[Any] = []
        for flow in step.flows:
            try:
                results.append(self.run(flow))
            except Exception as error:  # noqa: BLE001 - as the drivers do
                if not step.return_exceptions:
                    return error
                results.append(error)
        return results

    def of(self, kind: type[Any]) -> list[Any]:
        """The steps of one kind."""
        return [step for step in self.steps if isinstance(step, kind)]


def searched_for(step: CallMilvus) -> list[Any]:
    """The data of a search's first leg: one entry for each query."""
    reqs = step.arguments.get("reqs")
    return list(reqs[0].data if reqs else step.arguments["data"])
