"""The LlamaIndex retriever."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

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
from llama_index_instrumentation.dispatcher import DISPATCHER_SPAN_DECORATED_ATTR
from pydantic import SecretStr
from typing_extensions import Never, Self, Unpack

from milvus_vllm_retrievers._core.adapter import Closing, MilvusVLLMAdapter
from milvus_vllm_retrievers._core.arguments import (
    NOT_GIVEN,
    RetrieverArguments,
    given_ranker,
    other_names,
)
from milvus_vllm_retrievers._core.milvus import DEFAULT_URI, ConnectionSettings, MilvusConnection
from milvus_vllm_retrievers._core.query import SearchOptions, Where, check_count
from milvus_vllm_retrievers._core.stores import llama_index_arguments, with_article
from milvus_vllm_retrievers._core.target import TargetSettings
from milvus_vllm_retrievers.errors import ConfigurationError, refuse_setting, refuse_unknown
from milvus_vllm_retrievers.explain import Explanation, aexplain, explain
from milvus_vllm_retrievers.llama_index._convert import to_bundles, to_encoders, to_node, to_query
from milvus_vllm_retrievers.llama_index._filters import checked_filters, to_expr
from milvus_vllm_retrievers.ranker import VLLMRanker

dispatcher = get_dispatcher(__name__)
_Method = TypeVar("_Method", bound=Callable[..., Any])


class LlamaIndexRetrieverArguments(RetrieverArguments, total=False):
    """What `MilvusVLLMRetriever` takes beside a collection and a ranker; documented there."""

    embed_model: BaseEmbedding | Mapping[str, BaseEmbedding] | None
    similarity_top_k: int
    filters: MetadataFilters | None
    callback_manager: CallbackManager | None
    object_map: dict[str, Any] | None
    verbose: bool


_KNOWN = ["collection_name", "ranker", *sorted(LlamaIndexRetrieverArguments.__optional_keys__)]
_MEANT = other_names("similarity_top_k", "filters=MetadataFilters(...)", "embed_model")
_SEARCH = (
    *("fetch_k", "expr", "expr_params", "partition_names", "consistency_level"),
    *("search_params", "score_threshold", "timeout"),
)
# What is said of every search, and what the core calls it.
_OPTIONS = {"similarity_top_k": "k", **dict(zip(_SEARCH, _SEARCH, strict=True))}
_SETTABLE = (
    *("similarity_top_k", "fetch_k", "filters", "expr", "expr_params", "score_threshold"),
    *("timeout", "callback_manager", "object_map"),
)
# What is said of arguments of one call: LlamaIndex's retrievers take none.
_ASKED_OF_A_CALL = {
    **_MEANT,
    **dict.fromkeys(("k", "top_k", "top_n"), "set retriever.similarity_top_k = ..."),
    **{name: f"set retriever.{name} = ..." for name in _SETTABLE},
    "filter": "use retriever.within(filters=MetadataFilters(...)), or set retriever.filters",
    "filters": "use retriever.within(filters=...), or set retriever.filters",
    "expr": "use retriever.within(expr=...), or set retriever.expr",
}


def _option(name: str) -> Any:
    """Make an attribute that is an option of every search; what is set is checked, and counts."""

    def get(retriever: MilvusVLLMRetriever) -> Any:
        return getattr(retriever._options, _OPTIONS[name])

    def set_(retriever: MilvusVLLMRetriever, value: Any) -> None:
        retriever._use(retriever._options, {name: value})

    return property(get, set_)


def _span(method: _Method) -> _Method:
    """Give a method a span of its own in LlamaIndex's traces, and keep its type."""
    return dispatcher.span(method)  # type: ignore[return-value]


def _no_span(method: _Method) -> _Method:
    """Have LlamaIndex give a method no span beside that of its own method, which it calls."""
    setattr(method, DISPATCHER_SPAN_DECORATED_ATTR, True)
    return method


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
        ranker: How candidates are reranked. None, written out, leaves the retrieval order;
            several vector fields are then fused by RRF.
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
        filters: LlamaIndex MetadataFilters that every node must match. Values from users belong
            here, where each is quoted, and never into an `expr`. What a user may see at all is
            for `within`.
        expr: Milvus boolean expression that every node must match, beside `filters`.
        expr_params: Values of the expression's templates (not on Milvus Lite).
        partition_names: Partitions to search; None is all.
        consistency_level: Such as ``"Strong"``; None is the collection's own.
        search_params: Parameters of the index, common or by vector field.
        score_threshold: Least relevance score of a returned node; needs a ranker.
        timeout: Seconds for one query as a whole, default 60; None waits without limit.
        callback_manager: LlamaIndex's callbacks.
        object_map: Objects by index id, for IndexNodes.
        verbose: Whether LlamaIndex prints what it enters.

    `similarity_top_k`, `fetch_k`, `filters`, `expr`, `expr_params`, `score_threshold` and `timeout`
    can be set later as well, for the calls that follow, as can LlamaIndex's own `callback_manager`
    and `object_map`.

    Raises:
        ConfigurationError: An argument is unknown or out of range, or (on the first call) does
            not fit the collection or the server.
        SearchError: Milvus did not answer (on a call).
        RerankError: Reranking failed and the ranker's `on_error` does not cover it (on a call).
    """

    similarity_top_k: int = _option("similarity_top_k")
    fetch_k: int | None = _option("fetch_k")
    expr: str | None = _option("expr")
    expr_params: Mapping[str, Any] | None = _option("expr_params")
    score_threshold: float | None = _option("score_threshold")
    timeout: float | None = _option("timeout")

    _adapter: MilvusVLLMAdapter
    _options: SearchOptions
    _filters: MetadataFilters | None

    def __init__(
        self,
        collection_name: str,
        ranker: VLLMRanker | None = NOT_GIVEN,
        **arguments: Unpack[LlamaIndexRetrieverArguments],
    ) -> None:
        refuse_unknown(type(self).__name__, arguments, _KNOWN, _MEANT)
        self._ranked = (ranker := given_ranker(ranker)) is not None
        options = {name: value for name, value in arguments.items() if name in _OPTIONS}
        self._use(SearchOptions(), {"similarity_top_k": 2, **options})
        self.filters = arguments.get("filters")
        token = arguments.get("token", "")
        adapter = MilvusVLLMAdapter(
            MilvusConnection(
                ConnectionSettings(
                    arguments.get("uri", DEFAULT_URI),
                    token.get_secret_value() if isinstance(token, SecretStr) else token,
                    arguments.get("db_name", ""),
                    arguments.get("connection_args") or {},
                ),
                client=arguments.get("client"),
                async_client=arguments.get("async_client"),
            ),
            TargetSettings(
                collection_name=collection_name,
                text_field=arguments.get("text_field"),
                vector_field=arguments.get("vector_field"),
                output_fields=arguments.get("output_fields"),
                encoders=to_encoders(
                    arguments.get("embed_model"), arguments.get("sparse_embedding")
                ),
            ),
            ranker,
        )
        super().__init__(
            callback_manager=arguments.get("callback_manager") or Settings.callback_manager,
            object_map=arguments.get("object_map"),
            verbose=arguments.get("verbose", False),
        )
        self._adapter = adapter

    @classmethod
    def from_vector_store(
        cls,
        store: Any,
        ranker: VLLMRanker | None = NOT_GIVEN,
        **arguments: Unpack[LlamaIndexRetrieverArguments],
    ) -> Self:
        """Make a retriever over the collection of a MilvusVectorStore.

        Connection, field names and sparse encoder are the store's; a store knows no embedding
        model, so pass `embed_model`, or use `from_index`.

        Args:
            store: The store; its blocking client is borrowed and stays open.
            ranker: How candidates are reranked; None, written out, leaves the retrieval order.
            **arguments: Further arguments of the retriever; they win over the store's.

        Raises:
            ConfigurationError: It is not such a store, or an argument is wrong.
        """
        ranker = given_ranker(ranker)
        return cls(**{**llama_index_arguments(store), "ranker": ranker, **arguments})

    @classmethod
    def from_index(
        cls,
        index: Any,
        ranker: VLLMRanker | None = NOT_GIVEN,
        **arguments: Unpack[LlamaIndexRetrieverArguments],
    ) -> Self:
        """Make a retriever over a VectorStoreIndex whose store is a MilvusVectorStore.

        Args:
            index: The index; its embedding model is used.
            ranker: How candidates are reranked; None, written out, leaves the retrieval order.
            **arguments: Further arguments of the retriever; they win over the store's.

        Raises:
            ConfigurationError: The index's store is another, or an argument is wrong.
        """
        if not hasattr(index, "vector_store"):
            raise ConfigurationError(
                f"from_index needs a VectorStoreIndex, not {with_article(index)} (a store goes to "
                "from_vector_store)"
            )
        ranker = given_ranker(ranker)
        arguments = {"embed_model": getattr(index, "_embed_model", None), **arguments}
        return cls.from_vector_store(index.vector_store, ranker, **arguments)

    @classmethod
    def class_name(cls) -> str:
        """Return the class's name, as LlamaIndex's components do."""
        return "MilvusVLLMRetriever"

    @property
    def filters(self) -> MetadataFilters | None:
        """The MetadataFilters that every node must match."""
        return self._filters

    @filters.setter
    def filters(self, filters: MetadataFilters | None) -> None:
        self._filters = None if filters is None else checked_filters(filters)
        self._options = replace(self._options, wheres=_wheres(self._filters))

    def within(
        self,
        *,
        filters: MetadataFilters | None = None,
        expr: str | None = None,
        partition_names: Sequence[str] | None = None,
        instruction: str | None = None,
    ) -> Self:
        """Make a retriever that finds only a part of what this one finds, whatever it is asked.

        It shares this one's connections and costs next to nothing: make one for every request,
        such as with the filter of the user who asks. What it is confined to, this retriever's
        own filters included, no attribute, call or tool argument widens, and changing this one
        or the filters given here does not either. Its own `filters` and `expr` narrow further,
        as does `within` on it. Closing it closes nothing; close this one.

        Objects of `object_map` are not confined: an IndexNode leads to them as before.

        Args:
            filters: MetadataFilters that every node must match; each value is quoted.
            expr: Milvus boolean expression that every node must match. Never paste a user's
                value into it: that is what `filters` is for.
            partition_names: The only partitions to search.
            instruction: What the rerank model is told of the task.

        Raises:
            ConfigurationError: There is nothing to narrow by, or a value is wrong.
        """
        narrowing = None if filters is None else checked_filters(filters)
        # What `self.filters` hands out can be changed, so it takes a copy of it too.
        own = None if self._filters is None else checked_filters(self._filters)
        options = replace(self._options, wheres=_wheres(own)).within(
            expr=expr,
            where=next(iter(_wheres(narrowing)), None),
            partition_names=partition_names,
            instruction=instruction,
        )
        narrowed = object.__new__(type(self))
        vars(narrowed).update(vars(self), _options=options, _filters=None)
        narrowed.object_map = dict(self.object_map)
        return narrowed

    def refresh(self) -> None:
        """Look at the collection again now: for fields that were added, or an alias that moved.

        A retriever in use sees a change by itself within a minute.
        """
        self._adapter.refresh(self._options.timeout)

    async def arefresh(self) -> None:
        """Look at the collection again now; the async twin of `refresh`."""
        await self._adapter.arefresh(self._options.timeout)

    def close(self) -> None:
        """Close the blocking connections that were made here; borrowed clients stay open."""
        if self._options.scope is None:  # else they are those of the retriever it was made of
            super().close()

    async def aclose(self) -> None:
        """Close this event loop's connections and the blocking ones that were made here.

        Async calls under way finish, and the last of them closes what they use.
        """
        if self._options.scope is None:
            await super().aclose()

    def __setattr__(self, name: str, value: Any) -> None:
        own = name.startswith("_") or name in vars(self) or hasattr(type(self), name)
        of_subclass = type(self) is not MilvusVLLMRetriever and name not in {*_KNOWN, *_MEANT}
        # LlamaIndex sets its own while the retriever is made.
        if not own and not of_subclass and "_adapter" in vars(self):
            refuse_setting(type(self).__name__, name, _KNOWN, _SETTABLE, _MEANT)
        super().__setattr__(name, value)

    def _use(self, options: SearchOptions, changed: Mapping[str, Any]) -> None:
        """Search with these options from now on, some of them changed.

        Raises:
            ConfigurationError: One is out of range.
        """
        if "similarity_top_k" in changed:  # by the name it has here
            check_count("similarity_top_k", changed["similarity_top_k"])
        if changed.get("score_threshold") is not None and not self._ranked:
            raise ConfigurationError(
                "score_threshold is held against the rerank model's scores: pass "
                "ranker=VLLMRanker(...) too, or leave it out"
            )
        renamed = {_OPTIONS[name]: value for name, value in changed.items()}
        self._options = replace(options, **renamed)

    @_no_span
    def retrieve(self, str_or_query_bundle: QueryType, **unknown: Never) -> list[NodeWithScore]:
        """Retrieve the nodes of a query, best first.

        Args:
            str_or_query_bundle: A query text or a QueryBundle.
            **unknown: Refused: what is asked of a query is set on the retriever.
        """
        refuse_unknown("retrieve", unknown, (), _ASKED_OF_A_CALL)
        return super().retrieve(str_or_query_bundle)

    @_no_span
    async def aretrieve(
        self, str_or_query_bundle: QueryType, **unknown: Never
    ) -> list[NodeWithScore]:
        """Retrieve the nodes of a query, best first; the async twin of `retrieve`."""
        refuse_unknown("aretrieve", unknown, (), _ASKED_OF_A_CALL)
        return await super().aretrieve(str_or_query_bundle)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        hits = self._adapter.retrieve(to_query(query_bundle), self._options)
        return [to_node(hit) for hit in hits]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        hits = await self._adapter.aretrieve(to_query(query_bundle), self._options)
        return [to_node(hit) for hit in hits]

    @_span
    def retrieve_many(
        self,
        queries: Sequence[QueryType],
        *,
        num_workers: int | None = None,
        **unknown: Never,
    ) -> list[list[NodeWithScore]]:
        """Retrieve for several queries, with as few requests as serve them best.

        Each query has its own timeout and its own events, all in one span and one trace. Where
        some fail, the others are finished and told to event handlers all the same, and the first
        failure is raised.

        Args:
            queries: Query texts or QueryBundles.
            num_workers: How many queries are worked on at once: embedded, searched for, reranked.
                Queries are embedded no more at once than the embedding model's own `num_workers`.
                Default: as the ranker's `max_concurrency` says.
            **unknown: Refused: what is asked of every query is set on the retriever.

        Returns:
            The nodes of each query, in the queries' order.
        """
        bundles = to_bundles(queries)
        with self._retrievals(bundles, num_workers, unknown) as answers:
            asked = [to_query(bundle) for bundle in bundles]
            found = self._adapter.retrieve_many(asked, self._options, num_workers)
            for bundle, hits in zip(bundles, found, strict=True):
                if isinstance(hits, Exception):
                    answers.append(hits)
                    continue
                nodes = [to_node(hit) for hit in hits]
                answers.append(self._handle_recursive_retrieval(bundle, nodes))
        return answers

    @_span
    async def aretrieve_many(
        self,
        queries: Sequence[QueryType],
        *,
        num_workers: int | None = None,
        **unknown: Never,
    ) -> list[list[NodeWithScore]]:
        """Retrieve for several queries; the async twin of `retrieve_many`."""
        bundles = to_bundles(queries)
        with self._retrievals(bundles, num_workers, unknown) as answers:
            asked = [to_query(bundle) for bundle in bundles]
            found = await self._adapter.aretrieve_many(asked, self._options, num_workers)
            for bundle, hits in zip(bundles, found, strict=True):
                if isinstance(hits, Exception):
                    answers.append(hits)
                    continue
                nodes = [to_node(hit) for hit in hits]
                answers.append(await self._ahandle_recursive_retrieval(bundle, nodes))
        return answers

    @contextmanager
    def _retrievals(
        self, bundles: Sequence[QueryBundle], num_workers: int | None, unknown: Collection[str]
    ) -> Iterator[list[Any]]:
        """Emit LlamaIndex's events of each query around the block, which fills in the answers.

        An answer is a query's nodes, or the exception that it met; the first of these is raised.
        """
        refuse_unknown("retrieve_many", unknown, ["num_workers"], _ASKED_OF_A_CALL)
        if num_workers is not None:
            check_count("num_workers", num_workers)
        self._check_callback_manager()
        for bundle in bundles:
            dispatcher.event(RetrievalStartEvent(str_or_query_bundle=bundle))
        answers: list[Any] = []
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
            for event, answer in zip(events, answers, strict=True):
                failed = isinstance(answer, Exception)
                what = EventPayload.EXCEPTION if failed else EventPayload.NODES
                event.on_end(payload={what: answer})
        for bundle, answer in zip(bundles, answers, strict=True):
            if not isinstance(answer, Exception):
                dispatcher.event(RetrievalEndEvent(str_or_query_bundle=bundle, nodes=answer))
        if failures := [answer for answer in answers if isinstance(answer, Exception)]:
            raise failures[0]

    def explain(self, query: QueryType) -> Explanation:
        """Show what reranking does to a query: each result's place before and after."""
        return explain(self._adapter, to_query(query), self._options)

    async def aexplain(self, query: QueryType) -> Explanation:
        """Show what reranking does to a query; the async twin of `explain`."""
        return await aexplain(self._adapter, to_query(query), self._options)


def _wheres(filters: MetadataFilters | None) -> tuple[Where, ...]:
    return () if filters is None else (partial(to_expr, filters),)
