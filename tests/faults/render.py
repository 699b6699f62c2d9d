"""Writes the fault table into docs/what-happens.md: ``python -m tests.faults.render``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.faults.table import (
    MILVUS_ROWS,
    ON_ERROR,
    RELEVANCE,
    ROWS,
    MilvusRow,
    Mode,
    Outcome,
    Raises,
    Reranked,
    Row,
    Unranked,
)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "what-happens.md"
BEGIN = "<!-- The tables: written by `python -m tests.faults.render`, do not edit. -->"
EQUAL: dict[Mode, str] = {
    "server": "reranked: equals by primary key",
    "client": "reranked: equals by primary key (`VLLMRerank`: as given)",
}
END = "<!-- The end of the tables. -->"


def rendered(page: str) -> str:
    """Return the page with the tables of today between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    assert found, f"{PAGE} has lost its marks"
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def tables() -> str:
    """Return the three tables as Markdown."""
    return "\n\n".join(
        [
            '### vLLM fails Milvus (mode `"server"`, and `MilvusVLLMRerank`)',
            vllm_table("server"),
            '### vLLM fails this process (mode `"client"`, and `VLLMRerank`)',
            vllm_table("client"),
            "### Milvus fails (every mode, every `on_error`)",
            milvus_table(),
        ]
    )


def vllm_table(mode: Mode) -> str:
    notes: list[str] = []
    lines = []
    for row in ROWS:
        column = row.column(mode)
        marks = "".join(f" ({_number(note, notes)})" for note in _notes(row, mode))
        cells = [cell(column[each], mode) for each in ON_ERROR] if column else ["see the note"] * 3
        lines.append([f"{row.name}{marks}", *cells])
    heads = [f'`on_error="{each}"`' for each in ON_ERROR]
    return "\n\n".join([_table(["When vLLM ...", *heads], lines), _list(notes)])


def _notes(row: Row, mode: Mode) -> Iterable[str]:
    if mode == "server" and row.milvus_itself:
        yield f"{row.milvus_itself}."
    if row.warns:
        yield "The log has a warning, once."
    if row.then:
        yield f"{row.then[0].upper()}{row.then[1:]}."


def _number(note: str, notes: list[str]) -> int:
    if note not in notes:
        notes.append(note)
    return notes.index(note) + 1


def cell(outcome: Outcome, mode: Mode) -> str:
    """Say what a caller gets, in a few words."""
    match outcome:
        case Raises(error, phrase, status):
            return f"`{error.__name__}`{f' {status}' if status else ''}: “{phrase}”"
        case Unranked():
            return "retrieval order, marked"
        case Reranked(by, scores) if by == mode or (mode == "server" and by == "milvus"):
            if len(set(scores)) == 1:
                return EQUAL[mode]
            return "reranked" if scores == RELEVANCE else "**reranked, wrongly**"
        case Reranked():
            return "reranked from here"


def milvus_table() -> str:
    lines = [[row.name, _call(row), row.then] for row in MILVUS_ROWS.values()]
    return _table(["When Milvus ...", "a call", "and the same retriever afterwards"], lines)


def _call(row: MilvusRow) -> str:
    if not isinstance(row.call, Raises):
        return row.call
    reasons = " or ".join(f'`"{reason}"`' if reason else "None" for reason in row.reasons)
    said = f": “{row.call.phrase}”" if row.call.phrase else ""
    return f"raises `{row.call.error.__name__}`{said}; its `reason` is {reasons}"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _list(notes: Sequence[str]) -> str:
    return "\n".join(f"{number}. {note}" for number, note in enumerate(notes, 1))


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text()))
