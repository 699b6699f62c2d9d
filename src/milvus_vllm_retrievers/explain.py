"""What reranking did to one query: the place of each result before and after."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from milvus_vllm_retrievers._core.adapter import MilvusVLLMAdapter
from milvus_vllm_retrievers._core.hits import Hit, RerankedBy
from milvus_vllm_retrievers._core.query import Query, SearchOptions
from milvus_vllm_retrievers._core.target import Plan
from milvus_vllm_retrievers.errors import excerpt

if TYPE_CHECKING:
    from rich.console import Group

_COLUMNS = 80
_ID_COLUMNS = 14
_TEXT_COLUMNS = 60
_HEADINGS = ("rank", "before", "relevance", "retrieval", "id", "text")
_PLAIN = 10_000  # from here on a score is shown with an exponent, so that columns hold it
_WIDTHS = (4, 6, 10, 10)  # of the numbers


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
        plan: What was searched and reranked, and why so.

    ``print`` shows a table of 80 columns, `rich.print` one as wide as the terminal, and a notebook
    one in HTML.
    """

    query: str
    candidates: int
    reranked_by: RerankedBy | None
    hits: tuple[ExplainedHit, ...]
    plan: Plan | None = None

    def __str__(self) -> str:
        heading = [textwrap.fill(line, _COLUMNS) for line in self._heading()]
        rows = [_HEADINGS, *map(_cells, self.hits)]
        return "\n".join([*heading, "", *map(_aligned, rows)])

    def __rich__(self) -> Group:
        """Return what `rich.print` shows; needs the extra ``cli``."""
        from rich import box  # noqa: PLC0415 - an optional dependency
        from rich.console import Group  # noqa: PLC0415
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        table = Table(box=box.SIMPLE)
        for heading in _HEADINGS[:-2]:
            table.add_column(heading, justify="right", no_wrap=True)
        for heading in _HEADINGS[-2:]:
            table.add_column(heading, overflow="fold", min_width=12)
        for hit in self.hits:  # a plain text is read as markup
            table.add_row(*map(Text, _cells(hit)))
        return Group(*map(Text, self._heading()), table)

    def _repr_html_(self) -> str:
        heading = "".join(f"<div>{escape(line)}</div>" for line in self._heading())
        names = "".join(f"<th>{name}</th>" for name in _HEADINGS)
        rows = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in _cells(hit)) + "</tr>"
            for hit in self.hits
        )
        return f"{heading}<table><thead><tr>{names}</tr></thead><tbody>{rows}</tbody></table>"

    def _heading(self) -> Iterator[str]:
        plan = self.plan
        path = {"milvus": "inside Milvus", "client": "by this client", None: "not at all"}
        why = f": {plan.why}" if plan and plan.why else ""
        errors = [
            _line(each) for each in dict.fromkeys(h.hit.rerank_error for h in self.hits) if each
        ]
        yield excerpt(_line(self.query))
        if errors and self.reranked_by is None:
            yield f"{self.candidates} candidates, NOT reranked: {errors.pop(0)}"
        else:
            as_planned = plan is None or plan.reranked_by == self.reranked_by
            because = why if as_planned else ""
            yield f"{self.candidates} candidates, reranked {path[self.reranked_by]}{because}"
        if plan and plan.reranked_by != self.reranked_by:
            yield f"was to be reranked {path[plan.reranked_by]}{why}"
        if plan:
            text = f"text field {plan.text_field!r} ({plan.text_field_why})"
            yield f"collection {plan.collection}, {text}"
            yield "searched: " + ", ".join(f"{name} ({how})" for name, how in plan.vector_fields)
        yield from (f"unranked: {error}" for error in errors)


def _cells(explained: ExplainedHit) -> tuple[str, ...]:
    hit = explained.hit
    return (
        str(explained.rank),
        str(explained.retrieval_rank or "-"),
        _shown(hit.relevance_score),
        _shown(explained.retrieval_score),
        _line(str(hit.pk)),
        _cut(_line(hit.text or ""), _TEXT_COLUMNS),
    )


def _aligned(cells: Sequence[str]) -> str:
    numbers = [cell.rjust(width) for cell, width in zip(cells, _WIDTHS, strict=False)]
    key = _cut(cells[-2], _ID_COLUMNS)
    line = "  ".join([*numbers, key + " " * (_ID_COLUMNS - _columns(key)), cells[-1]])
    return _cut(line, _COLUMNS).rstrip()


def _line(text: str) -> str:
    """Return a text in one line, without what would steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))


def _columns(text: str) -> int:
    """Return how wide a terminal shows a text: East Asian characters take two columns."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(map(bool, map(unicodedata.combining, text)))


def _cut(text: str, columns: int) -> str:
    """Shorten a text to what fits."""
    if _columns(text) <= columns:
        return text
    text = text[:columns]
    while _columns(text) >= columns:
        text = text[:-1]
    return f"{text}…"


def explain(adapter: MilvusVLLMAdapter, query: Query, options: SearchOptions) -> Explanation:
    """Retrieve with and without the ranker, and compare."""
    return _compare(query, *adapter.explained(query, options))


async def aexplain(adapter: MilvusVLLMAdapter, query: Query, options: SearchOptions) -> Explanation:
    """Retrieve with and without the ranker, and compare; the async twin of `explain`."""
    return _compare(query, *await adapter.aexplained(query, options))


def _compare(query: Query, before: Sequence[Hit], after: Sequence[Hit], plan: Plan) -> Explanation:
    places = {hit.pk: (rank, hit) for rank, hit in enumerate(before, start=1)}
    rows = []
    for rank, hit in enumerate(after, start=1):
        old_rank, old = places.get(hit.pk, (None, None))
        rows.append(ExplainedHit(hit, rank, old_rank, old.retrieval_score if old else None))
    served_by = after[0].reranked_by if after else None
    return Explanation(query.text, len(before), served_by, tuple(rows), plan)


def _shown(score: float | None) -> str:
    if score is None:
        return "-"
    return f"{score:.4f}" if abs(score) < _PLAIN else f"{score:.3g}"
