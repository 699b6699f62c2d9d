"""The arguments of LangChain's classes: their types, and what those that do not exist mean."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from typing import Annotated, Any

from langchain_core.embeddings import Embeddings
from pydantic import BeforeValidator
from typing_extensions import TypedDict

from milvus_vllm_retrievers._core.arguments import RetrieverArguments, RowRerankArguments
from milvus_vllm_retrievers._core.query import OnMissing
from milvus_vllm_retrievers.errors import ConfigurationError, did_you_mean
from milvus_vllm_retrievers.ranker import VLLMRanker

_COUNTS = frozenset(
    {"k", "top_k", "similarity_top_k", "top_n", "num_results", "n_results", "limit"}
)
_FILTERS = frozenset({"filter", "where", "metadata_filter", "metadata_filters"})
_EMBEDDINGS = frozenset({"embed_model", "embedding_function", "embedding_func"})


class MilvusVLLMRetrieverArguments(RetrieverArguments, total=False):
    """The keyword arguments of `MilvusVLLMRetriever`."""

    embedding: Embeddings | Mapping[str, Any] | None
    k: int
    filters: Mapping[str, Any] | None
    name: str | None
    tags: list[str] | None
    metadata: dict[str, Any] | None


class VLLMRerankArguments(TypedDict, total=False):
    """The keyword arguments of `VLLMRerank`."""

    endpoint: str | None
    model: str | None
    top_n: int | None
    timeout: float | None


class MilvusVLLMRerankArguments(RowRerankArguments, total=False):
    """The keyword arguments of `MilvusVLLMRerank`."""

    on_missing: OnMissing


def _not_a_url(value: Any) -> Any:
    if isinstance(value, str):
        raise ConfigurationError(
            "must be a VLLMRanker, not a text: VLLMRanker(url), such as "
            "VLLMRanker('http://localhost:8000')"
        )
    return value


def _not_a_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ConfigurationError("must be a number, not a bool")
    return value


def _whole(value: Any) -> Any:
    try:
        return operator.index(_not_a_bool(value))  # numpy's whole numbers are numbers too
    except TypeError:
        return value  # pydantic says what it should be


Ranker = Annotated[VLLMRanker, BeforeValidator(_not_a_url)]
WholeNumber = Annotated[int, BeforeValidator(_whole)]
Number = Annotated[float, BeforeValidator(_not_a_bool)]


def refuse_unknown(owner: type, given: Iterable[str], known: Collection[str]) -> None:
    """Refuse arguments that do not exist, and name those that are meant.

    Args:
        owner: The class whose arguments they are.
        given: The names that were given.
        known: The names that exist.

    Raises:
        ConfigurationError: A name is not known.
    """
    for name in given:
        if name not in known:
            raise ConfigurationError(
                f"{owner.__name__}: unknown argument {name!r}{_meant_by(name, known)}"
            )


def _meant_by(name: str, known: Collection[str]) -> str:
    if name in _COUNTS:
        return f" (the number of documents is {'k' if 'k' in known else 'top_n'!r} here)"
    if name in _FILTERS and "filters" in known:
        return (
            " (pass values to match as filters={'field': 'value'}, or a Milvus expression as expr=)"
        )
    if name in _EMBEDDINGS and "embedding" in known:
        return " (the embedding model is 'embedding' here)"
    if name in {each.name for each in fields(VLLMRanker)} and "ranker" in known:
        given = "endpoint" if name == "endpoint" else f"endpoint, {name}=..."
        return f" (give it to the ranker: ranker=VLLMRanker({given}))"
    return did_you_mean(name, [each for each in known if each != "scope"])
