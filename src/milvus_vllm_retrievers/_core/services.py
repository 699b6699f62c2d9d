"""vLLM's rerank API: pure functions that build, read and judge, and the client that sends.

Source of the shapes: vLLM 0.32.0, measured (`/v1/rerank`).
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import ssl
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any
from urllib.parse import urljoin

import anyio
import httpx

from milvus_vllm_retrievers._core.deadline import Deadline
from milvus_vllm_retrievers._core.fork import forget_in_child
from milvus_vllm_retrievers._core.idle import LONGEST_REST, IdleClients
from milvus_vllm_retrievers._core.per_loop import PerLoop
from milvus_vllm_retrievers.errors import (
    RerankConnectionError,
    RerankResponseError,
    RerankStatusError,
    RerankTimeoutError,
    caused,
    excerpt,
    redacted,
)
from milvus_vllm_retrievers.ranker import VLLMRanker

_RETRIED_STATUSES = frozenset({429, 502, 503, 504})
_RETRIED_ONCE_STATUS = 500
_LONGEST_WAIT = 8.0
_LIMITS = httpx.Limits(keepalive_expiry=LONGEST_REST)
_OK = 200
_UNAUTHORIZED = (401, 403)
_NOT_FOUND = 404
_BAD_REQUEST = 400
_REDIRECTS = range(300, 400)


@dataclass(frozen=True, slots=True)
class RerankRequest:
    """One rerank request, ready to be sent.

    Attributes:
        url: Where to.
        headers: The headers, the api key among them.
        content: The JSON body.
        documents: How many documents it asks about.
        api_key: The key, so that it can be taken from what an answer echoes.
    """

    url: str
    headers: Mapping[str, str] = field(repr=False)
    content: bytes = field(repr=False)
    documents: int
    api_key: str = field(default="", repr=False)

    @property
    def largest_answer(self) -> int:
        """Bytes an answer may have: vLLM echoes the documents and adds a line for each."""
        return 4 * len(self.content) + 1000 * self.documents + 1_000_000

    def redacted(self, text: str) -> str:
        """Take the key from a text."""
        return redacted(text, [self.api_key])

    def shown(self, text: str) -> str:
        """Shorten a text for a message, without the key."""
        return excerpt(self.redacted(text))


@dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP answer, read to its end."""

    status_code: int
    headers: httpx.Headers
    text: str


def build_request(ranker: VLLMRanker, query: str, documents: Sequence[str]) -> RerankRequest:
    """Build the request for the scores of `documents` against `query`."""
    body: dict[str, Any] = {"query": query, "documents": list(documents)}
    if ranker.model is not None:
        body["model"] = ranker.model
    if ranker.truncate_prompt_tokens is not None:
        body["truncate_prompt_tokens"] = ranker.truncate_prompt_tokens
    if ranker.instruction is not None:
        body["instruction"] = ranker.instruction
    body.update(ranker.extra_body or {})
    headers = {"content-type": "application/json", "accept": "application/json"}
    api_key = ranker.api_key.get_secret_value() if ranker.api_key else ""
    if api_key:
        headers["authorization"] = f"Bearer {api_key}"
    return RerankRequest(
        url=f"{ranker.endpoint}/v1/rerank",
        headers=headers,
        # A lone surrogate is no valid UTF-8: it is sent as "?".
        content=json.dumps(body, ensure_ascii=False).encode("utf-8", "replace"),
        documents=len(documents),
        api_key=api_key,
    )


def read_scores(answer: Answer, request: RerankRequest) -> list[float]:
    """Read one finite score for each document, in the documents' order.

    Raises:
        RerankStatusError: The status is not 200.
        RerankResponseError: The answer does not give every document one finite score.
    """
    if answer.status_code != _OK:
        raise status_error(answer, request)
    results = _results(answer.text)
    if results is None:
        raise RerankResponseError(
            f"{request.url} answered with something other than rerank results "
            f"({request.shown(answer.headers.get('content-type', 'no content type'))}: "
            f"{request.shown(answer.text)!r}): is it vLLM's base URL?"
        )
    scores = dict(results)
    wanted = set(range(request.documents))
    if len(results) != request.documents or set(scores) != wanted:
        raise RerankResponseError(
            f"{request.url} answered with {len(results)} results for {request.documents} "
            f"documents ({len(wanted - set(scores))} of them without a score): a gateway may "
            "drop or repeat documents"
        )
    if not all(math.isfinite(score) for score in scores.values()):
        raise RerankResponseError(
            f"{request.url} answered with a score that is not a finite number: the model's "
            "weights or data type do not fit (try --dtype bfloat16 or float32)"
        )
    return [scores[i] for i in range(request.documents)]


def _results(text: str) -> list[tuple[int, float]] | None:
    """Read indexes and scores; None if the text is something else."""
    try:
        results = json.loads(text)["results"]
        if not all(type(result["index"]) is int for result in results):
            return None
        return [(result["index"], float(result["relevance_score"])) for result in results]
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None


def status_error(answer: Answer, request: RerankRequest) -> RerankStatusError:
    """Make the error for a status other than 200, with what to do about it."""
    text = request.shown(_error_text(answer.text)).removesuffix(".")
    return RerankStatusError(
        f"{request.url} answered {answer.status_code}: {text}{_hint(answer, request)}",
        status_code=answer.status_code,
        body=request.shown(answer.text),
        retry_after=_retry_after(answer.headers),
    )


def _error_text(body: str) -> str:
    """Return the message of vLLM's error answers (they have three shapes), or the body."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return body
    if not isinstance(answer, dict):
        return body
    error = answer.get("error", answer.get("detail", body))
    return str(error.get("message", body) if isinstance(error, dict) else error)


def _hint(response: Answer, request: RerankRequest) -> str:
    status = response.status_code
    if status in _UNAUTHORIZED:
        return ". Check the ranker's api_key"
    if status == _NOT_FOUND:
        return (
            ". Check the ranker's model name and endpoint; vLLM serves /v1/rerank only for "
            "embedding and one-label classification models"
        )
    if status == _BAD_REQUEST:
        return (
            ". If a document is too long, keep truncate_prompt_tokens=-1; one bad document "
            "fails its whole request"
        )
    if status in _REDIRECTS:
        location = request.shown(response.headers.get("location", ""))
        target = urljoin(request.url, location)
        return f". It redirects to {target!r}; redirects are not followed: set that endpoint"
    return ""


def transport_error(error: Exception, request: RerankRequest) -> RerankConnectionError:
    """Make the error for a request that got no answer."""
    failed: RerankConnectionError
    if isinstance(error, (httpx.TimeoutException, TimeoutError)):
        failed = RerankTimeoutError(
            f"{request.url} did not answer in time ({type(error).__name__}); raise the ranker's "
            "timeout, or rerank fewer candidates (fetch_k)"
        )
    else:
        failed = RerankConnectionError(
            f"{request.url} could not be reached or broke off ({type(error).__name__}: "
            f"{request.shown(str(error))}); is vLLM running there?"
        )
    return caused(failed, error, request.redacted)


def pause_before_retry(
    error: Exception, attempt: int, ranker: VLLMRanker, seconds_left: float | None
) -> float | None:
    if attempt > ranker.max_retries:
        return None
    if isinstance(error, RerankStatusError):
        retried = error.status_code in _RETRIED_STATUSES or (
            error.status_code == _RETRIED_ONCE_STATUS and attempt == 1
        )
    else:
        retried = isinstance(error, RerankConnectionError) and not isinstance(
            error, RerankTimeoutError
        )
    if not retried:
        return None
    asked = error.retry_after if isinstance(error, RerankStatusError) else None
    pause = max(min(0.2 * 2 ** (attempt - 1), _LONGEST_WAIT) + random.uniform(0, 0.2), asked or 0.0)
    if pause > _LONGEST_WAIT or (seconds_left is not None and pause >= seconds_left):
        return None
    return pause


def build_models_request(ranker: VLLMRanker) -> RerankRequest:
    raise RerankConnectionError("not yet")


def read_models(answer: Answer, request: RerankRequest) -> list[str]:
    return []


def _retry_after(headers: httpx.Headers) -> float | None:
    """Read a Retry-After header given in seconds."""
    try:
        seconds = float(headers.get("retry-after", ""))
    except ValueError:
        return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


class RerankClient:
    """Sends rerank requests, blocking or async; safe to share between threads and loops.

    Args:
        ranker: Endpoint, model, timeout and retries.
    """

    def __init__(self, ranker: VLLMRanker) -> None:
        self._ranker = ranker
        self._open()
        forget_in_child(self)

    def _open(self) -> None:
        self._clients = IdleClients(_new_client)
        # Sockets are closed also where nobody calls close, as with most retrievers.
        self._finalizer = weakref.finalize(self, _close_resting, self._clients)
        self._async_clients = PerLoop(partial(IdleClients, _new_async_client), _aclose_resting)

    def forget_connections(self) -> Sequence[object]:
        """Give up the connections of the parent process, without closing them."""
        inherited = (self._clients, self._async_clients)
        self._finalizer.detach()
        self._open()
        return inherited

    def close(self) -> None:
        """Close the blocking connections; those in use are closed after their request."""
        _close_resting(self._clients)

    async def aclose(self) -> None:
        """Close this event loop's connections, and the blocking ones; those in use follow."""
        await self._async_clients.close()
        self.close()

    def send(self, request: RerankRequest, deadline: Deadline) -> Answer:
        limit = self._limit(request, deadline)
        arguments = _stream_arguments(request, limit)
        client = self._clients.lend()
        try:
            with client.stream(**arguments) as response:
                body = bytearray()
                for chunk in response.iter_bytes():
                    body += chunk
                    _check_body(body, request, limit)
                answer = _answer(response, body)
        except (httpx.HTTPError, TimeoutError) as error:
            failed = transport_error(error, request)
        else:
            return answer
        finally:
            _close(self._clients.take_back(client))
        raise failed

    async def asend(self, request: RerankRequest, deadline: Deadline) -> Answer:
        """Send in a task of its own, so that a cancelled call leaves no socket behind.

        httpx cleans up after a cancelled scope of anyio, but not wherever asyncio's `cancel`
        strikes (measured: 3 of 100 cancelled calls kept a socket). The scope also ends an
        answer whose headers trickle in.
        """
        limit = self._limit(request, deadline)
        seconds = limit.remaining()
        scope = anyio.CancelScope(
            deadline=math.inf if seconds is None else anyio.current_time() + seconds
        )

        async def exchange() -> Answer | None:
            with scope:
                return await self._exchange(request, limit)
            return None

        task = asyncio.ensure_future(exchange())
        try:
            scores = await asyncio.shield(task)
        except asyncio.CancelledError:
            scope.cancel()
            await asyncio.gather(task, return_exceptions=True)
            raise
        if scores is None:
            raise transport_error(TimeoutError("the answer was not complete in time"), request)
        return scores

    async def _exchange(self, request: RerankRequest, limit: Deadline) -> Answer:
        arguments = _stream_arguments(request, limit)
        clients = await self._async_clients.get()
        client = clients.lend()
        try:
            async with client.stream(**arguments) as response:
                body = bytearray()
                async for chunk in response.aiter_bytes():
                    body += chunk
                    _check_body(body, request, limit)
                answer = _answer(response, body)
        except (httpx.HTTPError, TimeoutError) as error:
            failed = transport_error(error, request)
        else:
            return answer
        finally:
            await _aclose(clients.take_back(client))
        raise failed

    def _limit(self, request: RerankRequest, deadline: Deadline) -> Deadline:
        """Return the moment by which one try must be done."""
        limit = Deadline.after(deadline.within(self._ranker.timeout))
        if limit.passes_within(0):
            raise RerankTimeoutError(
                f"{request.url} was not asked: the call's timeout is used up; raise it"
            )
        return limit


@cache
def _certificates() -> ssl.SSLContext:
    """Read the certificates to trust once: that takes longer than a request."""
    return httpx.create_ssl_context()


def _new_client() -> httpx.Client:
    return httpx.Client(limits=_LIMITS, verify=_certificates())


def _new_async_client() -> httpx.AsyncClient:
    return httpx.AsyncClient(limits=_LIMITS, verify=_certificates())


def _close(clients: Sequence[httpx.Client]) -> None:
    for client in clients:
        client.close()


async def _aclose(clients: Sequence[httpx.AsyncClient]) -> None:
    for client in clients:
        with anyio.CancelScope(shield=True):  # a cancelled call leaves no socket behind either
            await client.aclose()


def _close_resting(clients: IdleClients[httpx.Client]) -> None:
    _close(clients.close())


async def _aclose_resting(clients: IdleClients[httpx.AsyncClient]) -> None:
    await _aclose(clients.close())


def _stream_arguments(request: RerankRequest, limit: Deadline) -> dict[str, Any]:
    return {
        "method": "POST",
        "url": request.url,
        "content": request.content,
        "headers": request.headers,
        "timeout": limit.remaining(),
    }


def _check_body(body: bytearray, request: RerankRequest, limit: Deadline) -> None:
    """Stop reading an answer that comes too slowly (httpx limits each read only) or is too long."""
    if limit.passes_within(0):
        raise TimeoutError("the answer was not complete in time")
    if len(body) > request.largest_answer:
        raise RerankResponseError(
            f"{request.url} answered with more than {request.largest_answer:,} bytes for "
            f"{request.documents} documents: is it vLLM's base URL?"
        )


def _answer(response: httpx.Response, body: bytearray) -> Answer:
    # JSON is UTF-8; what an answer says of its charset may be anything.
    return Answer(response.status_code, response.headers, body.decode("utf-8", "replace"))
