"""The steps of Milvus's vLLM Ranker page with a real vLLM: plain pymilvus, then the retriever."""

from __future__ import annotations

import httpx
import pytest
from pymilvus import AnnSearchRequest, DataType, MilvusClient

from milvus_vllm_retrievers.langchain import MilvusVLLMRetriever, VLLMRanker
from tests.conftest import Ask
from tests.corpus import TEXTS, create_collection
from tests.fakes import LetterEmbeddings

pytestmark = pytest.mark.real_vllm

NAME = "page"
QUERY = "animals that live in the sea"
WHALES = 2


@pytest.fixture(scope="module", params=["milvus 2.6 stand-in", "milvus lite"])
def server(
    request: pytest.FixtureRequest,
    milvus26: MilvusClient,
    milvus26_uri: str,
    lite: MilvusClient,
    lite_uri: str,
    vllm: str,
) -> tuple[MilvusClient, str, str]:
    """A client with the collection, its address and the provider it knows."""
    client, uri, provider = {
        "milvus 2.6 stand-in": (milvus26, milvus26_uri, "vllm"),
        "milvus lite": (lite, lite_uri, "cohere"),
    }[request.param]
    create_collection(client, NAME, text_embedding=vllm)
    return client, uri, provider


def test_step_1_the_rerank_model_answers(vllm: str) -> None:
    answer = httpx.post(f"{vllm}/v1/rerank", json={"query": QUERY, "documents": TEXTS})

    assert answer.status_code == 200
    assert answer.json()["results"][0]["index"] == WHALES


def test_step_2_and_3_a_function_reranks_a_search_by_text(
    server: tuple[MilvusClient, str, str], vllm: str
) -> None:
    client, _, provider = server
    function = VLLMRanker(vllm).to_function(QUERY, "document", provider=provider)

    hits = client.search(
        NAME, data=[QUERY], anns_field="embedded", limit=5, ranker=function,
        output_fields=["document"],
    )[0]  # fmt: skip

    assert hits[0]["pk"] == WHALES
    assert [h["distance"] for h in hits] == sorted((h["distance"] for h in hits), reverse=True)


def test_step_3_two_queries_go_in_one_call(
    server: tuple[MilvusClient, str, str], vllm: str
) -> None:
    client, _, provider = server
    queries = [QUERY, "baking"]
    function = VLLMRanker(vllm).to_function(queries, "document", provider=provider)

    answers = client.search(
        NAME, data=queries, anns_field="embedded", limit=5, ranker=function,
        output_fields=["document"],
    )  # fmt: skip

    assert [hits[0]["pk"] for hits in answers] == [WHALES, 5]


def test_step_4_a_function_reranks_a_hybrid_search(
    server: tuple[MilvusClient, str, str], vllm: str
) -> None:
    client, _, provider = server
    legs = [
        AnnSearchRequest(data=[QUERY], anns_field="sparse", param={}, limit=10),
        AnnSearchRequest(
            data=[LetterEmbeddings().embed_query(QUERY)], anns_field="dense", param={}, limit=10
        ),
    ]
    function = VLLMRanker(vllm).to_function(QUERY, "document", provider=provider)

    hits = client.hybrid_search(NAME, legs, ranker=function, limit=5, output_fields=["document"])[0]

    assert hits[0]["pk"] == WHALES


@pytest.mark.parametrize(
    "vector_field",
    ["dense", "sparse", "embedded", ["dense", "sparse"], ["dense", "sparse", "embedded"], None],
)
@pytest.mark.parametrize("fetch_k", [3, 12])
async def test_the_retriever_reranks_every_kind_of_leg_the_same_inside_milvus_and_from_here(
    server: tuple[MilvusClient, str, str],
    vllm: str,
    ask: Ask,
    vector_field: str | list[str] | None,
    fetch_k: int,
) -> None:
    _, uri, _ = server
    answers = {}
    for mode in ("server", "client"):
        retriever = MilvusVLLMRetriever(
            collection_name=NAME,
            uri=uri,
            embedding=LetterEmbeddings(),
            vector_field=vector_field,
            ranker=VLLMRanker(vllm, mode=mode),
            k=3,
            fetch_k=fetch_k,
        )
        documents = await ask(retriever, "whales in the ocean")
        origin = {"server": "milvus", "client": "client"}[mode]
        assert {d.metadata["reranked_by"] for d in documents} == {origin}
        answers[mode] = [(d.id, d.metadata["relevance_score"]) for d in documents]

    assert answers["server"][0][0] == str(WHALES)
    assert [i for i, _ in answers["server"]] == [i for i, _ in answers["client"]]
    assert [s for _, s in answers["server"]] == pytest.approx(
        [s for _, s in answers["client"]], abs=0.01
    )


@pytest.mark.parametrize("keys", [DataType.INT64, DataType.VARCHAR])
async def test_keys_of_either_type_are_returned_with_the_real_model(
    server: tuple[MilvusClient, str, str], vllm: str, ask: Ask, keys: DataType
) -> None:
    client, uri, _ = server
    create_collection(client, "page_keys", keys=keys)
    retriever = MilvusVLLMRetriever(
        collection_name="page_keys", uri=uri, ranker=VLLMRanker(vllm, mode="server"), k=1
    )

    documents = await ask(retriever, "animals in the ocean")

    assert [d.id for d in documents] == ["id-2" if keys == DataType.VARCHAR else "2"]


async def test_a_cross_encoder_gives_the_same_list_inside_milvus_and_from_here(
    server: tuple[MilvusClient, str, str], cross_encoder: str, ask: Ask
) -> None:
    _, uri, _ = server
    lists = []
    for mode in ("server", "client"):
        retriever = MilvusVLLMRetriever(
            collection_name=NAME,
            uri=uri,
            vector_field="dense",
            embedding=LetterEmbeddings(),
            ranker=VLLMRanker(cross_encoder, mode=mode),
            k=12,
            fetch_k=12,
        )
        lists.append([d.id for d in await ask(retriever, "who repaired the engine?")])

    assert lists[0] == lists[1]
    assert len(lists[0]) == len(TEXTS)


async def test_a_document_longer_than_the_model_is_truncated_where_the_path_can(
    milvus26: MilvusClient, milvus26_uri: str, vllm: str, ask: Ask
) -> None:
    create_collection(milvus26, "long", texts=["ocean " * 2000, "a short text on baking"])
    for mode in ("server", "client"):
        retriever = MilvusVLLMRetriever(
            collection_name="long",
            uri=milvus26_uri,
            vector_field="dense",
            embedding=LetterEmbeddings(),
            ranker=VLLMRanker(vllm, mode=mode),
        )
        assert [d.id for d in await ask(retriever, "the sea")] == ["0", "1"]


async def test_milvus_lite_names_the_limit_and_on_error_client_serves_the_query(
    lite: MilvusClient, lite_uri: str, vllm: str, ask: Ask
) -> None:
    create_collection(lite, "long", texts=["ocean " * 2000, "a short text on baking"])
    arguments = {
        "collection_name": "long",
        "uri": lite_uri,
        "vector_field": "dense",
        "embedding": LetterEmbeddings(),
    }
    strict = MilvusVLLMRetriever(**arguments, ranker=VLLMRanker(vllm, mode="server"))
    lenient = MilvusVLLMRetriever(
        **arguments, ranker=VLLMRanker(vllm, mode="server", on_error="client")
    )

    from milvus_vllm_retrievers import RerankStatusError

    with pytest.raises(RerankStatusError, match="cannot truncate") as caught:
        await ask(strict, "the sea")
    documents = await ask(lenient, "the sea")

    assert caught.value.status_code == 400
    assert [(d.id, d.metadata["reranked_by"]) for d in documents] == [
        ("0", "client"),
        ("1", "client"),
    ]
