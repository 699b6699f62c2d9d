"""Who reranks a query, through which provider, and why: decided here, once.

| mode       | condition                                                    | who reranks         |
| ---------- | ------------------------------------------------------------ | ------------------- |
| ``client`` |                                                              | this process        |
| ``server`` | Milvus is older than 2.6                                     | refused             |
| ``server`` | Milvus would drop or refuse something that the ranker asks   | refused             |
| ``server`` | else                                                         | Milvus              |
| ``auto``   | Milvus does not say its version, or is older than 2.6        | this process        |
| ``auto``   | Milvus Lite (it knows no provider ``vllm``)                  | this process        |
| ``auto``   | Milvus would drop or refuse something that the ranker asks   | this process        |
| ``auto``   | else                                                         | Milvus              |

What Milvus would drop or refuse: what `VLLMRanker.client_only_reasons` names; a text field that
may be null, before Milvus 3.0; a `model` that is not the only one which the endpoint serves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from milvus_vllm_retrievers._core.hits import RerankedBy
from milvus_vllm_retrievers._core.server import Server
from milvus_vllm_retrievers.errors import ConfigurationError
from milvus_vllm_retrievers.ranker import Provider, VLLMRanker

_FROM_HERE = "Rerank from this process: mode='auto' or 'client', or VLLMRerank"


@dataclass(frozen=True, slots=True)
class Route:
    """Who reranks.

    Attributes:
        reranked_by: ``"milvus"``, ``"client"`` or, without a ranker, None.
        why: The reason, in words.
        provider: Milvus's rerank provider, where Milvus reranks.
    """

    reranked_by: RerankedBy | None
    why: str
    provider: Provider | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """What a route depends on beside the ranker.

    Attributes:
        server: What the Milvus server can do.
        text_field: The field that is reranked.
        text_may_be_null: Whether its values may be null.
        served: The models that the ranker's endpoint serves; None if that is not known.
    """

    server: Server
    text_field: str
    text_may_be_null: bool = False
    served: Sequence[str] | None = None


def route(ranker: VLLMRanker | None, facts: Facts) -> Route:
    """Decide who reranks a query.

    Raises:
        ConfigurationError: ``mode="server"``, and Milvus cannot do what the ranker asks.
    """
    if ranker is None:
        return Route(None, "no ranker was given")
    if ranker.mode == "client":
        return Route("client", "mode='client'")
    if ranker.mode == "server":
        return Route("milvus", "mode='server'", provider_of(ranker, facts, "mode='server'"))
    if obstacle := _obstacle(ranker, facts):
        return Route("client", obstacle)
    return Route("milvus", f"Milvus {facts.server.version} knows the provider 'vllm'", "vllm")


def provider_of(ranker: VLLMRanker, facts: Facts, what: str) -> Provider:
    """Return the provider through which Milvus reranks, where it has to.

    Args:
        ranker: What is asked.
        facts: Of whom.
        what: What has Milvus rerank, for the message.

    Raises:
        ConfigurationError: It has none, or cannot do what the ranker asks.
    """
    server = facts.server
    if server.provider is None:
        raise ConfigurationError(
            f"{what} needs Milvus 2.6 or later; this server is {server.version!r} and would "
            f"ignore the ranker in silence. {_FROM_HERE}"
        )
    if reasons := _against(ranker, facts):
        raise ConfigurationError(f"{what} cannot be used: {'; '.join(reasons)}. {_FROM_HERE}")
    return server.provider


def asks_for_models(ranker: VLLMRanker, server: Server) -> bool:
    """Tell whether the route depends on which models the endpoint serves."""
    return (
        ranker.model is not None
        and ranker.mode != "client"
        and (server.known or ranker.mode == "server")
        and server.provider == "vllm"
        and not ranker.client_only_reasons
    )


def _obstacle(ranker: VLLMRanker, facts: Facts) -> str:
    """Say why Milvus is not left to rerank by itself; empty if it is."""
    server = facts.server
    if not server.known:
        return f"the version {server.version!r} does not tell what Milvus can do"
    if server.is_lite:
        return "Milvus Lite does not know the provider 'vllm'"
    if server.provider is None:
        return f"Milvus {server.version} is older than 2.6 and cannot rerank"
    return "; ".join(_against(ranker, facts))


def _against(ranker: VLLMRanker, facts: Facts) -> list[str]:
    """Say what Milvus would drop or refuse, and the way out."""
    reasons = list(ranker.client_only_reasons)
    if facts.text_may_be_null and not facts.server.reranks_nullable:
        reasons.append(
            f"Milvus {facts.server.version} refuses to rerank by {facts.text_field!r}, whose "
            "values may be null (Milvus 3.0 takes it)"
        )
    served = facts.served
    if served is not None and list(served) != [ranker.model]:
        reasons.append(
            f"Milvus sends no model name, and {ranker.endpoint} serves "
            f"{', '.join(map(repr, served)) or 'none'}, not {ranker.model!r} alone"
        )
    return reasons
