"""What a flow may ask for: the steps that it yields, and that `drivers` does.

A flow is a generator that is sent each step's result, or has its error thrown in. It never touches
a socket, so that one flow serves blocking and async callers, and a test can drive it by hand.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from milvus_vllm_retrievers._core.deadline import Deadline
from milvus_vllm_retrievers._core.query import Encoder, Query
from milvus_vllm_retrievers._core.services import RerankRequest

T = TypeVar("T")


class Encode(NamedTuple):
    """Turn a query into a vector."""

    encoder: Encoder
    query: Query
    deadline: Deadline


class CallMilvus(NamedTuple):
    """Call a method of the Milvus client, once."""

    what: str
    method: str
    arguments: Mapping[str, Any]
    deadline: Deadline


class Send(NamedTuple):
    """Send a request to the rerank service, once, and return its answer."""

    request: RerankRequest
    deadline: Deadline


class Pause(NamedTuple):
    """Wait before another try."""

    seconds: float


class Together(NamedTuple):
    """Run several flows at once, at most `limit` of them under way.

    A flow starts when its turn comes. The first error ends them all, unless `return_exceptions`:
    then a flow's error takes the place of its result.
    """

    flows: Sequence[Flow[Any]]
    limit: int
    return_exceptions: bool = False


Step = Encode | CallMilvus | Send | Pause | Together
Flow = Generator[Step, Any, T]
