"""An agent that looks things up: the reranking retriever as a tool of a LangChain agent.

Set CHAT_ENDPOINT (and CHAT_MODEL, CHAT_API_KEY) to an OpenAI-compatible chat server with tool
calling; without one a scripted model stands in, which calls the tool once with the question.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from langchain.agents import create_agent
from langchain_core.language_models import BaseChatModel
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_core.tools import create_retriever_tool
from langchain_openai import ChatOpenAI
from support import embeddings, stdlib_collection, vllm_endpoint

from milvus_vllm_retrievers.langchain import MilvusVLLMRetriever, VLLMRanker

QUESTION = "generate a token that nobody can guess"


class ScriptedModel(GenericFakeChatModel):
    """Says what it was told to say, whatever tools it is given."""

    def bind_tools(self, _tools: Sequence[Any], **_: Any) -> ScriptedModel:
        """Take the tools as known."""
        return self


def chat_model(question: str) -> BaseChatModel:
    """Return the chat model of CHAT_ENDPOINT, or a scripted one."""
    endpoint = os.environ.get("CHAT_ENDPOINT")
    if endpoint:
        return ChatOpenAI(
            base_url=endpoint,
            model=os.environ.get("CHAT_MODEL", ""),
            api_key=os.environ.get("CHAT_API_KEY", "unused"),
        )
    call = {"name": "search_python_docs", "args": {"query": question}, "id": "call-1"}
    messages = [
        AIMessage(content="", tool_calls=[call]),
        AIMessage(
            content="(CHAT_ENDPOINT is not set; a model would answer from the entries above)"
        ),
    ]
    return ScriptedModel(messages=iter(messages))


def main(question: str) -> None:
    """Fill a collection, give an agent the retriever, and print the conversation."""
    with (
        stdlib_collection() as docs,
        MilvusVLLMRetriever(
            collection_name=docs.collection,
            uri=docs.uri,
            token=docs.token,
            embedding=embeddings(),
            ranker=VLLMRanker(vllm_endpoint()),
            k=3,
        ) as retriever,
    ):
        tool = create_retriever_tool(
            retriever,
            name="search_python_docs",
            description="Search the documentation of Python's standard library.",
        )
        agent = create_agent(chat_model(question), [tool])
        answer = agent.invoke({"messages": [("user", question)]})
        for message in answer["messages"]:
            message.pretty_print()


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or QUESTION)
