"""Retrieval of tools: of two hundred, the few that fit a request are offered to the model.

Two hundred tools in one prompt confuse a model and cost tokens. Here functions of Python's standard
library are the tools, their descriptions are in Milvus, and reranking finds those that fit: first
as LlamaIndex does it (an ObjectRetriever in an agent), then as LangChain does (bind_tools).

Set CHAT_ENDPOINT (and CHAT_MODEL, CHAT_API_KEY) to an OpenAI-compatible chat server with tool
calling; without one the example prints the tools it would offer. The tools only pretend to act.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from typing import Any

import stdlib_docs
from langchain_core.tools import StructuredTool
from langchain_openai import ChatOpenAI
from llama_index.core.agent import FunctionAgent
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.mock import MockFunctionCallingLLM
from llama_index.core.objects import ObjectRetriever
from llama_index.core.objects.fn_node_mapping import FnNodeMapping
from llama_index.core.objects.tool_node_mapping import convert_tool_to_node
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from support import Docs, embeddings, llama_index_embeddings, stdlib_collection, vllm_endpoint

from milvus_vllm_retrievers import langchain, llama_index
from milvus_vllm_retrievers.ranker import VLLMRanker

REQUEST = "What is the average of these measurements?"
TOOLS = 200
OFFERED = 5


def tool_entries() -> list[stdlib_docs.Entry]:
    """Return two hundred functions of the standard library, from logging to zipfile."""
    return [entry for entry in stdlib_docs.load() if _is_function(entry)][-TOOLS:]


def _is_function(entry: stdlib_docs.Entry) -> bool:
    module, _, name = entry.id.rpartition(".")
    return module == entry.module and "." not in module and name[0].islower()


def pretend(entry: stdlib_docs.Entry) -> dict[str, Any]:
    """Describe the tool of an entry, in the words that both frameworks use for it."""

    def call(arguments: str = "") -> str:
        return f"{entry.id}({arguments}) was called"

    description = entry.text.removeprefix(f"{entry.id}: ")
    return {"name": entry.id.replace(".", "_"), "description": description, "func": call}


async def with_llama_index(request: str, docs: Docs, entries: Sequence[stdlib_docs.Entry]) -> None:
    """Run an agent whose tools are retrieved for each request."""
    tools = {}
    for entry in entries:
        tool = pretend(entry)
        tools[entry.id] = FunctionTool.from_defaults(
            tool["func"], name=tool["name"], description=tool["description"]
        )
    async with llama_index.MilvusVLLMRetriever(
        docs.collection,
        uri=docs.uri,
        token=docs.token,
        embed_model=llama_index_embeddings(),
        ranker=VLLMRanker(vllm_endpoint()),
        similarity_top_k=OFFERED,
    ) as retriever:
        by_id = FnNodeMapping(lambda node: tools[node.node_id], convert_tool_to_node)
        agent = FunctionAgent(
            tool_retriever=ObjectRetriever(retriever, by_id),
            llm=llama_index_model(),
            streaming=False,
        )
        print(await agent.run(request))


def llama_index_model() -> FunctionCallingLLM:
    """Return the model of CHAT_ENDPOINT, or one that answers with the tools it was offered."""
    endpoint = os.environ.get("CHAT_ENDPOINT")
    if not endpoint:
        return MockFunctionCallingLLM(response_generator=_say_what_was_offered)
    return OpenAILike(
        model=os.environ.get("CHAT_MODEL", ""),
        api_base=endpoint,
        api_key=os.environ.get("CHAT_API_KEY", "unused"),
        is_chat_model=True,
        is_function_calling_model=True,
    )


def _say_what_was_offered(
    _messages: Sequence[ChatMessage], *, tools: Sequence[FunctionTool], **_: Any
) -> ChatMessage:
    names = "\n".join(f"- {tool.metadata.name}" for tool in tools)
    return ChatMessage(
        role="assistant", content=f"(CHAT_ENDPOINT is not set; these tools would be sent)\n{names}"
    )


def with_langchain(request: str, docs: Docs, entries: Sequence[stdlib_docs.Entry]) -> None:
    """Bind the retrieved tools to the model for one request."""
    tools = {entry.id: StructuredTool.from_function(**pretend(entry)) for entry in entries}
    with langchain.MilvusVLLMRetriever(
        docs.collection,
        uri=docs.uri,
        token=docs.token,
        embedding=embeddings(),
        ranker=VLLMRanker(vllm_endpoint()),
        k=OFFERED,
    ) as retriever:
        offered = [tools[document.id or ""] for document in retriever.invoke(request)]
    endpoint = os.environ.get("CHAT_ENDPOINT")
    if not endpoint:
        print("(CHAT_ENDPOINT is not set; these tools would be sent)")
        print("\n".join(f"- {tool.name}" for tool in offered))
        return
    model = ChatOpenAI(
        base_url=endpoint,
        model=os.environ.get("CHAT_MODEL", ""),
        api_key=os.environ.get("CHAT_API_KEY", "unused"),
    )
    print(model.bind_tools(offered).invoke(request).tool_calls)


def main(request: str) -> None:
    """Fill a collection with tools, and let both frameworks choose from it."""
    entries = tool_entries()
    with stdlib_collection(entries) as docs:
        print(f"{docs.entries} tools. Request: {request}\n\n=== LlamaIndex")
        asyncio.run(with_llama_index(request, docs, entries))
        print("\n=== LangChain")
        with_langchain(request, docs, entries)


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or REQUEST)
