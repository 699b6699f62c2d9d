"""LlamaIndex query engines whose context is reranked by vLLM: while retrieving, and after.

The first engine has the reranking retriever over Milvus. The second has VLLMRerank after another
retriever, LlamaIndex's own keyword table: it reranks nodes from anywhere, scores or not.

Set CHAT_ENDPOINT (and CHAT_MODEL, CHAT_API_KEY) to an OpenAI-compatible chat server to have the
question answered; without one the example prints the prompt it would send.
"""

from __future__ import annotations

import os
import sys

from llama_index.core import SimpleKeywordTableIndex
from llama_index.core.llms import LLM, MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import TextNode
from llama_index.llms.openai_like import OpenAILike
from support import llama_index_embeddings, stdlib_collection, stdlib_entries, vllm_endpoint

from milvus_vllm_retrievers.llama_index import MilvusVLLMRetriever, VLLMRanker, VLLMRerank

QUESTION = "How do I run a program and capture what it prints?"


def language_model() -> LLM:
    """Return the language model of CHAT_ENDPOINT, or one that answers with what it was sent."""
    endpoint = os.environ.get("CHAT_ENDPOINT")
    if not endpoint:
        print("(CHAT_ENDPOINT is not set; each answer is the prompt that would be sent)")
        return MockLLM()
    return OpenAILike(
        model=os.environ.get("CHAT_MODEL", ""),
        api_base=endpoint,
        api_key=os.environ.get("CHAT_API_KEY", "unused"),
        is_chat_model=True,
    )


def ask(title: str, engine: RetrieverQueryEngine, question: str) -> None:
    """Print the answer and what it rests on."""
    response = engine.query(question)
    print(f"\n=== {title}\n\n{response}\n\nSources, best first:")
    for node in response.source_nodes:
        print(f"{node.score:.4f} (reranked by {node.metadata['reranked_by']}) {node.text[:60]}")


def main(question: str) -> None:
    """Ask the same question of both engines."""
    model = language_model()
    with (
        stdlib_collection() as docs,
        MilvusVLLMRetriever(
            docs.collection,
            uri=docs.uri,
            token=docs.token,
            embed_model=llama_index_embeddings(),
            ranker=VLLMRanker(vllm_endpoint()),
            similarity_top_k=4,
        ) as retriever,
    ):
        engine = RetrieverQueryEngine.from_args(retriever, llm=model)
        ask("The retriever reranks what Milvus finds", engine, question)

    nodes = [TextNode(id_=entry.id, text=entry.text) for entry in stdlib_entries()]
    by_keyword = SimpleKeywordTableIndex(nodes, llm=model).as_retriever(num_chunks_per_query=50)
    with VLLMRerank(endpoint=vllm_endpoint(), top_n=4) as reranker:
        engine = RetrieverQueryEngine.from_args(
            by_keyword, llm=model, node_postprocessors=[reranker]
        )
        ask("VLLMRerank reranks what any retriever finds", engine, question)


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or QUESTION)
