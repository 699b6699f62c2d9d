"""What a flow may ask for: the steps that it yields, and that `drivers` does.

A flow is a generator that is sent each step's result, or has its error thrown in. It never touches
a socket, so that one flow serves blocking and async callers, and a test can drive it by hand.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from milvus_vllm_retrievers._core.deadline import Deadline
from milvus_vllm_retrievers._core.query import Encoder, Query

T = TypeVar("T")


class Encode(NamedTuple):
    """Turn queries into vectors."""

    encoder: Encoder
    queries: Sequence[Query]
    deadline: Deadline


class CallMilvus(NamedTuple):
    """Call a method of the Milvus client."""

    what: str
    method: str
    arguments: Mapping[str, Any]
    deadline: Deadline


class Rerank(NamedTuple):
    """Ask vLLM for the scores of texts."""

    query: str
    texts: Sequence[str]
    deadline: Deadline


class Together(NamedTuple):
    """Do several steps at once, at most `limit` in flight.

    The first error ends them all, unless `errors_apart`: then a step's error of this package
    takes the place of its result.
    """

    steps: Sequence[Rerank | CallMilvus]
    limit: int
    errors_apart: bool = False


Step = Encode | CallMilvus | Rerank | Together
Flow = Generator[Step, Any, T]
