"""LlamaIndex: a retriever over Milvus reranked by vLLM, and a postprocessor for any nodes.

```python
from milvus_vllm_retrievers.llama_index import MilvusVLLMRetriever, VLLMRanker

retriever = MilvusVLLMRetriever("docs", ranker=VLLMRanker("http://localhost:8000"))
engine = RetrieverQueryEngine.from_args(retriever)
```
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import signature
from typing import Any

from pydantic import (
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    SecretStr,
    model_validator,
)
from typing_extensions import Self

from milvus_vllm_retrievers.core.adapter import (
    Closing,
    MilvusVLLMAdapter,
    Reranker,
    RowReranker,
    TextReranker,
)
from milvus_vllm_retrievers.core.hits import Ranking, score_among
from milvus_vllm_retrievers.core.milvus import DEFAULT_URI, ConnectionSettings, MilvusConnection
from milvus_vllm_retrievers.core.query import Item, OnMissing, SearchOptions, check_count
from milvus_vllm_retrievers.core.target import TargetSettings
from milvus_vllm_retrievers.errors import (
    ConfigurationError,
    MissingDependencyError,
    configuration_errors,
    refuse_unknown,
)
from milvus_vllm_retrievers.explain import Explanation, aexplain, explain
from milvus_vllm_retrievers.ranker import VLLMRanker, ranker_from, server_ranker
from milvus_vllm_retrievers.stores import llama_index_arguments

try:
    from llama_index.core import Settings
    from llama_index.core.base.base_retriever import BaseRetriever
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
    from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
    from llama_index.core.instrumentation.events.retrieval import (
        RetrievalEndEvent,
        RetrievalStartEvent,
    )
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import (
        ImageNode,
        MetadataMode,
        NodeWithScore,
        QueryBundle,
        QueryType,
    )
    from llama_index.core.vector_stores.types import MetadataFilters
    from llama_index_instrumentation import get_dispatcher

    from milvus_vllm_retrievers.llama_filters import to_expr
    from milvus_vllm_retrievers.llama_values import (
        to_bundle,
        to_encoders,
        to_node,
        to_query,
        with_hidden,
    )
except ImportError as error:
    raise MissingDependencyError(
        "milvus_vllm_retrievers.llama_index needs llama-index-core: "
        "pip install 'milvus-vllm-retrievers[llama-index]'"
    ) from error

__all__ = ["MilvusVLLMRerank", "MilvusVLLMRetriever", "VLLMRanker", "VLLMRerank"]

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
        timeout: float | None = None,
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
                where=None if filters is None else partial(to_expr, filters),
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


class _Rerank(Closing, BaseNodePostprocessor):
    """What both postprocessors do around the ranking itself: events, texts, copies."""

    model_config = ConfigDict(
        extra="forbid", arbitrary_types_allowed=True, hide_input_in_errors=True
    )

    top_n: PositiveInt | None = None
    keep_retrieval_score: bool = True

    _ranker: VLLMRanker = PrivateAttr()
    _adapter: Reranker = PrivateAttr()

    @classmethod
    def class_name(cls) -> str:
        """Return the class's name, by which LlamaIndex stores it."""
        return cls.__name__

    def _items(self, nodes: Sequence[NodeWithScore]) -> list[Item]:
        return [
            Item(text=given.node.get_content(), id=given.node_id, metadata=given.node.metadata)
            for given in nodes
        ]

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        with self._reranking(nodes, query_bundle) as reranked:
            if nodes:
                rankings = self._adapter.rank(to_query(query_bundle), self._items(nodes))
                reranked.extend(self._ranked(nodes, rankings))
        return reranked

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        with self._reranking(nodes, query_bundle) as reranked:
            if nodes:
                rankings = await self._adapter.arank(to_query(query_bundle), self._items(nodes))
                reranked.extend(self._ranked(nodes, rankings))
        return reranked

    @contextmanager
    def _reranking(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None
    ) -> Iterator[list[NodeWithScore]]:
        """Emit LlamaIndex's events around the block, which fills the list it is given."""
        model = self._ranker.model or ""
        top_n = self.top_n or len(nodes)
        dispatcher.event(
            ReRankStartEvent(query=query_bundle, nodes=nodes, top_n=top_n, model_name=model)
        )
        payload: dict[str, Any] = {
            EventPayload.NODES: nodes,
            EventPayload.MODEL_NAME: model,
            EventPayload.QUERY_STR: query_bundle.query_str if query_bundle else "",
            EventPayload.TOP_K: top_n,
        }
        reranked: list[NodeWithScore] = []
        with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
            yield reranked
            event.on_end(payload={EventPayload.NODES: reranked})
        dispatcher.event(ReRankEndEvent(nodes=reranked))

    def _ranked(
        self, nodes: Sequence[NodeWithScore], rankings: Sequence[Ranking]
    ) -> Iterator[NodeWithScore]:
        for ranking in rankings[: self.top_n]:
            given = nodes[ranking.index]
            scores = ranking.scores()
            if self.keep_retrieval_score and given.score is not None:
                scores["retrieval_score"] = given.score
            score = score_among(ranking, given.score)
            yield NodeWithScore(node=with_hidden(given.node, scores), score=score)


@configuration_errors("ranker")
class VLLMRerank(_Rerank):
    """Reranks any nodes straight against vLLM, best first.

    The nodes that were given stay as they are; copies come back, with ``relevance_score``,
    ``reranked_by`` and ``retrieval_score`` in their metadata, hidden from the language model.
    Equal scores keep the given order.

    Args:
        ranker: How nodes are reranked. In place of it, name `endpoint` and `model`.
        endpoint: vLLM's base URL, such as ``http://localhost:8000``.
        model: The served model's name; None is the server's only one.
        top_n: Nodes to return; None is all.
        metadata_mode: What is scored of a node. Default: the text alone, as Milvus does;
            ``MetadataMode.EMBED`` puts the metadata before it.
        keep_retrieval_score: Whether the score that a node came with is kept in its metadata.
        timeout: Seconds for one call with all its tries; None (default) leaves it to the
            ranker's `timeout` of each try.

    Raises:
        ConfigurationError: Neither or both of `ranker` and `endpoint` are given, an argument is
            unknown or out of range, or (on a call) there is no query, or a node is an image
            without a text.
        RerankError: Reranking failed and the ranker's `on_error` is not ``"skip"`` (on a call).
    """

    ranker: VLLMRanker | None = None
    endpoint: str | None = None
    model: str | None = None
    metadata_mode: MetadataMode = MetadataMode.NONE
    timeout: PositiveFloat | None = None

    @model_validator(mode="after")
    def _build(self) -> Self:
        self._ranker = ranker_from(self.ranker, self.endpoint, self.model)
        self._adapter = TextReranker(self._ranker, self.timeout)
        return self

    def _items(self, nodes: Sequence[NodeWithScore]) -> list[Item]:
        for given in nodes:
            is_image = isinstance(given.node, ImageNode) or getattr(
                given.node, "image_resource", None
            )
            if is_image and not given.node.get_content():
                raise ConfigurationError(
                    f"node {given.node.node_id!r} is an image without a text, which a text model "
                    "cannot rerank; give it a caption, or leave it out"
                )
        return [Item(given.node.get_content(metadata_mode=self.metadata_mode)) for given in nodes]


@configuration_errors("collection_name")
class MilvusVLLMRerank(_Rerank):
    """Has Milvus rerank nodes by their primary keys: no text travels, vLLM need not be in reach.

    The nodes must be rows of the collection: their id, or the primary key in their metadata,
    names the row, and the row's stored text is what is scored. Ties are by primary key.

    Args:
        collection_name: The collection the nodes came from. It needs a dense vector field.
        ranker: How Milvus reranks; its mode must not be ``"client"``.
        uri: Milvus's address, or the path of a Milvus Lite file.
        token: ``user:password`` or an api key of Milvus.
        db_name: Database; empty is the default one.
        connection_args: Further arguments of pymilvus's client, such as TLS files.
        client: A pymilvus MilvusClient to use in place of `uri`; it is never closed.
        async_client: An AsyncMilvusClient to use in the event loop it belongs to.
        text_field: The VARCHAR field that is reranked.
        partition_names: Partitions to look in; None is all.
        consistency_level: Such as ``"Strong"``; None is the collection's own.
        search_params: Parameters of the index. An approximate one that does not return every
            row needs some that have it look everywhere, such as ``{"nprobe": nlist}`` for IVF.
        timeout: Seconds for one call as a whole; None waits without limit.
        top_n: Nodes to return; None is all.
        keep_retrieval_score: Whether the score that a node came with is kept in its metadata.
        on_missing: Nodes without a row ``"raise"`` (default), or are returned last, marked by
            ``rerank_error`` in their metadata: ``"keep"``.

    Raises:
        ConfigurationError: An argument is unknown or out of range, or the collection or the
            server cannot do it.
        SearchError: Milvus did not answer, or a node has no row (on a call).
        RerankError: Reranking failed and the ranker's `on_error` does not cover it (on a call).
    """

    collection_name: str = Field(min_length=1)
    ranker: VLLMRanker
    uri: str = Field(default=DEFAULT_URI, exclude=True, repr=False)
    token: SecretStr = Field(default=SecretStr(""), exclude=True)
    db_name: str = ""
    connection_args: Mapping[str, Any] = Field(default_factory=dict, exclude=True, repr=False)
    client: Any = Field(default=None, exclude=True, repr=False)
    async_client: Any = Field(default=None, exclude=True, repr=False)
    text_field: str | None = None
    partition_names: Sequence[str] | None = None
    consistency_level: str | int | None = None
    search_params: Mapping[str, Any] | None = None
    timeout: float | None = None
    on_missing: OnMissing = "raise"

    @model_validator(mode="after")
    def _build(self) -> Self:
        self._ranker = server_ranker(self.ranker)
        self._adapter = RowReranker.of(self)
        return self
