"""What pymilvus logs of our own calls, kept off the screen: we raise it, or make up for it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextvars import ContextVar

from milvus_vllm_retrievers.errors import excerpt

logger = logging.getLogger("milvus_vllm_retrievers")
# Takes secrets from a text; set in the thread or task that is in a call of ours, and only there.
_redacted: ContextVar[Callable[[str], str] | None] = ContextVar("redacted", default=None)


class Quiet:
    """Has pymilvus log what happens in the block at DEBUG, in a line of our own logger.

    pymilvus logs every failed call as an ERROR with its traceback before it raises. Calls that
    others make meanwhile, in other threads and tasks, are logged as ever. A class, since every
    query pays for it.

    Args:
        redacted: Takes secrets from a text.
    """

    __slots__ = ("_redacted", "_token")

    def __init__(self, redacted: Callable[[str], str]) -> None:
        self._redacted = redacted

    def __enter__(self) -> None:
        self._token = _redacted.set(self._redacted)

    def __exit__(self, *_: object) -> None:
        _redacted.reset(self._token)


def _pass(record: logging.LogRecord) -> bool:
    redacted = _redacted.get()
    if redacted is None:
        return True
    if logger.isEnabledFor(logging.DEBUG):
        said = excerpt(redacted(record.getMessage().partition("\nTraceback")[0]))
        logger.debug("pymilvus: %s: %s", record.levelname, said)
    return False


# A filter of their parent would not be asked. To name them does not import pymilvus.
for _name in (
    "decorators",
    "client.async_grpc_handler",
    "client.connection_manager",
    "client.grpc_handler",
):
    logging.getLogger(f"pymilvus.{_name}").addFilter(_pass)
