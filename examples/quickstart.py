"""Reranked retrieval over the standard library's documentation: what `make demo` runs.

Milvus Lite (or MILVUS_URI) finds candidates by meaning and by words, and a real vLLM
(VLLM_ENDPOINT) reranks them: first with the Function attached inside Milvus, then from here.
"""

from __future__ import annotations

import os

from rich.console import Console
from rich.table import Table
from support import embeddings, stdlib_collection, vllm_endpoint

from milvus_vllm_retrievers.explain import Explanation
from milvus_vllm_retrievers.langchain import MilvusVLLMRetriever, VLLMRanker

QUESTIONS = [
    "How do I run a program and capture what it prints?",
    "make a folder and its missing parents",
    "limit how many coroutines run at the same time",
    "read rows of a spreadsheet saved as text",
    "generate a token that nobody can guess",
    "stop a thread from waiting forever for an item",
]

console = Console()


def show(question: str, in_milvus: Explanation, from_here: Explanation) -> None:
    """Print each result's place in the retrieval and after reranking, both ways."""
    table = Table(title=question, title_justify="left", title_style="bold")
    for heading in ("retrieval\nrank", "reranked\nrank", "score\nin Milvus", "score\nclient"):
        table.add_column(heading, justify="right", no_wrap=True, min_width=9)
    table.add_column("entry", no_wrap=True, overflow="ellipsis")
    client_score = {row.hit.pk: row.hit.relevance_score for row in from_here.hits}
    for row in in_milvus.hits:
        other = client_score.get(row.hit.pk)
        table.add_row(
            str(row.retrieval_rank or "-"),
            str(row.rank),
            f"{row.hit.relevance_score:.4f}",
            "-" if other is None else f"{other:.4f}",
            str(row.hit.pk),
        )
    console.print(table)
    same = [r.hit.pk for r in in_milvus.hits] == [r.hit.pk for r in from_here.hits]
    console.print(
        f"{in_milvus.candidates} candidates. Served by: {in_milvus.reranked_by} (mode server), "
        f"{from_here.reranked_by} (mode client). Same list both ways: {'yes' if same else 'no'}\n"
    )


def main() -> None:
    """Fill a collection, ask, compare."""
    endpoint = vllm_endpoint()
    server_endpoint = os.environ.get("VLLM_SERVER_ENDPOINT")
    with stdlib_collection() as docs:
        console.print(f"{docs.entries} entries in Milvus at {docs.uri}, vLLM at {endpoint}\n")
        in_milvus, from_here = (
            MilvusVLLMRetriever(
                docs.collection,
                uri=docs.uri,
                embedding=embeddings(),
                ranker=VLLMRanker(endpoint, server_endpoint=server_endpoint, mode=mode),
                k=5,
                fetch_k=30,
            )
            for mode in ("server", "client")
        )
        for question in QUESTIONS:
            show(question, in_milvus.explain(question), from_here.explain(question))
        in_milvus.close()
        from_here.close()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        console.print("Stopped; the collection is removed.")
