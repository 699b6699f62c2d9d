"""Filters: joined so that each stands on its own, and checked so that none can break out."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from milvus_vllm_retrievers import ConfigurationError
from milvus_vllm_retrievers._core.expressions import all_of, checked_expr


@pytest.mark.parametrize(
    ("expressions", "joined"),
    [
        ((), None),
        ((None, "", "  "), None),
        (("a == 1",), "a == 1"),
        ((None, "a == 1 or b == 2", ""), "a == 1 or b == 2"),
        (("a == 1 or b == 2", "c == 3"), "(a == 1 or b == 2) and (c == 3)"),
    ],
)
def test_expressions_are_anded_each_in_its_own_parentheses(
    expressions: tuple[str | None, ...], joined: str | None
) -> None:
    assert all_of(*expressions) == joined


@pytest.mark.parametrize(
    "expr",
    [
        "random_sample(0.5)",
        "pk > 1 and RANDOM_SAMPLE (0.5)",
        "not(Random_Sample\n(0.5))",
        "element_filter(tags, $ > 0)",
        "a == 'x' and ELEMENT_FILTER\t(tags, $ > 0)",
        "ElementFilter(tags, $ > 0)",
    ],
)
def test_what_takes_over_other_conditions_stands_alone_or_not_at_all(expr: str) -> None:
    assert all_of(None, expr, " ") == expr
    for joined in [("a == 1", expr), (expr, "a == 1")]:
        with pytest.raises(ConfigurationError, match="cannot be joined with another"):
            all_of(*joined)


@pytest.mark.parametrize(
    "expr",
    [
        "a == 'random_sample(0.5)'",
        'a == "\\"element_filter(tags, $ > 0)"',
        "random_samples == 1",
        "meta['random_sample'] in (1, 2)",
    ],
)
def test_what_only_looks_like_it_is_joined(expr: str) -> None:
    assert all_of("a == 1", expr) == f"(a == 1) and ({expr})"


comparisons = st.builds(
    lambda field, value: f"{field} == {json.dumps(value, ensure_ascii=False)}",
    st.sampled_from(["a", "meta['x']", '$meta["y"]']),
    st.text(),
)
balanced = st.recursive(
    comparisons,
    lambda inner: st.one_of(
        inner.map(lambda e: f"({e})"),
        inner.map(lambda e: f"not json_contains(tags, [{e}])"),
        st.tuples(inner, inner).map(" or ".join),
    ),
    max_leaves=5,
)


@given(balanced)
def test_any_text_quoted_as_json_may_stand_in_an_expression(expr: str) -> None:
    assert checked_expr(expr) is None


@given(st.lists(balanced | st.none(), max_size=4))
def test_what_is_joined_of_sound_expressions_is_sound(expressions: list[str | None]) -> None:
    assert checked_expr(all_of(*expressions)) is None


@pytest.mark.parametrize(
    "expr",
    [
        None,
        "",
        "a in [1, 2] and {limit} > 3",
        "a == 'it\\'s (not) closed'",
        """a == 'say "hi' or b == "it's" """,
        "a == \"]})\" and b like '%['",
        "a == 'ends with a backslash\\\\'",
        "a == 'a # b; c -- d /* e */ // f'",
        "a > -1\nand b > 2",
    ],
)
def test_a_sound_expression_is_accepted(expr: str | None) -> None:
    assert checked_expr(expr) is None


@pytest.mark.parametrize(
    ("expr", "problem"),
    [
        ("a == 1) or (b == 2", "closes a ')' it did not open"),
        ("a in [1, 2)", "closes a ')' it did not open"),
        ("] a [", "closes a ']' it did not open"),
        ("a in (1, 2", "not complete, a ')' is missing"),
        ("a in [1", "not complete, a ']' is missing"),
        ("a == {b", "not complete, a '}' is missing"),
        ("a == 'b", 'not complete, a "\'" is missing'),
        ('a == "b', "not complete, a '\"' is missing"),
        ("a == 'b\\'", 'not complete, a "\'" is missing'),
        ("a == 'b\nc'", 'not complete, a "\'" is missing'),
        ("a == 1 -- comment", "holds '--'"),
        ("a == 1 /* comment */", "holds '/*'"),
        ("a == 1 // comment", "holds '//'"),
        ("a == 1 # comment", "holds '#'"),
        ("a == 1; b == 2", "holds ';'"),
        ("a == \\'b'", "holds '\\\\'"),
        ("a == 1\x00", "holds '\\x00'"),
        ("a\u00a0== 1", "holds '\\xa0'"),
    ],
)
def test_an_expression_that_does_not_close_within_itself_is_refused(
    expr: str, problem: str
) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(problem)):
        checked_expr(expr)


def test_an_expression_that_is_no_text_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="expr must be a text, not dict"):
        checked_expr({"a": 1})  # type: ignore[arg-type]


def test_a_long_expression_is_shown_in_part() -> None:
    with pytest.raises(ConfigurationError) as caught:
        checked_expr(f"a in [{'1, ' * 1000}")

    assert len(str(caught.value)) < 300
