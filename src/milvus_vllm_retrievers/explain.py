"""What reranking did to one query: the place of each result before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from milvus_vllm_retrievers._core.adapter import MilvusVLLMAdapter
from milvus_vllm_retrievers._core.hits import Hit, RerankedBy
from milvus_vllm_retrievers._core.query import Query, SearchOptions
from milvus_vllm_retrievers.errors import excerpt

if TYPE_CHECKING:
    from rich.table import Table

_TEXT_CHARACTERS = 60


@dataclass(frozen=True, slots=True)
class ExplainedHit:
    """One result and where it stood before reranking.

    Attributes:
        hit: The result as the retriever returns it.
        rank: Its place among the results, from 1.
        retrieval_rank: Its place among the candidates, from 1; None if it is not among the
            candidates of the search without a ranker (the data changed in between).
        retrieval_score: The score of the search without a ranker.
    """

    hit: Hit
    rank: int
    retrieval_rank: int | None
    retrieval_score: float | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """The results of one query beside their order before reranking.

    Attributes:
        query: The query text.
        candidates: How many candidates there were.
        reranked_by: Who asked the model: ``"milvus"``, ``"client"`` or None.
        hits: The results, best first.
    """

    query: str
    candidates: int
    reranked_by: RerankedBy | None
    hits: tuple[ExplainedHit, ...]

    def __rich__(self) -> Table:
        """Return a table for `rich.print`; needs the extra ``cli``."""
        from rich.table import Table  # noqa: PLC0415 - an optional dependency

        path = {"milvus": "inside Milvus", "client": "by this client", None: "not at all"}
        table = Table(
            title=f"{self.query}\n{self.candidates} candidates, reranked {path[self.reranked_by]}",
            title_justify="left",
        )
        for heading in ("retrieval rank", "retrieval score", "rank", "relevance score"):
            table.add_column(heading, justify="right")
        table.add_column("id")
        table.add_column("text", no_wrap=True)
        for row in self.hits:
            table.add_row(
                str(row.retrieval_rank or "-"),
                _shown(row.retrieval_score),
                str(row.rank),
                _shown(row.hit.relevance_score),
                str(row.hit.pk),
                excerpt(" ".join((row.hit.text or "").split()), _TEXT_CHARACTERS),
            )
        return table


def explain(adapter: MilvusVLLMAdapter, query: Query, options: SearchOptions) -> Explanation:
    """Retrieve with and without the ranker, and compare."""
    before, after, _ = adapter.explained(query, options)
    return _compare(query, before, after)


async def aexplain(adapter: MilvusVLLMAdapter, query: Query, options: SearchOptions) -> Explanation:
    """Retrieve with and without the ranker, and compare; the async twin of `explain`."""
    before, after, _ = await adapter.aexplained(query, options)
    return _compare(query, before, after)


def _compare(query: Query, before: Sequence[Hit], after: Sequence[Hit]) -> Explanation:
    places = {hit.pk: (rank, hit) for rank, hit in enumerate(before, start=1)}
    rows = []
    for rank, hit in enumerate(after, start=1):
        old_rank, old = places.get(hit.pk, (None, None))
        rows.append(ExplainedHit(hit, rank, old_rank, old.retrieval_score if old else None))
    served_by = after[0].reranked_by if after else None
    return Explanation(query.text, len(before), served_by, tuple(rows))


def _shown(score: float | None) -> str:
    return "-" if score is None else f"{score:.4f}"
