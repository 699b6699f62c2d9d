"""Collections as llama-index-vector-stores-milvus writes them, one for each way to lay them out."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama_index.core.schema import (
    BaseNode,
    ImageNode,
    IndexNode,
    NodeRelationship,
    ObjectType,
    RelatedNodeInfo,
    TextNode,
)
from llama_index.vector_stores.milvus import MilvusVectorStore
from llama_index.vector_stores.milvus.utils import BaseSparseEmbeddingFunction, BM25BuiltInFunction
from pymilvus import DataType

from tests.existing.models import sparse_letters
from tests.existing.rows import KEYS, METADATA, TEXTS
from tests.fakes import LetterEmbeddings


class SparseLetters(BaseSparseEmbeddingFunction):
    """A sparse embedding model of the user's own."""

    def encode_queries(self, queries: list[str]) -> list[dict[int, float]]:
        return [sparse_letters(query) for query in queries]

    def encode_documents(self, documents: list[str]) -> list[dict[int, float]]:
        return [sparse_letters(document) for document in documents]


class Passage(TextNode):
    """A node with a field of its own: the one way to write a custom `text_key` in 1.2."""

    passage: str = ""


def text_nodes(kind: type[TextNode] = TextNode, **metadata: Any) -> list[BaseNode]:
    """One node a text, chained to one another and to the document they are from."""
    nodes = [
        kind(
            id_=key,
            text=text,
            metadata={**copy.deepcopy(own), **metadata},
            excluded_llm_metadata_keys=["page"],
            excluded_embed_metadata_keys=["source"],
            start_char_idx=100,
            end_char_idx=100 + len(text),
        )
        for key, text, own in zip(KEYS, TEXTS, METADATA, strict=True)
    ]
    document = RelatedNodeInfo(
        node_id="document-1", node_type=ObjectType.DOCUMENT, metadata={"year": 1999}, hash="abc"
    )
    for node, following in itertools.pairwise(nodes):
        node.relationships[NodeRelationship.NEXT] = following.as_related_node_info()
        following.relationships[NodeRelationship.PREVIOUS] = node.as_related_node_info()
    for node in nodes:
        node.relationships[NodeRelationship.SOURCE] = document
    return list(nodes)


def passages() -> list[BaseNode]:
    """Nodes that keep their text in a field of their own, too."""
    nodes = text_nodes(Passage, content="a summary", belongs_to="document-1")
    return [node.model_copy(update={"passage": node.get_content()}) for node in nodes]


def nodes_of_other_types() -> list[BaseNode]:
    """Nodes that are more than a text."""
    return [
        IndexNode(id_=KEYS[0], text=TEXTS[0], index_id="cats", metadata={"page": 1}),
        ImageNode(id_=KEYS[1], text=TEXTS[1], image_url="http://dogs.example/1.png"),
        TextNode(id_=KEYS[2], text=TEXTS[2]),
    ]


@dataclass(frozen=True)
class Kind:
    """A way to lay out a collection: the store's arguments, and what it is filled with."""

    arguments: dict[str, Any] = field(default_factory=dict)
    nodes: Callable[[], Sequence[BaseNode]] = text_nodes


KINDS = {
    "dense": Kind(),
    "nodes_of_other_types": Kind(nodes=nodes_of_other_types),
    "bm25": Kind(
        {
            "enable_dense": False,
            "dim": None,
            "enable_sparse": True,
            "sparse_embedding_function": BM25BuiltInFunction(),
        }
    ),
    "hybrid_bm25": Kind(
        {"enable_sparse": True, "sparse_embedding_function": BM25BuiltInFunction()}
    ),
    "hybrid_bm25_of_a_column": Kind(
        {
            "enable_sparse": True,
            "sparse_embedding_function": BM25BuiltInFunction(input_field_names="headline"),
            "scalar_field_names": ["headline"],
            "scalar_field_types": [DataType.VARCHAR],
        },
        nodes=lambda: text_nodes(headline="News of the animals"),
    ),
    "hybrid_own_sparse": Kind(
        {"enable_sparse": True, "sparse_embedding_function": SparseLetters()}
    ),
    "typed_columns": Kind(
        {
            "scalar_field_names": ["content", "page"],
            "scalar_field_types": [DataType.VARCHAR, DataType.INT64],
        },
        nodes=lambda: text_nodes(content="a summary"),
    ),
    "custom_names": Kind(
        {
            "text_key": "passage",
            "embedding_field": "meaning",
            "scalar_field_names": ["content"],
            "scalar_field_types": [DataType.VARCHAR],
        },
        nodes=passages,
    ),
    "custom_document_id": Kind(
        {"doc_id_field": "belongs_to"}, nodes=lambda: text_nodes(belongs_to="document-1")
    ),
}


def write(name: str, uri: str, **more: Any) -> MilvusVectorStore:
    """Fill a store of the named kind, in a collection of the same name.

    Args:
        name: A key of `KINDS`.
        uri: The Milvus to write to.
        **more: Further arguments of the store.
    """
    kind = KINDS[name]
    store = MilvusVectorStore(
        **{
            "uri": uri,
            "collection_name": name,
            "dim": LetterEmbeddings.dim,
            "consistency_level": "Strong",
            "overwrite": True,
            **kind.arguments,
            **more,
        }
    )
    nodes = kind.nodes()
    for node in nodes:
        node.embedding = LetterEmbeddings().embed_query(node.get_content())
    store.add(list(nodes))
    return store
