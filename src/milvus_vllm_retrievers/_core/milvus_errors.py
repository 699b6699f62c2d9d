"""What Milvus's errors mean, and what a user can do about each."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable

from milvus_vllm_retrievers._core.advice import (
    CHECK_ENDPOINT,
    LATE,
    NOT_HTTP,
    NOT_SERVED,
    sentences,
    status_advice,
)
from milvus_vllm_retrievers.errors import (
    MilvusVLLMError,
    RerankConnectionError,
    RerankError,
    RerankResponseError,
    RerankStatusError,
    RerankTimeoutError,
    SearchError,
    SearchFailure,
    excerpt,
)
from milvus_vllm_retrievers.ranker import VLLMRanker

# What servers say when the rerank service, not the search, failed. Milvus wraps it in
# "call service failed"; Milvus Lite's Cohere provider has words of its own.
_LITE_FAILED = "cohere api"
_RERANK_FAILED = ("call service failed", _LITE_FAILED)
_BAD_ANSWER = (
    "unmarshal response failed",
    "docs and scores does not match",
    "duplicated result index",
)
_TOO_LONG = re.compile("maximum context length|max_model_len")
_STATUS = re.compile(r"(?:api error |status(?: code)?:? |code:? |errs:\[)(\d{3})\b")
_TIMED_OUT = re.compile(r"(?<!connection )timed out|deadline exceeded|client\.timeout")
# Go and Python (Milvus Lite) in their own words. Go begins with `Post "<url>": `.
_UNREACHED = (
    (
        "response to https client|wrong_version_number|record layer failure",
        "it speaks no TLS: write http:// in the ranker's server_endpoint or endpoint",
    ),
    ("malformed http response", NOT_HTTP),
    (
        "x509|certificate_verify_failed",
        "Milvus does not trust vLLM's certificate: give Milvus its CA, an http:// server_endpoint, "
        "or mode='client'",
    ),
    (
        r"\beof\b|connection reset|remote end closed",
        "the connection broke: vLLM, or a gateway before it, may have restarted; its log says why",
    ),
    (
        'post "|dial tcp|connection (refused|error|timed out)|no such host|server misbehaving|'
        "i/o timeout|no route to host|network is unreachable",
        "vLLM must be reachable from Milvus: set server_endpoint, or mode='client'; "
        "for Milvus, localhost is the machine or container it runs in",
    ),
)
_UNKNOWN_KEY = "is not a apikey"
_KEY_NAME = re.compile(r"can not find key: (.+)\.apikey", re.DOTALL)
_NOT_MILVUS = (
    "is Milvus running there? It listens on port 19530 unless told otherwise; vLLM's URL is the "
    "ranker's endpoint, not the uri"
)

_TOO_LARGE = "ask for less at once: a smaller fetch_k, fewer output_fields, or fewer queries"

# Texts of server errors, lower case, and what a user can do about each.
_HINTS = (
    ("unknown rerank model provider", "this Milvus has no provider 'vllm': use mode='client'"),
    ("unknown rerank provider", "this Milvus has no such provider: use mode='client'"),
    ("is disabled", "enable provider vllm in milvus.yaml, or use mode='client'"),
    ("unsupported reranker", "this Milvus cannot rerank by a model: use mode='client'"),
    (
        "cannot be nullable",
        "this Milvus reranks no nullable field: use mode='client', or name another with "
        "text_field=",
    ),
    ("fail connecting to server", _NOT_MILVUS),
    ("larger than max", _TOO_LARGE),
    ("resource_exhausted", _TOO_LARGE),
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
    ("larger than max", "too_large"),
    ("resource_exhausted", "too_large"),
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
    if any(sign in lowered for sign in (*_RERANK_FAILED, *_BAD_ANSWER)):
        return _rerank_error(message, lowered)
    if _UNKNOWN_KEY in lowered:  # the text is left out: it repeats what may be the key itself
        return SearchError(
            f"{what} failed: Milvus knows no key of the name that the ranker's credential gives: "
            "it is the NAME of a key under 'credential' in milvus.yaml, never the key itself (add "
            "it there and restart Milvus, or use mode='client' with api_key=)"
        )
    hint = next((advice for sign, advice in _HINTS if sign in lowered), None)
    return SearchError(
        f"{what} failed: {message}" + (f" ({hint})" if hint else ""),
        reason=next((reason for sign, reason in _REASONS if sign in lowered), None),
    )


def given_as_key_names(text: str) -> list[str]:
    """Return what Milvus says it knows no key by: a key may stand where its name belongs."""
    return _KEY_NAME.findall(text)


def connecting_advice(uri: str, said: str) -> str:
    """Return what to do about a Milvus that cannot be connected to.

    Args:
        uri: Its URL, or the path of a Milvus Lite file.
        said: What pymilvus said.
    """
    if "://" in uri:
        return _NOT_MILVUS
    if "Open local milvus failed)" in said:  # it says no more; a missing folder it does name
        return "probably another process, such as a notebook, has the file open: close it there"
    if "needs start with" in said:
        return "write 'http://localhost:19530'; for Milvus Lite a path ending in .db"
    return (
        "for Milvus Lite, give a path ending in .db in a folder that exists, and install the extra "
        "'lite': pip install 'milvus-vllm-retrievers[lite]'"
    )


def _message(error: BaseException) -> str:
    """Return what was said: pymilvus passes some of grpc's errors on as they are, pages long."""
    code, details = getattr(error, "code", None), getattr(error, "details", None)
    if callable(code) and callable(details):
        return f"{getattr(code(), 'name', code())}: {details()}"
    return str(getattr(error, "message", "") or error)


def _rerank_error(message: str, lowered: str) -> RerankError:
    text = f"reranking inside Milvus failed: {message}"
    if status := _STATUS.search(lowered):
        code = int(status.group(1))
        serves = "" if _LITE_FAILED in lowered else NOT_SERVED  # Milvus itself sends no model name
        advice = _about_length(lowered) or status_advice(code, lowered, not_served=serves)
        return RerankStatusError(sentences(text, advice), status_code=code, body=message)
    if any(sign in lowered for sign in _BAD_ANSWER):
        return RerankResponseError(f"{text} (a gateway may drop documents; {CHECK_ENDPOINT})")
    if _TIMED_OUT.search(lowered):
        return RerankTimeoutError(f"{text} ({LATE})")
    for sign, about in _UNREACHED:
        if re.search(sign, lowered):
            return RerankConnectionError(f"{text} ({about})")
    return RerankError(text)


def _about_length(lowered: str) -> str:
    if _LITE_FAILED not in lowered or not _TOO_LONG.search(lowered):
        return ""
    return (
        "Milvus Lite cannot truncate: shorten the stored text, use mode='client', or "
        "on_error='client' for such queries"
    )


def with_advice(error: MilvusVLLMError, ranker: VLLMRanker) -> MilvusVLLMError:
    """Add what the ranker has to do with a failure of a search that was to rerank.

    Args:
        error: What `explain_error` made of it.
        ranker: The ranker that Milvus was given.

    Returns:
        An error of the same class, with the same cause; as it is where the ranker has no part.
    """
    if isinstance(error, SearchError) and error.reason == "rerank_timeout":
        late = RerankTimeoutError(f"reranking inside Milvus took too long: {error} ({LATE})")
        late.__cause__ = error
        return with_advice(late, ranker)
    given = "endpoint" if ranker.server_endpoint is None else "server_endpoint"
    url = getattr(ranker, given)
    told: MilvusVLLMError
    text = sentences(str(error), f"Milvus was given the ranker's {given}, {url}")
    if isinstance(error, SearchError) and error.reason == "timeout":
        doubt = f"Milvus was to rerank in that time: see whether vLLM answers at {url}"
        told = SearchError(sentences(str(error), doubt), reason="timeout")
    elif not isinstance(error, RerankError):
        return error
    elif not isinstance(error, RerankStatusError):
        told = type(error)(text)
    else:
        if error.status_code in {401, 403}:
            text = sentences(text, _about_key(error, ranker))
        told = RerankStatusError(text, status_code=error.status_code, body=error.body)
    told.__cause__ = error.__cause__
    return told


def _about_key(error: RerankStatusError, ranker: VLLMRanker) -> str:
    if _LITE_FAILED in error.body.lower():
        return "Milvus Lite sends no key: use mode='client' with an api_key"
    if ranker.credential is not None:
        return f"Check the key that milvus.yaml holds under the name {ranker.credential!r}"
    sent = "Milvus does not send the api_key" if ranker.api_key else "Milvus sent no key"
    return (
        f"{sent}: it sends only a credential, the name of a key in milvus.yaml. Set the ranker's "
        "credential, or use mode='client' with an api_key"
    )
