"""The LlamaIndex retriever."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import signature
from typing import Any

from llama_index.core import Settings
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
from llama_index.core.instrumentation.events.retrieval import (
    RetrievalEndEvent,
    RetrievalStartEvent,
)
from llama_index.core.schema import NodeWithScore, QueryBundle, QueryType
from llama_index.core.vector_stores.types import MetadataFilters
from llama_index_instrumentation import get_dispatcher
from typing_extensions import Self

from milvus_vllm_retrievers._core.adapter import Closing, MilvusVLLMAdapter
from milvus_vllm_retrievers._core.milvus import DEFAULT_URI, ConnectionSettings, MilvusConnection
from milvus_vllm_retrievers._core.query import SearchOptions, check_count
from milvus_vllm_retrievers._core.stores import llama_index_arguments
from milvus_vllm_retrievers._core.target import TargetSettings
from milvus_vllm_retrievers.errors import ConfigurationError, refuse_unknown
from milvus_vllm_retrievers.explain import Explanation, aexplain, explain
from milvus_vllm_retrievers.llama_index._convert import to_bundle, to_encoders, to_node, to_query
from milvus_vllm_retrievers.llama_index._filters import to_expr
from milvus_vllm_retrievers.ranker import VLLMRanker

dispatcher = get_dispatcher(__name__)


class MilvusVLLMRetriever(Closing, BaseRetriever):
    """Retrieves nodes from a Milvus collection, reranked by a model that vLLM serves.

    In the common case the collection's name and a ranker are all it takes: the primary key,
    the text field and the vector fields are read from the collection. Nodes that LlamaIndex
    stored come back as they were, with their own ids and relationships; other rows become
    TextNodes with the primary key as id.

    `NodeWithScore.score` is the model's score. The nodes' metadata has ``relevance_score``,
    ``retrieval_score`` (where it is known), ``reranked_by`` (``"milvus"``, ``"client"`` or None)
    and, on a node that a failure left unranked, ``rerank_error``; the language model and the
    embedding model do not see them.

    Args:
        collection_name: The Milvus collection.
        ranker: How candidates are reranked. None leaves the retrieval order; several vector
            fields are then fused by RRF.
        uri: Milvus's address, or the path of a Milvus Lite file. Default
            ``http://localhost:19530``.
        token: ``user:password`` or an api key of Milvus.
        db_name: Database; empty is the default one.
        connection_args: Further arguments of pymilvus's client, such as TLS files.
        client: A pymilvus MilvusClient to use in place of `uri`; it is never closed.
        async_client: An AsyncMilvusClient to use in the event loop it belongs to.
        embed_model: The embedding model of dense fields, or a mapping of field names to models.
            Default: `Settings.embed_model` where one was set. BM25 and TEXT_EMBEDDING fields
            need none, nor does a QueryBundle that brings its embedding.
        sparse_embedding: For sparse fields other than BM25: a callable from text to
            ``{dimension: weight}``, or an object with ``encode_queries`` that does it.
        vector_field: The vector field or fields to search; None is every one that the query
            can reach.
        text_field: The VARCHAR field that is reranked and becomes the node's text.
        output_fields: Fields for the metadata; None is all but vectors.
        similarity_top_k: Nodes to return. Default 2.
        fetch_k: Candidates per vector field that are reranked. Default: 50, or
            `similarity_top_k` if larger.
        filters: LlamaIndex MetadataFilters that every node must match.
        expr: Milvus boolean expression that every node must match, beside `filters`.
        expr_params: Values of the expression's templates (not on Milvus Lite).
        partition_names: Partitions to search; None is all.
        consistency_level: Such as ``"Strong"``; None is the collection's own.
        search_params: Parameters of the index, common or by vector field.
        score_threshold: Least relevance score of a returned node.
        timeout: Seconds for one call as a whole; None waits without limit.
        callback_manager: LlamaIndex's callbacks.
        object_map: Objects by index id, for IndexNodes.
        verbose: Whether LlamaIndex prints what it enters.
        **unknown: Refused, with the nearest known name.

    Raises:
        ConfigurationError: An argument is unknown or out of range, or (on the first call) does
            not fit the collection or the server.
        SearchError: Milvus did not answer (on a call).
        RerankError: Reranking failed and the ranker's `on_error` does not cover it (on a call).
    """

    _adapter: MilvusVLLMAdapter

    def __init__(
        self,
        collection_name: str,
        ranker: VLLMRanker | None = None,
        *,
        uri: str = DEFAULT_URI,
        token: str = "",
        db_name: str = "",
        connection_args: Mapping[str, Any] | None = None,
        client: Any = None,
        async_client: Any = None,
        embed_model: BaseEmbedding | Mapping[str, BaseEmbedding] | None = None,
        sparse_embedding: Any = None,
        vector_field: str | Sequence[str] | None = None,
        text_field: str | None = None,
        output_fields: Sequence[str] | None = None,
        similarity_top_k: int = 2,
        fetch_k: int | None = None,
        filters: MetadataFilters | None = None,
        expr: str | None = None,
        expr_params: Mapping[str, Any] | None = None,
        partition_names: Sequence[str] | None = None,
        consistency_level: str | int | None = None,
        search_params: Mapping[str, Any] | None = None,
        score_threshold: float | None = None,
        timeout: float | None = 60.0,
        callback_manager: CallbackManager | None = None,
        object_map: dict[str, Any] | None = None,
        verbose: bool = False,
        **unknown: Any,
    ) -> None:
        refuse_unknown(type(self).__name__, unknown, signature(type(self)).parameters)
        check_count("similarity_top_k", similarity_top_k)
        if filters is not None and not isinstance(filters, MetadataFilters):
            raise ConfigurationError(
                f"filters must be MetadataFilters, not {type(filters).__name__}; a Milvus "
                "expression goes into expr="
            )
        self._options = SearchOptions(
            k=similarity_top_k,
            fetch_k=fetch_k,
            expr=expr,
            wheres=() if filters is None else (partial(to_expr, filters),),
            expr_params=expr_params,
            partition_names=partition_names,
            consistency_level=consistency_level,
            search_params=search_params,
            score_threshold=score_threshold,
            timeout=timeout,
        )
        self._adapter = MilvusVLLMAdapter(
            MilvusConnection(
                ConnectionSettings(uri, token, db_name, connection_args or {}),
                client=client,
                async_client=async_client,
            ),
            TargetSettings(
                collection_name=collection_name,
                text_field=text_field,
                vector_field=vector_field,
                output_fields=output_fields,
                encoders=to_encoders(embed_model, sparse_embedding),
            ),
            ranker,
        )
        super().__init__(
            callback_manager=callback_manager or Settings.callback_manager,
            object_map=object_map,
            verbose=verbose,
        )

    @classmethod
    def from_vector_store(
        cls, store: Any, ranker: VLLMRanker | None = None, **arguments: Any
    ) -> Self:
        """Make a retriever over the collection of a MilvusVectorStore.

        Connection, field names and sparse encoder are the store's; a store knows no embedding
        model, so pass `embed_model`, or use `from_index`.

        Args:
            store: The store; its blocking client is borrowed and stays open.
            ranker: How candidates are reranked.
            **arguments: Further arguments of the retriever; they win over the store's.

        Raises:
            ConfigurationError: It is not such a store, or an argument is wrong.
        """
        return cls(**{**llama_index_arguments(store), "ranker": ranker, **arguments})

    @classmethod
    def from_index(cls, index: Any, ranker: VLLMRanker | None = None, **arguments: Any) -> Self:
        """Make a retriever over a VectorStoreIndex whose store is a MilvusVectorStore.

        Args:
            index: The index; its embedding model is used.
            ranker: How candidates are reranked.
            **arguments: Further arguments of the retriever; they win over the store's.

        Raises:
            ConfigurationError: The index's store is another, or an argument is wrong.
        """
        embed_model = getattr(index, "_embed_model", None)
        arguments = {"embed_model": embed_model, **arguments}
        return cls.from_vector_store(getattr(index, "vector_store", None), ranker, **arguments)

    @classmethod
    def class_name(cls) -> str:
        """Return the class's name, as LlamaIndex's components do."""
        return "MilvusVLLMRetriever"

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        hits = self._adapter.retrieve(to_query(query_bundle), self._options)
        return [to_node(hit) for hit in hits]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        hits = await self._adapter.aretrieve(to_query(query_bundle), self._options)
        return [to_node(hit) for hit in hits]

    def retrieve_many(self, queries: Sequence[QueryType]) -> list[list[NodeWithScore]]:
        """Retrieve for several queries, with as few requests as serve them best.

        The queries go to Milvus together: in one search, or, where Milvus reranks them one after
        another, in up to the ranker's `max_concurrency` searches at once. Rerank requests of this
        process are as many in flight. Each query has its own events, all in one trace.

        Args:
            queries: Query texts or QueryBundles.

        Returns:
            The nodes of each query, in the queries' order.
        """
        bundles = [to_bundle(query) for query in queries]
        with self._retrievals(bundles) as answers:
            found = self._adapter.retrieve_many([to_query(b) for b in bundles], self._options)
            for outcome in found:
                if isinstance(outcome, Exception):
                    raise outcome
            for bundle, hits in zip(bundles, found, strict=True):
                nodes = [to_node(hit) for hit in hits]
                answers.append(self._handle_recursive_retrieval(bundle, nodes))
        return answers

    async def aretrieve_many(self, queries: Sequence[QueryType]) -> list[list[NodeWithScore]]:
        """Retrieve for several queries; the async twin of `retrieve_many`."""
        bundles = [to_bundle(query) for query in queries]
        with self._retrievals(bundles) as answers:
            asked = [to_query(bundle) for bundle in bundles]
            found = await self._adapter.aretrieve_many(asked, self._options)
            for outcome in found:
                if isinstance(outcome, Exception):
                    raise outcome
            for bundle, hits in zip(bundles, found, strict=True):
                nodes = [to_node(hit) for hit in hits]
                answers.append(await self._ahandle_recursive_retrieval(bundle, nodes))
        return answers

    @contextmanager
    def _retrievals(self, bundles: Sequence[QueryBundle]) -> Iterator[list[list[NodeWithScore]]]:
        """Emit LlamaIndex's events of each query around the block, which fills in the nodes."""
        self._check_callback_manager()
        for bundle in bundles:
            dispatcher.event(RetrievalStartEvent(str_or_query_bundle=bundle))
        answers: list[list[NodeWithScore]] = []
        with ExitStack() as stack:
            stack.enter_context(self.callback_manager.as_trace("query"))
            events = [
                stack.enter_context(
                    self.callback_manager.event(
                        CBEventType.RETRIEVE, payload={EventPayload.QUERY_STR: bundle.query_str}
                    )
                )
                for bundle in bundles
            ]
            yield answers
            for event, nodes in zip(events, answers, strict=True):
                event.on_end(payload={EventPayload.NODES: nodes})
        for bundle, nodes in zip(bundles, answers, strict=True):
            dispatcher.event(RetrievalEndEvent(str_or_query_bundle=bundle, nodes=nodes))

    def explain(self, query: QueryType) -> Explanation:
        """Show what reranking does to a query: each result's place before and after."""
        return explain(self._adapter, to_query(query), self._options)

    async def aexplain(self, query: QueryType) -> Explanation:
        """Show what reranking does to a query; the async twin of `explain`."""
        return await aexplain(self._adapter, to_query(query), self._options)
