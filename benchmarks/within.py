"""Target 8: what `within` costs, which is meant to be called for every request.

    python -m benchmarks within

Both front ends, with a filter by one field and with three, and a `within` of a `within`; the
figure is the time of one call, the least of several rounds. How many connections it makes (none)
is counted by the tests of both front ends.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable
from typing import Any

from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters

from benchmarks.harness import Result, say
from milvus_vllm_retrievers import VLLMRanker, langchain, llama_index

LIMIT = 100.0  # microseconds
CALLS = 2_000

ONE = {"tenant": "a"}
THREE = {"tenant": "a", "year": {"gte": 2024}, "topic": ["x", "y"]}


def run(quick: bool) -> list[Result]:
    """Return the figures of target 8."""
    rounds = 3 if quick else 20
    ranker = VLLMRanker("http://localhost:8000")
    chain_side = langchain.MilvusVLLMRetriever("docs", ranker)
    index_side = llama_index.MilvusVLLMRetriever("docs", ranker)
    ways: dict[str, Callable[[], Any]] = {
        "LangChain, one field": lambda: chain_side.within(filters=ONE),
        "LangChain, three fields": lambda: chain_side.within(filters=THREE),
        "LangChain, within of within": lambda: chain_side.within(filters=ONE).within(filters=THREE),
        "LlamaIndex, one field": lambda: index_side.within(filters=_metadata_filters(1)),
        "LlamaIndex, three fields": lambda: index_side.within(filters=_metadata_filters(3)),
    }
    results = []
    for name, call in ways.items():
        say(f"  {name}")
        least = min(timeit.repeat(call, number=CALLS, repeat=rounds)) / CALLS
        results.append(Result(what=f"within: {name}", figure=least * 1e6, limit=LIMIT, unit="µs"))
    return results


def _metadata_filters(count: int) -> MetadataFilters:
    tests = [MetadataFilter(key=name, value="a") for name in ("tenant", "topic", "team")]
    return MetadataFilters(filters=[*tests[:count]])
