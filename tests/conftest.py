"""Servers and collections that tests share."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from pymilvus import MilvusClient

from milvus_vllm_retrievers._core import cool_down
from tests.fakes import Clock, FakeVLLM, running_fake_vllm
from tests.milvus26 import running_milvus26

pytest_plugins = ["tests.trust.leaks"]

Ask = Callable[..., Awaitable[list[Document]]]


@pytest.fixture(scope="session")
def vllm() -> str:
    """The base URL of the real vLLM: all-MiniLM-L6-v2, embeddings and rerank."""
    return _endpoint("VLLM_ENDPOINT")


@pytest.fixture(scope="session")
def cross_encoder() -> str:
    """The base URL of the real vLLM that serves a tiny cross-encoder."""
    # Who brings a vLLM of their own brings one: it then stands for both.
    return os.environ.get("VLLM_CROSS_ENCODER_ENDPOINT") or _endpoint("VLLM_ENDPOINT")


def _endpoint(variable: str) -> str:
    endpoint = os.environ.get(variable)
    if not endpoint:
        pytest.fail(f"{variable} is not set: run `make test`, which starts vLLM (or test-fast)")
    return endpoint


@pytest.fixture(scope="session")
def _fake_vllm() -> Iterator[FakeVLLM]:
    with running_fake_vllm() as fake:
        yield fake


@pytest.fixture
def fake_vllm(_fake_vllm: FakeVLLM) -> FakeVLLM:
    """A fake vLLM whose scores and faults the test chooses."""
    _fake_vllm.reset()
    return _fake_vllm


@pytest.fixture(scope="session")
def lite_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Milvus Lite file."""
    return str(tmp_path_factory.mktemp("lite") / "test.db")


@pytest.fixture(scope="session")
def lite(lite_uri: str) -> Iterator[MilvusClient]:
    """A client of Milvus Lite.

    It lives long and must not ping: Milvus Lite's server ends the connection of a client that
    pings as often as pymilvus does, and clients of one address share their connection.
    """
    client = MilvusClient(lite_uri, grpc_options={"grpc.keepalive_time_ms": 3_600_000})
    yield client
    client.close()


@pytest.fixture(scope="session")
def milvus26_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The stand-in for a Milvus 2.6 server."""
    folder = Path(tmp_path_factory.mktemp("milvus26"))
    with running_milvus26(folder, credentials={"vllm-prod": "a-key-of-milvus"}) as uri:
        yield uri


@pytest.fixture(scope="session")
def milvus26(milvus26_uri: str) -> Iterator[MilvusClient]:
    """A client of the stand-in for Milvus 2.6."""
    client = MilvusClient(milvus26_uri)
    yield client
    client.close()


@pytest.fixture(scope="session")
def milvus30_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The stand-in for a Milvus 3.0 server, which reranks null texts too."""
    with running_milvus26(Path(tmp_path_factory.mktemp("milvus30")), version="3.0.1") as uri:
        yield uri


@pytest.fixture(scope="session")
def milvus30(milvus30_uri: str) -> Iterator[MilvusClient]:
    """A client of the stand-in for Milvus 3.0."""
    client = MilvusClient(milvus30_uri)
    yield client
    client.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the cool-down, which the test sets."""
    clock = Clock()
    monkeypatch.setattr(cool_down, "time", clock)
    return clock


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest) -> Ask:
    """Invoke a LangChain retriever, blocking in one run of the test and async in the other."""

    async def run(retriever: Any, query: str, **per_call: Any) -> list[Document]:
        try:
            if request.param == "sync":
                return retriever.invoke(query, **per_call)
            return await retriever.ainvoke(query, **per_call)
        finally:
            await retriever.aclose()

    return run
