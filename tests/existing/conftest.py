"""What the tests of both packages share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from milvus_vllm_retrievers import VLLMRanker
from tests.fakes import FakeVLLM

Retrieve = Callable[[Any, str], Awaitable[list[Any]]]

# What the front ends add to an item's metadata.
SCORES = {"relevance_score", "retrieval_score", "reranked_by"}


@pytest.fixture
def ranker(fake_vllm: FakeVLLM) -> VLLMRanker:
    """Scores a text by its length."""
    return VLLMRanker(fake_vllm.url)


@pytest.fixture(params=["sync", "async"])
def retrieve(request: pytest.FixtureRequest) -> Retrieve:
    """Ask a LlamaIndex retriever, blocking in one run of the test and async in the other."""

    async def run(retriever: Any, query: str) -> list[Any]:
        try:
            if request.param == "sync":
                return retriever.retrieve(query)
            return await retriever.aretrieve(query)
        finally:
            await retriever.aclose()

    return run


def without_scores(metadata: dict[str, Any]) -> dict[str, Any]:
    """The metadata but for what the front ends add to it."""
    return {key: value for key, value in metadata.items() if key not in SCORES}
