"""What is asked: queries, encoders and search options."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from milvus_vllm_retrievers import ConfigurationError
from milvus_vllm_retrievers._core.query import Query, SearchOptions, sparse_encoder

QUERY = Query("three")


@pytest.mark.parametrize("text", ["", " \n", None, ["a"]])
def test_a_query_needs_a_text(text: Any) -> None:
    with pytest.raises(ConfigurationError, match="the query must be a non-empty text"):
        Query(text)


@given(st.text(min_size=1).filter(str.strip))
def test_a_querys_text_stays_as_it_is(text: str) -> None:
    assert Query(text).text == text


def test_half_a_surrogate_pair_becomes_a_question_mark() -> None:
    assert Query("an emoji cut in half: \ud83d").text == "an emoji cut in half: ?"


def weights(text: str) -> dict[int, float]:
    return {len(text): 1.0}


class EmbedsOne:
    """As langchain-milvus has it."""

    def embed_query(self, text: str) -> dict[int, float]:
        return weights(text)


class EmbedsOneAsync(EmbedsOne):
    def embed_query(self, text: str) -> dict[int, float]:
        raise AssertionError("the async twin is there")

    async def aembed_query(self, text: str) -> dict[int, float]:
        return weights(text)


class EncodesMany:
    """As LlamaIndex has it."""

    def encode_queries(self, texts: list[str]) -> list[dict[int, float]]:
        return [weights(text) for text in texts]


class EncodesManyAsync(EncodesMany):
    def encode_queries(self, texts: list[str]) -> list[dict[int, float]]:
        raise AssertionError("the async twin is there")

    async def async_encode_queries(self, texts: list[str]) -> list[dict[int, float]]:
        return [weights(text) for text in texts]


@pytest.mark.parametrize("source", [weights, EmbedsOne(), EncodesMany()])
async def test_a_sparse_encoder_is_a_callable_or_has_a_known_method(source: Any) -> None:
    encoder = sparse_encoder(source)

    assert encoder.encode(QUERY) == {5: 1.0}
    assert await encoder.aencode(QUERY) == {5: 1.0}


@pytest.mark.parametrize("source", [EmbedsOneAsync(), EncodesManyAsync()])
async def test_the_async_twin_of_a_sparse_encoder_serves_async_calls(source: Any) -> None:
    assert await sparse_encoder(source).aencode(QUERY) == {5: 1.0}


def test_what_cannot_encode_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="embed_query or encode_queries"):
        sparse_encoder("splade")


def test_four_items_are_asked_for_unless_said_otherwise() -> None:
    assert SearchOptions() == SearchOptions(k=4)


@pytest.mark.parametrize(
    ("arguments", "pool"),
    [({}, 50), ({"k": 60}, 60), ({"k": 3, "fetch_k": 3}, 3), ({"fetch_k": 200}, 200)],
)
def test_the_pool_is_fetch_k_or_fifty_but_never_less_than_k(
    arguments: dict[str, int], pool: int
) -> None:
    assert SearchOptions(**arguments).pool == pool


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k must be between 1 and 16,384, not 0"),
        ({"k": 16_385}, "k must be between"),
        ({"k": True}, "k must be a whole number, not bool"),
        ({"k": 2.0}, "k must be a whole number, not float"),
        ({"fetch_k": 0}, "fetch_k must be between"),
        ({"timeout": 0}, "timeout must be a positive number"),
        ({"timeout": float("inf")}, "timeout must be"),
        ({"timeout": float("nan")}, "timeout must be"),
        ({"score_threshold": float("nan")}, "score_threshold must be a finite number"),
        ({"expr": "a in [1"}, "expr is not complete"),
    ],
)
def test_an_option_out_of_range_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SearchOptions(**arguments)


@pytest.mark.parametrize(
    ("legs", "k", "fetch_k", "least"),
    [(1, 10, 5, 10), (2, 11, 5, 6), (3, 10, 3, 4), (1, 4, 3, 4)],
)
def test_fewer_candidates_than_results_are_refused_with_what_would_do(
    legs: int, k: int, fetch_k: int, least: int
) -> None:
    with pytest.raises(ConfigurationError, match=rf"fetch_k \({fetch_k}\).*fetch_k={least} or"):
        SearchOptions(k=k, fetch_k=fetch_k).check_pool(legs)
    SearchOptions(k=k, fetch_k=least).check_pool(legs)


@pytest.mark.parametrize(("legs", "k", "fetch_k"), [(2, 10, 5), (1, 5, 5), (2, 60, None)])
def test_what_counts_is_what_all_vector_fields_yield_together(
    legs: int, k: int, fetch_k: int | None
) -> None:
    options = SearchOptions(k=k, fetch_k=fetch_k)

    options.check_pool(legs)
    assert legs * options.pool >= k


def test_a_query_may_take_a_minute_unless_said_otherwise() -> None:
    assert SearchOptions().timeout == 60
    assert SearchOptions(timeout=None).timeout is None


@pytest.mark.parametrize("number", [np.int64(2), np.int32(2), np.uint8(2)])
def test_numpys_whole_numbers_count(number: Any) -> None:
    options = SearchOptions(k=number, fetch_k=number)

    assert (options.k, type(options.k)) == (2, int)
    assert (options.fetch_k, type(options.fetch_k)) == (2, int)


def test_numpys_bools_are_no_numbers() -> None:
    with pytest.raises(ConfigurationError, match="k must be a whole number"):
        SearchOptions(k=np.bool_(True))  # type: ignore[arg-type]


def test_a_timeout_may_be_a_fraction_of_a_second() -> None:
    assert SearchOptions(timeout=0.5).timeout == 0.5


def test_a_call_narrows_the_options_and_leaves_them_as_they_are() -> None:
    options = SearchOptions(k=4, expr="a > 1 or b > 1", expr_params={"x": 1}, timeout=3)

    narrowed = options.narrowed(k=2, fetch_k=9, expr="c > {y}", expr_params={"y": 2})

    assert narrowed == SearchOptions(
        k=2,
        fetch_k=9,
        expr="(a > 1 or b > 1) and (c > {y})",
        expr_params={"x": 1, "y": 2},
        timeout=3,
    )
    assert options == SearchOptions(k=4, expr="a > 1 or b > 1", expr_params={"x": 1}, timeout=3)


def test_a_call_that_gives_nothing_changes_nothing() -> None:
    options = SearchOptions(k=7, fetch_k=9, expr="a > 1", expr_params={"x": 1})

    assert options.narrowed() == options


def test_a_call_cannot_bind_a_template_anew() -> None:
    options = SearchOptions(expr="tenant == {tenant}", expr_params={"tenant": "a"})

    with pytest.raises(ConfigurationError, match=r"\['tenant'\] are bound"):
        options.narrowed(expr_params={"tenant": "b"})


def test_a_call_cannot_break_out_of_the_parentheses_around_its_filter() -> None:
    options = SearchOptions(expr="tenant == 'a'")

    with pytest.raises(ConfigurationError, match="did not open"):
        options.narrowed(expr="true) or (true")


@pytest.mark.parametrize(
    "option", [{"timeout": "5"}, {"score_threshold": "0.5"}, {"timeout": True}]
)
def test_a_number_must_be_one(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(option))):
        SearchOptions(**option)


@pytest.mark.parametrize(
    "names", [[], "tenant_a", [""], [".*"], ["a|b"], ["a b"], ["a\n"], ["ä"], [None], ["-a"]]
)
def test_partitions_that_could_stand_for_others_are_refused(names: Any) -> None:
    with pytest.raises(ConfigurationError, match="partition"):
        SearchOptions(partition_names=names)


def test_partitions_are_given_by_their_names() -> None:
    names = ["_default", "tenant_a", "2024-01", "a$b"]

    assert SearchOptions(partition_names=names).partition_names == tuple(names)


def test_later_changes_of_what_was_given_change_nothing() -> None:
    names, values, params = ["eu"], {"tenants": ["a"]}, {"params": {"ef": 10}}
    options = SearchOptions(
        expr="t in {tenants}", expr_params=values, partition_names=names, search_params=params
    )

    names.clear()
    values["tenants"].append("b")
    params["params"]["ef"] = 1

    assert options.partition_names == ("eu",)
    assert options.expr_params == {"tenants": ["a"]}
    assert options.search_params == {"params": {"ef": 10}}


def test_a_template_that_a_call_could_bind_is_no_scope() -> None:
    with pytest.raises(ConfigurationError, match=r"template 't' .* pass the value as filters="):
        SearchOptions().within(expr="tenant == {t}")

    options = SearchOptions(expr="tenant == {t}", expr_params={"t": "a"}).within(expr="pk > 0")

    assert options.scope is not None
    assert options.scope.expr_params == {"t": "a"}
    with pytest.raises(ConfigurationError, match="bound by the retriever already"):
        options.narrowed(expr_params={"t": "b"})


@pytest.mark.parametrize("instruction", ["", " ", 5])
def test_an_instruction_is_a_text(instruction: Any) -> None:
    with pytest.raises(ConfigurationError, match="instruction must be a non-empty text"):
        SearchOptions().within(instruction=instruction)


@pytest.mark.parametrize("how", ["sync", "async"])
@pytest.mark.parametrize("made", [[], [{1: 0.5}, {2: 0.5}]])
async def test_an_encoder_that_does_not_make_one_vector_for_a_query_is_refused(
    how: str, made: list[dict[int, float]]
) -> None:
    """An empty answer would otherwise keep an async caller waiting for ever."""

    class Sparse:
        def encode_queries(self, texts: list[str]) -> list[dict[int, float]]:
            return made

    encoder = sparse_encoder(Sparse())

    async def encode() -> Any:
        return encoder.encode(Query("q")) if how == "sync" else await encoder.aencode(Query("q"))

    with pytest.raises(ConfigurationError, match=f"made {len(made)} vectors for one query"):
        await encode()


async def test_an_encoder_that_raises_stop_iteration_keeps_nobody_waiting() -> None:
    encoder = sparse_encoder(lambda text: next(iter(())))

    with pytest.raises(RuntimeError, match="StopIteration"):
        await encoder.aencode(Query("q"))


def test_a_query_of_another_type_is_named() -> None:
    with pytest.raises(ConfigurationError, match="a non-empty text, not dict"):
        Query({"question": "whales?"})  # type: ignore[arg-type]
