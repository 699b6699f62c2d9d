"""The LangChain retriever."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Annotated, Any

from langchain_core.callbacks import (
    AsyncCallbackManagerForRetrieverRun,
    CallbackManagerForRetrieverRun,
)
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import get_config_list
from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    InstanceOf,
    PlainSerializer,
    PrivateAttr,
    SecretStr,
    SkipValidation,
    model_validator,
)
from typing_extensions import Self, Unpack

from milvus_vllm_retrievers._core.adapter import MilvusVLLMAdapter
from milvus_vllm_retrievers._core.arguments import NOT_GIVEN, given_ranker, other_names
from milvus_vllm_retrievers._core.filters import checked_filters, from_mapping
from milvus_vllm_retrievers._core.milvus import DEFAULT_URI, MilvusConnection
from milvus_vllm_retrievers._core.query import (
    DEFAULT_TIMEOUT,
    Query,
    Scope,
    SearchOptions,
    Where,
)
from milvus_vllm_retrievers._core.stores import langchain_arguments
from milvus_vllm_retrievers._core.target import TargetSettings
from milvus_vllm_retrievers.errors import ConfigurationError, configuration_errors, refuse_unknown
from milvus_vllm_retrievers.explain import Explanation, aexplain, explain
from milvus_vllm_retrievers.langchain._arguments import (
    Embedding,
    MilvusVLLMRetrieverArguments,
    Number,
    Ranker,
    WholeNumber,
)
from milvus_vllm_retrievers.langchain._convert import to_document, to_encoders
from milvus_vllm_retrievers.langchain._runs import (
    answers,
    astart_runs,
    in_place,
    start_runs,
    to_queries,
)
from milvus_vllm_retrievers.langchain._settings import Settable
from milvus_vllm_retrievers.ranker import VLLMRanker

_PER_CALL = ("k", "fetch_k", "filters", "expr", "expr_params", "instruction")
# What connections, layout and limits are made for; retrievers that agree in it share them.
_OF_THE_ADAPTER = (
    "collection_name",
    "ranker",
    "uri",
    "token",
    "db_name",
    "connection_args",
    "client",
    "async_client",
    "embedding",
    "sparse_embedding",
    "vector_field",
    "text_field",
    "output_fields",
)


@dataclass(frozen=True, slots=True)
class Shared:
    """What a retriever passes on to all that are made of it.

    Attributes:
        adapter: The connections, and what is known of the collection.
        arguments: What the adapter was made for.
        scope: What a retriever made by `within` is confined to.
    """

    adapter: MilvusVLLMAdapter = field(repr=False)
    arguments: tuple[Any, ...] = field(repr=False)
    scope: Scope | None = None


def _frozen(filters: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    return None if filters is None else MappingProxyType(checked_filters(filters))


def _where(filters: Mapping[str, Any] | None) -> Where | None:
    return None if filters is None else functools.partial(from_mapping, checked_filters(filters))


Filters = Annotated[
    SkipValidation[Mapping[str, Any] | None],
    AfterValidator(_frozen),
    PlainSerializer(dict, when_used="unless-none"),
]


@configuration_errors("collection_name", "ranker")
class MilvusVLLMRetriever(Settable, BaseRetriever):
    """Retrieves Documents from a Milvus collection, reranked by a model that vLLM serves.

    In the common case the collection's name and a ranker are all it takes: the primary key,
    the text field and the vector fields are read from the collection.

    Documents carry ``id`` (the primary key as text), ``page_content`` (the text field) and in
    ``metadata`` the row's other fields, ``relevance_score`` (the model's score, on its own
    scale), ``retrieval_score`` (where it is known), ``reranked_by`` (``"milvus"``,
    ``"client"`` or None) and, on an item that a failure left unranked, ``rerank_error``.

    Per call: ``retriever.invoke(query, k=..., fetch_k=..., filters=..., expr=...,
    expr_params=..., instruction=...)``. A filter given per call is AND-ed to the constructor's.
    Values, above all those that a user or a model wrote, belong into ``filters``, which quotes
    them; pasted into ``expr`` they can say anything.

    One tenant's rows for one request: `within`. ``bind(expr=...)`` is no such boundary, since
    LangChain lets the argument of a later call replace a bound one.

    ``k``, ``fetch_k``, ``filters``, ``expr``, ``expr_params``, ``score_threshold`` and
    ``timeout`` can be set as attributes, and take effect with the next call. All else is decided
    here; ``model_copy(update=...)`` makes a retriever with other arguments. It uses this one's
    connections, and leaves their closing to this one, as long as the collection, the ranker and
    what connects, embeds and names fields are the same; so does ``configurable_fields``.

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
        embedding: The LangChain embedding model of dense fields, or a mapping of field names
            to models (to sparse encoders for sparse fields). BM25 and TEXT_EMBEDDING fields
            need none.
        sparse_embedding: For sparse fields other than BM25: a callable from text to
            ``{dimension: weight}``, or an object with ``embed_query`` that does it.
        vector_field: The vector field or fields to search; None is every one that the query
            can reach.
        text_field: The VARCHAR field that is reranked and becomes ``page_content``.
        output_fields: Fields for the metadata; None is all but vectors.
        k: Documents to return. Default 4.
        fetch_k: Candidates per vector field that are reranked. Default: 50, or `k` if larger.
        filters: What the fields of every document must be: field -> value, field -> list of
            values (one of them), or field -> ``{"gte": ..., "lt": ...}``.
        expr: Milvus boolean expression that every document must match, for what `filters`
            cannot say.
        expr_params: Values of the expression's templates (not on Milvus Lite).
        partition_names: Partitions to search; None is all.
        consistency_level: Such as ``"Strong"``; None is the collection's own.
        search_params: Parameters of the index, common or by vector field.
        score_threshold: Least relevance score of a returned document. Needs a ranker.
        timeout: Seconds for one query as a whole, default 60; None waits without limit.

    Raises:
        ConfigurationError: An argument is unknown or out of range, or (on the first call) does
            not fit the collection or the server.
        SearchError: Milvus did not answer (on a call).
        RerankError: Reranking failed and the ranker's `on_error` does not cover it (on a call).

    Warns:
        UserWarning: No ranker was given; ``ranker=None`` says that none is wanted.
    """

    model_config = ConfigDict(
        extra="forbid", arbitrary_types_allowed=True, hide_input_in_errors=True
    )
    _meant = other_names("k", "filters={'field': 'value'}", "embedding")
    _settable = frozenset(
        {
            *("k", "fetch_k", "filters", "expr", "expr_params", "score_threshold", "timeout"),
            *BaseRetriever.model_fields,
        }
    )

    collection_name: str = Field(min_length=1)
    ranker: Ranker | None = None
    uri: str = Field(default=DEFAULT_URI, exclude=True, repr=False)
    token: SecretStr = Field(default=SecretStr(""), exclude=True)
    db_name: str = ""
    connection_args: Mapping[str, Any] = Field(default_factory=dict, exclude=True, repr=False)
    client: Any = Field(default=None, exclude=True, repr=False)
    async_client: Any = Field(default=None, exclude=True, repr=False)
    embedding: Embedding = Field(default=None, repr=False)
    sparse_embedding: Any = Field(default=None, repr=False)
    vector_field: str | Sequence[str] | None = None
    text_field: str | None = None
    output_fields: Sequence[str] | None = None
    k: WholeNumber = 4
    fetch_k: WholeNumber | None = None
    filters: Filters = None
    expr: str | None = None
    expr_params: Mapping[str, Any] | None = None
    partition_names: Sequence[str] | None = None
    consistency_level: str | int | None = None
    search_params: Mapping[str, Any] | None = None
    score_threshold: Number | None = None
    timeout: Number | None = DEFAULT_TIMEOUT
    # A field, since LangChain's configurable_fields makes retrievers anew of the fields alone.
    # None is no value of it: what is confined stays so.
    scope: InstanceOf[Shared] = Field(default=None, exclude=True, repr=False)  # type: ignore[assignment]

    _options: SearchOptions = PrivateAttr()
    _adapter: MilvusVLLMAdapter = PrivateAttr()
    _closes: bool = PrivateAttr()

    def __init__(
        self,
        collection_name: str,
        ranker: VLLMRanker | None = NOT_GIVEN,
        **arguments: Unpack[MilvusVLLMRetrieverArguments],
    ) -> None:
        refuse_unknown(type(self).__name__, arguments, type(self).model_fields, self._meant)
        given = None if ranker is NOT_GIVEN else ranker
        super().__init__(collection_name=collection_name, ranker=given, **arguments)
        given_ranker(ranker, stacklevel=3)  # whoever calls the decorated class

    @classmethod
    def from_vectorstore(
        cls,
        store: Any,
        ranker: VLLMRanker | None = NOT_GIVEN,
        **arguments: Unpack[MilvusVLLMRetrieverArguments],
    ) -> Self:
        """Make a retriever over the collection of a langchain_milvus.Milvus store.

        Connection, field names, embedding and search parameters are the store's.

        Args:
            store: The store; its blocking client is borrowed and stays open.
            ranker: How candidates are reranked; None, written out, leaves the retrieval order.
            **arguments: Further arguments of the retriever; they win over the store's.

        Raises:
            ConfigurationError: It is not such a store, or an argument is wrong.

        Warns:
            UserWarning: No ranker was given.
        """
        of_the_store = {n: v for n, v in langchain_arguments(store).items() if v is not None}
        return cls(**{**of_the_store, "ranker": given_ranker(ranker), **arguments})

    @model_validator(mode="after")
    def _build(self) -> Self:
        if self.score_threshold is not None and self.ranker is None:
            raise ValueError(
                "score_threshold needs a ranker: without one there is no relevance score"
            )
        shared, arguments = self.scope, tuple(getattr(self, name) for name in _OF_THE_ADAPTER)
        scope = shared.scope if shared else None
        self._closes = shared is None or shared.arguments != arguments
        if self._closes:
            shared = self.__dict__["scope"] = Shared(self._new_adapter(), arguments, scope)
        self._adapter = shared.adapter
        self._options = SearchOptions(
            k=self.k,
            fetch_k=self.fetch_k,
            expr=self.expr,
            wheres=tuple(filter(None, [_where(self.filters)])),
            expr_params=copy.deepcopy(self.expr_params),
            partition_names=self.partition_names,
            consistency_level=self.consistency_level,
            search_params=self.search_params,
            score_threshold=self.score_threshold,
            timeout=self.timeout,
            scope=scope,
        )
        return self

    def _new_adapter(self) -> MilvusVLLMAdapter:
        settings = TargetSettings(
            collection_name=self.collection_name,
            text_field=self.text_field,
            vector_field=self.vector_field,
            output_fields=self.output_fields,
            encoders=to_encoders(self.embedding, self.sparse_embedding),
        )
        return MilvusVLLMAdapter(MilvusConnection.of(self), settings, self.ranker)

    def _take_settings(self, checked: Self) -> None:
        self._options = checked._options

    def within(
        self,
        *,
        filters: Mapping[str, Any] | None = None,
        expr: str | None = None,
        partition_names: Sequence[str] | None = None,
        instruction: str | None = None,
    ) -> Self:
        """Make a retriever confined to what these find, such as one tenant's rows.

        Nothing widens it: no argument of a call, no `bind`, no attribute, no copy. What this
        retriever filters by is part of it. It uses this retriever's connections and costs nearly
        nothing, so make one for each request; closing it closes nothing.

        ```python
        mine = retriever.within(filters={"tenant": user.tenant})
        mine.invoke(question)
        ```

        Args:
            filters: What the fields of every document must be, as for the constructor.
            expr: Milvus boolean expression that every document must match. Never paste a value
                into it: that is what `filters` is for.
            partition_names: The only partitions to search.
            instruction: What the rerank model is told of the task, unless a call says otherwise.

        Raises:
            ConfigurationError: There is nothing to narrow by, or a value is wrong.
        """
        options = self._options.within(
            expr=expr,
            where=_where(filters),
            partition_names=partition_names,
            instruction=instruction,
        )
        confined = BaseRetriever.__copy__(self)
        confined.__dict__.update(
            filters=None,
            expr=None,
            expr_params=None,
            partition_names=None,
            scope=replace(self.scope, scope=options.scope),
        )
        confined._options, confined._closes = options, False
        return confined

    def model_dump(self, **options: Any) -> dict[str, Any]:
        """Write the arguments out; what is confined is not written, since it would be read open."""
        self._refuse_if_confined()
        return super().model_dump(**options)

    def model_dump_json(self, **options: Any) -> str:
        """Write the arguments out as JSON; see `model_dump`."""
        self._refuse_if_confined()
        return super().model_dump_json(**options)

    def _refuse_if_confined(self) -> None:
        if self.scope.scope is not None:
            raise ConfigurationError(
                "a retriever made by within() is not written out: what it is confined to would be "
                "lost. Write the one it was made of, and call within() again"
            )

    def refresh(self) -> None:
        """Look at the collection again now, after its schema or its alias was changed."""
        self._adapter.refresh(self.timeout)

    async def arefresh(self) -> None:
        """Look at the collection again now; the async twin of `refresh`."""
        await self._adapter.arefresh(self.timeout)

    def close(self) -> None:
        """Close the blocking connections that this retriever made.

        Those of another retriever (see `within`, `model_copy`) and borrowed clients stay open.
        """
        if self._closes:
            self._adapter.close()

    async def aclose(self) -> None:
        """Close this event loop's connections and the blocking ones that this retriever made."""
        if self._closes:
            await self._adapter.aclose()

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,  # noqa: ARG002 - LangChain's interface
        **per_call: Any,
    ) -> list[Document]:
        options = self._for_call(**per_call) if per_call else self._options
        return [to_document(hit) for hit in self._adapter.retrieve(Query(query), options)]

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,  # noqa: ARG002 - LangChain's interface
        **per_call: Any,
    ) -> list[Document]:
        options = self._for_call(**per_call) if per_call else self._options
        return [to_document(hit) for hit in await self._adapter.aretrieve(Query(query), options)]

    def _for_call(self, filters: Mapping[str, Any] | None = None, **per_call: Any) -> SearchOptions:
        """Return the options with one call's own values."""
        for name in per_call.keys() & type(self).model_fields.keys() - {*_PER_CALL, "scope"}:
            way_out = "within(partition_names=...)" if name == "partition_names" else "model_copy"
            raise ConfigurationError(
                f"{name!r} is not an argument of a call ({', '.join(_PER_CALL)} are): it belongs "
                f"to the retriever; for another value use {way_out}"
            )
        refuse_unknown(type(self).__name__, per_call, _PER_CALL, self._meant)
        return self._options.narrowed(where=_where(filters), **per_call)

    def batch(
        self,
        inputs: list[str],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[list[Document]]:
        """Retrieve for several queries, with as few requests as serve them best.

        The config's ``max_concurrency`` bounds what is in flight for them together: embeddings,
        searches and rerank requests.

        Args:
            inputs: Query texts.
            config: One config, or one for each query.
            return_exceptions: Whether an exception takes the place of a query's documents.
            **kwargs: `k`, `fetch_k`, `filters`, `expr`, `expr_params` and `instruction`, as for
                `invoke`.
        """
        if not inputs:
            return []
        configs = get_config_list(config, len(inputs))
        runs = start_runs(self, inputs, configs)
        queries = to_queries(inputs)
        try:
            found = self._adapter.retrieve_many(
                [query for query in queries if isinstance(query, Query)],
                self._for_call(**kwargs),
                configs[0].get("max_concurrency"),
            )
        except Exception as error:  # noqa: BLE001 - each run ends with it
            found = [error] * len(queries)
        outcomes = in_place(queries, found)
        for run, outcome in zip(runs, outcomes, strict=True):
            if isinstance(outcome, Exception):
                run.on_retriever_error(outcome)
            else:
                run.on_retriever_end(outcome)
        return answers(outcomes, return_exceptions=return_exceptions)

    async def abatch(
        self,
        inputs: list[str],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[list[Document]]:
        """Retrieve for several queries; the async twin of `batch`."""
        if not inputs:
            return []
        configs = get_config_list(config, len(inputs))
        runs = await astart_runs(self, inputs, configs)
        queries = to_queries(inputs)
        try:
            found = await self._adapter.aretrieve_many(
                [query for query in queries if isinstance(query, Query)],
                self._for_call(**kwargs),
                configs[0].get("max_concurrency"),
            )
        except Exception as error:  # noqa: BLE001 - each run ends with it
            found = [error] * len(queries)
        outcomes = in_place(queries, found)
        for run, outcome in zip(runs, outcomes, strict=True):
            if isinstance(outcome, Exception):
                await run.on_retriever_error(outcome)
            else:
                await run.on_retriever_end(outcome)
        return answers(outcomes, return_exceptions=return_exceptions)

    def explain(self, query: str, **per_call: Any) -> Explanation:
        """Show what reranking does to a query: each result's place before and after.

        Args:
            query: The query text.
            **per_call: `k`, `fetch_k`, `filters`, `expr`, `expr_params` and `instruction`, as for
                `invoke`.
        """
        return explain(self._adapter, Query(query), self._for_call(**per_call))

    async def aexplain(self, query: str, **per_call: Any) -> Explanation:
        """Show what reranking does to a query; the async twin of `explain`."""
        return await aexplain(self._adapter, Query(query), self._for_call(**per_call))
