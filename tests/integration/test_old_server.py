"""A real Milvus 2.3, which ignores rerank Functions in silence."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pymilvus import DataType, MilvusClient

from milvus_vllm_retrievers import ConfigurationError
from milvus_vllm_retrievers.langchain import MilvusVLLMRetriever, VLLMRanker
from tests.conftest import Ask
from tests.corpus import TEXTS
from tests.fakes import FakeVLLM, LetterEmbeddings
from tests.old_milvus import running_old_milvus

WHALES = 2
QUERY = "animals that live in the sea"


@pytest.fixture(scope="module")
def old_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_old_milvus(tmp_path_factory.mktemp("old_milvus")) as uri:
        client = MilvusClient(uri)
        schema = client.create_schema()
        schema.add_field("pk", DataType.INT64, is_primary=True)
        schema.add_field("document", DataType.VARCHAR, max_length=1000)
        schema.add_field("dense", DataType.FLOAT_VECTOR, dim=LetterEmbeddings.dim)
        index = client.prepare_index_params()
        index.add_index("dense", index_type="FLAT", metric_type="COSINE")
        client.create_collection("docs", schema=schema, index_params=index)
        embedding = LetterEmbeddings()
        rows = [
            {"pk": i, "document": text, "dense": embedding.embed_query(text)}
            for i, text in enumerate(TEXTS)
        ]
        client.insert("docs", rows)
        client.flush("docs")
        yield uri
        client.close()


def retriever(uri: str, ranker: VLLMRanker | None) -> MilvusVLLMRetriever:
    return MilvusVLLMRetriever(
        collection_name="docs",
        uri=uri,
        embedding=LetterEmbeddings(),
        ranker=ranker,
        k=3,
        fetch_k=12,
        consistency_level="Strong",
    )


def test_the_server_itself_says_nothing_when_it_ignores_a_ranker(old_uri: str) -> None:
    client = MilvusClient(old_uri)
    vector = LetterEmbeddings().embed_query(QUERY)
    function = VLLMRanker("http://127.0.0.1:1").to_function(QUERY, "document")

    plain = client.search("docs", data=[vector], anns_field="dense", limit=3)[0]
    ranked = client.search("docs", data=[vector], anns_field="dense", limit=3, ranker=function)[0]
    client.close()

    assert [h["distance"] for h in ranked] == [h["distance"] for h in plain]


async def test_server_mode_is_refused_in_words(old_uri: str, ask: Ask) -> None:
    ranker = VLLMRanker("http://127.0.0.1:1", mode="server")

    with pytest.raises(ConfigurationError, match=r"needs Milvus 2\.6 or later.*v2\.3\.5"):
        await ask(retriever(old_uri, ranker), QUERY)


@pytest.mark.parametrize("mode", ["auto", "client"])
async def test_auto_and_client_mode_rerank_from_here(
    old_uri: str, fake_vllm: FakeVLLM, ask: Ask, mode: str
) -> None:
    documents = await ask(retriever(old_uri, VLLMRanker(fake_vllm.url, mode=mode)), QUERY)

    assert [d.page_content for d in documents] == sorted(TEXTS, key=lambda t: -len(t))[:3]
    assert {d.metadata["reranked_by"] for d in documents} == {"client"}


@pytest.mark.real_vllm
async def test_auto_mode_finds_the_relevant_text_with_the_real_model(
    old_uri: str, vllm: str, ask: Ask
) -> None:
    documents = await ask(retriever(old_uri, VLLMRanker(vllm)), QUERY)

    assert documents[0].id == str(WHALES)
    assert documents[0].metadata["reranked_by"] == "client"


async def test_without_a_ranker_it_serves_its_own_order(old_uri: str, ask: Ask) -> None:
    unranked = await ask(retriever(old_uri, None), QUERY)

    assert len(unranked) == 3
    assert {d.metadata["reranked_by"] for d in unranked} == {None}
