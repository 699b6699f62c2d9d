"""LlamaIndex's engines, composed retrievers, tools and agents around the retriever, unchanged."""

from __future__ import annotations

import pickle
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import pytest
from llama_index.core import StorageContext
from llama_index.core.agent import FunctionAgent
from llama_index.core.base.llms.types import ChatMessage, MessageRole, ToolCallBlock
from llama_index.core.llms import CompletionResponse, CustomLLM, LLMMetadata, MockLLM
from llama_index.core.llms.mock import MockFunctionCallingLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import (
    AutoMergingRetriever,
    BaseRetriever,
    QueryFusionRetriever,
    RouterRetriever,
)
from llama_index.core.retrievers.fusion_retriever import FUSION_MODES
from llama_index.core.schema import NodeRelationship, NodeWithScore, TextNode
from llama_index.core.selectors import LLMMultiSelector, LLMSingleSelector
from llama_index.core.tools import RetrieverTool
from llama_index.core.vector_stores.utils import node_to_metadata_dict
from pymilvus import DataType, MilvusClient

from milvus_vllm_retrievers.llama_index import MilvusVLLMRetriever, VLLMRanker, VLLMRerank
from tests.corpus import TEXTS, create_collection
from tests.fakes import FakeVLLM

NAME = "llama_engine_docs"
CHUNKS = "llama_engine_chunks"
# Each of two texts has one of the words; the fake prefers the longer text, the whales.
QUESTION = "whales, violin"
WHALES, VIOLIN = 2, 8
ANSWER = [str(WHALES), str(VIOLIN)]

Run = Callable[..., Awaitable[Any]]


class Scripted(CustomLLM):
    """Completes any prompt with the same text."""

    text: str

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata()

    def complete(self, prompt: str, formatted: bool = False, **_: Any) -> CompletionResponse:
        return CompletionResponse(text=self.text)

    def stream_complete(self, prompt: str, formatted: bool = False, **_: Any) -> Any:
        raise NotImplementedError


@pytest.fixture(scope="module", autouse=True)
def _collections(milvus26: MilvusClient) -> None:
    create_collection(milvus26, NAME)


@pytest.fixture
def retriever(milvus26_uri: str, fake_vllm: FakeVLLM) -> Iterator[MilvusVLLMRetriever]:
    """Finds by words, and reranks in Milvus; the fake scores by the text's length."""
    ranker = VLLMRanker(fake_vllm.url, mode="server")
    with MilvusVLLMRetriever(NAME, ranker, uri=milvus26_uri) as retriever:
        yield retriever


@pytest.fixture(params=["sync", "async"])
def run(request: pytest.FixtureRequest, retriever: MilvusVLLMRetriever) -> Run:
    """Call one of two methods, the blocking one in one run of the test, the async in the other."""

    async def call(blocking: Callable[..., Any], concurrent: Run, *arguments: Any) -> Any:
        if request.param == "sync":
            return blocking(*arguments)
        async with retriever:
            return await concurrent(*arguments)

    return call


def ids(nodes: Sequence[NodeWithScore]) -> list[str]:
    return [node.node_id for node in nodes]


# --- query engines


async def test_a_query_engine_hands_the_reranked_texts_to_the_language_model(
    retriever: MilvusVLLMRetriever, run: Run
) -> None:
    engine = RetrieverQueryEngine.from_args(retriever, llm=MockLLM())  # it answers with its prompt

    response = await run(engine.query, engine.aquery, QUESTION)

    assert ids(response.source_nodes) == ANSWER
    prompt = str(response)
    assert 0 < prompt.index(TEXTS[WHALES]) < prompt.index(TEXTS[VIOLIN])
    assert "number: 2" in prompt
    assert "score" not in prompt
    assert "reranked_by" not in prompt


async def test_a_query_engine_takes_the_postprocessor_after_any_retriever(
    milvus26_uri: str, fake_vllm: FakeVLLM, run: Run
) -> None:
    fake_vllm.score = lambda query, document: -float(len(document))
    candidates = MilvusVLLMRetriever(NAME, None, uri=milvus26_uri)
    reranker = VLLMRerank(endpoint=fake_vllm.url, top_n=1)
    engine = RetrieverQueryEngine.from_args(
        candidates, llm=MockLLM(), node_postprocessors=[reranker]
    )

    response = await run(engine.query, engine.aquery, QUESTION)
    await candidates.aclose()
    await reranker.aclose()

    assert ids(response.source_nodes) == [str(VIOLIN)]
    assert TEXTS[WHALES] not in str(response)


# --- retrievers made of retrievers


@pytest.fixture
def plain(milvus26_uri: str) -> Iterator[MilvusVLLMRetriever]:
    """Finds by words and reranks nothing."""
    with MilvusVLLMRetriever(NAME, None, uri=milvus26_uri) as retriever:
        yield retriever


@pytest.fixture
def tools(retriever: MilvusVLLMRetriever, plain: MilvusVLLMRetriever) -> list[RetrieverTool]:
    return [
        RetrieverTool.from_defaults(plain, description="as found"),
        RetrieverTool.from_defaults(retriever, description="reranked"),
    ]


async def test_a_router_chooses_the_retriever(tools: list[RetrieverTool], run: Run) -> None:
    choice = Scripted(text='[{"choice": 2, "reason": "better"}]')
    router = RouterRetriever(LLMSingleSelector.from_defaults(choice), tools, llm=choice)

    nodes = await run(router.retrieve, router.aretrieve, QUESTION)

    assert ids(nodes) == ANSWER
    assert {n.metadata["reranked_by"] for n in nodes} == {"milvus"}


async def test_a_router_that_asks_several_retrievers_returns_each_node_once(
    tools: list[RetrieverTool], plain: MilvusVLLMRetriever, run: Run
) -> None:
    both = Scripted(text='[{"choice": 1, "reason": "a"}, {"choice": 2, "reason": "b"}]')
    router = RouterRetriever(LLMMultiSelector.from_defaults(both), tools, llm=both)

    nodes = await run(router.retrieve, router.aretrieve, QUESTION)
    await plain.aclose()

    assert sorted(ids(nodes)) == ANSWER


def fusion(retrievers: list[BaseRetriever], mode: FUSION_MODES, queries: int) -> Any:
    more_queries = Scripted(text="violin whales\nwhales, whales, violin")
    return QueryFusionRetriever(
        retrievers,
        llm=more_queries,
        mode=mode,
        num_queries=queries,
        similarity_top_k=2,
        use_async=False,
    )


@pytest.mark.parametrize("mode", list(FUSION_MODES))
async def test_a_fusion_ranks_what_the_retriever_found(
    retriever: MilvusVLLMRetriever, run: Run, mode: FUSION_MODES
) -> None:
    fused = fusion([retriever], mode, queries=1)

    assert ids(await run(fused.retrieve, fused.aretrieve, QUESTION)) == ANSWER


@pytest.mark.parametrize("mode", [mode for mode in FUSION_MODES if mode != FUSION_MODES.SIMPLE])
async def test_a_fusion_over_several_queries_takes_a_row_for_the_same_node_each_time(
    retriever: MilvusVLLMRetriever, fake_vllm: FakeVLLM, run: Run, mode: FUSION_MODES
) -> None:
    fake_vllm.score = lambda query, document: float(len(query) + len(document))
    fused = fusion([retriever], mode, queries=3)

    # A node that counts as another one for every query fills the places of those behind it.
    assert ids(await run(fused.retrieve, fused.aretrieve, QUESTION)) == ANSWER


def test_a_fusion_that_runs_its_own_event_loop_works(retriever: MilvusVLLMRetriever) -> None:
    fused = QueryFusionRetriever([retriever], llm=MockLLM(), num_queries=1, use_async=True)

    assert [ids(fused.retrieve(QUESTION)) for _ in range(2)] == [ANSWER, ANSWER]


@pytest.fixture(scope="module")
def chapter(milvus26: MilvusClient) -> StorageContext:
    """A parent node in a docstore, whose children are rows as LlamaIndex stores them."""
    parent = TextNode(id_="chapter", text="All about whales.")
    children = [
        TextNode(
            id_=f"chunk-{i}",
            text=f"Whales, part {i}" + "." * i,
            relationships={NodeRelationship.PARENT: parent.as_related_node_info()},
        )
        for i in range(3)
    ]
    parent.relationships = {
        NodeRelationship.CHILD: [child.as_related_node_info() for child in children]
    }
    create_collection(
        milvus26,
        CHUNKS,
        texts=[],
        keys=DataType.VARCHAR,
        primary_key="id",
        text_field="text",
        dense=0,
    )
    rows = [
        {**node_to_metadata_dict(n, remove_text=True), "id": n.node_id, "text": n.text}
        for n in children
    ]
    milvus26.insert(CHUNKS, rows)
    context = StorageContext.from_defaults()
    context.docstore.add_documents([parent, *children])
    return context


@pytest.mark.parametrize(("top_k", "merged"), [(2, ["chapter"]), (1, ["chunk-2"])])
async def test_an_auto_merging_retriever_merges_reranked_chunks_into_their_parent(
    chapter: StorageContext,
    milvus26_uri: str,
    fake_vllm: FakeVLLM,
    run: Run,
    top_k: int,
    merged: list[str],
) -> None:
    chunks = MilvusVLLMRetriever(
        CHUNKS, VLLMRanker(fake_vllm.url), uri=milvus26_uri, similarity_top_k=top_k
    )
    merging = AutoMergingRetriever(chunks, chapter)

    nodes = await run(merging.retrieve, merging.aretrieve, "whales")
    await chunks.aclose()

    assert ids(nodes) == merged


# --- tools and agents


async def test_a_tool_returns_the_reranked_texts(retriever: MilvusVLLMRetriever, run: Run) -> None:
    tool = RetrieverTool.from_defaults(retriever, name="notes", description="Looks things up.")

    output = await run(tool.call, tool.acall, QUESTION)

    assert ids(output.raw_output) == ANSWER
    assert output.content == (
        f"number: {WHALES}\n\n{TEXTS[WHALES]}\n\nnumber: {VIOLIN}\n\n{TEXTS[VIOLIN]}\n\n"
    )


# The agent's workflow looks at each of its attributes, the deprecated ones of pydantic too.
@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning")
async def test_an_agent_calls_the_retriever_and_answers_from_what_it_found(
    retriever: MilvusVLLMRetriever,
) -> None:
    def model(messages: Sequence[ChatMessage], **_: Any) -> ChatMessage:
        if messages[-1].role == MessageRole.TOOL:
            return ChatMessage(role="assistant", content=f"It says: {messages[-1].content}")
        call = ToolCallBlock(tool_name="notes", tool_kwargs={"input": QUESTION}, tool_call_id="1")
        return ChatMessage(role="assistant", blocks=[call])

    tool = RetrieverTool.from_defaults(retriever, name="notes", description="Looks things up.")
    agent = FunctionAgent(
        tools=[tool], llm=MockFunctionCallingLLM(response_generator=model), streaming=False
    )

    async with retriever:
        answer = await agent.run("What do the notes say?")

    assert [call.tool_name for call in answer.tool_calls] == ["notes"]
    assert str(answer).startswith("It says: ")
    assert 0 < str(answer).index(TEXTS[WHALES]) < str(answer).index(TEXTS[VIOLIN])


def test_a_retrieved_node_can_be_pickled_and_stays_recognisable(
    retriever: MilvusVLLMRetriever,
) -> None:
    with retriever:
        node = retriever.retrieve(QUESTION)[0].node

    copied = pickle.loads(pickle.dumps(node))

    assert copied == node
    assert copied.hash == node.hash
    assert copied.metadata["relevance_score"] == node.metadata["relevance_score"]
