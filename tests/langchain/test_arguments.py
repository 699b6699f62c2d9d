"""What LangChain's classes take, and what they say to what they do not take."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from milvus_vllm_retrievers import ConfigurationError
from milvus_vllm_retrievers.langchain import (
    MilvusVLLMRerank,
    MilvusVLLMRetriever,
    VLLMRanker,
    VLLMRerank,
)

RANKER = VLLMRanker("http://localhost:8000")
Call = Callable[..., Awaitable[Any]]


@pytest.fixture(params=["invoke", "ainvoke", "batch", "abatch", "explain", "aexplain"])
def call(request: pytest.FixtureRequest) -> Call:
    """Ask a retriever with arguments of the call, which must be read before anything is sent."""

    async def run(**per_call: Any) -> Any:
        retriever = MilvusVLLMRetriever("notes", RANKER, uri="http://127.0.0.1:1")
        query: Any = ["why?"] if "batch" in request.param else "why?"
        answer = getattr(retriever, request.param)(query, **per_call)
        return await answer if request.param.startswith("a") else answer

    return run


NAMED = [
    ("top_k", "it is k= here"),
    ("similarity_top_k", "it is k= here"),
    ("num_results", "it is k= here"),
    ("filter", "as filters={'field': 'value'}, or a Milvus expression as expr="),
    ("where", "as filters={'field': 'value'}, or a Milvus expression as expr="),
    ("expr_param", "did you mean 'expr_params'?"),
    ("fetchk", "did you mean 'fetch_k'?"),
]


@pytest.mark.parametrize(("name", "advice"), NAMED)
async def test_a_misnamed_argument_of_a_call_says_which_is_meant(
    call: Call, name: str, advice: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        await call(**{name: 3})

    assert f"unknown argument {name!r}" in str(caught.value)
    assert advice in str(caught.value)


@pytest.mark.parametrize(
    ("name", "advice"),
    [("timeout", "model_copy"), ("vector_field", "model_copy"), ("partition_names", "within(")],
)
async def test_a_call_with_an_argument_of_the_retriever_says_where_to_give_it(
    call: Call, name: str, advice: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        await call(**{name: 3})

    assert f"{name!r} is not an argument of a call" in str(caught.value)
    assert advice in str(caught.value)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        *NAMED,
        ("reranker", "did you mean 'ranker'?"),
        ("embedding_function", "it is embedding= here"),
        ("api_key", "ranker=VLLMRanker(endpoint, api_key=...)"),
        ("endpoint", "ranker=VLLMRanker(endpoint)"),
    ],
)
def test_a_misnamed_argument_of_the_retriever_says_which_is_meant(name: str, advice: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        MilvusVLLMRetriever("notes", RANKER, **{name: "sk-something"})

    assert f"unknown argument {name!r}" in str(caught.value)
    assert advice in str(caught.value)
    assert "sk-something" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("api_key", "ranker=VLLMRanker(endpoint, api_key=...)"),
        ("mode", "ranker=VLLMRanker(endpoint, mode=...)"),
        ("k", "it is top_n= here"),
        ("top_k", "it is top_n= here"),
        ("topn", "did you mean 'top_n'?"),
    ],
)
def test_a_misnamed_argument_of_a_reranker_says_which_is_meant(name: str, advice: str) -> None:
    for make in (
        lambda: VLLMRerank(endpoint="http://localhost:8000", **{name: 3}),
        lambda: MilvusVLLMRerank("notes", RANKER, **{name: 3}),
    ):
        with pytest.raises(ConfigurationError) as caught:
            make()

        assert f"unknown argument {name!r}" in str(caught.value)
        assert advice in str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda url: MilvusVLLMRetriever("notes", url),
        lambda url: MilvusVLLMRetriever("notes", ranker=url),
        lambda url: MilvusVLLMRerank("notes", url),
        VLLMRerank,
    ],
)
def test_a_url_in_the_place_of_a_ranker_says_how_to_make_one(make: Callable[[str], Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"not a text: VLLMRanker\(url\)") as caught:
        make("http://user:sk-secret@localhost:8000")

    assert "sk-secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (MilvusVLLMRetriever, "collection_name"),
        (MilvusVLLMRerank, "collection_name"),
        (lambda: MilvusVLLMRerank("notes"), "ranker"),
    ],
)
def test_an_argument_that_is_missing_is_named(make: Callable[[], Any], name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"argument '{name}' is required"):
        make()


# A forgotten ranker


def test_a_forgotten_ranker_is_warned_of_where_the_retriever_is_made() -> None:
    with pytest.warns(UserWarning, match=r"ranker=VLLMRanker\(.*\), or ranker=None") as warned:
        MilvusVLLMRetriever("notes")

    assert [warning.filename for warning in warned] == [__file__]


def test_a_ranker_that_is_written_out_as_none_is_no_mistake() -> None:
    retriever = MilvusVLLMRetriever("notes", None)

    copies = [retriever.model_copy(update={"k": 2}), retriever.within(expr="pk > 0")]
    assert [each.ranker for each in (retriever, *copies)] == [None] * 3


def store() -> SimpleNamespace:
    """What `from_vectorstore` reads of a langchain_milvus.Milvus."""
    return SimpleNamespace(
        collection_name="notes",
        client=None,
        vector_fields=["vector"],
        embedding_func=None,
        default_search_params={},
        search_params=None,
        partition_names=None,
        timeout=None,
        _connection_args={"uri": "http://localhost:19530"},
        _text_field="text",
        _vector_fields_from_embedding=[],
    )


def test_a_ranker_forgotten_beside_a_store_is_warned_of_too() -> None:
    with pytest.warns(UserWarning, match="no ranker was given") as warned:
        MilvusVLLMRetriever.from_vectorstore(store())

    assert [warning.filename for warning in warned] == [__file__]


def test_a_store_without_a_timeout_leaves_the_default_one() -> None:
    of_the_store = MilvusVLLMRetriever.from_vectorstore(store(), None)
    without_limit = MilvusVLLMRetriever.from_vectorstore(store(), RANKER, timeout=None)

    assert of_the_store.timeout == 60.0
    assert without_limit.timeout is None


def test_a_score_threshold_without_a_ranker_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="score_threshold needs a ranker"):
        MilvusVLLMRetriever("notes", None, score_threshold=0.5)


# Numbers


@pytest.mark.parametrize("name", ["k", "fetch_k"])
def test_numpys_whole_numbers_are_numbers(name: str) -> None:
    retriever = MilvusVLLMRetriever("notes", RANKER, **{name: np.int64(8)})

    assert type(getattr(retriever, name)) is int
    setattr(retriever, name, np.int32(9))
    assert type(getattr(retriever, name)) is int
    assert getattr(retriever, name) == 9


def test_numpys_whole_numbers_are_numbers_of_documents_for_a_reranker() -> None:
    assert type(VLLMRerank(RANKER, top_n=np.int64(2)).top_n) is int


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda value: MilvusVLLMRetriever("notes", RANKER, k=value),
        lambda value: MilvusVLLMRetriever("notes", RANKER, fetch_k=value),
        lambda value: MilvusVLLMRetriever("notes", RANKER, timeout=value),
        lambda value: MilvusVLLMRetriever("notes", RANKER, score_threshold=value),
        lambda value: VLLMRerank(RANKER, top_n=value),
        lambda value: VLLMRerank(RANKER, timeout=value),
        lambda value: MilvusVLLMRerank("notes", RANKER, top_n=value),
        lambda value: MilvusVLLMRerank("notes", RANKER, timeout=value),
    ],
)
def test_a_bool_is_no_number(make: Callable[[Any], Any], value: Any) -> None:
    with pytest.raises(ConfigurationError):
        make(value)


@pytest.mark.parametrize("name", ["k", "fetch_k"])
async def test_a_bool_is_no_number_in_a_call_either(call: Call, name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} must be a whole number, not bool"):
        await call(**{name: True})


def test_a_query_may_take_a_minute_unless_something_else_is_said() -> None:
    assert MilvusVLLMRetriever("notes", RANKER).timeout == 60.0
    assert MilvusVLLMRetriever("notes", RANKER, timeout=None).timeout is None
    assert MilvusVLLMRerank("notes", RANKER).timeout == 60.0
    assert VLLMRerank(RANKER).timeout is None


# Filters


@pytest.mark.parametrize("filters", [{}, {"tenant": None}, {"tenant": []}, "tenant == 'a'"])
async def test_a_filter_that_would_match_everything_or_nothing_is_refused(
    call: Call, filters: Any
) -> None:
    retriever = MilvusVLLMRetriever("notes", RANKER)

    for refused in (
        lambda: MilvusVLLMRetriever("notes", RANKER, filters=filters),
        lambda: retriever.within(filters=filters),
        lambda: setattr(retriever, "filters", filters),
    ):
        with pytest.raises(ConfigurationError, match="filters"):
            refused()
    with pytest.raises(ConfigurationError, match="filters"):
        await call(filters=filters)


def test_what_filters_were_made_of_may_change_afterwards() -> None:
    given = {"tenant": "a", "year": [2024, 2025]}
    retriever = MilvusVLLMRetriever("notes", RANKER, filters=given)

    given["tenant"] = "b"
    given["year"].append(2026)

    assert retriever.filters is not None
    assert retriever.filters["tenant"] == "a"
    assert list(retriever.filters["year"]) == [2024, 2025]
    with pytest.raises(TypeError):
        retriever.filters["tenant"] = "b"


def test_an_embedding_that_is_none_is_refused_in_one_sentence() -> None:
    with pytest.raises(ConfigurationError) as caught:
        MilvusVLLMRetriever("docs", RANKER, embedding="all-MiniLM")  # type: ignore[arg-type]

    assert str(caught.value) == (
        "MilvusVLLMRetriever: embedding must be LangChain Embeddings, or a mapping of field names "
        "to them, not str"
    )
