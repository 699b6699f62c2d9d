"""The views of an explanation: text of 80 columns, rich at any width, HTML."""

from __future__ import annotations

from io import StringIO
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

import milvus_vllm_retrievers
from milvus_vllm_retrievers._core.hits import Hit
from milvus_vllm_retrievers.explain import ExplainedHit, Explanation

LONG = "A whale is the largest animal that has ever lived, and it sings to others of its kind."
PLAN = SimpleNamespace(
    collection="docs",
    text_field="body",
    text_field_why="the BM25 function's input",
    vector_fields=(("dense", "embedded here"), ("sparse", "BM25 by Milvus")),
    reranked_by="milvus",
    why="Milvus 2.6.4 knows the provider vllm",
)


def hit(rank: int, text: str | None = LONG, **more: Any) -> ExplainedHit:
    retrieved = {"retrieval_rank": 5 - rank, "retrieval_score": 0.0125 * rank}
    retrieved = {name: more.pop(name, value) for name, value in retrieved.items()}
    values = {"pk": rank, "relevance_score": 1 - rank / 8, "reranked_by": "milvus", **more}
    return ExplainedHit(hit=Hit(text=text, **values), rank=rank, **retrieved)


def explanation(*hits: ExplainedHit, query: str = "whales", **more: Any) -> Explanation:
    rows = hits or (hit(1), hit(2), hit(3, pk="b7e0d8e2-6c0b-4a53-9a54-2f0c5fd1d3a1"))
    return Explanation(query, 50, "milvus", rows, **{"plan": PLAN, **more})


def rich_text(subject: Explanation, width: int) -> str:
    console = Console(width=width, file=StringIO(), color_system=None)
    console.print(subject)
    return console.file.getvalue()  # type: ignore[attr-defined]


VIEWS = {
    "print": str,
    "rich at 80": lambda subject: rich_text(subject, 80),
    "rich at 100": lambda subject: rich_text(subject, 100),
    "rich at 160": lambda subject: rich_text(subject, 160),
    "a notebook": lambda subject: subject._repr_html_(),
}


@pytest.fixture(params=VIEWS)
def view(request: pytest.FixtureRequest) -> Any:
    return VIEWS[request.param]


def test_every_view_shows_the_numbers_the_keys_and_the_texts(view: Any) -> None:
    shown = view(explanation())

    for value in ("0.8750", "0.7500", "0.6250", "0.0125", "0.0250", "0.0375", "b7e0d8e2"):
        assert value in shown
    assert shown.count("A whale is") == 3


def test_every_view_shows_what_was_searched_what_was_reranked_by_whom_and_why(view: Any) -> None:
    shown = " ".join(view(explanation()).replace("&#x27;", "'").split())

    assert "whales" in shown
    assert "50 candidates, reranked inside Milvus: Milvus 2.6.4 knows the provider vllm" in shown
    assert "collection docs, text field 'body' (the BM25 function's input)" in shown
    assert "searched: dense (embedded here), sparse (BM25 by Milvus)" in shown


def test_every_view_says_once_why_items_are_unranked(view: Any) -> None:
    lost = [hit(i, relevance_score=None, rerank_error="vLLM is down") for i in (1, 2)]
    shown = view(explanation(*lost, plan=None))

    assert shown.count("unranked: vLLM is down") == 1


def test_every_view_says_that_and_why_nothing_was_reranked_before_what_was_planned(
    view: Any,
) -> None:
    lost = [hit(i, relevance_score=None, rerank_error="vLLM is down") for i in (1, 2)]
    shown = " ".join(view(Explanation("whales", 50, None, tuple(lost), PLAN)).split())

    assert "50 candidates, NOT reranked: vLLM is down" in shown
    assert "was to be reranked inside Milvus: Milvus 2.6.4 knows the provider vllm" in shown
    assert shown.count("vLLM is down") == 1


def test_every_view_tells_the_fallback_from_the_plan(view: Any) -> None:
    fallen_back = Explanation("whales", 50, "client", (hit(1, reranked_by="client"),), PLAN)
    shown = " ".join(view(fallen_back).split())

    assert "50 candidates, reranked by this client: " not in shown
    assert "50 candidates, reranked by this client" in shown
    assert "was to be reranked inside Milvus: Milvus 2.6.4 knows" in shown


def test_every_view_shows_an_explanation_without_results(view: Any) -> None:
    nothing = Explanation("whales", 0, None, ())

    assert "0 candidates, reranked not at all" in view(nothing)


def test_the_columns_of_a_printed_table_are_aligned() -> None:
    lines = str(explanation(hit(1), hit(2, pk="x" * 40), hit(10, "猫の本", pk="鍵"))).splitlines()
    table = lines[lines.index("") + 1 :]

    assert table[0].split() == ["rank", "before", "relevance", "retrieval", "id", "text"]
    places = {cell_len(line.split(start)[0]) for line, start in zip(
        table, ["text", "A whale", "A whale", "猫の本"], strict=True
    )}  # fmt: skip
    assert places == {table[0].index("text")}


def test_what_was_retrieved_nowhere_has_a_dash_in_its_place() -> None:
    row = str(explanation(hit(1, retrieval_rank=None, retrieval_score=None))).splitlines()[-1]

    assert row.split()[:4] == ["1", "-", "0.8750", "-"]


SCORES = st.none() | st.floats(allow_nan=False, width=32)


@given(st.text(), st.text(), st.text(max_size=50), SCORES, SCORES)
def test_whatever_is_stored_a_printed_table_has_80_columns_and_one_line_for_each_result(
    query: str, text: str, key: str, relevance: float | None, retrieval: float | None
) -> None:
    row = hit(1, text, pk=key, relevance_score=relevance, retrieval_score=retrieval)
    lines = str(explanation(row, row, query=query)).split("\n")

    assert len(lines[lines.index("") + 1 :] if query.strip() else lines) >= 3
    assert max(cell_len(line) for line in lines[-3:]) <= 80
    assert all(line.isprintable() for line in lines)


@given(st.text() | st.sampled_from(["[red]x[/red]", "[/]", "a [link=x", "\x1b[31mred"]))
def test_whatever_is_stored_rich_shows_it_as_it_is(text: str) -> None:
    shown = rich_text(explanation(hit(1, text), query=text), 160)

    assert "0.8750" in shown
    assert "\x1b" not in shown


HOSTILE = "<script>alert('x')</script> & \"more\""


def test_a_notebook_shows_no_value_as_html() -> None:
    plan = SimpleNamespace(**{**vars(PLAN), "collection": HOSTILE, "why": HOSTILE})
    row = hit(1, HOSTILE, pk=HOSTILE, rerank_error=HOSTILE)
    shown = explanation(row, query=HOSTILE, plan=plan)._repr_html_()

    assert "<script" not in shown
    assert shown.count("&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;") == 6


def test_an_explanation_is_public() -> None:
    assert milvus_vllm_retrievers.Explanation is Explanation
    assert "Explanation" in dir(milvus_vllm_retrievers)
