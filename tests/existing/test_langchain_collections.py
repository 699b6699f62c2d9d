"""Collections that langchain-milvus wrote, read by both front ends.

The measure is what the store itself answers for the same rows.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.vectorstores import InMemoryVectorStore

from milvus_vllm_retrievers import ConfigurationError, VLLMRanker
from milvus_vllm_retrievers.langchain import MilvusVLLMRetriever
from milvus_vllm_retrievers.llama_index import MilvusVLLMRetriever as LlamaIndexRetriever
from tests.conftest import Ask
from tests.existing.conftest import Retrieve, without_scores
from tests.existing.models import LetterEmbedModel
from tests.existing.rows import LONGEST_FIRST, TEXTS
from tests.fakes import FakeVLLM, LetterEmbeddings

pytest.importorskip("langchain_milvus")

from langchain_milvus import Milvus

from tests.existing.writers_langchain import KINDS, write

QUERY = "which animals are there in the ocean?"


# How the store fuses several fields when it is asked for no other way.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The 'ranker_type' and 'ranker_params' parameters:DeprecationWarning"
)


@pytest.fixture(scope="module", params=KINDS)
def store(request: pytest.FixtureRequest, lite_uri: str) -> Milvus:
    """A filled store of each kind."""
    return write(request.param, lite_uri)


@pytest.fixture
def hybrid(lite_uri: str) -> Milvus:
    """A filled store with two vector fields, each with an embedding model of its own."""
    return write("dense_and_own_sparse", lite_uri, collection_name="hybrid")


@pytest.fixture(scope="module")
def expected(store: Milvus) -> dict[str, Document]:
    """What the store itself returns, by text, with the keys that it leaves out.

    Asked once: a search damages a store of langchain-milvus 0.4.0 with BM25, which from then on
    lists the field twice and cannot search any more.
    """
    found = {d.page_content: d for d in store.similarity_search(QUERY, k=len(TEXTS))}
    key = store._primary_field
    for row in store.client.query(store.collection_name, filter="", limit=10, output_fields=["*"]):
        document = found[row[store._text_field]]
        document.id = str(row[key])
        document.metadata.setdefault(key, row[key])
    return found


def assert_same_documents(documents: list[Document], expected: dict[str, Document]) -> None:
    assert [d.page_content for d in documents] == LONGEST_FIRST
    for document in documents:
        original = expected[document.page_content]
        assert document.id == original.id
        assert without_scores(document.metadata) == original.metadata
        assert document.metadata["relevance_score"] == len(document.page_content)


async def test_the_collections_name_is_enough_to_read_it(
    store: Milvus, expected: dict[str, Document], lite_uri: str, ranker: VLLMRanker, ask: Ask
) -> None:
    retriever = MilvusVLLMRetriever(
        collection_name=store.collection_name,
        uri=lite_uri,
        embedding=LetterEmbeddings(),
        ranker=ranker,
    )

    assert_same_documents(await ask(retriever, QUERY), expected)


async def test_a_store_is_all_it_takes(
    store: Milvus, expected: dict[str, Document], ranker: VLLMRanker, ask: Ask
) -> None:
    retriever = MilvusVLLMRetriever.from_vectorstore(store, ranker=ranker)

    assert_same_documents(await ask(retriever, QUERY), expected)


def test_milvus_reranks_the_field_that_holds_the_text(
    store: Milvus, lite_uri: str, fake_vllm: FakeVLLM
) -> None:
    with MilvusVLLMRetriever(
        collection_name=store.collection_name,
        uri=lite_uri,
        embedding=LetterEmbeddings(),
        ranker=VLLMRanker(fake_vllm.url, mode="server"),
    ) as retriever:
        documents = retriever.invoke(QUERY)

    assert [d.page_content for d in documents] == LONGEST_FIRST
    assert sorted(fake_vllm.received[-1].body["documents"]) == sorted(TEXTS)


async def test_llama_index_reads_the_same_rows(
    store: Milvus,
    expected: dict[str, Document],
    lite_uri: str,
    ranker: VLLMRanker,
    retrieve: Retrieve,
) -> None:
    retriever = LlamaIndexRetriever(
        collection_name=store.collection_name,
        uri=lite_uri,
        embed_model=LetterEmbedModel(),
        ranker=ranker,
        similarity_top_k=len(TEXTS),
    )

    nodes = await retrieve(retriever, QUERY)

    assert [n.text for n in nodes] == LONGEST_FIRST
    for node in nodes:
        original = expected[node.text]
        assert node.node_id == original.id
        assert without_scores(node.metadata) == original.metadata
        assert node.score == len(node.text)


@pytest.fixture(scope="module")
def earlier_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Milvus Lite file that another process wrote, and left."""
    uri = str(tmp_path_factory.mktemp("earlier") / "earlier.db")
    code = "from tests.existing.writers_langchain import write; import sys; write(*sys.argv[1:])"
    command = [sys.executable, "-c", code, "dynamic_fields", uri]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    return uri


async def test_a_collection_of_an_earlier_process_is_read(
    earlier_uri: str, ranker: VLLMRanker, ask: Ask
) -> None:
    retriever = MilvusVLLMRetriever(
        collection_name="dynamic_fields",
        uri=earlier_uri,
        embedding=LetterEmbeddings(),
        ranker=ranker,
    )

    documents = await ask(retriever, QUERY)

    assert [d.page_content for d in documents] == LONGEST_FIRST


def searched(store: Milvus, retriever: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict]:
    """Retrieve; return the fields that were searched through the store's client, with params."""
    requests: dict[str, dict] = {}
    search, hybrid_search = store.client.search, store.client.hybrid_search

    def record_search(**arguments: Any) -> Any:
        requests[arguments["anns_field"]] = arguments["search_params"] or {}
        return search(**arguments)

    def record_hybrid_search(**arguments: Any) -> Any:
        requests.update({r.anns_field: r.param for r in arguments["reqs"]})
        return hybrid_search(**arguments)

    with monkeypatch.context() as patch:
        patch.setattr(store.client, "search", record_search)
        patch.setattr(store.client, "hybrid_search", record_hybrid_search)
        retriever.invoke(QUERY)
    return requests


def test_all_the_fields_of_a_store_are_searched_through_its_client(
    store: Milvus, ranker: VLLMRanker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MilvusVLLMRetriever.from_vectorstore(store, ranker=ranker) as retriever:
        requests = searched(store, retriever, monkeypatch)

    assert set(requests) == set(store.vector_fields)


def test_arguments_go_before_what_the_store_says(
    hybrid: Milvus, ranker: VLLMRanker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MilvusVLLMRetriever.from_vectorstore(
        hybrid, ranker=ranker, vector_field="dense", k=1, expr="page > 1"
    ) as retriever:
        requests = searched(hybrid, retriever, monkeypatch)
        documents = retriever.invoke(QUERY)

    assert set(requests) == {"dense"}
    assert [d.page_content for d in documents] == [TEXTS[1]]


def test_search_parameters_that_the_user_gave_the_store_are_kept(
    lite_uri: str, ranker: VLLMRanker, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = [{"metric_type": "L2", "params": {"nprobe": 77}}, {"metric_type": "L2"}]
    store = write("two_dense", lite_uri, search_params=own)

    with MilvusVLLMRetriever.from_vectorstore(store, ranker=ranker) as retriever:
        requests = searched(store, retriever, monkeypatch)

    assert requests == {"first": own[0], "second": own[1]}


def test_search_parameters_that_the_store_made_up_are_not(
    lite_uri: str, ranker: VLLMRanker, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Such as {"ef": 10}, with which Milvus refuses to look for 50 candidates.
    store = write("dense_and_own_sparse", lite_uri, search_params=None)

    with MilvusVLLMRetriever.from_vectorstore(store, ranker=ranker) as retriever:
        requests = searched(store, retriever, monkeypatch)

    assert requests == {"dense": {}, "letters": {}}


def test_the_store_works_on_after_the_retriever_is_closed(
    hybrid: Milvus, ranker: VLLMRanker
) -> None:
    with MilvusVLLMRetriever.from_vectorstore(hybrid, ranker=ranker) as retriever:
        retriever.invoke(QUERY)

    assert len(hybrid.similarity_search(QUERY, k=2)) == 2


def test_closing_a_retriever_leaves_other_clients_of_the_server_connected(
    hybrid: Milvus, lite_uri: str, ranker: VLLMRanker
) -> None:
    with MilvusVLLMRetriever(
        collection_name="hybrid", uri=lite_uri, embedding=LetterEmbeddings(), ranker=ranker
    ) as retriever:
        retriever.invoke(QUERY)

    assert hybrid.client.has_collection("hybrid")


def test_a_store_other_than_milvus_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="InMemoryVectorStore"):
        MilvusVLLMRetriever.from_vectorstore(InMemoryVectorStore(LetterEmbeddings()))
