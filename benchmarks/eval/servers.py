"""Where Milvus and vLLM are: those that the environment names, or those started here."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import httpx
from pymilvus import MilvusClient
from tests.milvus26 import running_milvus26

from benchmarks.eval.memory import remembering
from milvus_vllm_retrievers.ranker import VLLMRanker

# Rerank requests at once: enough to keep a vLLM busy.
_IN_FLIGHT = 16
# Seconds for one of them: hundreds of candidates, and others' before, take a model on a CPU long.
_RERANK_TIMEOUT = 300.0


class MissingServerError(Exception):
    """No vLLM to ask; the message says what to do."""


@dataclass(frozen=True)
class Servers:
    """Where Milvus and vLLM are.

    Attributes:
        milvus: Milvus's URI.
        token: Its token.
        milvus_is_ours: Whether it is the stand-in that was started here.
        vllm: The rerank model's vLLM.
        reranking: What rankers are given as endpoint: that vLLM, or the memory in front of it.
        vllm_for_milvus: The endpoint as Milvus reaches it, if it is another.
        model: The rerank model's name; None is vLLM's only one.
        embedding: The embedding model's vLLM.
        embedding_model: Its name.
    """

    milvus: str
    token: str
    milvus_is_ours: bool
    vllm: str
    reranking: str
    vllm_for_milvus: str | None
    model: str | None
    embedding: str
    embedding_model: str

    @property
    def remembers(self) -> bool:
        """Whether every pair is scored once, so that all ways of asking get the same scores."""
        return self.reranking != self.vllm

    def ranker(self, mode: Literal["server", "client"], *, direct: bool = False) -> VLLMRanker:
        """Make a ranker.

        Args:
            mode: Who asks vLLM.
            direct: Whether to ask vLLM itself in any case, not the memory.
        """
        return VLLMRanker(
            self.vllm if direct else self.reranking,
            server_endpoint=self.vllm_for_milvus,
            model=self.model,
            mode=mode,
            max_concurrency=_IN_FLIGHT,
            timeout=_RERANK_TIMEOUT,
        )


@contextmanager
def serving() -> Iterator[Servers]:
    """Yield the servers that the environment names, and start those that it does not.

    `VLLM_ENDPOINT` must be there, with `VLLM_MODEL` if it serves several. Another vLLM may embed:
    `VLLM_EMBEDDING_ENDPOINT`, `VLLM_EMBEDDING_MODEL`. Without `MILVUS_URI` (`MILVUS_TOKEN`), a
    stand-in for Milvus 2.6 is started, and a memory in front of vLLM; a Milvus of the user's
    may be on another machine, which could not reach that.

    Raises:
        MissingServerError: `VLLM_ENDPOINT` is not set.
    """
    vllm = os.environ.get("VLLM_ENDPOINT")
    if not vllm:
        raise MissingServerError(
            "Set VLLM_ENDPOINT to a vLLM server, such as http://localhost:8000, or run "
            "`make eval`, which starts one."
        )
    if uri := os.environ.get("MILVUS_URI"):
        yield _servers(vllm, uri, milvus_is_ours=False, reranking=vllm)
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        running_milvus26(folder) as uri,
        remembering(vllm) as memory,
    ):
        yield _servers(vllm, uri, milvus_is_ours=True, reranking=memory)


def _servers(vllm: str, uri: str, *, milvus_is_ours: bool, reranking: str) -> Servers:
    environment = os.environ.get
    model = environment("VLLM_MODEL")
    return Servers(
        milvus=uri,
        token=environment("MILVUS_TOKEN", ""),
        milvus_is_ours=milvus_is_ours,
        vllm=vllm,
        reranking=reranking,
        vllm_for_milvus=None if milvus_is_ours else environment("VLLM_SERVER_ENDPOINT"),
        model=model,
        embedding=environment("VLLM_EMBEDDING_ENDPOINT", vllm),
        embedding_model=environment("VLLM_EMBEDDING_MODEL", model or "all-MiniLM-L6-v2"),
    )


def describe_servers(servers: Servers) -> dict[str, Any]:
    """Return what the figures depend on: versions and models. Fails early if one is not there.

    Raises:
        MissingServerError: vLLM cannot be reached, or serves no model.
    """
    try:
        models = httpx.get(f"{servers.vllm}/v1/models", timeout=30).raise_for_status().json()
        # What stands between, such as a gateway, may not pass this on.
        version = httpx.get(f"{servers.vllm}/version", timeout=30)
    except httpx.HTTPError as error:
        raise MissingServerError(f"vLLM at {servers.vllm} does not answer: {error}") from error
    return {
        "milvus": _milvus_version(servers),
        "vllm": version.json().get("version") if version.is_success else None,
        "rerank_model": servers.model or models["data"][0]["id"],
        "embedding_model": servers.embedding_model,
        "every_pair_scored_once": servers.remembers,
    }


def _milvus_version(servers: Servers) -> str:
    client = MilvusClient(uri=servers.milvus, token=servers.token)
    try:
        stand_in = " (the stand-in of tests/milvus26)" if servers.milvus_is_ours else ""
        return f"{client.get_server_version()}{stand_in}"
    finally:
        client.close()
