"""The one description of a vLLM ranker, shared by every way of using it."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import field, fields
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args
from urllib.parse import urlsplit, urlunsplit

import httpx
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    NonNegativeFloat,
    NonNegativeInt,
    PlainSerializer,
    PlainValidator,
    PositiveFloat,
    PositiveInt,
    Secret,
    SecretStr,
    WithJsonSchema,
    model_validator,
)
from pydantic.dataclasses import dataclass

from milvus_vllm_retrievers.errors import ConfigurationError, configuration_errors

if TYPE_CHECKING:
    from pymilvus import Function, FunctionType
    from typing_extensions import Self

Mode = Literal["auto", "server", "client"]
OnError = Literal["raise", "client", "skip"]
Provider = Literal["vllm", "cohere"]

# Milvus splits one query's candidates into batches of 32 by default and sends them one after
# another; vLLM itself has no limit, so one call is faster. A search has at most 16,384
# candidates a leg, so this is above any pool.
_ONE_BATCH = 1_000_000

RERANK_PATH = "/v1/rerank"
# The rerank routes users paste from vLLM's documentation, longest first.
_KNOWN_SUFFIXES = (RERANK_PATH, "/v2/rerank", "/rerank", "/v1", "/v2")

_WHERE_MILVUS_ASKS = frozenset({None, RERANK_PATH, "/rerank"})  # one handler in vLLM
_RESERVED_BODY_KEYS = frozenset({"query", "documents", "top_n"})
_RESERVED_HEADERS = frozenset({"content-type", "content-length", "transfer-encoding"})
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")  # what a header's name is made of
_MASK = "**********"  # as pydantic writes a secret
# A shorter value of a header is no secret, and would be taken from messages wherever it stands.
_SHORTEST_SECRET = 6


_COUNTS = dict.fromkeys(
    ("k", "top_k", "top_n", "similarity_top_k"),
    "how many come back is the retriever's k (similarity_top_k), or the reranker's top_n",
)


def _endpoint(value: str) -> str:
    parts = urlsplit(value.strip())
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError(
            "must be an http:// or https:// URL with a host, such as http://localhost:8000"
        )
    _ = parts.port  # raises for a port that cannot be one
    try:
        host = httpx.URL(value.strip()).host
        host.encode("idna")
    except (httpx.InvalidURL, UnicodeError) as error:
        raise ValueError(f"is not a URL that can be asked: {error}") from error
    if parts.username or parts.password:
        raise ValueError("must not hold credentials; pass api_key= (or credential=) instead")
    if parts.query or parts.fragment:
        raise ValueError("must not have a query or a fragment; give vLLM's base URL")
    return urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/"), "", ""))


def without_route(endpoint: str) -> str:
    """Drop one rerank route that a base URL was given with."""
    path = urlsplit(endpoint).path.rstrip("/")
    known = next((suffix for suffix in _KNOWN_SUFFIXES if path.endswith(suffix)), "")
    return endpoint.rstrip("/").removesuffix(known).rstrip("/")


def _without_prefix(value: str) -> str:
    endpoint = without_route(_endpoint(value))
    if urlsplit(endpoint).path:
        raise ValueError(
            "must not have a path: Milvus replaces it by /rerank, so a gateway prefix is lost. "
            "Give Milvus a URL without a prefix, or use mode='client'"
        )
    return endpoint


def _path(value: str) -> str:
    if not value.startswith("/") or set(value) & set("?#") or not value.isprintable():
        raise ValueError(f"must be a path that begins with '/', such as {RERANK_PATH!r}")
    return value


def usable_secret(value: object) -> SecretStr:
    """Return what an HTTP header is to hold, as a ranker keeps it.

    Raises:
        ValueError: No header can hold it, or it is a mask.
    """
    text = value.get_secret_value() if isinstance(value, SecretStr) else value
    if not isinstance(text, str):
        raise ValueError(f"must be text, not {type(value).__name__}")  # noqa: TRY004 - for pydantic
    text = text.strip()
    if not (text.isascii() and text.isprintable()):
        raise ValueError("must be plain ASCII without line breaks, as an HTTP header holds it")
    if text and not text.strip("*"):
        raise ValueError(
            "is the mask that takes the secret's place where a ranker is written: pass the secret "
            "itself to what is read back"
        )
    return SecretStr(text)


def secrets_of(value: str) -> list[str]:
    """Return what must not be shown of a header's value: it all, and what follows ``Bearer``."""
    return [part for part in (value, *value.split()[1:]) if len(part) >= _SHORTEST_SECRET]


def _usable_key(value: object) -> SecretStr | Secret[Any] | None:
    if isinstance(value, Secret) or callable(value):
        return value if isinstance(value, Secret) else Secret(value)
    key = usable_secret(value)
    return key if key.get_secret_value() else None


def _usable_headers(value: object) -> Mapping[str, SecretStr]:
    if not isinstance(value, Mapping):
        raise ValueError("must be a mapping of names to values")  # noqa: TRY004 - for pydantic
    for name in value:
        if not (isinstance(name, str) and _TOKEN.fullmatch(name)):
            raise ValueError("must have names that HTTP allows, such as 'X-Tenant'")
        if name.lower() in _RESERVED_HEADERS:
            raise ValueError(f"must not set {name}: the reranker does")
    return {name: usable_secret(each) for name, each in value.items()}


def _json_object(value: Mapping[str, Any]) -> Mapping[str, Any]:
    reserved = sorted(_RESERVED_BODY_KEYS & set(value))
    if reserved:
        raise ValueError(f"must not set {', '.join(reserved)}: the reranker does")
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"must be what JSON can hold: {error}") from error
    return value


def is_bool(value: object) -> bool:
    """Whether it is True or False, or numpy's kind of it."""
    return type(value).__name__.startswith("bool")


def _number(value: Any) -> Any:
    """Refuse bools, which Python takes for numbers, and take numpy's integers for Python's."""
    if is_bool(value):
        raise ValueError("must be a number, not True or False")
    return operator.index(value) if hasattr(value, "__index__") else value


IsNumber = BeforeValidator(_number)
Endpoint = Annotated[str, AfterValidator(_endpoint)]
ServerEndpoint = Annotated[str, AfterValidator(_without_prefix)]
Path = Annotated[str, AfterValidator(_path)]
# Secrets are written as their mask, so that what holds a ranker can be written as JSON.
ApiKey = Annotated[
    str | SecretStr | Secret[Any] | Callable[[], str | Awaitable[str]],
    PlainValidator(_usable_key),
    PlainSerializer(lambda _: _MASK, return_type=str),
    WithJsonSchema({"type": "string", "format": "password", "writeOnly": True}),
]
Headers = Annotated[
    Mapping[str, str] | Mapping[str, SecretStr],
    PlainValidator(_usable_headers),
    PlainSerializer(lambda headers: dict.fromkeys(headers, _MASK), return_type=dict[str, str]),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "string"}}),
]
HttpClient = Annotated[InstanceOf[httpx.Client] | None, Field(exclude=True), WithJsonSchema({})]
AsyncHttpClient = Annotated[
    InstanceOf[httpx.AsyncClient] | None, Field(exclude=True), WithJsonSchema({})
]
JsonObject = Annotated[Mapping[str, Any], AfterValidator(_json_object)]


@configuration_errors(meant=_COUNTS)
@dataclass(
    frozen=True,
    config=ConfigDict(extra="forbid", hide_input_in_errors=True, validate_default=True),
)
class VLLMRanker:
    """A rerank model served by vLLM, and how it is to be asked.

    One value serves every query: the query itself is bound when it is asked, by
    `to_function` or by the retrievers.

    Args:
        endpoint: vLLM's base URL as this process reaches it, such as
            ``http://localhost:8000``. One trailing ``/v1``, ``/v2``, ``/rerank``, ``/v1/rerank``
            or ``/v2/rerank`` is dropped; what is left of the path is kept as a gateway prefix. A
            prefix that itself ends so is written with its route, ``https://gw/v1/v1/rerank``, or
            with `rerank_path`.
        server_endpoint: vLLM's base URL as Milvus reaches it (default: `endpoint`). It must
            have no path, since Milvus replaces the path by ``/rerank``.
        model: The served model's name, sent on the client path and by Milvus Lite. Default:
            the server's only model. Milvus >= 2.6 never sends a model.
        api_key: Bearer token of the client path, or what returns one: it is asked for each try,
            in a thread for async callers unless it is async itself. It is sent to `endpoint`
            only, never to Milvus: name a key of milvus.yaml with `credential`. Milvus Lite has no
            such keys, so that with an `api_key` it cannot rerank itself.
        credential: The name of an api key in milvus.yaml; never the key itself.
        mode: ``"server"`` has Milvus rerank inside the search, ``"client"`` reranks from this
            process over HTTP, ``"auto"`` (default) is server where the server knows provider
            ``vllm`` (Milvus >= 2.6), else client.
        on_error: What happens when reranking fails: ``"raise"`` (default), ``"client"``
            (server-side reranking failed: rerank from here), ``"skip"`` (return the retrieval
            order, every item marked).
        instruction: Task instruction for models served with a score template. Client path
            only: Milvus cannot send it.
        truncate_prompt_tokens: Tokens kept of query plus document; -1 (default) is the model's
            own limit, None leaves it out, so that a longer document fails the request.
        max_client_batch_size: Documents per rerank request. Default: one request a query.
        max_concurrency: Requests in flight at once for one call: rerank requests of this
            process, or searches that Milvus reranks. Default 16: on two CPU cores, 64 queries of 50
            candidates took 14 s with 16 at once as with 4, and none was late.
        timeout: Seconds one rerank request may take, default 30, as in Milvus; None waits without
            limit. Sent to Milvus as ``timeout_ms``, which newer servers honour.
        max_retries: Further tries of a request that failed in a way a retry can mend
            (connection, 429, 502, 503, 504; 500 once). Default 2. Milvus has its own retries.
        cool_down: Seconds for which calls with a fallback (`on_error`) stop asking a rerank
            service that has failed three times in a row, default 30; then one asks again. 0 has
            every call ask. Without a fallback every call asks.
        extra_body: Further fields of vLLM's rerank request, such as ``use_activation``.
            Client path only.
        headers: Further headers of the client path's requests. Their values are kept as secret
            as a key.
        http_client: An httpx.Client to send blocking requests with, for a CA, a client
            certificate or a proxy of your own. It is never closed.
        async_http_client: An httpx.AsyncClient for async requests, in the event loop it belongs
            to; the same otherwise.
        rerank_path: Where the service reranks, if not at ``/v1/rerank``. The `endpoint` before it
            is then taken as it is written.

    Raises:
        ConfigurationError: An argument is unknown or out of range, or ``mode="server"`` is
            combined with something Milvus would drop in silence.

    Source: the vLLM Ranker page of the Milvus 2.6 manual and Milvus's server code.
    """

    endpoint: Endpoint
    server_endpoint: ServerEndpoint | None = Field(default=None, kw_only=True)
    model: str | None = Field(default=None, kw_only=True, min_length=1)
    api_key: ApiKey | None = Field(default=None, kw_only=True)
    credential: str | None = Field(default=None, kw_only=True, min_length=1)
    mode: Mode = Field(default="auto", kw_only=True)
    on_error: OnError = Field(default="raise", kw_only=True)
    instruction: str | None = Field(default=None, kw_only=True, min_length=1)
    truncate_prompt_tokens: Annotated[int, IsNumber] | None = Field(default=-1, kw_only=True, ge=-1)
    max_client_batch_size: Annotated[PositiveInt, IsNumber] | None = Field(
        default=None, kw_only=True
    )
    max_concurrency: Annotated[PositiveInt, IsNumber] = Field(default=16, kw_only=True)
    timeout: Annotated[PositiveFloat, IsNumber] | None = Field(
        default=30.0, kw_only=True, allow_inf_nan=False
    )
    max_retries: Annotated[NonNegativeInt, IsNumber] = Field(default=2, kw_only=True)
    cool_down: Annotated[NonNegativeFloat, IsNumber] = Field(
        default=30.0, kw_only=True, allow_inf_nan=False
    )
    # A dict has no hash; two rankers that differ only here may share one.
    extra_body: JsonObject | None = field(default=None, kw_only=True, hash=False)
    headers: Headers | None = field(default=None, kw_only=True, hash=False)
    http_client: HttpClient = field(default=None, kw_only=True, repr=False)
    async_http_client: AsyncHttpClient = field(default=None, kw_only=True, repr=False)
    rerank_path: Path | None = Field(default=None, kw_only=True)

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        self._find_base_url()
        if self.api_key is not None and any(
            h.lower() == "authorization" for h in self.headers or ()
        ):
            raise ValueError("give the key either as api_key or as a header 'authorization'")
        if self.mode == "server" and self.client_only_reasons:
            raise ValueError(
                "mode='server' cannot be used: "
                + "; ".join(self.client_only_reasons)
                + ". Use mode='client' (or 'auto')"
            )
        return self

    def _find_base_url(self) -> None:
        """Drop a rerank route from the endpoint, once.

        Where what is left looks like one again, `rerank_path` says that it is none: copies and
        what is read back then keep the endpoint.
        """
        if self.rerank_path is None:
            endpoint = without_route(self.endpoint)
            object.__setattr__(self, "endpoint", endpoint)
            if without_route(endpoint) != endpoint:
                object.__setattr__(self, "rerank_path", RERANK_PATH)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        private = {
            "an api_key": self.api_key,
            "headers": self.headers,
            "an http_client": self.http_client or self.async_http_client,
        }
        if held := [name for name, value in private.items() if value]:
            raise TypeError(
                f"a VLLMRanker with {' and '.join(held)} is not pickled, since the key would be in "
                "the pickle: make it anew where it is needed"
            )
        arguments = {each.name: getattr(self, each.name) for each in fields(self)}
        return partial(type(self), **arguments), ()

    # Not cached: what is cached would show among the variables.
    @property
    def plain_key(self) -> str | Callable[[], object]:
        """The key, or what is to be asked for one; empty without."""
        key = self.api_key
        return key.get_secret_value() if isinstance(key, (SecretStr, Secret)) else ""

    @property
    def plain_headers(self) -> dict[str, str]:
        """The further headers as they are sent."""
        given = self.headers or {}
        return {name: usable_secret(value).get_secret_value() for name, value in given.items()}

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must not stand in a message, as far as it is known before a request."""
        key = self.plain_key if isinstance(self.plain_key, str) else ""
        values = [secret for value in self.plain_headers.values() for secret in secrets_of(value)]
        return tuple(filter(None, [key, *values]))

    @cached_property
    def client_only_reasons(self) -> tuple[str, ...]:
        """Why Milvus cannot do what this ranker asks, and the way out; empty if it can."""
        reasons = []
        if self.instruction is not None:
            reasons.append("Milvus does not send an instruction (leave it out)")
        if self.extra_body:
            reasons.append("Milvus does not send extra_body (leave it out)")
        if self.server_endpoint is None and urlsplit(self.endpoint).path:
            reasons.append(
                "Milvus drops the path of the endpoint (give it a server_endpoint without one)"
            )
        elif self.server_endpoint is None and self.rerank_path not in _WHERE_MILVUS_ASKS:
            reasons.append(
                "Milvus asks /rerank in place of rerank_path (give it a server_endpoint that "
                "serves /rerank)"
            )
        if self.credential is None:
            reasons += [
                f"Milvus does not {does}: name a key of milvus.yaml with credential='...'"
                for does, value in {
                    "send the api_key": self.api_key,
                    "send headers": self.headers,
                    "use an http_client": self.http_client or self.async_http_client,
                }.items()
                if value
            ]
        return tuple(reasons)

    def to_function(
        self,
        queries: str | Sequence[str],
        input_field: str,
        *,
        provider: Provider = "vllm",
        name: str = "vllm_rerank",
    ) -> Function:
        """Build the pymilvus Function that reranks one request's candidates.

        Hand it to ``client.search(..., ranker=...)`` or ``client.hybrid_search(..., ranker=...)``
        of plain pymilvus. It is bound to `queries`: build a new one for every request.

        Args:
            queries: The request's query texts, one for each entry of its ``data``.
            input_field: The VARCHAR field whose text is scored.
            provider: ``"vllm"`` (default) for Milvus >= 2.6, ``"cohere"`` for Milvus Lite,
                which reaches vLLM through vLLM's Cohere-compatible ``/v2/rerank``. Milvus Lite
                sends no truncation: a document longer than the model takes fails the search.
            name: The Function's name, for the server's log.

        Returns:
            A Function of type RERANK.

        Raises:
            ConfigurationError: No query, an empty one, or a ranker Milvus cannot serve.
        """
        if provider not in get_args(Provider):
            raise ConfigurationError(f"provider must be 'vllm' or 'cohere', not {provider!r}")
        texts = [queries] if isinstance(queries, str) else queries
        if (
            not isinstance(texts, Sequence)
            or not texts
            or not all(isinstance(text, str) and text.strip() for text in texts)
        ):
            raise ConfigurationError("queries must be one or more non-empty texts, in a list")
        params = self._cohere_params if provider == "cohere" else self._vllm_params
        if self.client_only_reasons:
            raise ConfigurationError(
                "Milvus cannot rerank as this ranker asks: " + "; ".join(self.client_only_reasons)
            )
        make, rerank = _function_class()
        return make(
            name=name,
            function_type=rerank,
            input_field_names=[input_field],
            params={"reranker": "model", "provider": provider, "queries": list(texts), **params},
        )

    @property
    def _milvus_endpoint(self) -> str:
        return self.server_endpoint or self.endpoint

    @cached_property
    def _vllm_params(self) -> Mapping[str, Any]:
        params: dict[str, Any] = {
            "endpoint": self._milvus_endpoint,
            "max_client_batch_size": self.max_client_batch_size or _ONE_BATCH,
        }
        if self.truncate_prompt_tokens is not None:
            params["truncate_prompt_tokens"] = self.truncate_prompt_tokens
        if self.credential is not None:
            params["credential"] = self.credential
        if self.timeout is not None:
            params["timeout_ms"] = round(self.timeout * 1000)
        return params

    @property
    def _cohere_params(self) -> Mapping[str, Any]:
        if self.truncate_prompt_tokens not in {-1, None}:
            raise ConfigurationError(
                "Milvus Lite cannot truncate: drop truncate_prompt_tokens or use mode='client'"
            )
        if self.credential is not None or self.api_key is not None:
            raise ConfigurationError(
                "Milvus Lite has no credentials, and a Function would carry the api_key in clear: "
                "use mode='client', or a vLLM without a key"
            )
        return {
            "base_url": f"{self._milvus_endpoint}/v2",
            # Milvus Lite insists on both; vLLM takes an empty name for its only model.
            "model_name": self.model or "",
            "api_key": "unused",
        }


@cache
def _function_class() -> tuple[type[Function], FunctionType]:
    from pymilvus import Function, FunctionType  # noqa: PLC0415 - seconds of import time

    return Function, FunctionType.RERANK


def ranker_from(
    ranker: VLLMRanker | None, endpoint: str | None = None, model: str | None = None
) -> VLLMRanker:
    """Return the ranker that was given, or the one that `endpoint` and `model` describe.

    Raises:
        ConfigurationError: Neither was given, or both.
    """
    if ranker is not None and endpoint is None and model is None:
        return ranker
    if ranker is None and endpoint is not None:
        return VLLMRanker(endpoint, model=model)
    raise ConfigurationError(
        "pass either ranker=VLLMRanker(...), or endpoint= (and model=) of a vLLM server"
    )


def server_ranker(ranker: VLLMRanker) -> VLLMRanker:
    """Return the ranker if Milvus can do what it asks.

    Raises:
        ConfigurationError: It is for the client, or asks what Milvus cannot do.
    """
    reasons = list(ranker.client_only_reasons)
    if ranker.mode == "client":
        reasons.append("mode='client' reranks from this process")
    if reasons:
        raise ConfigurationError(
            f"MilvusVLLMRerank has Milvus rerank, but {'; '.join(reasons)}. Use VLLMRerank"
        )
    return ranker
