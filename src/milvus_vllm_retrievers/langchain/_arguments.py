"""The types of the arguments of LangChain's classes, and what their values are checked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from langchain_core.embeddings import Embeddings
from pydantic import BeforeValidator
from typing_extensions import TypedDict

from milvus_vllm_retrievers._core.arguments import RetrieverArguments, RowRerankArguments
from milvus_vllm_retrievers._core.query import OnMissing
from milvus_vllm_retrievers.errors import ConfigurationError
from milvus_vllm_retrievers.ranker import IsNumber, VLLMRanker


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


def _not_embeddings(value: Any) -> Any:
    if isinstance(value, (Embeddings, Mapping)) or value is None:
        return value
    raise ConfigurationError(
        "embedding must be LangChain Embeddings, or a mapping of field names to them, not "
        f"{type(value).__name__}"
    )


Embedding = Annotated[Embeddings | Mapping[str, Any] | None, BeforeValidator(_not_embeddings)]
Ranker = Annotated[VLLMRanker, BeforeValidator(_not_a_url)]
WholeNumber = Annotated[int, IsNumber]
Number = Annotated[float, IsNumber]
