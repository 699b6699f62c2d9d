"""What the tests of faults share: two fakes of vLLM, one that fails and one that is well."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pymilvus import MilvusClient

from milvus_vllm_retrievers._core import services
from tests.corpus import create_collection
from tests.fakes import FakeVLLM, running_fake_vllm
from tests.faults.callers import FRONT_ENDS, HOWS, TEXTS, FrontEnd, How
from tests.faults.table import RELEVANCE

COLLECTION = "fault_docs"


def relevance(query: str, document: str) -> float:
    """Score as the table has it."""
    return RELEVANCE[TEXTS.index(document)]


@pytest.fixture(scope="session")
def steady_vllm() -> Iterator[FakeVLLM]:
    """A vLLM that is well: what a fallback finds."""
    with running_fake_vllm() as fake:
        fake.score = relevance
        yield fake


@pytest.fixture
def well_vllm(steady_vllm: FakeVLLM) -> FakeVLLM:
    """A vLLM that is well, and has received nothing yet."""
    steady_vllm.received.clear()
    return steady_vllm


@pytest.fixture
def ill_vllm(fake_vllm: FakeVLLM) -> FakeVLLM:
    """A vLLM that scores alike until a test has it fail."""
    fake_vllm.score = relevance
    return fake_vllm


@pytest.fixture(scope="module", autouse=True)
def _no_certificates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep HTTP clients from reading all root certificates: no test here speaks TLS.

    Every call of the table has a client of its own, and the reading takes longer than the rest.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_DIR", str(tmp_path_factory.mktemp("no_certificates")))
        patch.delenv("SSL_CERT_FILE", raising=False)
        yield


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep no pause between tries but what a server asks for."""
    monkeypatch.setattr(services, "_backoff", lambda attempt: 0.0)


@pytest.fixture(scope="session")
def collection(milvus26: MilvusClient) -> str:
    """The collection of the texts in the stand-in for Milvus 2.6."""
    create_collection(milvus26, COLLECTION, texts=TEXTS)
    return COLLECTION


@pytest.fixture(params=FRONT_ENDS, ids=str)
def front_end(request: pytest.FixtureRequest) -> FrontEnd:
    """LangChain in one run of the test, LlamaIndex in the other."""
    return request.param


@pytest.fixture(params=HOWS)
def how(request: pytest.FixtureRequest) -> How:
    """Blocking in one run of the test, async in the other."""
    return request.param
