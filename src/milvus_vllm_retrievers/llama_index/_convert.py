"""LlamaIndex's values to the core's and back: queries, nodes, embedding models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, cast

from llama_index.core import Settings
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.schema import BaseNode, NodeWithScore, QueryBundle, QueryType, TextNode
from llama_index.core.vector_stores.utils import metadata_dict_to_node

from milvus_vllm_retrievers._core.hits import SCORE_KEYS, Hit, rescored, score_among, stored
from milvus_vllm_retrievers._core.query import Encoder, Encoders, Query, sparse_encoder
from milvus_vllm_retrievers.errors import ConfigurationError


def to_query(query: QueryType | None) -> Query:
    """Read a query, with its own embedding and the texts to embed in its place.

    Raises:
        ConfigurationError: There is none, or it is empty.
    """
    if query is None:
        raise ConfigurationError("there is no query to rerank for: pass query_str or query_bundle")
    if isinstance(query, str):
        return Query(query)
    return Query(query.query_str, query.embedding, tuple(query.embedding_strs))


def to_bundles(queries: Sequence[QueryType]) -> list[QueryBundle]:
    """Return queries in the form that LlamaIndex hands on.

    Raises:
        ConfigurationError: It is one query, not several: a text would be taken letter by letter.
    """
    if isinstance(queries, (str, QueryBundle)):
        raise ConfigurationError("queries must be a list of queries: [query], or use retrieve")
    return [_to_bundle(query) for query in queries]


def _to_bundle(query: QueryType) -> QueryBundle:
    return QueryBundle(query) if isinstance(query, str) else query


def to_node(hit: Hit) -> NodeWithScore:
    """Make a node of a hit: the one that LlamaIndex stored, or a TextNode of the row."""
    scores = hit.scores()
    node: BaseNode
    if hit.fields.get("_node_content"):
        node = metadata_dict_to_node(dict(hit.fields), text=hit.text or "")
        node.metadata = stored(node.metadata)
        node.excluded_llm_metadata_keys = _stored_keys(node.excluded_llm_metadata_keys)
        node.excluded_embed_metadata_keys = _stored_keys(node.excluded_embed_metadata_keys)
        node = with_hidden(node, scores)
    else:
        hidden = [hit.pk_field, *scores]
        node = _hashing_class(TextNode)(
            id_=str(hit.pk),
            text=hit.text or "",
            metadata={**hit.fields, **scores},
            excluded_llm_metadata_keys=hidden,
            excluded_embed_metadata_keys=hidden,
        )
    return NodeWithScore(node=node, score=score_among(hit, hit.retrieval_score))


def _stored_keys(keys: Sequence[str]) -> list[str]:
    return list(stored(dict.fromkeys(keys)))


def with_hidden(node: BaseNode, metadata: Mapping[str, Any]) -> BaseNode:
    """Copy a node with further metadata that neither the LLM nor an embedding model sees.

    Scores in the metadata take no part in the copy's hash: by it LlamaIndex's fusion recognises
    a node that several queries found.
    """
    copied = node.model_copy(
        update={
            "metadata": rescored(node.metadata, metadata),
            "excluded_llm_metadata_keys": _with(node.excluded_llm_metadata_keys, metadata),
            "excluded_embed_metadata_keys": _with(node.excluded_embed_metadata_keys, metadata),
        }
    )
    return _with_hash_of_content(copied)


class _HashOfContent:
    """Leaves scores out of the hash of the node class that stands behind it."""

    metadata: dict[str, Any]

    @property
    def hash(self) -> str:
        bare = {k: v for k, v in self.metadata.items() if k not in SCORE_KEYS}
        node = _plain_class(type(self)).model_construct(**{**self.__dict__, "metadata": bare})
        return str(node.hash)

    def __reduce__(self) -> tuple[Any, ...]:
        return _with_hash_of_content, (_plain_class(type(self)).model_construct(**self.__dict__),)


def _with_hash_of_content(node: BaseNode) -> BaseNode:
    if isinstance(node, _HashOfContent):
        return node
    return cast(BaseNode, _hashing_class(type(node)).model_construct(**node.__dict__))


@cache
def _hashing_class(node_class: type[BaseNode]) -> Any:
    # Under the node class's own name: by it LlamaIndex's JsonSerializer reads nodes back.
    named = {"__module__": node_class.__module__}
    return type(node_class.__name__, (_HashOfContent, node_class), named)


def _plain_class(hashing_class: type[Any]) -> Any:
    return hashing_class.__bases__[1]


def _with(keys: Sequence[str], more: Iterable[str]) -> list[str]:
    return list(dict.fromkeys([*keys, *more]))


def to_encoders(
    embed_model: BaseEmbedding | Mapping[str, BaseEmbedding] | None, sparse_embedding: Any
) -> Encoders:
    """Wrap embedding models; without any, what was set as `Settings.embed_model` serves.

    Raises:
        ConfigurationError: Something is no embedding model of LlamaIndex.
    """
    by_field = embed_model if isinstance(embed_model, Mapping) else {}
    common = None if isinstance(embed_model, Mapping) else embed_model
    if embed_model is None:
        # What was set explicitly; asking Settings.embed_model would make an OpenAI model.
        common = getattr(Settings, "_embed_model", None)
    return Encoders(
        dense=None if common is None else _dense_encoder(common),
        sparse=None if sparse_embedding is None else sparse_encoder(sparse_embedding),
        by_field={name: _dense_encoder(model) for name, model in by_field.items()},
    )


def _dense_encoder(model: Any) -> Encoder:
    if not isinstance(model, BaseEmbedding):
        raise ConfigurationError(
            f"embed_model must be an embedding model of LlamaIndex, not {type(model).__name__} "
            "(a langchain Embeddings goes into LlamaIndex's LangchainEmbedding)"
        )

    def texts(query: Query) -> list[str]:
        return list(query.embedding_texts) or [query.text]

    def encode(query: Query) -> list[float]:
        return model.get_agg_embedding_from_queries(texts(query))

    async def aencode(query: Query) -> list[float]:
        return await model.aget_agg_embedding_from_queries(texts(query))

    return Encoder(encode, aencode, limit=model.num_workers)
