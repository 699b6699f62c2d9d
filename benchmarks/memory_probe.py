"""A process of its own that asks many queries and prints its memory; startup.py starts it.

python -m benchmarks.memory_probe langchain server MILVUS_URI VLLM_URL 1000 10000

For each of the numbers it prints, as one line, the resident memory in bytes once so many queries
were asked, no two of them alike.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_index.core.schema import QueryBundle

from benchmarks.corpus import QUERIES, query_vector
from benchmarks.overhead import COLLECTION, FETCH_K, K, ReadyMade
from milvus_vllm_retrievers import langchain, llama_index
from milvus_vllm_retrievers.ranker import VLLMRanker

VECTOR = query_vector(QUERIES[0])


class OneVector(ReadyMade):
    """The same vector for every query."""

    def embed_query(self, text: str) -> list[float]:  # noqa: ARG002 - LangChain's interface
        """Return the vector."""
        return VECTOR


def asking(framework: str, ranker: VLLMRanker, uri: str) -> Callable[[str], Any]:
    """Return what asks one query."""
    if framework == "langchain":
        return langchain.MilvusVLLMRetriever(
            collection_name=COLLECTION,
            ranker=ranker,
            uri=uri,
            embedding=OneVector(),
            k=K,
            fetch_k=FETCH_K,
        ).invoke
    retriever = llama_index.MilvusVLLMRetriever(
        COLLECTION, ranker, uri=uri, similarity_top_k=K, fetch_k=FETCH_K
    )
    return lambda query: retriever.retrieve(QueryBundle(query, embedding=VECTOR))


def resident_bytes() -> int:
    """Return this process's resident memory."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Ask, and print the memory at every mark."""
    framework, mode, uri, vllm, *marks = sys.argv[1:]
    ask = asking(framework, VLLMRanker(vllm, mode=mode), uri)
    asked = 0
    for mark in map(int, marks):
        for number in range(asked, mark):
            found = ask(f"question {number}: {QUERIES[number % len(QUERIES)]}")
            assert len(found) == K, f"{len(found)} results in place of {K}"
        asked = mark
        print(resident_bytes(), flush=True)


if __name__ == "__main__":
    main()
