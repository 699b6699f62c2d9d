"""Milvus's rerank provider ``vllm``, as section 2 of the contract describes it."""

from __future__ import annotations

import json
import re
import socket
import ssl
import struct
import time
from contextlib import closing
from dataclasses import dataclass, field
from http import HTTPStatus
from http.client import (
    HTTPConnection,
    HTTPException,
    HTTPResponse,
    HTTPSConnection,
    IncompleteRead,
    RemoteDisconnected,
)
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import SplitResult, urljoin, urlsplit

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_DEFAULT_BATCH_SIZE = 32
_DEFAULT_BUDGET_MS = 30_000
# Go follows these; all but the last two with a GET that has no body.
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_KEEP_METHOD = frozenset({307, 308})
_MOST_REDIRECTS = 10


@dataclass(frozen=True)
class ServerConfig:
    """What an operator of Milvus sets, and the pace of the retries.

    Attributes:
        version: The version that the server reports.
        retry_wait: Seconds before the second try of a call; twice that before the third.
        credentials: API keys by the name that a Function's ``credential`` gives.
        vllm_enabled: Whether Functions may use the provider.
    """

    version: str = "2.6.4"
    retry_wait: float = 1.0
    credentials: Mapping[str, str] = field(default_factory=dict)
    vllm_enabled: bool = True


class RerankError(Exception):
    """Fails the whole search. ``code`` is the Milvus error code the client sees."""

    code = 65535


class InvalidParameterError(RerankError):
    """The Function's params, or the field it reads, are not acceptable."""

    code = 1100


@dataclass(frozen=True)
class VLLMProvider:
    """Scores documents by calling vLLM's rerank API; see ``provider_from`` for the meanings."""

    url: SplitResult
    api_key: str | None
    batch_size: int
    truncation: Mapping[str, int]
    budget: float
    retry_wait: float

    def score(self, query: str, documents: Sequence[str]) -> list[float]:
        """One float32 score a document, in the documents' order; no documents, no request."""
        scores: list[float] = []
        for start in range(0, len(documents), self.batch_size):
            scores += self._score_batch(query, documents[start : start + self.batch_size])
        return scores

    def _score_batch(self, query: str, documents: Sequence[str]) -> list[float]:
        body = {"query": query, "documents": documents, **self.truncation}
        answer = self._post(json.dumps(body).encode())
        try:
            results = json.loads(answer, parse_constant=_refuse_constant).get("results") or []
            by_index = sorted(results, key=lambda result: int(result.get("index", 0)))
            scores = [_float32(result.get("relevance_score", 0.0)) for result in by_index]
        except (ValueError, TypeError, AttributeError, OverflowError, struct.error) as error:
            raise RerankError(
                f"call service failed, unmarshal response failed, errs:[{error}]"
            ) from error
        if len(scores) > len(documents):
            raise RerankError(f"index out of range [{len(documents)}] with length {len(documents)}")
        # Read by position: what a dropped result leaves behind is a zero at the end.
        return scores + [0.0] * (len(documents) - len(scores))

    def _post(self, body: bytes) -> bytes:
        deadline = time.monotonic() + self.budget
        for wait in (self.retry_wait, 2 * self.retry_wait):
            try:
                return self._try_once(body, deadline)
            except RerankError as error:
                if time.monotonic() + wait >= deadline:
                    raise RerankError("context deadline exceeded") from error
                time.sleep(wait)
        return self._try_once(body, deadline)

    def _try_once(self, body: bytes, deadline: float) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        url, method = self.url, "POST"
        for _ in range(_MOST_REDIRECTS):
            answer, content = _exchange(url, method, body, headers, deadline)
            location = answer.getheader("location")
            if answer.status not in _REDIRECTS or not location:
                break
            onward = urlsplit(urljoin(url.geturl(), location))
            if onward.hostname != url.hostname:
                headers.pop("Authorization", None)
            if answer.status not in _KEEP_METHOD:
                method, body = "GET", b""
            url = onward
        else:
            raise RerankError(
                f'call service failed, errs:[{method.title()} "{url.geturl()}": '
                f"stopped after {_MOST_REDIRECTS} redirects]"
            )
        if answer.status != HTTPStatus.OK:
            text = content.decode(errors="replace")
            raise RerankError(
                f"call service failed, errs:[{answer.status} {answer.reason}, {text}]"
            )
        return content


def _exchange(
    url: SplitResult, method: str, body: bytes, headers: Mapping[str, str], deadline: float
) -> tuple[HTTPResponse, bytes]:
    connect = HTTPSConnection if url.scheme == "https" else HTTPConnection
    remaining = max(deadline - time.monotonic(), 0.001)
    target = url._replace(scheme="", netloc="", fragment="").geturl()
    try:
        with closing(connect(str(url.hostname), url.port, timeout=remaining)) as http:
            http.request(method, target, body, dict(headers))
            answer = http.getresponse()
            return answer, answer.read()
    except (OSError, HTTPException) as error:
        said = f'{method.title()} "{url.geturl()}": {in_gos_words(error, url)}'
        raise RerankError(f"call service failed, errs:[{said}]") from error


# What Go's HTTP client says, by what Python raises; the first that fits.
_GOS_WORDS: tuple[tuple[type[Exception], str], ...] = (
    (RemoteDisconnected, "EOF"),
    (IncompleteRead, "unexpected EOF"),
    (HTTPException, "net/http: HTTP/1.x transport connection broken: malformed HTTP response"),
    (socket.gaierror, "dial tcp: lookup {host} on 127.0.0.11:53: no such host"),
    (ssl.SSLCertVerificationError, "tls: failed to verify certificate: x509: unknown authority"),
    (ssl.SSLError, "http: server gave HTTP response to HTTPS client"),
    (
        ConnectionResetError,
        "read tcp 10.0.0.1:5000->{host}:{port}: read: connection reset by peer",
    ),
    (TimeoutError, "context deadline exceeded"),
    # Refused connections, unreachable hosts and networks: the system's words, in lower case.
    (OSError, "dial tcp {host}:{port}: connect: {system}"),
)


def in_gos_words(error: Exception, url: SplitResult) -> str:
    """Say what Go's HTTP client says of a failure in place of what Python's does."""
    words = next(words for kind, words in _GOS_WORDS if isinstance(error, kind))
    return words.format(
        host=url.hostname,
        port=url.port or (443 if url.scheme == "https" else 80),
        system=(getattr(error, "strerror", None) or str(error)).lower(),
    )


def provider_from(params: Mapping[str, str], config: ServerConfig) -> VLLMProvider:
    """Reads a Function's params, whose keys match in any case; unknown keys mean nothing.

    Raises:
        InvalidParameterError: In the words of Milvus.
    """
    params = {key.lower(): value for key, value in params.items()}
    if "provider" not in params:
        raise InvalidParameterError("lost rerank params:provider")
    if params["provider"].lower() != "vllm":
        raise InvalidParameterError(f"unknown rerank model provider:{params['provider']}")
    if not config.vllm_enabled:
        raise InvalidParameterError("rerank provider: [vllm] is disabled")
    return VLLMProvider(
        url=_rerank_url(params.get("endpoint", "")),
        api_key=_api_key(params.get("credential"), config.credentials),
        batch_size=_batch_size(params.get("max_client_batch_size")),
        truncation=_truncation(params.get("truncate_prompt_tokens")),
        budget=_budget(params.get("timeout_ms")),
        retry_wait=config.retry_wait,
    )


def _rerank_url(endpoint: str) -> SplitResult:
    if not endpoint:
        raise InvalidParameterError("rerank function lost params endpoint")
    try:
        url = urlsplit(endpoint)
        valid = url.scheme in {"http", "https"} and bool(url.hostname) and url.port != 0
    except ValueError:  # a port that is no number, or half an IPv6 address
        valid = False
    if not valid:
        raise InvalidParameterError(f"endpoint: [{endpoint}] is not a valid http/https link")
    return url._replace(path="/rerank")


def _api_key(name: str | None, credentials: Mapping[str, str]) -> str | None:
    if name is None:
        return None
    if name not in credentials:
        raise InvalidParameterError(
            f"{name} is not a apikey crediential, can not find key: {name}.apikey"
        )
    return credentials[name]


def _batch_size(value: str | None) -> int:
    if value is None:
        return _DEFAULT_BATCH_SIZE
    size = _integer(value)
    if size is None:
        raise InvalidParameterError(
            f"[max_client_batch_size param's value: {value}] is not a valid number"
        )
    if size <= 0:
        raise InvalidParameterError(
            f"[max_client_batch_size param's value: {value}] must be greater than 0"
        )
    return size


def _truncation(value: str | None) -> dict[str, int]:
    if value is None:
        return {}
    tokens = _integer(value)
    if tokens is None:
        raise InvalidParameterError(
            f"Rerank params error, truncate_prompt_tokens: {value} is not a number"
        )
    return {"truncate_prompt_tokens": tokens}


def _budget(timeout_ms: str | None) -> float:
    """Seconds that all tries of one call may take together."""
    milliseconds = _integer(timeout_ms or "") or 0
    return (milliseconds if milliseconds > 0 else _DEFAULT_BUDGET_MS) / 1000


def _integer(text: str) -> int | None:
    """Reads what Go's ``strconv.Atoi`` reads: no spaces, no underscores, no decimals."""
    return int(text) if re.fullmatch(r"[+-]?[0-9]+", text) else None


def _float32(value: Any) -> float:
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
