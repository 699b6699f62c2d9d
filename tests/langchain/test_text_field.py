"""Which text is reranked and returned, end to end."""

from __future__ import annotations

from typing import Any

import pytest
from pymilvus import DataType, Function, FunctionType, MilvusClient

from milvus_vllm_retrievers import ConfigurationError, VLLMRanker
from milvus_vllm_retrievers.langchain import MilvusVLLMRetriever
from tests.conftest import Ask
from tests.fakes import FakeVLLM, LetterEmbeddings

TEXT = "Whales are the largest animals in the ocean."


def fill(
    client: MilvusClient, fields: list[str], bm25: str | None, rows: list[dict[str, str]]
) -> None:
    client.drop_collection("which_text")
    schema = client.create_schema()
    for name in fields:
        if name in ("pk", "id"):
            schema.add_field(name, DataType.INT64, is_primary=True, auto_id=True)
        elif name == "dense":
            schema.add_field(name, DataType.FLOAT_VECTOR, dim=LetterEmbeddings.dim)
        else:
            schema.add_field(name, DataType.VARCHAR, max_length=65_535, enable_analyzer=True)
    indexes = client.prepare_index_params()
    indexes.add_index("dense", index_type="AUTOINDEX", metric_type="COSINE")
    if bm25:
        schema.add_field("sparse", DataType.SPARSE_FLOAT_VECTOR)
        schema.add_function(Function("bm25", FunctionType.BM25, [bm25], ["sparse"]))
        indexes.add_index("sparse", index_type="SPARSE_INVERTED_INDEX", metric_type="BM25")
    client.create_collection(
        "which_text", schema=schema, index_params=indexes, consistency_level="Strong"
    )
    if rows:
        client.insert(
            "which_text", [{**row, "dense": LetterEmbeddings().embed_query(TEXT)} for row in rows]
        )


SCHEMAS: list[tuple[list[str], str | None, str]] = [
    (["id", "doc_id", "title", "text", "dense"], None, "text"),
    (["id", "doc_id", "url", "content", "dense"], None, "content"),
    (["source", "pk", "text", "dense"], None, "text"),
    (["source", "pk", "dense", "text"], None, "text"),
    (["pk", "title", "text", "dense"], "title", "text"),
    (["pk", "document", "content", "dense"], None, "content"),
]


@pytest.mark.parametrize(("fields", "bm25", "text"), SCHEMAS)
@pytest.mark.parametrize("mode", ["server", "client"])
async def test_the_text_is_reranked_and_returned_and_not_what_stands_in_its_place(
    milvus26: MilvusClient,
    milvus26_uri: str,
    fake_vllm: FakeVLLM,
    ask: Ask,
    fields: list[str],
    bm25: str | None,
    text: str,
    mode: Any,
) -> None:
    row = {name: f"short {name}" for name in fields if name not in ("pk", "id", "dense")}
    fill(milvus26, fields, bm25, [{**row, text: TEXT}])
    retriever = MilvusVLLMRetriever(
        collection_name="which_text",
        uri=milvus26_uri,
        embedding=LetterEmbeddings(),
        ranker=VLLMRanker(fake_vllm.url, mode=mode),
    )

    (document,) = await ask(retriever, "short whales")

    assert document.page_content == TEXT
    assert fake_vllm.received[-1].body["documents"] == [TEXT]


@pytest.mark.parametrize("rows", [[], [{"title": "as long", "text": "as long"}]])
async def test_where_two_fields_may_be_the_text_both_are_named(
    milvus26: MilvusClient, milvus26_uri: str, ask: Ask, rows: list[dict[str, str]]
) -> None:
    fill(milvus26, ["pk", "title", "text", "dense"], "title", rows)
    retriever = MilvusVLLMRetriever(
        collection_name="which_text", uri=milvus26_uri, embedding=LetterEmbeddings(), ranker=None
    )

    with pytest.raises(ConfigurationError, match=r"any of \['title', 'text'\].*pass text_field="):
        await ask(retriever, "whales")
