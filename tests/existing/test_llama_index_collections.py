"""Collections that llama-index-vector-stores-milvus wrote, read by both front ends.

The measure is what the store itself answers for the same rows.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Document, StorageContext, VectorStoreIndex
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore
from llama_index.core.vector_stores import SimpleVectorStore

from milvus_vllm_retrievers import ConfigurationError, VLLMRanker
from milvus_vllm_retrievers.langchain import MilvusVLLMRetriever as LangChainRetriever
from milvus_vllm_retrievers.llama_index import MilvusVLLMRetriever
from tests.conftest import Ask
from tests.existing.conftest import SCORES, Retrieve, without_scores
from tests.existing.models import LetterEmbedModel
from tests.existing.rows import KEYS, LONGEST_FIRST, METADATA, TEXTS
from tests.fakes import FakeVLLM, LetterEmbeddings

pytest.importorskip("llama_index.vector_stores.milvus")

from llama_index.vector_stores.milvus import MilvusVectorStore

from tests.existing.writers_llama_index import KINDS, write

QUERY = "which animals are there in the ocean?"


@pytest.fixture(scope="module", params=KINDS)
def store(request: pytest.FixtureRequest, lite_uri: str) -> MilvusVectorStore:
    """A filled store of each kind."""
    return write(request.param, lite_uri)


@pytest.fixture
def hybrid(lite_uri: str) -> MilvusVectorStore:
    """A filled store with a dense field and a sparse one."""
    return write("hybrid_own_sparse", lite_uri, collection_name="hybrid")


def assert_same_nodes(nodes: list[NodeWithScore], store: MilvusVectorStore) -> None:
    expected = {node.node_id: node for node in store.get_nodes(KEYS)}
    assert [n.text for n in nodes] == LONGEST_FIRST
    for found in nodes:
        original = expected[found.node_id]
        assert isinstance(found.node, type(original))
        assert without_scores(found.metadata) == original.metadata
        assert content(found.node) == content(original)
        assert found.score == found.metadata["relevance_score"] == len(found.text)


def content(node: BaseNode) -> dict[str, Any]:
    """All of a node, relationships and all, but for metadata, vector, and what is hidden."""
    apart = {"metadata", "embedding", "excluded_llm_metadata_keys", "excluded_embed_metadata_keys"}
    return node.model_dump(exclude=apart)


async def test_the_collections_name_is_enough_to_rebuild_its_nodes(
    store: MilvusVectorStore, lite_uri: str, ranker: VLLMRanker, retrieve: Retrieve
) -> None:
    retriever = MilvusVLLMRetriever(
        collection_name=store.collection_name,
        uri=lite_uri,
        embed_model=LetterEmbedModel(),
        ranker=ranker,
        similarity_top_k=len(TEXTS),
    )

    assert_same_nodes(await retrieve(retriever, QUERY), store)


async def test_a_store_and_an_embedding_model_are_all_it_takes(
    store: MilvusVectorStore, ranker: VLLMRanker, retrieve: Retrieve
) -> None:
    retriever = MilvusVLLMRetriever.from_vector_store(
        store, embed_model=LetterEmbedModel(), ranker=ranker, similarity_top_k=len(TEXTS)
    )

    assert_same_nodes(await retrieve(retriever, QUERY), store)


async def test_an_index_is_all_it_takes(
    store: MilvusVectorStore, ranker: VLLMRanker, retrieve: Retrieve
) -> None:
    index = VectorStoreIndex.from_vector_store(store, embed_model=LetterEmbedModel())
    retriever = MilvusVLLMRetriever.from_index(index, ranker=ranker, similarity_top_k=len(TEXTS))

    assert_same_nodes(await retrieve(retriever, QUERY), store)


def test_milvus_reranks_the_field_that_holds_the_text(
    store: MilvusVectorStore, lite_uri: str, fake_vllm: FakeVLLM
) -> None:
    with MilvusVLLMRetriever(
        collection_name=store.collection_name,
        uri=lite_uri,
        embed_model=LetterEmbedModel(),
        ranker=VLLMRanker(fake_vllm.url, mode="server"),
        similarity_top_k=len(TEXTS),
    ) as retriever:
        nodes = retriever.retrieve(QUERY)

    assert [n.text for n in nodes] == LONGEST_FIRST
    assert sorted(fake_vllm.received[-1].body["documents"]) == sorted(TEXTS)


async def test_the_models_see_of_a_node_what_they_would_see_without_reranking(
    hybrid: MilvusVectorStore, ranker: VLLMRanker, retrieve: Retrieve
) -> None:
    retriever = MilvusVLLMRetriever.from_vector_store(
        hybrid, embed_model=LetterEmbedModel(), ranker=ranker
    )

    nodes = await retrieve(retriever, QUERY)

    originals = {node.node_id: node for node in hybrid.get_nodes(KEYS)}
    for node in nodes:
        assert {"relevance_score", "reranked_by"} <= SCORES & set(node.metadata)
        for mode in (MetadataMode.LLM, MetadataMode.EMBED):
            assert node.get_content(mode) == originals[node.node_id].get_content(mode)


async def test_langchain_reads_the_same_rows(
    store: MilvusVectorStore, lite_uri: str, ranker: VLLMRanker, ask: Ask
) -> None:
    retriever = LangChainRetriever(
        collection_name=store.collection_name,
        uri=lite_uri,
        embedding=LetterEmbeddings(),
        ranker=ranker,
    )

    documents = await ask(retriever, QUERY)

    originals = {node.node_id: node for node in store.get_nodes(KEYS)}
    assert [d.page_content for d in documents] == LONGEST_FIRST
    for document in documents:
        original = originals[document.id or ""]
        assert document.page_content == original.get_content()
        assert {**document.metadata, **original.metadata} == document.metadata
        assert document.metadata["id"] == original.node_id
        assert document.metadata["ref_doc_id"] == (original.ref_doc_id or "None")


async def test_a_documents_chunks_keep_their_places_in_it(
    lite_uri: str, ranker: VLLMRanker, retrieve: Retrieve
) -> None:
    store = MilvusVectorStore(
        uri=lite_uri,
        collection_name="chunks",
        dim=LetterEmbeddings.dim,
        consistency_level="Strong",
        overwrite=True,
    )
    index = VectorStoreIndex.from_documents(
        [Document(text=text, id_=key) for key, text in zip(KEYS, TEXTS, strict=True)],
        storage_context=StorageContext.from_defaults(vector_store=store),
        embed_model=LetterEmbedModel(),
    )
    retriever = MilvusVLLMRetriever.from_index(index, ranker=ranker, similarity_top_k=len(TEXTS))

    nodes = await retrieve(retriever, QUERY)

    assert {n.node.ref_doc_id: n.text for n in nodes} == dict(zip(KEYS, TEXTS, strict=True))


@pytest.fixture(scope="module")
def earlier_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Milvus Lite file that another process wrote, and left."""
    uri = str(tmp_path_factory.mktemp("earlier") / "earlier.db")
    code = "from tests.existing.writers_llama_index import write; import sys; write(*sys.argv[1:])"
    command = [sys.executable, "-c", code, "dense", uri]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    return uri


async def test_a_collection_of_an_earlier_process_is_read(
    earlier_uri: str, ranker: VLLMRanker, retrieve: Retrieve
) -> None:
    retriever = MilvusVLLMRetriever(
        collection_name="dense",
        uri=earlier_uri,
        embed_model=LetterEmbedModel(),
        ranker=ranker,
        similarity_top_k=len(TEXTS),
    )

    nodes = await retrieve(retriever, QUERY)

    assert {n.node_id: without_scores(n.metadata) for n in nodes} == dict(
        zip(KEYS, METADATA, strict=True)
    )


def searched(store: Any, retriever: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict]:
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
        retriever.retrieve(QUERY)
    return requests


def test_all_the_fields_of_a_store_are_searched_through_its_client(
    store: MilvusVectorStore, ranker: VLLMRanker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MilvusVLLMRetriever.from_vector_store(
        store, embed_model=LetterEmbedModel(), ranker=ranker
    ) as retriever:
        requests = searched(store, retriever, monkeypatch)

    dense = {store.embedding_field} if store.enable_dense else set()
    sparse = {store.sparse_embedding_field} if store.enable_sparse else set()
    assert set(requests) == dense | sparse


def test_arguments_go_before_what_the_store_says(
    hybrid: MilvusVectorStore, ranker: VLLMRanker, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = VectorStoreIndex.from_vector_store(hybrid, embed_model=LetterEmbedModel())
    with MilvusVLLMRetriever.from_index(
        index, ranker=ranker, vector_field="sparse_embedding", expr="page > 1"
    ) as retriever:
        requests = searched(hybrid, retriever, monkeypatch)
        nodes = retriever.retrieve(QUERY)

    assert set(requests) == {"sparse_embedding"}
    assert [n.text for n in nodes] == [TEXTS[1]]


def test_search_parameters_that_the_user_gave_the_store_are_kept(
    lite_uri: str, ranker: VLLMRanker, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = write("hybrid_bm25", lite_uri, collection_name="own", search_config={"nprobe": 77})

    with MilvusVLLMRetriever.from_vector_store(
        store, embed_model=LetterEmbedModel(), ranker=ranker
    ) as retriever:
        requests = searched(store, retriever, monkeypatch)

    assert requests["embedding"] == {"params": {"nprobe": 77}}
    assert not requests["sparse_embedding"].get("params")


def test_the_store_works_on_after_the_retriever_is_closed(
    hybrid: MilvusVectorStore, ranker: VLLMRanker
) -> None:
    with MilvusVLLMRetriever.from_vector_store(
        hybrid, embed_model=LetterEmbedModel(), ranker=ranker
    ) as retriever:
        retriever.retrieve(QUERY)

    assert len(hybrid.get_nodes(KEYS)) == len(KEYS)


def test_a_store_other_than_milvus_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="SimpleVectorStore"):
        MilvusVLLMRetriever.from_vector_store(SimpleVectorStore(), None)
