"""LlamaIndex's MilvusVLLMRetriever over the stand-in for Milvus 2.6."""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_index.core import Settings
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.base import BaseEvent
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index.core.schema import (
    BaseNode,
    ImageNode,
    IndexNode,
    MetadataMode,
    Node,
    NodeRelationship,
    NodeWithScore,
    QueryBundle,
    QueryType,
    RelatedNodeInfo,
    TextNode,
)
from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
)
from llama_index.core.vector_stores.utils import node_to_metadata_dict
from llama_index.core.workflow import JsonSerializer
from pydantic import Field, PrivateAttr
from pymilvus import DataType, MilvusClient

from milvus_vllm_retrievers import ConfigurationError, MilvusVLLMError, RerankStatusError
from milvus_vllm_retrievers.llama_index import MilvusVLLMRetriever, VLLMRanker
from tests.corpus import TEXTS, create_collection
from tests.fakes import FakeVLLM, LetterEmbeddings, Reply

NAME = "llama_retriever_docs"
TWO_DENSE_FIELDS = "llama_retriever_two"
STORE = "llama_retriever_store"
LONGEST = sorted(range(len(TEXTS)), key=lambda i: -len(TEXTS[i]))
VIOLIN = 8

Retrieve = Callable[[MilvusVLLMRetriever, QueryType], Awaitable[list[NodeWithScore]]]


class LetterModel(BaseEmbedding):
    """LetterEmbeddings for LlamaIndex; it remembers what it was asked to embed."""

    _embedded: list[str] = PrivateAttr(default_factory=list)

    @property
    def embedded(self) -> list[str]:
        return self._embedded

    def _get_query_embedding(self, query: str) -> list[float]:
        self._embedded.append(query)
        return LetterEmbeddings().embed_query(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_query_embedding(query)

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_query_embedding(text)


@pytest.fixture(scope="module", autouse=True)
def _collections(milvus26: MilvusClient) -> None:
    create_collection(milvus26, NAME)
    create_collection(milvus26, TWO_DENSE_FIELDS, bm25=False, dense=2)


@pytest.fixture(params=["sync", "async"])
def retrieve(request: pytest.FixtureRequest) -> Retrieve:
    """Call a retriever, blocking in one run of the test and async in the other."""

    async def run(retriever: MilvusVLLMRetriever, query: QueryType) -> list[NodeWithScore]:
        try:
            if request.param == "sync":
                return retriever.retrieve(query)
            return await retriever.aretrieve(query)
        finally:
            await retriever.aclose()

    return run


@pytest.fixture(params=["server", "client"])
def ranker(request: pytest.FixtureRequest, fake_vllm: FakeVLLM) -> VLLMRanker:
    """Scores by the text's length, in Milvus and from here."""
    return VLLMRanker(fake_vllm.url, mode=request.param)


@pytest.fixture
def retriever(ranker: VLLMRanker, milvus26_uri: str) -> MilvusVLLMRetriever:
    """Over both legs of the stand-in's collection."""
    return MilvusVLLMRetriever(
        NAME, ranker, uri=milvus26_uri, embed_model=LetterModel(), similarity_top_k=3
    )


# --- nodes


async def test_nodes_come_back_in_the_order_of_their_relevance(
    retriever: MilvusVLLMRetriever, retrieve: Retrieve
) -> None:
    nodes = await retrieve(retriever, "what is the longest text?")

    assert [n.text for n in nodes] == [TEXTS[i] for i in LONGEST[:3]]
    assert [n.score for n in nodes] == [float(len(n.text)) for n in nodes]


async def test_a_row_becomes_a_text_node_that_says_where_it_was_reranked(
    retriever: MilvusVLLMRetriever, ranker: VLLMRanker, retrieve: Retrieve
) -> None:
    node = (await retrieve(retriever, "longest"))[0].node

    origin = {"server": "milvus", "client": "client"}[ranker.mode]
    assert isinstance(node, TextNode)
    assert node.node_id == str(LONGEST[0])
    assert node.metadata["pk"] == LONGEST[0]
    assert node.metadata["number"] == LONGEST[0]
    assert node.metadata["relevance_score"] == len(TEXTS[LONGEST[0]])
    assert node.metadata["reranked_by"] == origin
    assert ("retrieval_score" in node.metadata) == (origin == "client")
    assert not {"dense", "sparse", "document"} & set(node.metadata)


async def test_neither_the_language_model_nor_an_embedding_model_sees_the_scores(
    retriever: MilvusVLLMRetriever, retrieve: Retrieve
) -> None:
    node = (await retrieve(retriever, "longest"))[0].node

    for mode in (MetadataMode.LLM, MetadataMode.EMBED):
        content = node.get_content(mode)
        assert f"number: {LONGEST[0]}" in content
        assert "score" not in content
        assert "reranked_by" not in content


async def test_a_failure_left_unranked_is_marked_out_of_the_models_sight(
    milvus26_uri: str, retrieve: Retrieve
) -> None:
    ranker = VLLMRanker("http://127.0.0.1:1", mode="client", on_error="skip", max_retries=0)
    retriever = MilvusVLLMRetriever(NAME, ranker, uri=milvus26_uri)

    found = (await retrieve(retriever, "violin"))[0]

    assert found.node_id == str(VIOLIN)
    assert found.score == found.metadata["retrieval_score"]
    assert "could not be reached" in found.metadata["rerank_error"]
    assert "rerank_error" not in found.node.get_content(MetadataMode.LLM)


async def test_similarity_top_k_nodes_are_chosen_from_fetch_k_candidates(
    ranker: VLLMRanker, milvus26_uri: str, fake_vllm: FakeVLLM, retrieve: Retrieve
) -> None:
    retriever = MilvusVLLMRetriever(
        NAME,
        ranker,
        uri=milvus26_uri,
        embed_model=LetterModel(),
        vector_field="dense",
        similarity_top_k=2,
        fetch_k=7,
    )

    nodes = await retrieve(retriever, "whales")

    assert len(nodes) == 2
    assert [len(r.body["documents"]) for r in fake_vllm.received] == [7]


async def test_metadata_filters_and_an_expression_must_both_hold(
    ranker: VLLMRanker, milvus26_uri: str, retrieve: Retrieve
) -> None:
    either = MetadataFilters(
        filters=[
            MetadataFilter(key="number", value=2, operator=FilterOperator.LT),
            MetadataFilter(key="number", value=9, operator=FilterOperator.GTE),
        ],
        condition=FilterCondition.OR,
    )
    retriever = MilvusVLLMRetriever(
        NAME,
        ranker,
        uri=milvus26_uri,
        embed_model=LetterModel(),
        filters=either,
        expr="pk > 0 or pk < 0",
        similarity_top_k=12,
    )

    nodes = await retrieve(retriever, "everything")

    assert {n.metadata["number"] for n in nodes} == {1, 9, 10, 11}


async def test_without_a_ranker_the_score_is_that_of_the_retrieval(
    milvus26_uri: str, fake_vllm: FakeVLLM, retrieve: Retrieve
) -> None:
    retriever = MilvusVLLMRetriever(NAME, None, uri=milvus26_uri)

    found = (await retrieve(retriever, "violin"))[0]

    assert found.node_id == str(VIOLIN)
    assert found.score == found.metadata["retrieval_score"] > 0
    assert found.metadata["reranked_by"] is None
    assert fake_vllm.received == []


# --- query vectors


async def test_a_querys_own_embedding_is_searched_with_and_no_model_is_called(
    ranker: VLLMRanker, milvus26_uri: str, fake_vllm: FakeVLLM, retrieve: Retrieve
) -> None:
    model = LetterModel()
    retriever = MilvusVLLMRetriever(
        NAME,
        ranker,
        uri=milvus26_uri,
        embed_model=model,
        vector_field="dense",
        similarity_top_k=1,
        fetch_k=1,
    )
    near_the_violin = LetterEmbeddings().embed_query(TEXTS[VIOLIN])

    nodes = await retrieve(retriever, QueryBundle("aeroplane", embedding=near_the_violin))

    assert [n.node_id for n in nodes] == [str(VIOLIN)]
    assert model.embedded == []
    assert fake_vllm.received[-1].body["query"] == "aeroplane"


async def test_a_querys_own_embedding_needs_no_model(
    milvus26_uri: str, retrieve: Retrieve, no_common_model: None
) -> None:
    retriever = MilvusVLLMRetriever(NAME, None, uri=milvus26_uri, vector_field="dense")
    near_the_violin = LetterEmbeddings().embed_query(TEXTS[VIOLIN])

    nodes = await retrieve(retriever, QueryBundle("any", embedding=near_the_violin))

    assert nodes[0].node_id == str(VIOLIN)


async def test_custom_embedding_strings_are_embedded_and_the_query_is_reranked_against(
    ranker: VLLMRanker, milvus26_uri: str, fake_vllm: FakeVLLM, retrieve: Retrieve
) -> None:
    model = LetterModel()
    retriever = MilvusVLLMRetriever(
        NAME,
        ranker,
        uri=milvus26_uri,
        embed_model=model,
        vector_field="dense",
        similarity_top_k=1,
        fetch_k=1,
    )
    query = QueryBundle("aeroplane", custom_embedding_strs=[TEXTS[VIOLIN], TEXTS[VIOLIN]])

    nodes = await retrieve(retriever, query)

    assert [n.node_id for n in nodes] == [str(VIOLIN)]
    assert model.embedded == [TEXTS[VIOLIN], TEXTS[VIOLIN]]
    assert fake_vllm.received[-1].body["query"] == "aeroplane"


async def test_each_field_can_have_a_model_of_its_own(
    milvus26_uri: str, ranker: VLLMRanker, retrieve: Retrieve
) -> None:
    models = {"dense": LetterModel(), "dense_2": LetterModel()}
    retriever = MilvusVLLMRetriever(
        TWO_DENSE_FIELDS, ranker, uri=milvus26_uri, embed_model=models, similarity_top_k=3
    )

    nodes = await retrieve(retriever, "whales")

    assert [n.node_id for n in nodes] == [str(i) for i in LONGEST[:3]]
    assert [model.embedded for model in models.values()] == [["whales"], ["whales"]]


@pytest.fixture
def no_common_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has been set as `Settings.embed_model`; what is set is restored."""
    monkeypatch.setattr(Settings, "_embed_model", None)


async def test_the_common_model_of_the_settings_is_used_where_one_was_set(
    milvus26_uri: str, retrieve: Retrieve, no_common_model: None
) -> None:
    Settings.embed_model = model = LetterModel()
    retriever = MilvusVLLMRetriever(NAME, None, uri=milvus26_uri, vector_field="dense")

    await retrieve(retriever, "whales")

    assert model.embedded == ["whales"]


async def test_a_model_of_ones_own_wins_over_the_common_one(
    milvus26_uri: str, retrieve: Retrieve, no_common_model: None
) -> None:
    Settings.embed_model = common = LetterModel()
    own = LetterModel()
    retriever = MilvusVLLMRetriever(NAME, None, uri=milvus26_uri, embed_model=own)

    await retrieve(retriever, "whales")

    assert (own.embedded, common.embedded) == (["whales"], [])


async def test_where_no_model_was_set_none_is_made_up(
    milvus26_uri: str, retrieve: Retrieve, no_common_model: None
) -> None:
    retriever = MilvusVLLMRetriever(NAME, None, uri=milvus26_uri, vector_field="dense")

    with pytest.raises(ConfigurationError, match="pass an embedding model"):
        await retrieve(retriever, "whales")

    assert Settings._embed_model is None


# --- nodes that LlamaIndex has stored


PARENT = TextNode(id_="parent", text="The whole chapter.")
CHAPTER = {
    NodeRelationship.SOURCE: RelatedNodeInfo(node_id="book"),
    NodeRelationship.PARENT: RelatedNodeInfo(node_id="parent"),
}
STORED: list[BaseNode] = [
    TextNode(
        id_="first",
        text="Whales sing.",
        metadata={"page": 7, "draft": "secret"},
        excluded_llm_metadata_keys=["draft"],
        relationships={**CHAPTER, NodeRelationship.NEXT: RelatedNodeInfo(node_id="second")},
        start_char_idx=100,
    ),
    TextNode(
        id_="second",
        text="Whales sing for hours.",
        relationships={**CHAPTER, NodeRelationship.PREVIOUS: RelatedNodeInfo(node_id="first")},
    ),
    IndexNode(id_="leads on", text="Whales sing for hours: see the chapter.", index_id="chapter"),
    ImageNode(id_="image", text="Whales on a picture", image_url="http://localhost/whales.png"),
    Node(id_="other", text_resource={"text": "Whales"}),
]


@pytest.fixture(scope="module")
def store(milvus26: MilvusClient) -> str:
    """A collection as llama-index-vector-stores-milvus makes and fills it."""
    fill_store(milvus26, STORE, STORED)
    return STORE


def fill_store(milvus26: MilvusClient, name: str, nodes: Sequence[BaseNode]) -> None:
    milvus26.drop_collection(name)
    schema = milvus26.create_schema(enable_dynamic_field=True)
    schema.add_field("id", DataType.VARCHAR, max_length=65_535, is_primary=True)
    schema.add_field("doc_id", DataType.VARCHAR, max_length=65_535)
    schema.add_field("text", DataType.VARCHAR, max_length=65_535)
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=LetterEmbeddings.dim)
    indexes = milvus26.prepare_index_params()
    indexes.add_index("embedding", index_type="FLAT", metric_type="IP")
    milvus26.create_collection(
        name, schema=schema, index_params=indexes, consistency_level="Strong"
    )
    milvus26.insert(
        name,
        [
            {
                **node_to_metadata_dict(node, remove_text=True),
                "id": node.node_id,
                "text": node.get_content(),
                "embedding": LetterEmbeddings().embed_query(node.get_content()),
            }
            for node in nodes
        ],
    )


@pytest.fixture
def over_store(store: str, milvus26_uri: str, ranker: VLLMRanker) -> MilvusVLLMRetriever:
    return MilvusVLLMRetriever(
        store, ranker, uri=milvus26_uri, embed_model=LetterModel(), similarity_top_k=5
    )


async def test_nodes_that_llama_index_stored_come_back_as_they_were(
    over_store: MilvusVLLMRetriever, retrieve: Retrieve
) -> None:
    found = {n.node_id: n.node for n in await retrieve(over_store, "whales")}

    assert list(found) == ["leads on", "second", "image", "first", "other"]
    for stored in STORED:
        node = found[stored.node_id]
        assert isinstance(node, type(stored))
        assert node.get_content() == stored.get_content()
        assert node.relationships == stored.relationships
        assert node.metadata.items() >= stored.metadata.items()


async def test_what_a_stored_node_hides_stays_hidden_and_its_own_metadata_is_all_there_is(
    over_store: MilvusVLLMRetriever, retrieve: Retrieve
) -> None:
    found = next(n for n in await retrieve(over_store, "whales") if n.node_id == "first")

    assert found.node.get_content(MetadataMode.LLM) == "page: 7\n\nWhales sing."
    assert not {"id", "doc_id", "_node_content", "_node_type"} & set(found.metadata)


async def test_the_json_of_llama_indexs_workflows_reads_every_kind_of_node_back(
    over_store: MilvusVLLMRetriever, retrieve: Retrieve
) -> None:
    json = JsonSerializer()
    nodes = [n.node for n in await retrieve(over_store, "whales")]

    for stored in STORED:
        node = next(n for n in nodes if n.node_id == stored.node_id)
        back = json.deserialize(json.serialize(node))
        assert type(back) is type(stored)
        assert back.to_dict() == node.to_dict()
    assert json.deserialize(json.serialize({"found": nodes}))["found"][0].id_ == nodes[0].id_


async def test_the_json_of_a_row_reads_back_as_a_text_node(
    retriever: MilvusVLLMRetriever, retrieve: Retrieve
) -> None:
    node = (await retrieve(retriever, "whales"))[0].node

    only = JsonSerializer(allowed_types=[TextNode])
    back = only.deserialize(only.serialize(node))

    assert type(back) is TextNode
    assert back.to_dict() == node.to_dict()


async def test_every_kind_of_node_can_be_pickled(
    over_store: MilvusVLLMRetriever, retrieve: Retrieve
) -> None:
    for found in await retrieve(over_store, "whales"):
        copied = pickle.loads(pickle.dumps(found.node))
        assert copied == found.node
        assert copied.hash == found.node.hash


OWN_SCORES = {"relevance_score": 0.9, "reranked_by": "an editor", "page": 7}


@pytest.mark.parametrize("ranked", [True, False])
@pytest.mark.parametrize("written_by", ["LlamaIndex", "others"])
async def test_own_metadata_with_the_names_of_scores_comes_back_as_stored(
    milvus26: MilvusClient,
    milvus26_uri: str,
    fake_vllm: FakeVLLM,
    retrieve: Retrieve,
    written_by: str,
    ranked: bool,
) -> None:
    if written_by == "LlamaIndex":
        node = TextNode(
            id_="1",
            text="Whales sing.",
            metadata=OWN_SCORES,
            excluded_llm_metadata_keys=["reranked_by"],
        )
        fill_store(milvus26, "own_scores", [node])
    else:
        create_collection(milvus26, "own_scores", texts=[], dense=0)
        milvus26.insert("own_scores", [{"pk": 1, "document": "Whales sing.", **OWN_SCORES}])
    retriever = MilvusVLLMRetriever(
        "own_scores",
        VLLMRanker(fake_vllm.url) if ranked else None,
        uri=milvus26_uri,
        embed_model=LetterModel(),
    )

    (found,) = await retrieve(retriever, "whales")

    assert found.metadata["relevance_score"] == (len("Whales sing.") if ranked else None)
    assert found.metadata["reranked_by"] == ("milvus" if ranked else None)
    assert found.metadata["stored_relevance_score"] == 0.9
    assert found.metadata["stored_reranked_by"] == "an editor"
    shown = found.node.get_content(MetadataMode.LLM)
    assert "page: 7" in shown
    assert "stored_relevance_score: 0.9" in shown
    assert ("an editor" in shown) == (written_by == "others")  # hidden by the node itself


@pytest.fixture
def with_objects(store: str, milvus26_uri: str, ranker: VLLMRanker) -> MilvusVLLMRetriever:
    """Over the store, one of whose nodes stands for an object."""
    return MilvusVLLMRetriever(
        store,
        ranker,
        uri=milvus26_uri,
        embed_model=LetterModel(),
        object_map={"chapter": PARENT},
    )


async def test_an_index_node_leads_to_its_object(
    with_objects: MilvusVLLMRetriever, retrieve: Retrieve
) -> None:
    nodes = await retrieve(with_objects, "whales")

    assert [n.node_id for n in nodes] == ["parent", "second"]


# --- observability


class Recorder(BaseEventHandler):
    """Keeps the events it hears."""

    heard: list[BaseEvent] = Field(default_factory=list)

    def handle(self, event: BaseEvent, **_: Any) -> None:
        self.heard.append(event)


@pytest.fixture
def events() -> Iterator[list[BaseEvent]]:
    """What LlamaIndex's instrumentation tells while the test runs."""
    recorder, root = Recorder(), get_dispatcher()
    root.add_event_handler(recorder)
    yield recorder.heard
    root.event_handlers.remove(recorder)


async def test_a_retrieval_is_told_once_to_event_handlers_and_callbacks(
    ranker: VLLMRanker, milvus26_uri: str, events: list[BaseEvent], retrieve: Retrieve
) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    retriever = MilvusVLLMRetriever(
        NAME, ranker, uri=milvus26_uri, callback_manager=CallbackManager([debug])
    )

    nodes = await retrieve(retriever, "violin")

    assert [e.class_name() for e in events] == ["RetrievalStartEvent", "RetrievalEndEvent"]
    assert events[1].nodes == nodes
    ((start, end),) = debug.get_event_pairs(CBEventType.RETRIEVE)
    assert start.payload == {"query_str": "violin"}
    assert end.payload == {"nodes": nodes}


# --- several queries at once

RetrieveMany = Callable[
    [MilvusVLLMRetriever, list[QueryType]], Awaitable[list[list[NodeWithScore]]]
]


@pytest.fixture(params=["sync", "async"])
def retrieve_many(request: pytest.FixtureRequest) -> RetrieveMany:
    """Retrieve for several queries, blocking in one run of the test and async in the other."""

    async def run(
        retriever: MilvusVLLMRetriever, queries: list[QueryType], **arguments: Any
    ) -> list[list[NodeWithScore]]:
        async with retriever:
            if request.param == "sync":
                return retriever.retrieve_many(queries, **arguments)
            return await retriever.aretrieve_many(queries, **arguments)

    return run


async def test_several_queries_give_what_each_gives_alone(
    retriever: MilvusVLLMRetriever, retrieve_many: RetrieveMany
) -> None:
    queries: list[QueryType] = ["whales", QueryBundle("bread"), "violin"]

    together = await retrieve_many(retriever, queries)

    assert together == [retriever.retrieve(query) for query in queries]
    retriever.close()


async def test_several_queries_are_searched_for_in_few_requests(
    retriever: MilvusVLLMRetriever, retrieve_many: RetrieveMany, fake_vllm: FakeVLLM
) -> None:
    queries: list[QueryType] = [f"query {i}" for i in range(9)]

    await retrieve_many(retriever, queries)

    asked = [received.body["query"] for received in fake_vllm.received]
    assert sorted(asked) == queries
    assert fake_vllm.most_in_flight <= 4


async def test_no_queries_give_no_answers(
    retriever: MilvusVLLMRetriever, retrieve_many: RetrieveMany
) -> None:
    assert await retrieve_many(retriever, []) == []


async def test_each_of_several_queries_leads_through_index_nodes(
    with_objects: MilvusVLLMRetriever, retrieve_many: RetrieveMany
) -> None:
    found = await retrieve_many(with_objects, ["whales", "songs"])

    assert [[n.node_id for n in nodes] for nodes in found] == [["parent", "second"]] * 2


async def test_each_of_several_queries_is_told_to_event_handlers_and_callbacks(
    ranker: VLLMRanker, milvus26_uri: str, events: list[BaseEvent], retrieve_many: RetrieveMany
) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    retriever = MilvusVLLMRetriever(
        NAME, ranker, uri=milvus26_uri, callback_manager=CallbackManager([debug])
    )

    found = await retrieve_many(retriever, ["violin", "bread"])

    kinds = [event.class_name() for event in events]
    assert kinds == ["RetrievalStartEvent"] * 2 + ["RetrievalEndEvent"] * 2
    assert [event.nodes for event in events[2:]] == found
    pairs = debug.get_event_pairs(CBEventType.RETRIEVE)
    assert [start.payload["query_str"] for start, _ in pairs] == ["violin", "bread"]
    assert [end.payload["nodes"] for _, end in pairs] == found


@pytest.fixture
def spans() -> Iterator[SimpleSpanHandler]:
    """What LlamaIndex's instrumentation has for spans while the test runs."""
    handler, root = SimpleSpanHandler(), get_dispatcher()
    root.add_span_handler(handler)
    yield handler
    root.span_handlers.remove(handler)


def named(span_id: str | None) -> str:
    return str(span_id).split("-")[0]


async def test_several_queries_have_one_span_and_their_events_are_in_it(
    retriever: MilvusVLLMRetriever,
    retrieve_many: RetrieveMany,
    events: list[BaseEvent],
    spans: SimpleSpanHandler,
) -> None:
    await retrieve_many(retriever, ["violin", "bread"])

    (span,) = [s for s in spans.completed_spans if "retrieve_many" in s.id_]
    told = [e for e in events if e.class_name().startswith("Retrieval")]
    assert len(told) == 4
    assert {e.span_id for e in told} == {span.id_}


async def test_one_query_has_one_span_of_retrieving(
    retriever: MilvusVLLMRetriever, retrieve: Retrieve, spans: SimpleSpanHandler
) -> None:
    await retrieve(retriever, "violin")

    names = [named(span.id_).rpartition(".")[2] for span in spans.completed_spans]
    assert sum(name in {"retrieve", "aretrieve"} for name in names) == 1


@pytest.mark.parametrize("failing", [0, 1, 2])
async def test_where_one_of_several_queries_fails_the_others_are_told_and_its_error_is_raised(
    milvus26_uri: str,
    fake_vllm: FakeVLLM,
    events: list[BaseEvent],
    retrieve_many: RetrieveMany,
    failing: int,
) -> None:
    queries: list[QueryType] = ["violin", "bread", "whales"]
    original = fake_vllm.answer

    def answer(received: Any) -> Reply:
        if received.body["query"] == queries[failing]:
            return Reply.json(400, {"error": "no"})
        return original(received)

    debug = LlamaDebugHandler(print_trace_on_end=False)
    retriever = MilvusVLLMRetriever(
        NAME,
        VLLMRanker(fake_vllm.url, mode="client"),
        uri=milvus26_uri,
        callback_manager=CallbackManager([debug]),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_vllm, "answer", answer)
        with pytest.raises(RerankStatusError) as caught:
            await retrieve_many(retriever, queries)

    ended = [e.str_or_query_bundle.query_str for e in events if "End" in e.class_name()]
    assert ended == [query for query in queries if query != queries[failing]]
    payloads = [end.payload for _, end in debug.get_event_pairs(CBEventType.RETRIEVE)]
    assert [set(p) for p in payloads] == [
        {"exception"} if i == failing else {"nodes"} for i in range(3)
    ]
    assert payloads[failing]["exception"] is caught.value


class Gate:
    """Counts who is inside at once."""

    def __init__(self) -> None:
        self.inside = self.most = 0
        self.lock = threading.Lock()

    @contextmanager
    def entered(self) -> Iterator[None]:
        with self.lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        try:
            yield
        finally:
            with self.lock:
                self.inside -= 1


class CountingModel(LetterModel):
    """Counts how many queries it embeds at once."""

    _gate: Gate = PrivateAttr(default_factory=Gate)

    def _get_query_embedding(self, query: str) -> list[float]:
        with self._gate.entered():
            return super()._get_query_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        with self._gate.entered():
            for _ in range(5):
                await asyncio.sleep(0)
            return LetterEmbeddings().embed_query(query)

    def _get_text_embedding(self, text: str) -> list[float]:
        raise AssertionError("a query is no document: some models embed the two differently")

    async def _aget_text_embedding(self, text: str) -> list[float]:
        raise AssertionError("a query is no document: some models embed the two differently")


@pytest.mark.parametrize(
    ("workers_of_model", "num_workers", "most"), [(2, None, 2), (None, 2, 2), (3, 1, 1), (1, 3, 1)]
)
@pytest.mark.parametrize("with_ranker", [True, False])
async def test_no_more_queries_are_embedded_at_once_than_was_said(
    milvus26_uri: str,
    fake_vllm: FakeVLLM,
    retrieve_many: Callable[..., Awaitable[Any]],
    workers_of_model: int | None,
    num_workers: int | None,
    most: int,
    *,
    with_ranker: bool,
) -> None:
    model = CountingModel(num_workers=workers_of_model)
    ranker = VLLMRanker(fake_vllm.url, mode="client") if with_ranker else None
    retriever = MilvusVLLMRetriever(NAME, ranker, uri=milvus26_uri, embed_model=model)

    found = await retrieve_many(
        retriever, [f"query {i}" for i in range(20)], num_workers=num_workers
    )

    assert len(found) == 20
    assert 1 <= model._gate.most <= most


async def test_without_a_word_about_it_few_queries_are_embedded_at_once(
    milvus26_uri: str, retrieve_many: RetrieveMany
) -> None:
    model = CountingModel()
    retriever = MilvusVLLMRetriever(NAME, None, uri=milvus26_uri, embed_model=model)

    await retrieve_many(retriever, [f"query {i}" for i in range(60)])

    assert 1 <= model._gate.most <= 16


@pytest.mark.parametrize("num_workers", [0, -1, True, 1.5, "2"])
async def test_workers_are_a_positive_whole_number(
    retriever: MilvusVLLMRetriever, retrieve_many: Callable[..., Awaitable[Any]], num_workers: Any
) -> None:
    with pytest.raises(ConfigurationError, match="num_workers"):
        await retrieve_many(retriever, ["violin"], num_workers=num_workers)


async def test_explain_takes_a_text_or_a_bundle(retriever: MilvusVLLMRetriever) -> None:
    async with retriever:
        explanation = retriever.explain("whales")
        assert await retriever.aexplain(QueryBundle("whales")) == explanation

    assert [row.hit.pk for row in explanation.hits] == LONGEST[:3]
    assert explanation.candidates == len(TEXTS)


def test_a_with_block_closes_the_retriever_which_can_be_used_again(
    retriever: MilvusVLLMRetriever,
) -> None:
    for _ in range(2):
        with retriever as open_retriever:
            assert len(open_retriever.retrieve("whales")) == 3


def test_it_tells_llama_index_its_name() -> None:
    assert MilvusVLLMRetriever.class_name() == "MilvusVLLMRetriever"


def test_secrets_are_not_printed_with_the_retriever(fake_vllm: FakeVLLM) -> None:
    retriever = MilvusVLLMRetriever(
        NAME,
        VLLMRanker(fake_vllm.url, api_key="hidden"),
        uri="http://root:hidden@127.0.0.1:1",
        token="hidden",
        connection_args={"password": "hidden"},
    )

    assert "hidden" not in repr(retriever)
    assert "hidden" not in repr(vars(retriever))


# --- arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reranker": None}, "unknown argument 'reranker' (did you mean 'ranker'?)"),
        ({"k": 3}, "unknown argument 'k': it is similarity_top_k= here"),
        ({"top_k": 3}, "unknown argument 'top_k': it is similarity_top_k= here"),
        ({"filter": "a > 1"}, "filters=MetadataFilters(...), or a Milvus expression as expr="),
        ({"similarity_topk": 3}, "did you mean 'similarity_top_k'"),
        ({"embedding": LetterModel()}, "it is embed_model= here"),
        ({"api_key": "sk-mine"}, "give it to the ranker: ranker=VLLMRanker(endpoint, api_key=...)"),
        ({"endpoint": "http://vllm"}, "give it to the ranker"),
        ({"similarity_top_k": 0}, "similarity_top_k must be between 1"),
        ({"similarity_top_k": True}, "similarity_top_k must be a whole number, not bool"),
        ({"fetch_k": True}, "fetch_k must be a whole number, not bool"),
        ({"filters": {"a": 1}}, "filters must be MetadataFilters, not dict"),
        ({"expr": "a == 'b"}, "expr is not complete"),
        ({"timeout": 0}, "timeout must be a positive number"),
        ({"timeout": True}, "timeout must be a positive number"),
        ({"score_threshold": 0.5}, "pass ranker=VLLMRanker(...) too"),
        ({"ranker": "http://localhost:8000"}, "VLLMRanker('http://localhost:8000')"),
        ({"sparse_embedding": 5}, "sparse encoder must be a callable"),
    ],
)
def test_a_bad_argument_is_refused_before_anything_is_sent(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        MilvusVLLMRetriever(NAME, **{"ranker": None, **arguments})

    assert message in str(caught.value)
    assert "sk-mine" not in str(caught.value)


async def test_fewer_candidates_than_nodes_are_refused(
    milvus26_uri: str, retrieve: Retrieve
) -> None:
    retriever = MilvusVLLMRetriever(
        NAME, None, uri=milvus26_uri, vector_field="sparse", similarity_top_k=9, fetch_k=5
    )

    with pytest.raises(ConfigurationError, match=r"fetch_k \(5\) is smaller than"):
        await retrieve(retriever, "whales")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("k", "set retriever.similarity_top_k"),
        ("top_k", "set retriever.similarity_top_k"),
        ("similarity_top_k", "set retriever.similarity_top_k"),
        ("filter", "within(filters=MetadataFilters(...))"),
        ("filters", "within(filters=...)"),
        ("expr", "within(expr=...)"),
        ("fetch_k", "set retriever.fetch_k"),
    ],
)
async def test_an_argument_of_a_call_is_refused_with_what_to_do(
    retriever: MilvusVLLMRetriever,
    retrieve_many: Callable[..., Awaitable[Any]],
    argument: str,
    message: str,
) -> None:
    asked: dict[str, Any] = {argument: 1}
    with pytest.raises(ConfigurationError) as many:
        await retrieve_many(retriever, ["whales"], **asked)
    with pytest.raises(ConfigurationError) as one:
        retriever.retrieve("whales", **asked)
    with pytest.raises(ConfigurationError) as aone:
        await retriever.aretrieve("whales", **asked)

    for caught in (many, one, aone):
        assert message in str(caught.value)


async def test_numpys_whole_numbers_are_numbers(milvus26_uri: str, retrieve: Retrieve) -> None:
    retriever = MilvusVLLMRetriever(
        NAME, None, uri=milvus26_uri, similarity_top_k=np.int64(3), fetch_k=np.int32(7)
    )
    retriever.similarity_top_k = np.int64(1)

    assert len(await retrieve(retriever, "whales violin")) == 1


@pytest.mark.parametrize("way", ["the constructor", "from_vector_store", "from_index"])
def test_a_forgotten_ranker_is_warned_of_at_the_line_that_forgot_it(
    monkeypatch: pytest.MonkeyPatch, milvus26: MilvusClient, way: str
) -> None:
    taken = {"collection_name": NAME, "client": milvus26}
    monkeypatch.setattr(
        "milvus_vllm_retrievers.llama_index._retriever.llama_index_arguments", lambda store: taken
    )
    make: dict[str, Callable[..., Any]] = {
        "the constructor": lambda **ranker: MilvusVLLMRetriever(NAME, **ranker),
        "from_vector_store": lambda **ranker: MilvusVLLMRetriever.from_vector_store(5, **ranker),
        "from_index": lambda **ranker: MilvusVLLMRetriever.from_index(
            SimpleNamespace(vector_store=5), **ranker
        ),
    }

    with pytest.warns(UserWarning, match=r"ranker=VLLMRanker\(.*ranker=None") as caught:
        make[way]()
    make[way](ranker=None)  # written out: not a word
    make[way](ranker=VLLMRanker("http://localhost"))

    assert [warning.filename for warning in caught] == [__file__]


def test_a_call_has_a_minute_unless_said_otherwise() -> None:
    assert MilvusVLLMRetriever(NAME, None).timeout == 60
    assert MilvusVLLMRetriever(NAME, None, timeout=None).timeout is None


# --- attributes


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses that clients of Milvus are made for."""
    addresses: list[str] = []
    original = MilvusClient.__init__

    def noted(self: Any, uri: str = "", *args: Any, **kwargs: Any) -> None:
        addresses.append(uri)
        original(self, uri, *args, **kwargs)

    monkeypatch.setattr(MilvusClient, "__init__", noted)
    return addresses


@pytest.mark.parametrize(
    ("attribute", "value", "found"),
    [
        ("similarity_top_k", 1, [2]),
        ("filters", MetadataFilters(filters=[MetadataFilter(key="number", value=8)]), [8]),
        ("expr", "number == 8", [8]),
        ("score_threshold", 1e9, []),
        ("fetch_k", 2, [2, 8]),
    ],
)
def test_an_attribute_that_is_set_takes_effect_on_the_same_connection(
    milvus26_uri: str,
    fake_vllm: FakeVLLM,
    made: list[str],
    attribute: str,
    value: Any,
    found: list[int],
) -> None:
    ranker = VLLMRanker(fake_vllm.url, mode="client")
    with MilvusVLLMRetriever(NAME, ranker, uri=milvus26_uri, similarity_top_k=2) as retriever:
        before = [n.metadata["pk"] for n in retriever.retrieve("whales, violin")]
        setattr(retriever, attribute, value)
        after = [n.metadata["pk"] for n in retriever.retrieve("whales, violin")]
        now = getattr(retriever, attribute)

    assert before == [2, 8]
    assert after == found
    assert now == value
    assert len(made) == 1


def test_a_timeout_that_is_set_takes_effect(retriever: MilvusVLLMRetriever) -> None:
    with retriever:
        retriever.retrieve("whales")
        retriever.timeout = 1e-6
        with pytest.raises(MilvusVLLMError, match="timeout"):
            retriever.retrieve("whales")
        retriever.timeout = None
        assert len(retriever.retrieve("whales")) == 3


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("similarity_top_k", True, "similarity_top_k must be a whole number, not bool"),
        ("similarity_top_k", 0, "similarity_top_k must be between 1"),
        ("fetch_k", -1, "fetch_k must be between 1"),
        ("timeout", -1, "timeout must be a positive number"),
        ("filters", "a > 1", "filters must be MetadataFilters, not str"),
        ("expr", "a == 'b", "expr is not complete"),
        ("score_threshold", "high", "score_threshold must be a finite number"),
        ("ranker", None, "make a new MilvusVLLMRetriever with ranker=..."),
        ("uri", "http://elsewhere", "make a new MilvusVLLMRetriever with uri=..."),
        ("partition_names", ["b"], "make a new MilvusVLLMRetriever with partition_names=..."),
        ("similarity_topk", 3, "did you mean 'similarity_top_k'?"),
        ("k", 3, "it is similarity_top_k= here"),
    ],
)
def test_what_cannot_be_set_is_refused_and_changes_nothing(
    retriever: MilvusVLLMRetriever, attribute: str, value: Any, message: str
) -> None:
    before = dict(vars(retriever))
    with pytest.raises(ConfigurationError) as caught:
        setattr(retriever, attribute, value)

    assert message in str(caught.value)
    assert vars(retriever) == before


@given(st.lists(st.tuples(st.sampled_from(["similarity_top_k", "fetch_k"]), st.integers())))
def test_whatever_is_set_the_last_value_that_was_taken_counts(
    settings: list[tuple[str, int]],
) -> None:
    retriever = MilvusVLLMRetriever(NAME, None)
    taken: dict[str, int | None] = {"similarity_top_k": 2, "fetch_k": None}

    for name, value in settings:
        try:
            setattr(retriever, name, value)
        except ConfigurationError:
            assert not 1 <= value <= 16_384
        else:
            taken[name] = value

    assert {name: getattr(retriever, name) for name in taken} == taken


def test_what_llama_index_sets_can_be_set(retriever: MilvusVLLMRetriever) -> None:
    manager, objects = CallbackManager(), {"chapter": PARENT}

    retriever.callback_manager, retriever.object_map = manager, objects

    assert (retriever.callback_manager, retriever.object_map) == (manager, objects)


@pytest.mark.parametrize(
    "embed_model",
    ["text-embedding-3", LetterEmbeddings(), {"dense": LetterEmbeddings()}],
    ids=["a name", "LangChain's", "LangChain's, by field"],
)
def test_what_is_no_embedding_model_of_llama_index_is_refused(embed_model: Any) -> None:
    with pytest.raises(ConfigurationError, match="embed_model"):
        MilvusVLLMRetriever(NAME, None, embed_model=embed_model)


@pytest.mark.parametrize("query", ["", QueryBundle("  \n")])
async def test_an_empty_query_is_refused(
    retriever: MilvusVLLMRetriever, retrieve: Retrieve, query: QueryType
) -> None:
    with pytest.raises(ConfigurationError, match="non-empty text"):
        await retrieve(retriever, query)


async def test_one_query_is_not_taken_for_several_letter_by_letter() -> None:
    retriever = MilvusVLLMRetriever(NAME, None)

    with pytest.raises(ConfigurationError, match="a list of queries"):
        retriever.retrieve_many("abc")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="a list of queries"):
        await retriever.aretrieve_many("abc")  # type: ignore[arg-type]


def test_what_is_no_index_is_refused_with_where_it_goes() -> None:
    with pytest.raises(
        ConfigurationError, match=r"VectorStoreIndex, not an int .*from_vector_store"
    ):
        MilvusVLLMRetriever.from_index(5, None)
