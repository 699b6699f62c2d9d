"""Collections as langchain-milvus writes them, one for each way it lays them out."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from langchain_milvus import BM25BuiltInFunction, Milvus
from langchain_milvus.utils.sparse import BaseSparseEmbedding
from pymilvus import DataType

from tests.existing.models import sparse_letters
from tests.existing.rows import FLAT_METADATA, KEYS, METADATA, TEXTS
from tests.fakes import LetterEmbeddings


class SparseLetters(BaseSparseEmbedding):
    """A sparse embedding model of the user's own."""

    def embed_query(self, query: str) -> dict[int, float]:
        return sparse_letters(query)

    def embed_documents(self, texts: list[str]) -> list[dict[int, float]]:
        return [sparse_letters(text) for text in texts]


@dataclass(frozen=True)
class Kind:
    """A way to lay out a collection: the store's arguments, and what it is filled with."""

    arguments: dict[str, Any] = field(default_factory=dict)
    embedding: Any = field(default_factory=LetterEmbeddings)
    metadata: Sequence[dict[str, Any]] = tuple(METADATA)


# Milvus Lite knows one sparse index, without the parameters that langchain-milvus chooses for it.
DENSE = {"index_type": "AUTOINDEX", "metric_type": "L2", "params": {}}
BM25 = {"index_type": "SPARSE_INVERTED_INDEX", "metric_type": "BM25", "params": {}}
SPARSE = {"index_type": "SPARSE_INVERTED_INDEX", "metric_type": "IP", "params": {}}

TEXT_COLUMN = {"max_length": 200}
TEXT_ARRAY = {"element_type": DataType.VARCHAR, "max_capacity": 10, "max_length": 200}

KINDS = {
    "dynamic_fields": Kind({"enable_dynamic_field": True}),
    "auto_keys": Kind({"enable_dynamic_field": True, "auto_id": True}),
    "one_json_field": Kind({"metadata_field": "metadata"}),
    "one_json_field_auto_keys": Kind({"metadata_field": "about", "auto_id": True}),
    "typed_columns": Kind(metadata=FLAT_METADATA),
    "typed_columns_of_every_type": Kind(
        {
            "metadata_schema": {
                "source": {"dtype": DataType.VARCHAR, "kwargs": {**TEXT_COLUMN, "nullable": True}},
                "tags": {"dtype": DataType.ARRAY, "kwargs": TEXT_ARRAY},
            }
        }
    ),
    "only_column_is_json": Kind(metadata=[{"origin": m["origin"], "page": 1} for m in METADATA]),
    "partition_key": Kind(
        {"enable_dynamic_field": True, "partition_key_field": "tenant"},
        metadata=[{**m, "tenant": "t1"} for m in METADATA],
    ),
    "custom_names": Kind(
        {
            "primary_field": "isbn",
            "text_field": "story",
            "vector_field": "meaning",
            "enable_dynamic_field": True,
        }
    ),
    "custom_names_beside_usual_ones": Kind(
        {"primary_field": "isbn", "text_field": "story", "vector_field": "meaning"},
        metadata=[{"text": "a title", "content": "a summary", **m} for m in FLAT_METADATA],
    ),
    "bm25": Kind(
        {
            "builtin_function": BM25BuiltInFunction(output_field_names="words"),
            "vector_field": "words",
            "index_params": BM25,
            "search_params": {"metric_type": "BM25"},
            "enable_dynamic_field": True,
        },
        embedding=None,
    ),
    "dense_and_bm25": Kind(
        {
            "builtin_function": BM25BuiltInFunction(),
            "vector_field": ["dense", "sparse"],
            "index_params": [DENSE, BM25],
            "search_params": [{"metric_type": "L2"}, {"metric_type": "BM25"}],
            "enable_dynamic_field": True,
        }
    ),
    "dense_and_bm25_of_a_column": Kind(
        {
            "builtin_function": BM25BuiltInFunction(input_field_names="headline"),
            "vector_field": ["dense", "sparse"],
            "index_params": [DENSE, BM25],
            "search_params": [{"metric_type": "L2"}, {"metric_type": "BM25"}],
            "metadata_schema": {
                "headline": {
                    "dtype": DataType.VARCHAR,
                    "kwargs": {**TEXT_COLUMN, "enable_analyzer": True},
                }
            },
        },
        metadata=[{"headline": "News of the animals", **m} for m in FLAT_METADATA],
    ),
    "two_dense": Kind(
        {"vector_field": ["first", "second"], "enable_dynamic_field": True},
        embedding=[LetterEmbeddings(), LetterEmbeddings()],
    ),
    "dense_and_own_sparse": Kind(
        {
            "vector_field": ["dense", "letters"],
            "index_params": [DENSE, SPARSE],
            "search_params": [{"metric_type": "L2"}, {"metric_type": "IP"}],
            "enable_dynamic_field": True,
        },
        embedding=[LetterEmbeddings(), SparseLetters()],
    ),
}


def write(name: str, uri: str, **more: Any) -> Milvus:
    """Fill a store of the named kind, in a collection of the same name.

    Args:
        name: A key of `KINDS`.
        uri: The Milvus to write to.
        **more: Further arguments of the store.
    """
    kind = KINDS[name]
    store = Milvus(
        kind.embedding,
        **{
            "collection_name": name,
            "connection_args": {"uri": uri},
            "consistency_level": "Strong",
            "drop_old": True,
            **kind.arguments,
            **more,
        },
    )
    keys = None if kind.arguments.get("auto_id") else KEYS
    store.add_texts(TEXTS, copy.deepcopy(list(kind.metadata)), ids=keys)
    return store
