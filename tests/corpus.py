"""Collections that tests search: the same rows with keys and fields of every kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pymilvus import DataType, Function, FunctionType, MilvusClient

from tests.fakes import LetterEmbeddings

TEXTS = [
    "The cat sat on the warm windowsill and slept.",
    "A dog barked at the postman all morning.",
    "Whales are the largest animals in the ocean.",
    "The aeroplane took off in heavy rain.",
    "He repaired the engine of an old car.",
    "Bread needs flour, water, salt and yeast.",
    "She planted tomatoes in the garden in spring.",
    "The library closes at six in the evening.",
    "A violin has four strings tuned in fifths.",
    "Glaciers move slowly and carve valleys.",
    "The mayor opened a new bridge over the river.",
    "Honey bees dance to tell others about flowers.",
]


def create_collection(
    client: MilvusClient,
    name: str,
    *,
    texts: Sequence[str | None] = TEXTS,
    keys: DataType = DataType.INT64,
    primary_key: str = "pk",
    text_field: str = "document",
    bm25: bool = True,
    dense: int = 1,
    text_embedding: str | None = None,
    nullable: bool = False,
) -> None:
    """Make a collection of the texts.

    Args:
        client: Where to make it.
        name: Its name; one that is there is replaced.
        texts: One row each; row i has key i (or "id-i") and the dynamic field number = i.
        keys: INT64 or VARCHAR.
        primary_key: The primary key field's name.
        text_field: The text field's name.
        bm25: Whether to have a BM25 field "sparse".
        dense: How many dense fields of LetterEmbeddings to have, "dense", "dense_2", ...
        text_embedding: vLLM's base URL, to have a TEXT_EMBEDDING field "embedded".
        nullable: Whether texts may be null.
    """
    client.drop_collection(name)
    schema = client.create_schema(enable_dynamic_field=True)
    key_length = {"max_length": 64} if keys == DataType.VARCHAR else {}
    schema.add_field(primary_key, keys, is_primary=True, **key_length)
    schema.add_field(
        text_field, DataType.VARCHAR, max_length=60_000, enable_analyzer=True, nullable=nullable
    )
    indexes = client.prepare_index_params()
    dense_fields = ["dense" if i == 0 else f"dense_{i + 1}" for i in range(dense)]
    for field in dense_fields:
        schema.add_field(field, DataType.FLOAT_VECTOR, dim=LetterEmbeddings.dim)
        indexes.add_index(field, index_type="AUTOINDEX", metric_type="COSINE")
    if bm25:
        schema.add_field("sparse", DataType.SPARSE_FLOAT_VECTOR)
        schema.add_function(Function("bm25", FunctionType.BM25, [text_field], ["sparse"]))
        indexes.add_index("sparse", index_type="SPARSE_INVERTED_INDEX", metric_type="BM25")
    if text_embedding:
        params = {
            "provider": "openai",
            "model_name": "all-MiniLM-L6-v2",
            "api_key": "unused",
            "base_url": f"{text_embedding}/v1",
        }
        schema.add_field("embedded", DataType.FLOAT_VECTOR, dim=384)
        schema.add_function(
            Function("embed", FunctionType.TEXTEMBEDDING, [text_field], ["embedded"], params=params)
        )
        indexes.add_index("embedded", index_type="AUTOINDEX", metric_type="COSINE")
    client.create_collection(name, schema=schema, index_params=indexes, consistency_level="Strong")
    embedding = LetterEmbeddings()
    rows: list[dict[str, Any]] = [
        {
            primary_key: f"id-{i}" if keys == DataType.VARCHAR else i,
            text_field: text,
            "number": i,
            **{field: embedding.embed_query(text or "") for field in dense_fields},
        }
        for i, text in enumerate(texts)
    ]
    if rows:
        client.insert(name, rows)
