"""What is asked of the adapter: frozen values, checked when they are made."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from milvus_vllm_retrievers._core.expressions import all_of, checked_expr
from milvus_vllm_retrievers.errors import ConfigurationError, excerpt

DEFAULT_FETCH_K = 50
# What Milvus allows as topk, per leg and in all.
MAX_LIMIT = 16_384
# Milvus's rule for names. A server may be set to read names as regular expressions, by which
# one could stand for every partition.
_PARTITION_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_$-]*")

T = TypeVar("T")
OnMissing = Literal["raise", "keep"]
DenseVector = Sequence[float]
SparseVector = Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Query:
    """One question.

    Args:
        text: What is reranked against, and searched for as text. Not empty.
        embedding: A ready dense vector of the question, for every dense field; None has it
            computed.
        embedding_texts: Other texts to embed in place of `text`, where the framework has them.
    """

    text: str
    embedding: DenseVector | None = None
    embedding_texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text.strip():
            raise ConfigurationError("the query must be a non-empty text")
        # gRPC and JSON carry valid Unicode only; a lone surrogate becomes "?".
        object.__setattr__(self, "text", self.text.encode("utf-8", "replace").decode("utf-8"))


@dataclass(frozen=True, slots=True)
class Item:
    """One document or node that is to be reranked.

    Args:
        text: Its text.
        id: Its id, as the framework has it.
        metadata: Its metadata, where the primary key may stand under its field's name.
    """

    text: str
    id: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Encoder:
    """Turns queries into vectors, in the way the front end's framework does it.

    Args:
        encode: Takes queries, returns one vector for each.
        aencode: The same as a coroutine function.
    """

    encode: Callable[[Sequence[Query]], Sequence[Any]]
    aencode: Callable[[Sequence[Query]], Awaitable[Sequence[Any]]]


async def encoded_together(encodings: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Await several encodings at once; one alone without the cost of a task."""
    if len(encodings) == 1:
        return [await encodings[0]]
    return list(await asyncio.gather(*encodings))


def sparse_encoder(source: Any) -> Encoder:
    """Wrap what users have for sparse query vectors.

    Args:
        source: A callable from text to ``{dimension: weight}``, or an object with
            ``embed_query`` (langchain-milvus) or ``encode_queries`` (LlamaIndex) that does it.
            Where the object has an async twin (``aembed_query``, ``async_encode_queries``) it
            is used in async calls; else encoding runs where it is called.

    Raises:
        ConfigurationError: The source is none of these.
    """
    one = getattr(source, "embed_query", source)
    many = getattr(source, "encode_queries", None)
    if many is None and not callable(one):
        raise ConfigurationError(
            "the sparse encoder must be a callable from text to {dimension: weight}, or have "
            "embed_query or encode_queries"
        )
    aone = getattr(source, "aembed_query", None)
    amany = getattr(source, "async_encode_queries", None)

    def encode(queries: Sequence[Query]) -> list[SparseVector]:
        texts = [query.text for query in queries]
        return list(many(texts)) if many is not None else [one(text) for text in texts]

    async def aencode(queries: Sequence[Query]) -> list[SparseVector]:
        if amany is not None:
            return list(await amany([query.text for query in queries]))
        if aone is not None:
            return [await aone(query.text) for query in queries]
        return encode(queries)

    return Encoder(encode, aencode)


@dataclass(frozen=True, slots=True)
class Encoders:
    """Which encoder serves which vector field.

    Args:
        dense: For dense fields that Milvus does not embed itself.
        sparse: For sparse fields that are not BM25.
        by_field: For fields by name; it wins over the other two.
    """

    dense: Encoder | None = None
    sparse: Encoder | None = None
    by_field: Mapping[str, Encoder] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """How to search; the same for every query of a call.

    Args:
        k: Items to return. Default 4.
        fetch_k: Candidates per vector field that are reranked. Default: 50, or `k` if larger.
        expr: Milvus boolean expression that every hit must match.
        expr_params: Values of the expression's ``{name}`` templates (not on Milvus Lite).
        partition_names: Partitions to search, at least one; None is all.
        consistency_level: Such as ``"Strong"``; None is the collection's own.
        search_params: Parameters of the index, for every vector field, or by field name.
        score_threshold: Least relevance score, on the rerank model's own scale. Items that
            were never scored are kept.
        timeout: Seconds for the whole call; None waits without limit.

    Raises:
        ConfigurationError: A value is out of range.
    """

    k: int = 4
    fetch_k: int | None = None
    expr: str | None = None
    expr_params: Mapping[str, Any] | None = None
    partition_names: Sequence[str] | None = None
    consistency_level: str | int | None = None
    search_params: Mapping[str, Any] | None = None
    score_threshold: float | None = None
    timeout: float | None = None

    def __post_init__(self) -> None:
        check_count("k", self.k)
        if self.fetch_k is not None:
            check_count("fetch_k", self.fetch_k)
            if self.fetch_k < self.k:
                raise ConfigurationError(
                    f"fetch_k ({self.fetch_k}) is smaller than k ({self.k}): fewer candidates "
                    f"than results. Pass fetch_k={self.k} or more"
                )
        if self.timeout is not None and not (_is_finite(self.timeout) and self.timeout > 0):
            raise ConfigurationError("timeout must be a positive number of seconds, or None")
        if self.score_threshold is not None and not _is_finite(self.score_threshold):
            raise ConfigurationError("score_threshold must be a finite number, or None")
        checked_expr(self.expr)
        _check_partitions(self.partition_names)

    @property
    def pool(self) -> int:
        """Candidates per vector field."""
        return max(DEFAULT_FETCH_K, self.k) if self.fetch_k is None else self.fetch_k

    def narrowed(
        self,
        *,
        k: int | None = None,
        fetch_k: int | None = None,
        expr: str | None = None,
        expr_params: Mapping[str, Any] | None = None,
    ) -> SearchOptions:
        """Return these options with one call's own values.

        A filter is AND-ed to the one that is there: a call can narrow, never widen.

        Raises:
            ConfigurationError: A value is out of range, or the filters cannot be joined: both
                bind the same template, or Milvus would drop a part.
        """
        if k is None and fetch_k is None and expr is None and expr_params is None:
            return self
        checked_expr(expr)
        clash = set(expr_params or ()) & set(self.expr_params or ())
        if clash:
            raise ConfigurationError(
                f"expr_params {sorted(clash)} are bound by the retriever already; rename them"
            )
        return replace(
            self,
            k=self.k if k is None else k,
            fetch_k=self.fetch_k if fetch_k is None else fetch_k,
            expr=all_of(self.expr, expr),
            expr_params={**(self.expr_params or {}), **(expr_params or {})} or None,
        )


def check_count(name: str, value: int) -> None:
    """Refuse what is no number of hits that Milvus can return, by the argument's name."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigurationError(f"{name} must be a whole number, not {type(value).__name__}")
    if not 1 <= value <= MAX_LIMIT:
        raise ConfigurationError(f"{name} must be between 1 and {MAX_LIMIT:,}, not {value}")


def _check_partitions(names: Sequence[str] | None) -> None:
    if names is None:
        return
    if not isinstance(names, (list, tuple)) or not names:
        # Milvus takes an empty list for all partitions.
        raise ConfigurationError(
            "partition_names must be a list of at least one name, or None for all partitions"
        )
    for name in names:
        if not isinstance(name, str) or not _PARTITION_NAME.fullmatch(name):
            raise ConfigurationError(
                f"partition_names: {excerpt(str(name))!r} is no partition's name: letters, digits, "
                "'_', '$' and '-' only"
            )


def _is_finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value)
