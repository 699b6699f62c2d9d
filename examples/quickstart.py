"""Reranked retrieval over the standard library's documentation: what `make demo` runs.

Milvus Lite (or MILVUS_URI) finds candidates by meaning and by words, and a real vLLM
(VLLM_ENDPOINT) reranks them: with the Function attached inside Milvus, then from here, through
LangChain and through LlamaIndex.
"""

from __future__ import annotations

import os

from langchain_core.documents import Document
from rich.console import Console
from rich.table import Table
from support import Docs, embeddings, llama_index_embeddings, stdlib_collection, vllm_endpoint

from milvus_vllm_retrievers import langchain, llama_index
from milvus_vllm_retrievers.explain import Explanation
from milvus_vllm_retrievers.ranker import VLLMRanker

QUESTIONS = [
    "How do I run a program and capture what it prints?",
    "make a folder and its missing parents",
    "limit how many coroutines run at the same time",
    "read rows of a spreadsheet saved as text",
    "generate a token that nobody can guess",
    "stop a thread from waiting forever for an item",
]

console = Console()


def show(in_milvus: Explanation, from_here: list[Document]) -> None:
    """Print each result's place in the retrieval and after reranking, both ways."""
    table = Table(title=in_milvus.query, title_justify="left", title_style="bold")
    for heading in ("retrieval\nrank", "reranked\nrank", "score\nin Milvus", "score\nclient"):
        table.add_column(heading, justify="right", no_wrap=True, min_width=9)
    table.add_column("entry", no_wrap=True, overflow="ellipsis")
    client_score = {d.id: f"{d.metadata['relevance_score']:.4f}" for d in from_here}
    for row in in_milvus.hits:
        table.add_row(
            str(row.retrieval_rank or "-"),
            str(row.rank),
            f"{row.hit.relevance_score:.4f}",
            client_score.get(str(row.hit.pk), "-"),
            str(row.hit.pk),
        )
    console.print(table)
    same = [row.hit.pk for row in in_milvus.hits] == [d.id for d in from_here]
    console.print(
        f"{in_milvus.candidates} candidates. Served by: {in_milvus.reranked_by} (mode server), "
        f"{from_here[0].metadata['reranked_by']} (mode client). "
        f"Same list both ways: {'yes' if same else 'no'}\n"
    )


def through_llama_index(docs: Docs, ids: dict[str, list[str | None]]) -> None:
    """Ask the same questions of the LlamaIndex retriever, and compare with LangChain's ids."""
    with llama_index.MilvusVLLMRetriever(
        docs.collection,
        uri=docs.uri,
        token=docs.token,
        embed_model=llama_index_embeddings(),
        ranker=VLLMRanker(vllm_endpoint(), mode="client"),
        similarity_top_k=5,
        fetch_k=30,
    ) as retriever:
        console.print("Through LlamaIndex: the same ids in the same order as LangChain?")
        for question, expected in ids.items():
            same = [node.node_id for node in retriever.retrieve(question)] == expected
            console.print(f"  {'yes' if same else 'no':3} {question}")


def main() -> None:
    """Fill a collection, ask, compare."""
    endpoint = vllm_endpoint()
    server_endpoint = os.environ.get("VLLM_SERVER_ENDPOINT")
    with stdlib_collection() as docs:
        console.print(f"{docs.entries} entries in Milvus at {docs.uri}, vLLM at {endpoint}\n")
        in_milvus, from_here = (
            langchain.MilvusVLLMRetriever(
                docs.collection,
                uri=docs.uri,
                token=docs.token,
                embedding=embeddings(),
                ranker=VLLMRanker(endpoint, server_endpoint=server_endpoint, mode=mode),
                k=5,
                fetch_k=30,
            )
            for mode in ("server", "client")
        )
        ids = {}
        with in_milvus, from_here:
            for question in QUESTIONS:
                documents = from_here.invoke(question)
                show(in_milvus.explain(question), documents)
                ids[question] = [document.id for document in documents]
        through_llama_index(docs, ids)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        console.print("Stopped; the collection is removed.")
