"""What Milvus's errors mean, and what a user can do about each."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable

from milvus_vllm_retrievers.errors import (
    MilvusVLLMError,
    RerankConnectionError,
    RerankError,
    RerankStatusError,
    RerankTimeoutError,
    SearchError,
    SearchFailure,
    excerpt,
)

# What servers say when the rerank service, not the search, failed. Milvus wraps it in
# "call service failed"; Milvus Lite's Cohere provider has words of its own.
_RERANK_FAILED = ("call service failed", "cohere api")
_TIMED_OUT = ("timed out", "deadline exceeded", "context deadline")
_UNREACHABLE = ("connection refused", "connection error", "no such host", "connection reset")

# Texts of server errors, lower case, and what a user can do about each.
_HINTS = (
    ("unknown rerank model provider", "this Milvus has no provider 'vllm': use mode='client'"),
    ("unknown rerank provider", "this Milvus has no such provider: use mode='client'"),
    ("is disabled", "enable provider vllm in milvus.yaml, or use mode='client'"),
    ("unsupported reranker", "this Milvus cannot rerank by a model: use mode='client'"),
    ("not a valid http/https link", "set the ranker's server_endpoint to vLLM's base URL"),
    ("must be varchar", "name a VARCHAR field with text_field="),
    ("not loaded", "load the collection first: client.load_collection(...)"),
    ("in state 'released'", "load the collection first: client.load_collection(...)"),
    ("does not exist", "check collection_name, db_name and the Milvus uri"),
    ("can't find collection", "check collection_name, db_name and the Milvus uri"),
    ("collection not found", "check collection_name, db_name and the Milvus uri"),
    ("cannot parse expression", "check the filter (expr)"),
    ("unexpected character", "check the filter (expr)"),
    ("filter parse", "check the filter (expr)"),
    ("deadline_exceeded", "raise timeout, or search fewer candidates"),
    ("unimplemented", "this Milvus is too old for it; several vector fields need 2.4 or later"),
)


# Texts, lower case, by which failures are told apart that something else is done about.
_REASONS: tuple[tuple[str, SearchFailure], ...] = (
    ("not loaded", "not_loaded"),
    ("in state 'released'", "not_loaded"),
    ("should create connection first", "closed"),
    ("closed channel", "closed"),
    ("channel closed", "closed"),
    ("channel is closed", "closed"),
    ("no channel in handler", "closed"),
    ("context deadline exceeded", "rerank_timeout"),
    ("deadline_exceeded", "timeout"),
    ("retry timeout", "timeout"),
    ("fail connecting to server", "disconnected"),
    ("unavailable", "disconnected"),
    ("server disconnected", "disconnected"),
)


def explain_error(
    error: BaseException, what: str, redacted: Callable[[str], str] = str
) -> MilvusVLLMError:
    """Translate what pymilvus raised.

    Args:
        error: A MilvusException, what grpc raised, or asyncio's TimeoutError; a CancelledError
            where nobody cancelled.
        what: What was tried, for the message, such as ``search of collection 'docs'``.
        redacted: Takes secrets from a text.

    Returns:
        A `RerankError` where the rerank service failed inside the search, else a `SearchError`.
    """
    if isinstance(error, asyncio.TimeoutError):
        return SearchError(
            f"{what} took longer than the call's timeout (raise timeout, or search fewer "
            "candidates)",
            reason="timeout",
        )
    if isinstance(error, asyncio.CancelledError):
        return SearchError(f"{what} failed: its client was closed meanwhile", reason="closed")
    full = redacted(_message(error))
    message, lowered = excerpt(full), full.lower()
    if any(sign in lowered for sign in _RERANK_FAILED):
        return _rerank_error(message, lowered)
    hint = next((advice for sign, advice in _HINTS if sign in lowered), None)
    return SearchError(
        f"{what} failed: {message}" + (f" ({hint})" if hint else ""),
        reason=next((reason for sign, reason in _REASONS if sign in lowered), None),
    )


def _message(error: BaseException) -> str:
    """Return what was said: pymilvus passes some of grpc's errors on as they are, pages long."""
    code, details = getattr(error, "code", None), getattr(error, "details", None)
    if callable(code) and callable(details):
        return f"{getattr(code(), 'name', code())}: {details()}"
    return str(getattr(error, "message", "") or error)


def _rerank_error(message: str, lowered: str) -> RerankError:
    text = f"reranking inside Milvus failed: {message}"
    if any(sign in lowered for sign in _TIMED_OUT):
        return RerankTimeoutError(text)
    if any(sign in lowered for sign in _UNREACHABLE):
        return RerankConnectionError(
            f"{text} (vLLM must be reachable from Milvus: set server_endpoint, or mode='client')"
        )
    status = re.search(r"(?:api error |status(?: code)?:? |code:? |errs:\[)(\d{3})\b", lowered)
    if not status:
        return RerankError(text)
    return RerankStatusError(
        text + _length_hint(lowered), status_code=int(status.group(1)), body=excerpt(message)
    )


def _length_hint(lowered: str) -> str:
    if "maximum context length" not in lowered and "max_model_len" not in lowered:
        return ""
    return (
        " (Milvus Lite cannot truncate: shorten the stored text, use mode='client', or "
        "on_error='client' for such queries)"
    )
