"""Target 6: what it takes to import the package, and whether memory grows with the queries.

    python -m benchmarks startup

- The CPU time of importing a front end, beside importing what a retriever written by hand needs:
  the framework's BaseRetriever and pymilvus. Once just imported, once with the first retriever
  constructed, which is when pymilvus comes in. Every figure is a fresh process; no byte code is
  compiled in it.
- A direct reranker (`VLLMRerank`), constructed and used, imports no pymilvus.
- The resident memory of a process after 10,000 different queries, beside after 1,000.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from pymilvus import MilvusClient

from benchmarks.corpus import make_collection
from benchmarks.harness import (
    ROOT,
    NotRunError,
    Result,
    behind,
    milvus_process,
    replaying,
    rerank_process,
    say,
)
from benchmarks.overhead import COLLECTION, ROWS

IMPORT_LIMIT = 1.05
MEMORY_LIMIT = 1.02
MEMORY_ALLOWANCE = 1_000_000  # bytes; what an allocator may hold on to

BY_HAND = {
    "langchain": "from langchain_core.retrievers import BaseRetriever",
    "llama_index": "from llama_index.core.base.base_retriever import BaseRetriever",
}
NAMES = {"langchain": "LangChain", "llama_index": "LlamaIndex"}

TIMED = "import time; start = time.process_time(); {code}; print(time.process_time() - start)"
OURS = "import milvus_vllm_retrievers.{framework}"
CONSTRUCTED = (
    "from milvus_vllm_retrievers.{framework} import MilvusVLLMRetriever, VLLMRanker; "
    "MilvusVLLMRetriever(collection_name='docs', ranker=VLLMRanker('http://localhost:8000'))"
)
RERANK_DIRECTLY = {
    "langchain": """
import sys
from langchain_core.documents import Document
from milvus_vllm_retrievers.langchain import VLLMRerank
documents = [Document(page_content=text) for text in ("one", "two")]
assert len(VLLMRerank(endpoint=sys.argv[1]).compress_documents(documents, "which?")) == 2
print(int("pymilvus" in sys.modules))
""",
    "llama_index": """
import sys
from llama_index.core.schema import NodeWithScore, TextNode
from milvus_vllm_retrievers.llama_index import VLLMRerank
nodes = [NodeWithScore(node=TextNode(text=text)) for text in ("one", "two")]
assert len(VLLMRerank(endpoint=sys.argv[1]).postprocess_nodes(nodes, query_str="which?")) == 2
print(int("pymilvus" in sys.modules))
""",
}


def fresh(*command: str) -> list[float]:
    """Run Python in a fresh process and return the numbers it prints."""
    search_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": search_path, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *command], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return [float(line) for line in done.stdout.split()]


def import_times(framework: str, rounds: int) -> list[Result]:
    """Compare imports, in turn, in fresh processes."""
    codes = {
        "by hand": f"{BY_HAND[framework]}; import pymilvus",
        "imported": OURS.format(framework=framework),
        "first retriever constructed": CONSTRUCTED.format(framework=framework),
    }
    seconds: dict[str, list[float]] = {name: [] for name in codes}
    for turn in range(-1, rounds):  # the first turn warms the disk's cache
        for name, code in codes.items():
            taken = fresh("-c", TIMED.format(code=code))
            if turn >= 0:
                seconds[name] += taken
    return [
        Result(
            what=f"{NAMES[framework]} {name}: CPU time, ours / BaseRetriever and pymilvus",
            figure=statistics.median(
                ours / hand for ours, hand in zip(seconds[name], seconds["by hand"], strict=True)
            ),
            limit=IMPORT_LIMIT,
            behind=behind(
                statistics.median(seconds[name]), statistics.median(seconds["by hand"]), "s"
            ),
            details={
                "ours_s": statistics.median(seconds[name]),
                "by_hand_s": statistics.median(seconds["by hand"]),
                "rounds": rounds,
            },
        )
        for name in codes
        if name != "by hand"
    ]


def without_pymilvus(framework: str, vllm: str) -> Result:
    """Find out whether a direct reranker, used, has imported pymilvus."""
    return Result(
        what=f"{NAMES[framework]} VLLMRerank used: imports of pymilvus",
        figure=fresh("-c", RERANK_DIRECTLY[framework], vllm)[0],
        limit=0,
        unit="",
    )


def memory(framework: str, mode: str, uri: str, vllm: str, marks: tuple[int, int]) -> Result:
    """Compare a process's memory after few queries and after many."""
    probe = ("-m", "benchmarks.memory_probe", framework, mode, uri, vllm)
    first, last = fresh(*probe, *map(str, marks))
    return Result(
        what=(
            f"{NAMES[framework]} retriever, mode {mode}: memory after {marks[1]:,} queries / "
            f"after {marks[0]:,}"
        ),
        figure=last / first,
        limit=MEMORY_LIMIT + MEMORY_ALLOWANCE / first,
        behind=behind(last / 1e6, first / 1e6, "MB"),
        details={"first_bytes": first, "last_bytes": last, "queries": list(marks)},
    )


def memory_of_all(milvus: str, vllm: str, marks: tuple[int, int]) -> list[Result]:
    """Measure the memory of three processes, two at once: time does not matter here."""

    def one(framework: str, mode: str) -> Result:
        with replaying(milvus, same_answer=True) as uri:
            return memory(framework, mode, uri, vllm, marks)

    processes = (("langchain", "server"), ("llama_index", "server"), ("langchain", "client"))
    say(f"  memory: {marks[1]:,} queries in each of {len(processes)} processes")
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, *zip(*processes, strict=True)))


def run(quick: bool) -> list[Result]:
    """Return the figures of target 6."""
    if not Path("/proc/self/statm").exists():
        raise NotRunError("memory is read from /proc, which this system has not")
    rounds, marks = (2, (200, 1_000)) if quick else (7, (1_000, 10_000))
    results = []
    for framework, name in NAMES.items():
        say(f"  {name}: imports in {3 * (rounds + 1)} fresh processes")
        results += import_times(framework, rounds)
    with ExitStack() as servers:
        data = servers.enter_context(tempfile.TemporaryDirectory())
        milvus = servers.enter_context(milvus_process(data))
        vllm = servers.enter_context(rerank_process())
        results += [without_pymilvus(framework, vllm) for framework in NAMES]
        client = MilvusClient(milvus)
        make_collection(client, COLLECTION, rows=ROWS)
        client.close()
        return results + memory_of_all(milvus, vllm, marks)
