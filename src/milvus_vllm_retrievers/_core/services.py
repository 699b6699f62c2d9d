"""vLLM's rerank API: pure functions that build, read and judge, and the client that sends.

Source of the shapes: vLLM 0.32.0, measured (`/v1/rerank`).
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import os
import random
import ssl
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import anyio
import httpx

from milvus_vllm_retrievers._core.advice import NOT_HTTP, sentences, status_advice
from milvus_vllm_retrievers._core.deadline import NO_DEADLINE, Deadline
from milvus_vllm_retrievers._core.fork import forget_in_child
from milvus_vllm_retrievers._core.hits import fits_float32
from milvus_vllm_retrievers._core.idle import (
    LONGEST_REST,
    IdleClients,
    later_in_loop,
    later_in_thread,
)
from milvus_vllm_retrievers._core.per_loop import PerLoop
from milvus_vllm_retrievers._core.query import in_thread
from milvus_vllm_retrievers.errors import (
    ConfigurationError,
    RerankConnectionError,
    RerankError,
    RerankResponseError,
    RerankStatusError,
    RerankTimeoutError,
    caused,
    excerpt,
    redacted,
)
from milvus_vllm_retrievers.ranker import (
    RERANK_PATH,
    VLLMRanker,
    secrets_of,
    usable_secret,
    without_route,
)

_RETRIED_STATUSES = frozenset({429, 502, 503, 504})
_RETRIED_ONCE_STATUS = 500
_LONGEST_WAIT = 8.0
_LIMITS = httpx.Limits(keepalive_expiry=LONGEST_REST)
_OK = 200
_REDIRECTS = range(300, 400)
_REDIRECTS_THAT_KEEP_THE_BODY = (307, 308)
_MOST_REDIRECTS = 3
# What every httpx client sends: no secrets.
_HEADERS_OF_HTTPX = frozenset({"accept", "accept-encoding", "connection", "user-agent"})


_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "record layer failure")
_LASTING = ("CERTIFICATE_VERIFY_FAILED", *_NO_TLS)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RerankRequest:
    """One request, ready to be sent but for its key.

    Attributes:
        endpoint: The base URL.
        path: What is asked there.
        content: The JSON body; empty for a request that only reads.
        documents: How many documents it asks about.
    """

    endpoint: str
    path: str
    content: bytes = field(default=b"", repr=False)
    documents: int = 0

    @property
    def url(self) -> str:
        """Where to."""
        return self.endpoint + self.path

    @property
    def largest_answer(self) -> int:
        """Bytes an answer may have: vLLM echoes the documents and adds a line for each."""
        return 4 * len(self.content) + 1000 * self.documents + 1_000_000


@dataclass(frozen=True)
class Answer:
    """One HTTP answer, read to its end.

    Attributes:
        status_code: The HTTP status.
        headers: The answer's headers.
        text: The body.
        secrets: What was sent and must not be shown where the answer repeats it.
    """

    status_code: int
    headers: httpx.Headers = field(repr=False)
    text: str = field(repr=False)
    secrets: Sequence[str] = field(default=(), repr=False)

    @cached_property
    def json(self) -> Any:
        """What the body says; None if that is no JSON."""
        try:
            return json.loads(self.text)
        except (ValueError, RecursionError):
            return None

    def shown(self, text: str) -> str:
        """Shorten a part of the answer for a message, without secrets."""
        return excerpt(redacted(text, self.secrets))


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
    # A lone surrogate is no valid UTF-8: it is sent as "?".
    content = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
    return RerankRequest(
        ranker.endpoint, ranker.rerank_path or RERANK_PATH, content, len(documents)
    )


def build_models_request(ranker: VLLMRanker) -> RerankRequest:
    """Build the request for the names of the models that are served."""
    return RerankRequest(ranker.endpoint, "/v1/models")


def read_models(answer: Answer, request: RerankRequest) -> list[str]:
    """Read the names of the models that are served.

    Raises:
        RerankStatusError: The status is not 200.
        RerankResponseError: The answer is no list of models.
    """
    if answer.status_code != _OK:
        raise status_error(answer, request)
    try:
        names = [model["id"] for model in answer.json["data"]]
    except (TypeError, KeyError):
        names = [None]
    if not all(isinstance(name, str) for name in names):
        raise _other_answer(answer, request, "a list of models")
    return names


def read_scores(answer: Answer, request: RerankRequest) -> list[float]:
    """Read one finite score for each document, in the documents' order.

    Raises:
        RerankStatusError: The status is not 200.
        RerankResponseError: The answer does not give every document one finite score.
    """
    if answer.status_code != _OK:
        raise status_error(answer, request)
    results = _results(answer)
    if results is None:
        raise _other_answer(answer, request, "rerank results")
    scores = dict(results)
    wanted = set(range(request.documents))
    if len(results) != request.documents or set(scores) != wanted:
        lost = len(wanted - set(scores))
        raise RerankResponseError(
            f"{request.url} answered with {_count(len(results), 'result')} for "
            f"{_count(request.documents, 'document')}"
            + (f" ({lost} of them without a score)" if lost else "")
            + ": a gateway may drop or repeat documents"
        )
    if not all(map(fits_float32, scores.values())):
        raise RerankResponseError(
            f"{request.url} answered with a score that is not a finite number: the model's "
            "weights or data type do not fit (try --dtype bfloat16 or float32)"
        )
    return [scores[i] for i in range(request.documents)]


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _other_answer(answer: Answer, request: RerankRequest, wanted: str) -> RerankResponseError:
    content_type = answer.shown(answer.headers.get("content-type", "no content type"))
    return RerankResponseError(
        f"{request.url} answered with something other than {wanted} "
        f"({content_type}: {answer.shown(answer.text)!r}): is it vLLM's base URL?"
    )


def read_model(answer: Answer) -> str:
    """Read which model has scored; empty if the answer does not say it."""
    model = answer.json.get("model") if isinstance(answer.json, dict) else None
    return model if isinstance(model, str) else ""


def _results(answer: Answer) -> list[tuple[int, float]] | None:
    """Read indexes and scores; None if the answer has something else."""
    try:
        results = answer.json["results"]
        if not all(type(result["index"]) is int for result in results):
            return None
        return [(result["index"], float(result["relevance_score"])) for result in results]
    except (ValueError, TypeError, KeyError, OverflowError):
        return None


def status_error(answer: Answer, request: RerankRequest) -> RerankStatusError:
    """Make the error for a status other than 200, with what to do about it."""
    text = answer.shown(_error_text(answer)).strip().removesuffix(".")
    answered = f"{request.url} answered {answer.status_code}" + (f": {text}" if text else "")
    return RerankStatusError(
        sentences(answered, _hint(answer, request)),
        status_code=answer.status_code,
        body=answer.shown(answer.text),
        retry_after=_retry_after(answer.headers),
    )


def _error_text(answer: Answer) -> str:
    """Return the message of vLLM's error answers (they have three shapes), or the body."""
    said = answer.json
    if not isinstance(said, dict):
        return answer.text
    error = said.get("error", said.get("detail", answer.text))
    return str(error.get("message", answer.text) if isinstance(error, dict) else error)


def _hint(answer: Answer, request: RerankRequest) -> str:
    if answer.status_code in _REDIRECTS:
        return _redirect_hint(answer, request)
    about_key = "Check the ranker's api_key" + ("" if answer.secrets else " (none is given)")
    advice = status_advice(
        answer.status_code, answer.text, about_key=about_key, endpoint=request.endpoint
    )
    path = urlsplit(request.endpoint).path
    if path and "base URL" in advice:
        base = request.endpoint.removesuffix(path)
        advice += f". Unless {path!r} is a gateway's prefix, pass endpoint={base!r}"
    return advice


def _redirect_hint(answer: Answer, request: RerankRequest) -> str:
    location = answer.shown(answer.headers.get("location", ""))
    try:
        target = urljoin(request.url, location)
        parts = urlsplit(target)
    except ValueError:
        return f"It redirects to {location!r}, which is no URL"
    if redirected(answer, request):
        return f"It redirects to {target!r}, after {_MOST_REDIRECTS} redirects already"
    base, path = without_route(target), ""
    if base + RERANK_PATH != target or without_route(base) != base:
        base, path = f"{parts.scheme}://{parts.netloc}", f", rerank_path={parts.path!r}"
    return (
        f"It redirects to {target!r}, which is not followed: only a 307 or 308 of the same "
        "origin is, since the request holds documents and perhaps a key. If that is where the "
        f"model is, pass endpoint={base!r}{path}"
    )


def redirected(answer: Answer, request: RerankRequest) -> RerankRequest | None:
    """Return the request that an answer redirects to; None where it is not to be followed."""
    if answer.status_code not in _REDIRECTS_THAT_KEEP_THE_BODY:
        return None
    try:
        asked = httpx.URL(request.url)
        target = asked.join(answer.headers["location"])
    except (KeyError, httpx.InvalidURL):
        return None
    origins = {(url.scheme, url.host, url.port, url.userinfo) for url in (asked, target)}
    if len(origins) > 1:
        return None
    origin = f"{target.scheme}://{target.netloc.decode('ascii')}"
    return replace(request, endpoint=origin, path=target.raw_path.decode("ascii"))


def transport_error(
    error: Exception,
    request: RerankRequest,
    limit: Deadline = NO_DEADLINE,
    secrets: Sequence[str] = (),
    *,
    own: bool = True,
) -> RerankError:
    """Make the error for a request that got no answer.

    Args:
        error: What came in place of one.
        request: What was asked.
        limit: When the answer had to be there.
        secrets: What is to be kept out of the message.
        own: Whether the HTTP client is one of ours.
    """
    failed: RerankError
    text = f"{type(error).__name__}: {excerpt(redacted(str(error), secrets))}"
    if isinstance(error, (httpx.TimeoutException, TimeoutError)):
        failed = RerankTimeoutError(
            f"{request.url} did not answer in time ({type(error).__name__}); raise "
            f"{limit.argument}, or rerank fewer candidates (fetch_k)"
        )
    elif isinstance(error, RuntimeError):
        failed = RerankConnectionError(
            f"{request.url} was not asked ({text}): is the http_client that was passed in closed, "
            "or of another event loop?",
            may_pass=False,
        )
    else:
        advice = _advice(error, request, own=own)
        failed = RerankConnectionError(
            f"{request.url} could not be reached or broke off ({text}); {advice}",
            may_pass=not any(word in str(error) for word in _LASTING),
        )
    return caused(failed, error, lambda each: redacted(each, secrets))


def _advice(error: Exception, request: RerankRequest, *, own: bool) -> str:
    text = str(error)
    proxy = _proxy_for(request.url) if own else None
    if "CERTIFICATE_VERIFY_FAILED" in text and "mismatch" in text:
        return "use the host name that its certificate is for"
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return (
            "to trust the authority that signed its certificate, set SSL_CERT_FILE to the "
            "authority's file, or pass http_client=httpx.Client(verify=ssl."
            "create_default_context(cafile=...)) (and async_http_client) to the ranker"
        )
    if any(word in text for word in _NO_TLS):
        return f"it speaks no TLS: use {request.endpoint.replace('https://', 'http://', 1)!r}"
    if isinstance(error, httpx.ProxyError) or (proxy and isinstance(error, httpx.ConnectError)):
        return (
            f"that is the proxy which {proxy or 'your http_client'} names, not vLLM: is it "
            "running? A host that needs no proxy belongs in NO_PROXY"
        )
    if isinstance(error, httpx.RemoteProtocolError) and "illegal" in text:
        return f"{NOT_HTTP}, and a port for https://"
    return "is vLLM running there?"


def _proxy_for(url: str) -> str | None:
    """Name the variable of the proxy through which a URL is asked, where there is one."""
    parts = urlsplit(url)
    scheme = next((s for s in (parts.scheme, "all") if getproxies().get(s)), None)
    return None if scheme is None or proxy_bypass(parts.netloc) else _variable(f"{scheme}_proxy")


def _variable(name: str) -> str:
    """Spell a variable as the environment does; the lower case counts where there are both."""
    return name if name in os.environ else name.upper()


def environment_error(error: Exception) -> RerankError:
    """Make the error for an HTTP client that the environment's variables do not let be made."""
    if isinstance(error, OSError):
        name = next((v for v in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(v)), None)
        source = f"{name}={os.environ[name]!r}" if name else "certifi"
        problem = f"no certificates can be read from {source} ({error.strerror}): correct that"
    elif (name := _faulty_proxy()) and isinstance(error, ImportError):
        problem = f"{name} names a SOCKS proxy: pip install 'httpx[socks]', or unset it"
    elif name:
        problem = f"{name} is not the address of a proxy, such as http://proxy:3128: correct it"
    else:
        problem = (
            f"{_variable('no_proxy')} has an entry that httpx cannot read: write a host, such as "
            "::1 (without brackets) or .example.com"
        )
    failed = RerankConnectionError(
        f"no HTTP client can be made, since {problem}. Or pass an http_client (and "
        "async_http_client) of your own to the ranker",
        may_pass=False,
    )
    if isinstance(error, (OSError, ImportError)):  # others may quote a proxy's password
        failed.__cause__ = error
    return failed


def _faulty_proxy() -> str | None:
    for scheme, proxy in getproxies().items():
        if scheme in {"http", "https", "all"}:
            url = proxy if "://" in proxy else f"http://{proxy}"
            try:
                httpx.HTTPTransport(verify=_certificates(), proxy=url).close()
            except (ImportError, ValueError, httpx.InvalidURL):
                return _variable(f"{scheme}_proxy")
    return None


def pause_before_retry(
    error: Exception, attempt: int, ranker: VLLMRanker, seconds_left: float | None
) -> float | None:
    """Return the pause after which a failed request is sent again; None gives up.

    Args:
        error: How it failed.
        attempt: How often it has been sent.
        ranker: How often it may be sent again.
        seconds_left: Until its call must be done; None is no limit.
    """
    if attempt > ranker.max_retries or not _may_be_gone(error, attempt):
        return None
    asked = error.retry_after if isinstance(error, RerankStatusError) else None
    pause = max(_backoff(attempt), asked or 0.0)
    in_time = seconds_left is None or pause < seconds_left
    return pause if pause <= _LONGEST_WAIT and in_time else None


def _may_be_gone(error: Exception, attempt: int) -> bool:
    """Tell whether the failure of this attempt may be gone in the next."""
    if isinstance(error, RerankStatusError):
        if error.status_code == _RETRIED_ONCE_STATUS:
            return attempt == 1
        return error.status_code in _RETRIED_STATUSES
    is_late = isinstance(error, RerankTimeoutError)
    return isinstance(error, RerankConnectionError) and error.may_pass and not is_late


def _backoff(attempt: int) -> float:
    exponential = 0.2 * 2.0 ** min(attempt - 1, 10)
    return min(exponential + random.uniform(0, 0.2), _LONGEST_WAIT)  # noqa: S311 - no secret


def _retry_after(headers: httpx.Headers) -> float | None:
    """Read a Retry-After header given in seconds."""
    try:
        seconds = float(headers.get("retry-after", ""))
    except ValueError:
        return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


class RerankClient:
    """Sends requests to a rerank service, one try each; safe to share between threads and loops.

    Args:
        ranker: Where to, with what key, headers and HTTP clients, and how long a try may take.
    """

    def __init__(self, ranker: VLLMRanker) -> None:
        self._ranker = ranker
        self._open()
        forget_in_child(self)

    def _open(self) -> None:
        self._clients = IdleClients(_new_client, later_in_thread, _close)
        # Sockets are closed also where nobody calls close, as with most retrievers.
        self._finalizer = weakref.finalize(self, _close_resting, self._clients)
        make = partial(IdleClients, _new_async_client, later_in_loop, _aclose_soon)
        self._async_clients = PerLoop(make, _aclose_resting)

    def check_environment(self) -> None:
        """Make sure that a client can be made, so that no query is the first to find out.

        Raises:
            RerankConnectionError: A variable of the environment does not let one be made.
        """
        if self._ranker.http_client is None and self._ranker.async_http_client is None:
            _new_client().close()

    def send(self, request: RerankRequest, deadline: Deadline = NO_DEADLINE) -> Answer:
        """Send a request once and return its answer, whatever the status.

        Args:
            request: What is asked.
            deadline: When the answer must be there, if that is before the ranker's `timeout`.

        Raises:
            RerankError: There is no answer, or no key to ask with.
            ConfigurationError: The ranker's api_key is only for async callers.
        """
        limit = self._limit(request, deadline)
        key = self._asked_key()
        answer = self._exchange(request, key, limit)
        for _ in range(_MOST_REDIRECTS):
            target = redirected(answer, request)
            if target is None:
                break
            request, answer = target, self._exchange(target, key, limit)
        return answer

    async def asend(self, request: RerankRequest, deadline: Deadline = NO_DEADLINE) -> Answer:
        """Send a request once; the async twin of `send`.

        It is sent in a task of its own, so that a cancelled call leaves no socket behind: httpx
        cleans up after a cancelled scope of anyio, but not wherever asyncio's `cancel` strikes
        (measured: 3 of 100 cancelled calls kept a socket). The scope also ends an answer whose
        headers trickle in.
        """
        limit = self._limit(request, deadline)
        seconds = limit.remaining()
        scope = anyio.CancelScope(
            deadline=math.inf if seconds is None else anyio.current_time() + seconds
        )

        async def in_time() -> Answer | None:
            with scope:
                return await self._asend(request, limit)
            return None

        task = asyncio.ensure_future(in_time())
        try:
            answer = await asyncio.shield(task)
        except asyncio.CancelledError:
            scope.cancel()
            await asyncio.gather(task, return_exceptions=True)
            raise
        if answer is None:
            late = TimeoutError("the answer was not complete in time")
            raise transport_error(late, request, limit)
        return answer

    async def _asend(self, request: RerankRequest, limit: Deadline) -> Answer:
        key = await self._aasked_key()
        answer = await self._aexchange(request, key, limit)
        for _ in range(_MOST_REDIRECTS):
            target = redirected(answer, request)
            if target is None:
                break
            request, answer = target, await self._aexchange(target, key, limit)
        return answer

    def forget_connections(self) -> Sequence[object]:
        """Give up the connections of the process that this one was forked from."""
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

    def _exchange(self, request: RerankRequest, key: str, limit: Deadline) -> Answer:
        own = self._ranker.http_client
        client = own or self._clients.lend()
        secrets = self._secrets(key, client)
        try:
            with client.stream(**self._arguments(request, key, limit)) as response:
                body = bytearray()
                for chunk in response.iter_bytes():
                    body += chunk
                    _check_body(body, request, limit)
                return _answer(response, body, secrets)
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, RuntimeError) as error:
            failed = transport_error(error, request, limit, secrets, own=own is None)
        finally:
            if own is None:
                _close(self._clients.take_back(client))
        raise failed

    async def _aexchange(self, request: RerankRequest, key: str, limit: Deadline) -> Answer:
        own = _of_this_loop(self._ranker.async_http_client)
        clients = await self._async_clients.get()
        client = own or clients.lend()
        secrets = self._secrets(key, client)
        try:
            async with client.stream(**self._arguments(request, key, limit)) as response:
                body = bytearray()
                async for chunk in response.aiter_bytes():
                    body += chunk
                    _check_body(body, request, limit)
                return _answer(response, body, secrets)
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, RuntimeError) as error:
            failed = transport_error(error, request, limit, secrets, own=own is None)
        finally:
            if own is None:
                await _aclose(clients.take_back(client))
        raise failed

    def _arguments(self, request: RerankRequest, key: str, limit: Deadline) -> dict[str, Any]:
        headers = self._ranker.plain_headers
        headers["accept"] = "application/json"
        if request.content:
            headers["content-type"] = "application/json"
        if key:
            headers["authorization"] = f"Bearer {key}"
        return {
            "method": "POST" if request.content else "GET",
            "url": request.url,
            "content": request.content or None,
            "headers": headers,
            "timeout": limit.remaining(),
            "follow_redirects": False,
        }

    def _secrets(self, key: str, client: httpx.Client | httpx.AsyncClient) -> list[str]:
        of_client = [
            secret
            for name, value in client.headers.items()
            if name not in _HEADERS_OF_HTTPX
            for secret in secrets_of(value)
        ]
        return [*self._ranker.secrets, *of_client, *([key] if key else [])]

    def _asked_key(self) -> str:
        ask = self._ranker.plain_key
        if isinstance(ask, str):
            return ask
        try:
            given = ask()
        except Exception as error:  # noqa: BLE001 - the user's own code
            failed = _no_key(error)
        else:
            if inspect.isawaitable(given):
                if inspect.iscoroutine(given):
                    given.close()
                raise ConfigurationError(
                    "the ranker's api_key is async, which a blocking call cannot wait for: use "
                    "the async methods, or an api_key that returns the key itself"
                )
            return _read_key(given)
        raise failed

    async def _aasked_key(self) -> str:
        ask = self._ranker.plain_key
        if isinstance(ask, str):
            return ask
        try:
            given = ask() if inspect.iscoroutinefunction(ask) else await in_thread(ask)
            if inspect.isawaitable(given):
                given = await given
        except Exception as error:  # noqa: BLE001 - the user's own code
            failed = _no_key(error)
        else:
            return _read_key(given)
        raise failed

    def _limit(self, request: RerankRequest, deadline: Deadline) -> Deadline:
        """Return the moment by which one try must be done."""
        limit = deadline.or_after(self._ranker.timeout, "the ranker's timeout")
        if limit.passes_within(0):
            raise RerankTimeoutError(
                f"{request.url} was not asked: {limit.argument} is used up; raise it"
            )
        return limit


def _no_key(error: Exception) -> RerankError:
    """Make the error for an api_key that failed; its cause is not shown: it may quote a secret."""
    return RerankError(
        f"the ranker's api_key could not be asked for a key: it raised {type(error).__name__}. "
        "Call it by itself to see why"
    )


def _read_key(given: object) -> str:
    """Read what an api_key that was asked has returned."""
    try:
        key = usable_secret(given).get_secret_value()
    except ValueError as error:
        raise RerankError(f"what the ranker's api_key returned {error}") from error
    if not key:
        raise RerankError("what the ranker's api_key returned is empty")
    return key


_loops: weakref.WeakKeyDictionary[
    httpx.AsyncClient, weakref.ReferenceType[asyncio.AbstractEventLoop]
] = weakref.WeakKeyDictionary()


def _of_this_loop(client: httpx.AsyncClient | None) -> httpx.AsyncClient | None:
    """Refuse a client that was passed in and used in another event loop."""
    if client is not None:
        loop = asyncio.get_running_loop()
        if _loops.setdefault(client, weakref.ref(loop))() is not loop:
            raise ConfigurationError(
                "the ranker's async_http_client was first used in another event loop, to which "
                "its connections belong: make a ranker with a client of its own for each loop, or "
                "leave async_http_client out"
            )
    return client


@cache
def _certificates() -> ssl.SSLContext:
    """Read the certificates to trust once: that takes longer than a request."""
    return httpx.create_ssl_context()


def _new_client() -> httpx.Client:
    return _made(httpx.Client)


def _new_async_client() -> httpx.AsyncClient:
    return _made(httpx.AsyncClient)


def _made(make: Callable[..., T]) -> T:
    try:
        return make(limits=_LIMITS, verify=_certificates())
    except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
        failed = environment_error(error)
    raise failed


def _close(clients: Sequence[httpx.Client]) -> None:
    for client in clients:
        with suppress(Exception):  # concerns no call
            client.close()


async def _aclose(clients: Sequence[httpx.AsyncClient]) -> None:
    for client in clients:
        # A cancelled call leaves no socket behind either.
        with anyio.CancelScope(shield=True), suppress(Exception):
            await client.aclose()


_closing: set[asyncio.Task[None]] = set()  # an event loop alone does not keep its tasks alive


def _aclose_soon(clients: Sequence[httpx.AsyncClient]) -> None:
    task = asyncio.get_running_loop().create_task(_aclose(clients))
    _closing.add(task)
    task.add_done_callback(_closing.discard)


def _close_resting(clients: IdleClients[httpx.Client]) -> None:
    _close(clients.close())


async def _aclose_resting(clients: IdleClients[httpx.AsyncClient]) -> None:
    await _aclose(clients.close())


def _check_body(body: bytearray, request: RerankRequest, limit: Deadline) -> None:
    """Stop reading an answer that comes too slowly (httpx limits each read only) or is too long."""
    if limit.passes_within(0):
        raise TimeoutError("the answer was not complete in time")
    if len(body) > request.largest_answer:
        raise RerankResponseError(
            f"{request.url} answered with more than {request.largest_answer:,} bytes for "
            f"{request.documents} documents: is it vLLM's base URL?"
        )


def _answer(response: httpx.Response, body: bytearray, secrets: Sequence[str]) -> Answer:
    # JSON is UTF-8, perhaps with a mark; what an answer says of its charset may be anything.
    text = body.decode("utf-8-sig", "replace")
    return Answer(response.status_code, response.headers, text, secrets)
