"""LlamaIndex's postprocessors: straight against vLLM, and through Milvus."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import numpy as np
import pytest
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.base import BaseEvent
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import (
    Document,
    ImageNode,
    IndexNode,
    MetadataMode,
    NodeWithScore,
    QueryBundle,
    TextNode,
)
from llama_index.core.workflow import JsonSerializer
from pydantic import Field
from pymilvus import DataType, MilvusClient

from milvus_vllm_retrievers import (
    ConfigurationError,
    MilvusVLLMError,
    RerankConnectionError,
    SearchError,
)
from milvus_vllm_retrievers.llama_index import MilvusVLLMRerank, VLLMRanker, VLLMRerank
from tests.corpus import TEXTS, create_collection
from tests.fakes import FakeVLLM

NAME = "llama_rerank_docs"
NAMED_KEYS = "llama_rerank_named"
NO_DENSE_FIELD = "llama_rerank_bm25"
LONGEST = sorted(range(len(TEXTS)), key=lambda i: -len(TEXTS[i]))

Rerank = VLLMRerank | MilvusVLLMRerank
Postprocess = Callable[..., Awaitable[list[NodeWithScore]]]


@pytest.fixture(scope="module", autouse=True)
def _collections(milvus26: MilvusClient) -> None:
    create_collection(milvus26, NAME, bm25=False)
    create_collection(
        milvus26, NAMED_KEYS, bm25=False, keys=DataType.VARCHAR, primary_key="id", text_field="text"
    )
    create_collection(milvus26, NO_DENSE_FIELD, dense=0)


@pytest.fixture(params=["sync", "async"])
def postprocess(request: pytest.FixtureRequest) -> Postprocess:
    """Call a postprocessor, blocking in one run of the test and async in the other."""

    async def run(reranker: Rerank, nodes: list[NodeWithScore], **query: Any) -> Any:
        try:
            if request.param == "sync":
                return reranker.postprocess_nodes(nodes, **query)
            return await reranker.apostprocess_nodes(nodes, **query)
        finally:
            await reranker.aclose()

    return run


@pytest.fixture(params=["straight", "through Milvus"])
def reranker(request: pytest.FixtureRequest, fake_vllm: FakeVLLM, milvus26_uri: str) -> Rerank:
    """Either postprocessor; the fake scores by the text's length."""
    if request.param == "straight":
        return VLLMRerank(endpoint=fake_vllm.url)
    return MilvusVLLMRerank(NAME, ranker=VLLMRanker(fake_vllm.url), uri=milvus26_uri)


@pytest.fixture
def nodes() -> list[NodeWithScore]:
    """A node for each row, as another retriever might have found them."""
    return [
        NodeWithScore(node=TextNode(id_=str(i), text=text, metadata={"row": i}), score=1 - i / 100)
        for i, text in enumerate(TEXTS)
    ]


# --- both


async def test_copies_come_back_most_relevant_first_with_their_scores(
    reranker: Rerank, postprocess: Postprocess, nodes: list[NodeWithScore]
) -> None:
    reranker.top_n = 3

    reranked = await postprocess(reranker, nodes, query_str="longest")

    assert [n.node_id for n in reranked] == [str(i) for i in LONGEST[:3]]
    assert [n.score for n in reranked] == [float(len(TEXTS[i])) for i in LONGEST[:3]]
    assert reranked[0].metadata == {
        "row": LONGEST[0],
        "relevance_score": float(len(TEXTS[LONGEST[0]])),
        "retrieval_score": 1 - LONGEST[0] / 100,
        "reranked_by": "client" if isinstance(reranker, VLLMRerank) else "milvus",
    }


async def test_the_given_nodes_stay_as_they_are(
    reranker: Rerank, postprocess: Postprocess, nodes: list[NodeWithScore]
) -> None:
    before = [n.model_copy(deep=True) for n in nodes]

    await postprocess(reranker, nodes, query_str="longest")

    assert nodes == before


async def test_neither_the_language_model_nor_an_embedding_model_sees_the_scores(
    reranker: Rerank, postprocess: Postprocess, nodes: list[NodeWithScore]
) -> None:
    node = (await postprocess(reranker, nodes, query_str="longest"))[0].node

    for mode in (MetadataMode.LLM, MetadataMode.EMBED):
        assert node.get_content(mode) == f"row: {LONGEST[0]}\n\n{TEXTS[LONGEST[0]]}"


async def test_the_score_of_the_retrieval_is_kept_only_where_there_was_one_and_it_is_wanted(
    reranker: Rerank, postprocess: Postprocess, nodes: list[NodeWithScore]
) -> None:
    nodes[LONGEST[0]].score = None
    scoreless, scored = (await postprocess(reranker, nodes, query_str="longest"))[:2]
    reranker.keep_retrieval_score = False
    unwanted = (await postprocess(reranker, nodes, query_str="longest"))[1]

    assert "retrieval_score" not in scoreless.metadata
    assert scored.metadata["retrieval_score"] == 1 - LONGEST[1] / 100
    assert "retrieval_score" not in unwanted.metadata


async def test_the_query_comes_as_a_text_or_as_a_bundle(
    reranker: Rerank, postprocess: Postprocess, nodes: list[NodeWithScore], fake_vllm: FakeVLLM
) -> None:
    await postprocess(reranker, nodes, query_str="a text")
    await postprocess(reranker, nodes, query_bundle=QueryBundle("a bundle"))

    assert [r.body["query"] for r in fake_vllm.received] == ["a text", "a bundle"]


async def test_without_a_query_nothing_is_reranked(
    reranker: Rerank, postprocess: Postprocess, nodes: list[NodeWithScore], fake_vllm: FakeVLLM
) -> None:
    with pytest.raises(ConfigurationError, match="pass query_str or query_bundle"):
        await postprocess(reranker, nodes)

    assert fake_vllm.received == []


async def test_no_nodes_send_no_request(
    reranker: Rerank, postprocess: Postprocess, fake_vllm: FakeVLLM
) -> None:
    assert await postprocess(reranker, [], query_str="any") == []
    assert fake_vllm.received == []


async def test_an_index_node_is_reranked_and_keeps_what_it_leads_to(
    reranker: Rerank, postprocess: Postprocess, nodes: list[NodeWithScore]
) -> None:
    leads_on = IndexNode(id_=str(LONGEST[0]), text=TEXTS[LONGEST[0]], index_id="x", obj=reranker)
    given = [NodeWithScore(node=leads_on), *nodes[:2]]

    node = (await postprocess(reranker, given, query_str="longest"))[0].node

    assert isinstance(node, IndexNode)
    assert node.index_id == "x"
    assert node.obj is reranker


async def test_a_node_given_twice_comes_back_twice(
    reranker: Rerank, postprocess: Postprocess, nodes: list[NodeWithScore]
) -> None:
    twice = [nodes[3], nodes[2], nodes[3]]

    reranked = await postprocess(reranker, twice, query_str="longest")

    assert [n.node_id for n in reranked] == ["2", "3", "3"]


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


@pytest.mark.parametrize("count", [12, 0])
async def test_a_reranking_is_told_once_to_event_handlers_and_callbacks_even_of_nothing(
    reranker: Rerank,
    postprocess: Postprocess,
    nodes: list[NodeWithScore],
    events: list[Any],
    count: int,
) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    reranker.callback_manager = CallbackManager([debug])
    reranker.top_n = 5
    given = nodes[:count]

    reranked = await postprocess(reranker, given, query_str="longest")

    start, end = events
    assert start.class_name() == "ReRankStartEvent"
    assert (start.query.query_str, start.nodes, start.top_n) == ("longest", given, 5)
    assert end.class_name() == "ReRankEndEvent"
    assert end.nodes == reranked
    ((called, returned),) = debug.get_event_pairs(CBEventType.RERANKING)
    assert called.payload == {
        "nodes": given,
        "model_name": "",
        "query_str": "longest",
        "top_k": 5,
    }
    assert returned.payload == {"nodes": reranked, "model_name": reranker._adapter.model}


async def test_events_name_the_model_once_an_answer_has_named_it(
    fake_vllm: FakeVLLM, nodes: list[NodeWithScore], postprocess: Postprocess, events: list[Any]
) -> None:
    reranker = VLLMRerank(endpoint=fake_vllm.url)
    debug = LlamaDebugHandler(print_trace_on_end=False)
    reranker.callback_manager = CallbackManager([debug])

    for _ in range(2):
        await postprocess(reranker, nodes, query_str="longest")

    starts = [event for event in events if event.class_name() == "ReRankStartEvent"]
    assert [start.model_name for start in starts] == ["", "fake"]
    ends = [end.payload for _, end in debug.get_event_pairs(CBEventType.RERANKING)]
    assert [end["model_name"] for end in ends] == ["fake", "fake"]


class Given(BaseRetriever):
    """A retriever that returns the nodes it was given."""

    def __init__(self, nodes: list[NodeWithScore]) -> None:
        super().__init__()
        self._nodes = nodes

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return self._nodes


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
async def test_the_events_of_a_reranking_are_in_a_span_of_its_own_not_the_query_engines(
    reranker: Rerank, nodes: list[NodeWithScore], events: list[Any], *, is_async: bool
) -> None:
    spans, root = SimpleSpanHandler(), get_dispatcher()
    engine = RetrieverQueryEngine.from_args(
        Given(nodes), llm=MockLLM(), node_postprocessors=[reranker]
    )
    root.add_span_handler(spans)
    try:
        async with reranker:
            _ = await engine.aquery("longest") if is_async else engine.query("longest")
    finally:
        root.span_handlers.remove(spans)

    told = [e for e in events if e.class_name().startswith("ReRank")]
    assert len(told) == 2
    owners = {str(e.span_id).rpartition("postprocess_nodes-")[0] for e in told}
    name = type(reranker).__name__
    assert owners == {f"{name}._a" if is_async else f"{name}._"}
    own = next(s for s in spans.completed_spans if s.id_ == told[0].span_id)
    assert str(own.parent_id).startswith("RetrieverQueryEngine.")


async def test_the_json_of_llama_indexs_workflows_reads_every_kind_of_node_back(
    reranker: Rerank, postprocess: Postprocess
) -> None:
    given = [
        TextNode(id_="0", text="a"),
        IndexNode(id_="1", text="ab", index_id="chapter", obj=TextNode(text="the chapter")),
        ImageNode(id_="2", text="abc", image_url="http://localhost/whale.png"),
        Document(id_="3", text="abcd"),
    ]
    json = JsonSerializer()

    reranked = await postprocess(
        reranker, [NodeWithScore(node=node) for node in given], query_str="longest"
    )

    for found in reranked:
        back = json.deserialize(json.serialize(found.node))
        assert type(back) is type(given[int(found.node_id)])
        assert back.to_dict() == found.node.to_dict()


async def test_a_failure_is_raised_and_told_to_callbacks(
    postprocess: Postprocess, nodes: list[NodeWithScore]
) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    ranker = VLLMRanker("http://127.0.0.1:1", max_retries=0)
    reranker = VLLMRerank(ranker, callback_manager=CallbackManager([debug]))

    with pytest.raises(RerankConnectionError, match=r"127\.0\.0\.1:1"):
        await postprocess(reranker, nodes, query_str="any")

    ((_, end),) = debug.get_event_pairs(CBEventType.RERANKING)
    assert isinstance(end.payload["exception"], RerankConnectionError)


def test_they_tell_llama_index_their_names(reranker: Rerank) -> None:
    assert reranker.class_name() == type(reranker).__name__
    assert reranker.to_dict()["class_name"] == type(reranker).__name__


@pytest.fixture(params=["straight", "through Milvus"])
def with_secrets(request: pytest.FixtureRequest) -> Rerank:
    ranker = VLLMRanker("http://localhost", model="bge", api_key="hidden", credential="key1")
    if request.param == "straight":
        return VLLMRerank(ranker)
    return MilvusVLLMRerank(
        NAME,
        ranker=ranker,
        uri="http://root:hidden@127.0.0.1:1",
        token="hidden",
        connection_args={"password": "hidden"},
    )


def test_secrets_are_in_no_dictionary_and_no_print(with_secrets: Rerank) -> None:
    as_dictionary = with_secrets.to_dict()

    assert as_dictionary["ranker"]["model"] == "bge"
    assert "hidden" not in repr(as_dictionary)
    assert "hidden" not in repr(with_secrets)
    assert "hidden" not in str(with_secrets)


def test_secrets_are_in_no_json(with_secrets: Rerank) -> None:
    assert "hidden" not in with_secrets.to_json()


# --- VLLMRerank


async def test_equal_scores_keep_the_given_order(
    fake_vllm: FakeVLLM, postprocess: Postprocess, nodes: list[NodeWithScore]
) -> None:
    fake_vllm.score = lambda query, document: 1.0

    reranked = await postprocess(VLLMRerank(endpoint=fake_vllm.url), nodes[::-1], query_str="any")

    assert [n.node_id for n in reranked] == [n.node_id for n in nodes[::-1]]


@pytest.mark.parametrize(
    ("arguments", "scored"),
    [
        ({}, "text"),
        ({"metadata_mode": MetadataMode.NONE}, "text"),
        ({"metadata_mode": MetadataMode.EMBED}, "title: whales\n\ntext"),
        ({"metadata_mode": MetadataMode.LLM}, "page: 7\n\ntext"),
    ],
)
async def test_the_metadata_mode_says_what_is_scored(
    fake_vllm: FakeVLLM, postprocess: Postprocess, arguments: dict[str, Any], scored: str
) -> None:
    node = TextNode(
        text="text",
        metadata={"page": 7, "title": "whales"},
        excluded_embed_metadata_keys=["page"],
        excluded_llm_metadata_keys=["title"],
    )

    reranker = VLLMRerank(endpoint=fake_vllm.url, **arguments)
    await postprocess(reranker, [NodeWithScore(node=node)], query_str="any")

    assert fake_vllm.received[0].body["documents"] == [scored]


async def test_the_scores_of_an_earlier_reranking_are_not_scored(
    fake_vllm: FakeVLLM, postprocess: Postprocess, nodes: list[NodeWithScore]
) -> None:
    reranker = VLLMRerank(endpoint=fake_vllm.url, metadata_mode=MetadataMode.EMBED)

    once = await postprocess(reranker, nodes[:1], query_str="any")
    await postprocess(reranker, once, query_str="any")

    first, second = fake_vllm.received
    assert second.body["documents"] == first.body["documents"] == [f"row: 0\n\n{TEXTS[0]}"]


async def test_an_image_is_reranked_by_its_text_and_refused_without_one(
    fake_vllm: FakeVLLM, postprocess: Postprocess
) -> None:
    reranker = VLLMRerank(endpoint=fake_vllm.url)
    captioned = ImageNode(text="a whale", image_url="http://localhost/whale.png")
    bare = ImageNode(id_="bare", image_url="http://localhost/whale.png")

    reranked = await postprocess(reranker, [NodeWithScore(node=captioned)], query_str="any")
    with pytest.raises(ConfigurationError, match="'bare' is an image without a text"):
        await postprocess(reranker, [NodeWithScore(node=bare)], query_str="any")

    assert isinstance(reranked[0].node, ImageNode)
    assert [r.body["documents"] for r in fake_vllm.received] == [["a whale"]]


async def test_skip_returns_the_given_order_marked_out_of_the_models_sight(
    postprocess: Postprocess, nodes: list[NodeWithScore]
) -> None:
    ranker = VLLMRanker("http://127.0.0.1:1", on_error="skip", max_retries=0)

    reranked = await postprocess(VLLMRerank(ranker, top_n=2), nodes, query_str="any")

    assert [(n.node_id, n.score) for n in reranked] == [("0", 1.0), ("1", 0.99)]
    assert all(n.metadata["reranked_by"] is None for n in reranked)
    assert all("could not be reached" in n.metadata["rerank_error"] for n in reranked)
    assert "rerank_error" not in reranked[0].node.get_content(MetadataMode.LLM)


async def test_a_node_that_is_reranked_after_all_is_marked_no_longer(
    fake_vllm: FakeVLLM, postprocess: Postprocess, nodes: list[NodeWithScore]
) -> None:
    unreachable = VLLMRanker("http://127.0.0.1:1", on_error="skip", max_retries=0)
    skipped = await postprocess(VLLMRerank(unreachable), nodes, query_str="any")

    reranked = await postprocess(VLLMRerank(endpoint=fake_vllm.url), skipped, query_str="any")

    assert not any("rerank_error" in n.metadata for n in reranked)


HERE = {"endpoint": "http://localhost"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "pass either ranker=VLLMRanker(...)"),
        ({"ranker": VLLMRanker("http://localhost"), **HERE}, "pass either ranker=VLLMRanker(...)"),
        ({"endpoint": "localhost:8000"}, "must be an http:// or https:// URL"),
        ({"ranker": "http://localhost"}, "pass ranker=VLLMRanker(url)"),
        ({**HERE, "top_n": 0}, "top_n must be between 1"),
        ({**HERE, "top_n": True}, "top_n must be a whole number, not bool"),
        ({**HERE, "timeout": True}, "timeout must be a positive number"),
        ({**HERE, "timeout": float("inf")}, "timeout must be a positive number"),
        ({**HERE, "k": 3}, "unknown argument 'k': it is top_n= here"),
        ({**HERE, "top_k": 3}, "unknown argument 'top_k': it is top_n= here"),
        ({**HERE, "api_key": "sk-mine"}, "ranker=VLLMRanker(endpoint, api_key=...)"),
        ({**HERE, "keep_retrieval_scores": 1}, "did you mean 'keep_retrieval_score'?"),
    ],
)
def test_a_bad_argument_is_refused_with_what_to_do(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        VLLMRerank(**arguments)

    assert message in str(caught.value)
    assert "sk-mine" not in str(caught.value)


# --- attributes


async def test_what_is_set_takes_effect_on_the_same_connections(
    reranker: Rerank, nodes: list[NodeWithScore]
) -> None:
    adapter = reranker._adapter
    with reranker:
        assert len(reranker.postprocess_nodes(nodes, query_str="longest")) == len(nodes)
        reranker.top_n = np.int64(2)
        reranker.keep_retrieval_score = False
        reranked = reranker.postprocess_nodes(nodes, query_str="longest")

    assert len(reranked) == 2
    assert not any("retrieval_score" in n.metadata for n in reranked)
    assert reranker._adapter is adapter


async def test_a_timeout_that_is_set_takes_effect(
    reranker: Rerank, postprocess: Postprocess, nodes: list[NodeWithScore]
) -> None:
    await postprocess(reranker, nodes, query_str="longest")
    reranker.timeout = 1e-6
    with pytest.raises(MilvusVLLMError, match="timeout"):
        await postprocess(reranker, nodes, query_str="longest")
    reranker.timeout = None

    assert len(await postprocess(reranker, nodes, query_str="longest")) == len(nodes)


def test_row_reranking_has_a_minute_and_straight_reranking_the_rankers_own_time() -> None:
    ranker = VLLMRanker("http://localhost")

    assert MilvusVLLMRerank(NAME, ranker=ranker).timeout == 60
    assert MilvusVLLMRerank(NAME, ranker=ranker, timeout=None).timeout is None
    assert VLLMRerank(ranker).timeout is None


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("top_n", -2, "top_n must be between 1"),
        ("top_n", True, "top_n must be a whole number, not bool"),
        ("top_n", 2.5, "top_n must be a whole number, not float"),
        ("timeout", 0, "timeout must be a positive number"),
        ("timeout", True, "timeout must be a positive number"),
        ("keep_retrieval_score", "perhaps", "keep_retrieval_score"),
        ("ranker", VLLMRanker("http://elsewhere"), "with ranker=..."),
        ("top_k", 3, "unknown attribute 'top_k': it is top_n= here"),
    ],
)
def test_what_cannot_be_set_is_refused_and_changes_nothing(
    reranker: Rerank, attribute: str, value: Any, message: str
) -> None:
    before = dict(vars(reranker))
    with pytest.raises(ConfigurationError) as caught:
        setattr(reranker, attribute, value)

    assert message in str(caught.value)
    assert vars(reranker) == before


# --- MilvusVLLMRerank


@pytest.fixture
def through_milvus(fake_vllm: FakeVLLM, milvus26_uri: str) -> Callable[..., MilvusVLLMRerank]:
    """Make a MilvusVLLMRerank over the stand-in."""

    def make(collection: str = NAME, ranker: VLLMRanker | None = None, **more: Any) -> Any:
        ranker = ranker or VLLMRanker(fake_vllm.url)
        return MilvusVLLMRerank(collection, ranker=ranker, uri=milvus26_uri, **more)

    return make


async def test_milvus_asks_the_model_once_about_the_texts_it_has_stored(
    through_milvus: Any, postprocess: Postprocess, fake_vllm: FakeVLLM
) -> None:
    elsewhere = [NodeWithScore(node=TextNode(id_=str(i), text="kept here")) for i in (5, 8, 2)]

    reranked = await postprocess(through_milvus(), elsewhere, query_str="longest")

    (request,) = fake_vllm.received
    assert request.path == "/rerank"  # what Milvus asks; this process would ask /v1/rerank
    assert sorted(request.body["documents"]) == sorted(TEXTS[i] for i in (5, 8, 2))
    assert [n.node_id for n in reranked] == ["2", "8", "5"]
    assert {n.text for n in reranked} == {"kept here"}


async def test_keys_may_be_texts_and_equal_scores_are_in_their_order(
    through_milvus: Any, postprocess: Postprocess, fake_vllm: FakeVLLM
) -> None:
    fake_vllm.score = lambda query, document: 1.0
    nodes = [NodeWithScore(node=TextNode(id_=f"id-{i}", text="")) for i in (8, 11, 2)]

    reranked = await postprocess(through_milvus(NAMED_KEYS), nodes, query_str="any")

    assert [n.node_id for n in reranked] == ["id-11", "id-2", "id-8"]


async def test_the_key_may_be_in_the_metadata_of_a_node_with_an_id_of_its_own(
    through_milvus: Any, postprocess: Postprocess
) -> None:
    nodes = [NodeWithScore(node=TextNode(text="", metadata={"pk": i})) for i in (2, 0)]

    reranked = await postprocess(through_milvus(), nodes, query_str="any")

    assert [n.metadata["pk"] for n in reranked] == [0, 2]


async def test_nodes_without_a_row_are_reported(
    through_milvus: Any, postprocess: Postprocess, nodes: list[NodeWithScore]
) -> None:
    lost = NodeWithScore(node=TextNode(id_="99", text="gone"))

    with pytest.raises(SearchError, match=r"1 of 13 items have no row .* id '99'"):
        await postprocess(through_milvus(), [*nodes, lost], query_str="any")


async def test_nodes_without_a_row_can_be_kept_last_and_marked(
    through_milvus: Any, postprocess: Postprocess, nodes: list[NodeWithScore]
) -> None:
    lost = NodeWithScore(node=TextNode(id_="99", text="gone"), score=0.5)
    reranker = through_milvus(on_missing="keep")

    reranked = await postprocess(reranker, [lost, *nodes], query_str="any")

    assert [n.node_id for n in reranked] == [*map(str, LONGEST), "99"]
    assert reranked[-1].score == 0.5
    assert reranked[-1].metadata["reranked_by"] is None
    assert "has no row" in reranked[-1].metadata["rerank_error"]
    assert not any("rerank_error" in n.metadata for n in reranked[:-1])


async def test_where_milvus_cannot_reach_the_model_this_process_can_take_over(
    through_milvus: Any, postprocess: Postprocess, nodes: list[NodeWithScore], fake_vllm: FakeVLLM
) -> None:
    ranker = VLLMRanker(fake_vllm.url, server_endpoint="http://127.0.0.1:1", on_error="client")

    reranked = await postprocess(through_milvus(ranker=ranker), nodes, query_str="longest")

    assert [n.node_id for n in reranked] == [str(i) for i in LONGEST]
    assert {n.metadata["reranked_by"] for n in reranked} == {"client"}
    assert [r.path for r in fake_vllm.received] == ["/v1/rerank"]


async def test_where_milvus_cannot_reach_the_model_the_given_order_can_be_kept(
    through_milvus: Any, postprocess: Postprocess, nodes: list[NodeWithScore]
) -> None:
    ranker = VLLMRanker("http://127.0.0.1:1", on_error="skip")

    reranked = await postprocess(through_milvus(ranker=ranker, top_n=2), nodes, query_str="any")

    assert [n.node_id for n in reranked] == ["0", "1"]
    assert all("inside Milvus failed" in n.metadata["rerank_error"] for n in reranked)


async def test_a_collection_without_a_dense_field_is_refused(
    through_milvus: Any, postprocess: Postprocess, nodes: list[NodeWithScore]
) -> None:
    with pytest.raises(ConfigurationError, match="has no dense vector field"):
        await postprocess(through_milvus(NO_DENSE_FIELD), nodes, query_str="any")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranker": VLLMRanker("http://localhost", mode="client")}, "reranks from this process"),
        ({"ranker": VLLMRanker("http://localhost", instruction="be kind")}, "an instruction"),
        ({}, "'ranker' is required"),
        ({"ranker": VLLMRanker("http://localhost"), "top_k": 3}, "it is top_n= here"),
        ({"ranker": "http://localhost"}, "pass ranker=VLLMRanker(url)"),
        ({"ranker": VLLMRanker("http://localhost"), "top_n": True}, "not bool"),
        ({"ranker": VLLMRanker("http://localhost"), "on_missing": "drop"}, "on_missing"),
    ],
)
def test_what_milvus_cannot_do_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        MilvusVLLMRerank(NAME, **arguments)

    assert message in str(caught.value)


def test_a_copy_of_a_reranker_is_made_of_its_arguments_and_checked() -> None:
    first, second = VLLMRanker("http://one"), VLLMRanker("http://two")
    reranker = VLLMRerank(first, timeout=50)

    copied = reranker.model_copy(update={"ranker": second, "timeout": 3})
    copied.timeout = 1

    assert copied._adapter._ranker is second
    assert (reranker.timeout, copied.timeout) == (50, 1)
    with pytest.raises(ConfigurationError, match="top_n"):
        reranker.model_copy(update={"top_n": -2})
