"""The one description of a vLLM ranker, shared by every way of using it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import field, fields
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import SplitResult, urlsplit, urlunsplit

import httpx
from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PlainSerializer,
    PositiveFloat,
    PositiveInt,
    SecretStr,
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

# The rerank routes users paste from vLLM's documentation, longest first.
_KNOWN_SUFFIXES = ("/v1/rerank", "/v2/rerank", "/rerank", "/v1", "/v2")

_RESERVED_BODY_KEYS = frozenset({"query", "documents", "top_n"})


def _split_endpoint(value: str) -> SplitResult:
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
    return parts


def _normalise_endpoint(value: str) -> str:
    parts = _split_endpoint(value)
    path = parts.path.rstrip("/")
    while suffix := next((s for s in _KNOWN_SUFFIXES if path.endswith(s)), None):
        path = path.removesuffix(suffix).rstrip("/")
    return urlunsplit((parts.scheme, parts.netloc, path, "", ""))


def _usable_key(value: SecretStr) -> SecretStr | None:
    key = value.get_secret_value().strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError("must be plain ASCII without line breaks, as an HTTP header holds it")
    return SecretStr(key) if key else None


def _json_object(value: Mapping[str, Any]) -> Mapping[str, Any]:
    reserved = sorted(_RESERVED_BODY_KEYS & set(value))
    if reserved:
        raise ValueError(f"must not set {', '.join(reserved)}: the reranker does")
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"must be what JSON can hold: {error}") from error
    return value


def _without_prefix(value: str) -> str:
    endpoint = _normalise_endpoint(value)
    if urlsplit(endpoint).path:
        raise ValueError(
            "must not have a path: Milvus replaces it by /rerank, so a gateway prefix is lost. "
            "Give Milvus a URL without a prefix, or use mode='client'"
        )
    return endpoint


Endpoint = Annotated[str, AfterValidator(_normalise_endpoint)]
ServerEndpoint = Annotated[str, AfterValidator(_without_prefix)]
# Written as its mask, so that what holds a ranker can be written as JSON.
ApiKey = Annotated[SecretStr, AfterValidator(_usable_key), PlainSerializer(str)]
JsonObject = Annotated[Mapping[str, Any], AfterValidator(_json_object)]


@configuration_errors()
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
            ``http://localhost:8000``. A trailing ``/``, ``/v1``, ``/rerank``, ``/v1/rerank``
            or ``/v2/rerank`` is dropped; any other path is kept as a gateway prefix.
        server_endpoint: vLLM's base URL as Milvus reaches it (default: `endpoint`). It must
            have no path, since Milvus replaces the path by ``/rerank``.
        model: The served model's name, sent on the client path and by Milvus Lite. Default:
            the server's only model. Milvus >= 2.6 never sends a model.
        api_key: Bearer token of the client path. It is sent to `endpoint` only, never to Milvus:
            name a key of milvus.yaml with `credential`. Milvus Lite has no such keys, so that
            with an `api_key` it cannot rerank itself.
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
            process, or searches that Milvus reranks. Default 4.
        timeout: Seconds one rerank request may take, default 10; None waits without limit.
            Sent to Milvus as ``timeout_ms``, which newer servers honour.
        max_retries: Further tries of a request that failed in a way a retry can mend
            (connection, 429, 502, 503, 504; 500 once). Default 2. Milvus has its own retries.
        cool_down: Seconds for which calls with a fallback (`on_error`) stop asking a rerank
            service that has failed three times in a row, default 30; then one asks again. 0 has
            every call ask. Without a fallback every call asks.
        extra_body: Further fields of vLLM's rerank request, such as ``use_activation``.
            Client path only.

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
    truncate_prompt_tokens: int | None = Field(default=-1, kw_only=True, ge=-1)
    max_client_batch_size: PositiveInt | None = Field(default=None, kw_only=True)
    max_concurrency: PositiveInt = Field(default=4, kw_only=True)
    timeout: PositiveFloat | None = Field(default=10.0, kw_only=True, allow_inf_nan=False)
    max_retries: NonNegativeInt = Field(default=2, kw_only=True)
    cool_down: NonNegativeFloat = Field(default=30.0, kw_only=True, allow_inf_nan=False)
    # A dict has no hash; two rankers that differ only here may share one.
    extra_body: JsonObject | None = field(default=None, kw_only=True, hash=False)

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if self.mode == "server" and self.client_only_reasons:
            raise ValueError(
                "mode='server' cannot be used: "
                + "; ".join(self.client_only_reasons)
                + ". Use mode='client' (or 'auto')"
            )
        return self

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self.api_key is not None:
            raise TypeError(
                "a VLLMRanker with an api_key is not pickled, since the key would be in the "
                "pickle: make it anew where it is needed"
            )
        arguments = {each.name: getattr(self, each.name) for each in fields(self)}
        return partial(type(self), **arguments), ()

    @cached_property
    def client_only_reasons(self) -> tuple[str, ...]:
        """Why Milvus cannot do what this ranker asks; empty if it can."""
        reasons = []
        if self.instruction is not None:
            reasons.append("Milvus does not send an instruction")
        if self.extra_body:
            reasons.append("Milvus does not send extra_body")
        if self.server_endpoint is None and urlsplit(self.endpoint).path:
            reasons.append(
                "Milvus drops the path of the endpoint (give it a server_endpoint without one)"
            )
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
        texts = [queries] if isinstance(queries, str) else list(queries)
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ConfigurationError("queries must be one or more non-empty texts")
        if self.client_only_reasons:
            raise ConfigurationError(
                "Milvus cannot rerank as this ranker asks: " + "; ".join(self.client_only_reasons)
            )
        params = self._cohere_params if provider == "cohere" else self._vllm_params
        make, rerank = _function_class()
        return make(
            name=name,
            function_type=rerank,
            input_field_names=[input_field],
            params={"reranker": "model", "provider": provider, "queries": texts, **params},
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
