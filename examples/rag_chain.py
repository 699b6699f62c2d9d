"""A RAG chain (LCEL) whose context is reranked by vLLM before the chat model sees it.

Set CHAT_ENDPOINT (and CHAT_MODEL, CHAT_API_KEY) to an OpenAI-compatible chat server to have the
question answered; without one the example prints the prompt it would send.
"""

from __future__ import annotations

import os
import sys

from langchain_core.documents import Document
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnableLambda, RunnablePassthrough
from langchain_openai import ChatOpenAI
from support import embeddings, stdlib_collection, vllm_endpoint

from milvus_vllm_retrievers.langchain import MilvusVLLMRetriever, VLLMRanker

QUESTION = "How do I run a program and capture what it prints?"

PROMPT = ChatPromptTemplate.from_template(
    "Answer from these entries of Python's documentation only, and name the entries you used.\n\n"
    "{context}\n\nQuestion: {question}"
)


def as_context(documents: list[Document]) -> str:
    """Write the documents one below the other."""
    return "\n\n".join(document.page_content for document in documents)


def chat_model() -> Runnable:
    """Return the chat model of CHAT_ENDPOINT, or one that answers with what it was sent."""
    endpoint = os.environ.get("CHAT_ENDPOINT")
    if not endpoint:
        return RunnableLambda(
            lambda prompt: f"(CHAT_ENDPOINT is not set; this would be sent)\n\n{prompt.to_string()}"
        )
    model = ChatOpenAI(
        base_url=endpoint,
        model=os.environ.get("CHAT_MODEL", ""),
        api_key=os.environ.get("CHAT_API_KEY", "unused"),
    )
    return model | StrOutputParser()


def main(question: str) -> None:
    """Fill a collection, then answer the question from it."""
    with (
        stdlib_collection() as docs,
        MilvusVLLMRetriever(
            collection_name=docs.collection,
            uri=docs.uri,
            token=docs.token,
            embedding=embeddings(),
            ranker=VLLMRanker(vllm_endpoint()),
            k=4,
        ) as retriever,
    ):
        chain = (
            {"context": retriever | as_context, "question": RunnablePassthrough()}
            | PROMPT
            | chat_model()
        )
        print(chain.invoke(question))


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or QUESTION)
