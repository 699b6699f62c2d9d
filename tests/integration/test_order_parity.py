"""For the same candidates every way of reranking gives the same list, ties included."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pymilvus import DataType, MilvusClient

from milvus_vllm_retrievers.langchain import MilvusVLLMRetriever, VLLMRanker
from tests.corpus import create_collection
from tests.fakes import FakeVLLM, LetterEmbeddings, running_fake_vllm

ROWS = 20
K = 6
Retrievers = dict[str, MilvusVLLMRetriever]

# Few distinct values make ties; float64 values that differ only below float32 make more.
SCORES = st.lists(
    st.one_of(
        st.sampled_from([-1.5, 0.0, 0.25, 0.25 + 1e-12, 7.0]),
        st.floats(-100, 100, allow_nan=False),
    ),
    min_size=ROWS,
    max_size=ROWS,
)


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeVLLM]:
    with running_fake_vllm() as running:
        yield running


@pytest.fixture(scope="module", params=[DataType.INT64, DataType.VARCHAR])
def retrievers(
    request: pytest.FixtureRequest,
    milvus26: MilvusClient,
    milvus26_uri: str,
    lite: MilvusClient,
    lite_uri: str,
    fake: FakeVLLM,
) -> Iterator[Retrievers]:
    """The same rows behind each way of reranking; a row's text is its number."""
    for client in (milvus26, lite):
        create_collection(
            client, "parity", texts=[str(i) for i in range(ROWS)], bm25=False, keys=request.param
        )
    made = {
        name: MilvusVLLMRetriever(
            collection_name="parity",
            uri=uri,
            embedding=LetterEmbeddings(),
            ranker=VLLMRanker(fake.url, mode=mode),
            k=K,
            fetch_k=ROWS,
        )
        for name, uri, mode in [
            ("stand-in, server", milvus26_uri, "server"),
            ("stand-in, client", milvus26_uri, "client"),
            ("lite, server", lite_uri, "server"),
            ("lite, client", lite_uri, "client"),
        ]
    }
    yield made
    for retriever in made.values():
        retriever.close()


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(scores=SCORES)
def test_server_and_client_mode_return_the_same_list_for_random_scores_with_ties(
    scores: list[float], retrievers: Retrievers, fake: FakeVLLM
) -> None:
    fake.score = lambda query, document: scores[int(document)]

    lists = {
        name: [(d.metadata["pk"], d.metadata["relevance_score"]) for d in r.invoke("any")]
        for name, r in retrievers.items()
    }

    keys = [key for key, _ in _every_row(retrievers)]
    expected = sorted(
        ((key, _float32(score)) for key, score in zip(keys, scores, strict=True)),
        key=lambda row: (-row[1], row[0]),
    )[:K]
    assert lists["stand-in, server"] == expected
    assert lists["stand-in, client"] == expected
    assert lists["lite, client"] == expected
    # Milvus Lite decides by itself which of several equal scores survive the cut at k.
    assert [s for _, s in lists["lite, server"]] == [s for _, s in expected]
    cut = expected[-1][1]
    assert [r for r in lists["lite, server"] if r[1] > cut] == [r for r in expected if r[1] > cut]


def _float32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def _every_row(retrievers: Retrievers) -> list[tuple[int | str, None]]:
    is_text = isinstance(retrievers["lite, client"].invoke("x", k=1)[0].metadata["pk"], str)
    return [(f"id-{i}" if is_text else i, None) for i in range(ROWS)]
