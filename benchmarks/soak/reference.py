"""What Milvus finds for every question, asked beforehand with plain pymilvus."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from pymilvus import AnnSearchRequest, MilvusClient, RRFRanker
from tests.fakes import LetterEmbeddings

from benchmarks.soak.questions import COLLECTION, FETCH_K, HIGH, LOW, ROWS, WORDS, Question, Setup

Scored = list[tuple[str, float]]
"""Primary keys as texts, with scores, best first."""

_QUERIES = 32
_FILTERS = [(low, high) for low in (0, LOW) for high in (HIGH, ROWS)]


class Reference:
    """The queries, and what Milvus finds for each.

    Queries whose candidates end between two equal scores are left out: for them, more than one
    pool is right.

    Args:
        client: The client to ask with.

    Attributes:
        queries: Their texts.
    """

    def __init__(self, client: MilvusClient) -> None:
        self._client = client
        self._legs: dict[tuple[str, str, int, int], Scored] = {}
        self._fused: dict[tuple[str, int, int], Scored] = {}
        self.queries: list[str] = []
        rng = random.Random(5)
        while len(self.queries) < _QUERIES:
            text = " ".join(rng.sample(WORDS, 3))
            if text not in self.queries and all(self._ask(text, *f) for f in _FILTERS):
                self.queries.append(text)

    def retrieved(self, question: Question, setup: Setup) -> Scored:
        """Return the candidates in the order in which they are found."""
        low, high = setup.low, question.high or ROWS
        if len(setup.fields) == 1:
            return self._legs[question.text, setup.fields[0], low, high]
        return self._fused[question.text, low, high]

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
