"""What is asked of the adapter: frozen values, checked when they are made."""

from __future__ import annotations

import asyncio
import math
import numbers
import operator
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from milvus_vllm_retrievers._core.expressions import all_of, checked_expr, template_names
from milvus_vllm_retrievers.errors import ConfigurationError, excerpt
from milvus_vllm_retrievers.ranker import is_bool

if TYPE_CHECKING:
    from milvus_vllm_retrievers._core.layout import CollectionLayout

DEFAULT_FETCH_K = 50
DEFAULT_TIMEOUT = 60.0  # seconds
# What Milvus allows as topk, per leg and in all.
MAX_LIMIT = 16_384
# Milvus's rule for names. A server may be set to read names as regular expressions, by which
# one could stand for every partition.
_PARTITION_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_$-]*")

T = TypeVar("T")
OnMissing = Literal["raise", "keep"]
DenseVector = Sequence[float]
SparseVector = Mapping[int, float]
Where = Callable[["CollectionLayout"], "str | None"]


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
            kind = "" if isinstance(self.text, str) else f", not {type(self.text).__name__}"
            raise ConfigurationError(f"the query must be a non-empty text{kind}")
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
    """Turns one query into a vector, in the way the front end's framework does it.

    Args:
        encode: Takes a query, returns its vector.
        aencode: The same as a coroutine function; it must not hold up the event loop.
        limit: How many queries it may be asked for at once; None leaves it to the call.
    """

    encode: Callable[[Query], Any]
    aencode: Callable[[Query], Awaitable[Any]]
    limit: int | None = None


async def in_thread(function: Callable[..., T], *args: Any) -> T:
    """Call a function that blocks in a thread, with the caller's context variables."""

    def call() -> T:
        try:
            return function(*args)
        except StopIteration as error:  # no future can hold it: whoever awaits would wait for ever
            raise RuntimeError(f"{error!r} from {function!r}") from error

    return await asyncio.to_thread(call)


def sparse_encoder(source: Any) -> Encoder:
    """Wrap what users have for sparse query vectors.

    Args:
        source: A callable from text to ``{dimension: weight}``, or an object with
            ``embed_query`` (langchain-milvus) or ``encode_queries`` (LlamaIndex) that does it.
            Async calls use its async twin (``aembed_query``, ``async_encode_queries``), or a
            thread where it has none.

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

    def encode(query: Query) -> SparseVector:
        if many is None:
            return one(query.text)  # type: ignore[no-any-return]
        return only(many([query.text]))

    def only(vectors: Any) -> SparseVector:
        made = list(vectors)
        if len(made) != 1:
            raise ConfigurationError(
                f"the sparse encoder made {len(made)} vectors for one query: encode_queries must "
                "return one for each text"
            )
        return made[0]  # type: ignore[no-any-return]

    async def aencode(query: Query) -> SparseVector:
        if amany is not None:
            return only(await amany([query.text]))
        if aone is not None:
            return await aone(query.text)  # type: ignore[no-any-return]
        return await in_thread(encode, query)

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


@dataclass(frozen=True, slots=True)
class Scope:
    """What a retriever made by `within` is confined to: no call and no argument can widen it.

    Attributes:
        exprs: Milvus boolean expressions that every hit must match.
        wheres: Filters that are written as expressions once the layout is known.
        expr_params: Values of the templates in `exprs`.
        partition_names: The only partitions that are searched; None is all.
        instruction: What the rerank model is told of the task, unless a call says otherwise.
    """

    exprs: tuple[str, ...] = ()
    wheres: tuple[Where, ...] = ()
    expr_params: Mapping[str, Any] = field(default_factory=dict)
    partition_names: tuple[str, ...] | None = None
    instruction: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """How to search; the same for every query of a call.

    Args:
        k: Items to return. Default 4.
        fetch_k: Candidates per vector field that are reranked. Default: 50, or `k` if larger.
        expr: Milvus boolean expression that every hit must match.
        wheres: Further filters, each written as an expression once the layout is known.
        expr_params: Values of the expression's ``{name}`` templates (not on Milvus Lite).
        partition_names: Partitions to search, at least one; None is all.
        consistency_level: Such as ``"Strong"``; None is the collection's own.
        search_params: Parameters of the index, for every vector field, or by field name.
        score_threshold: Least relevance score, on the rerank model's own scale. Items that
            were never scored are kept.
        timeout: Seconds for one query as a whole; None waits without limit.
        instruction: What the rerank model is told of the task; None is what the ranker says.
        scope: What the search is confined to, whatever else is asked.

    Raises:
        ConfigurationError: A value is out of range.
    """

    k: int = 4
    fetch_k: int | None = None
    expr: str | None = None
    wheres: tuple[Where, ...] = ()
    expr_params: Mapping[str, Any] | None = None
    partition_names: Sequence[str] | None = None
    consistency_level: str | int | None = None
    search_params: Mapping[str, Any] | None = None
    score_threshold: float | None = None
    timeout: float | None = DEFAULT_TIMEOUT
    instruction: str | None = None
    scope: Scope | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", check_count("k", self.k))
        if self.fetch_k is not None:
            object.__setattr__(self, "fetch_k", check_count("fetch_k", self.fetch_k))
        if self.timeout is not None and not (_is_finite(self.timeout) and self.timeout > 0):
            raise ConfigurationError("timeout must be a positive number of seconds, or None")
        if self.score_threshold is not None and not _is_finite(self.score_threshold):
            raise ConfigurationError("score_threshold must be a finite number, or None")
        _check_instruction(self.instruction)
        checked_expr(self.expr)
        _check_partitions(self.partition_names)
        if self.partition_names is not None:
            object.__setattr__(self, "partition_names", tuple(self.partition_names))
        for name in ("expr_params", "search_params"):  # later changes of the caller's do nothing
            if getattr(self, name):
                object.__setattr__(self, name, deepcopy(getattr(self, name)))

    @property
    def pool(self) -> int:
        """Candidates per vector field."""
        return max(DEFAULT_FETCH_K, self.k) if self.fetch_k is None else self.fetch_k

    def check_pool(self, legs: int) -> None:
        """Refuse fewer candidates than results.

        Args:
            legs: How many vector fields are searched.

        Raises:
            ConfigurationError: All of them together cannot yield `k` candidates.
        """
        if legs * self.pool < self.k:
            least = -(-self.k // legs)
            raise ConfigurationError(
                f"fetch_k ({self.fetch_k}) for each of {legs} vector fields is smaller than k "
                f"({self.k}) in all: fewer candidates than results. Pass fetch_k={least} or more"
                if legs > 1
                else f"fetch_k ({self.fetch_k}) is smaller than k ({self.k}): fewer candidates "
                f"than results. Pass fetch_k={least} or more"
            )

    def narrowed(
        self,
        *,
        k: int | None = None,
        fetch_k: int | None = None,
        expr: str | None = None,
        where: Where | None = None,
        expr_params: Mapping[str, Any] | None = None,
        instruction: str | None = None,
    ) -> SearchOptions:
        """Return these options with one call's own values.

        A filter is AND-ed to the one that is there: a call can narrow, never widen.

        Raises:
            ConfigurationError: A value is out of range, or the filters cannot be joined: both
                bind the same template, or Milvus would drop a part.
        """
        given = (k, fetch_k, expr, where, expr_params, instruction)
        if all(value is None for value in given):
            return self
        checked_expr(expr)
        bound = {**(self.scope.expr_params if self.scope else {}), **(self.expr_params or {})}
        if clash := bound.keys() & (expr_params or {}).keys():
            raise ConfigurationError(
                f"expr_params {sorted(clash)} are bound by the retriever already; rename them"
            )
        return replace(
            self,
            k=self.k if k is None else k,
            fetch_k=self.fetch_k if fetch_k is None else fetch_k,
            expr=all_of(self.expr, expr),
            wheres=self.wheres if where is None else (*self.wheres, where),
            expr_params={**(self.expr_params or {}), **(expr_params or {})} or None,
            instruction=self.instruction if instruction is None else instruction,
        )

    def within(
        self,
        *,
        expr: str | None = None,
        where: Where | None = None,
        partition_names: Sequence[str] | None = None,
        instruction: str | None = None,
    ) -> SearchOptions:
        """Return options confined to what these find and match beside; nothing widens them.

        The filters that are here already are part of what they are confined to.

        Raises:
            ConfigurationError: There is nothing to narrow by, or a value is wrong.
        """
        if expr is not None and not expr.strip():
            raise ConfigurationError("within: expr is empty, which would match everything")
        if expr is None and where is None and partition_names is None and instruction is None:
            raise ConfigurationError(
                "within needs something to narrow by: filters=, expr=, partition_names= (or an "
                "instruction=)"
            )
        checked_expr(expr)
        _check_partitions(partition_names)
        _check_instruction(instruction)
        old = self.scope or Scope()
        own = _common(old.partition_names, self.partition_names)
        scope = Scope(
            exprs=(*old.exprs, *(e for e in (self.expr, expr) if e and e.strip())),
            wheres=(*old.wheres, *self.wheres, *(() if where is None else (where,))),
            expr_params=deepcopy({**old.expr_params, **(self.expr_params or {})}),
            partition_names=_common(own, partition_names),
            instruction=instruction or self.instruction or old.instruction,
        )
        if unbound := template_names(*scope.exprs) - scope.expr_params.keys():
            raise ConfigurationError(
                f"within: the template {sorted(unbound)[0]!r} in expr has no value, so that a call "
                "could choose it: pass the value as filters="
            )
        return replace(
            self,
            expr=None,
            wheres=(),
            expr_params=None,
            partition_names=None,
            instruction=None,
            scope=scope,
        )

    def resolved(self, layout: CollectionLayout) -> SearchOptions:
        """Return what Milvus is asked: scope and filters written into `expr` for this layout.

        Raises:
            ConfigurationError: A filter does not fit the layout, or filters cannot be joined.
        """
        scope = self.scope
        if scope is None and not self.wheres:
            return self
        scope = scope or Scope()
        wheres = [where(layout) for where in (*scope.wheres, *self.wheres)]
        return replace(
            self,
            expr=all_of(*scope.exprs, *wheres, self.expr),
            wheres=(),
            expr_params={**(self.expr_params or {}), **scope.expr_params} or None,
            partition_names=_common(scope.partition_names, self.partition_names),
            instruction=self.instruction or scope.instruction,
            scope=None,
        )


def check_count(name: str, value: object) -> int:
    """Return a number of hits that Milvus can return; numpy's whole numbers are numbers too.

    Raises:
        ConfigurationError: It is none; the message has the argument's name.
    """
    try:
        if is_bool(value):
            raise TypeError
        count = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigurationError(
            f"{name} must be a whole number, not {type(value).__name__}"
        ) from None
    if not 1 <= count <= MAX_LIMIT:
        raise ConfigurationError(f"{name} must be between 1 and {MAX_LIMIT:,}, not {count}")
    return count


def _common(allowed: Sequence[str] | None, asked: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return the partitions to search: those asked for, all of which must be allowed."""
    if asked is None or allowed is None:
        names = allowed if asked is None else asked
        return None if names is None else tuple(names)
    if beyond := [name for name in asked if name not in allowed]:
        raise ConfigurationError(
            f"partition_names: {beyond[0]!r} is not among the partitions that this retriever is "
            f"confined to, {list(allowed)}"
        )
    return tuple(asked)


def _check_instruction(instruction: object) -> None:
    if instruction is not None and not (isinstance(instruction, str) and instruction.strip()):
        raise ConfigurationError("instruction must be a non-empty text, or None")


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
    if is_bool(value) or not isinstance(value, numbers.Real):
        return False
    return math.isfinite(value)
