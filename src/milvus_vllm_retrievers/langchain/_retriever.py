"""The LangChain retriever."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.callbacks import (
    AsyncCallbackManagerForRetrieverRun,
    CallbackManagerForRetrieverRun,
)
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableConfig
from pydantic import ConfigDict, Field, PrivateAttr, SecretStr, model_validator
from typing_extensions import Self

from milvus_vllm_retrievers._core.adapter import Closing, MilvusVLLMAdapter
from milvus_vllm_retrievers._core.milvus import DEFAULT_URI, MilvusConnection
from milvus_vllm_retrievers._core.query import Query, SearchOptions
from milvus_vllm_retrievers._core.stores import langchain_arguments
from milvus_vllm_retrievers._core.target import TargetSettings
from milvus_vllm_retrievers.errors import configuration_errors
from milvus_vllm_retrievers.explain import Explanation, aexplain, explain
from milvus_vllm_retrievers.langchain._convert import to_document, to_encoders
from milvus_vllm_retrievers.langchain._runs import astart_runs, start_runs
from milvus_vllm_retrievers.ranker import VLLMRanker


@configuration_errors("collection_name")
class MilvusVLLMRetriever(Closing, BaseRetriever):
    """Retrieves Documents from a Milvus collection, reranked by a model that vLLM serves.

    In the common case the collection's name and a ranker are all it takes: the primary key,
    the text field and the vector fields are read from the collection.

    Documents carry ``id`` (the primary key as text), ``page_content`` (the text field) and in
    ``metadata`` the row's other fields, ``relevance_score`` (the model's score, on its own
    scale), ``retrieval_score`` (where it is known), ``reranked_by`` (``"milvus"``,
    ``"client"`` or None) and, on an item that a failure left unranked, ``rerank_error``.

    Per call: ``retriever.invoke(query, k=..., fetch_k=..., expr=..., expr_params=...)``. A
    filter given per call is AND-ed to the constructor's.

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
        expr: Milvus boolean expression that every document must match.
        expr_params: Values of the expression's templates (not on Milvus Lite).
        partition_names: Partitions to search; None is all.
        consistency_level: Such as ``"Strong"``; None is the collection's own.
        search_params: Parameters of the index, common or by vector field.
        score_threshold: Least relevance score of a returned document.
        timeout: Seconds for one call as a whole; None waits without limit.

    Raises:
        ConfigurationError: An argument is unknown or out of range, or (on the first call) does
            not fit the collection or the server.
        SearchError: Milvus did not answer (on a call).
        RerankError: Reranking failed and the ranker's `on_error` does not cover it (on a call).
    """

    model_config = ConfigDict(
        extra="forbid",
        arbitrary_types_allowed=True,
        hide_input_in_errors=True,
        validate_assignment=True,  # so that an attribute that is set takes effect
    )

    collection_name: str = Field(min_length=1)
    ranker: VLLMRanker | None = None
    uri: str = Field(default=DEFAULT_URI, exclude=True, repr=False)
    token: SecretStr = Field(default=SecretStr(""), exclude=True)
    db_name: str = ""
    connection_args: Mapping[str, Any] = Field(default_factory=dict, exclude=True, repr=False)
    client: Any = Field(default=None, exclude=True, repr=False)
    async_client: Any = Field(default=None, exclude=True, repr=False)
    embedding: Embeddings | Mapping[str, Any] | None = Field(default=None, repr=False)
    sparse_embedding: Any = Field(default=None, repr=False)
    vector_field: str | Sequence[str] | None = None
    text_field: str | None = None
    output_fields: Sequence[str] | None = None
    k: int = 4
    fetch_k: int | None = None
    expr: str | None = None
    expr_params: Mapping[str, Any] | None = None
    partition_names: Sequence[str] | None = None
    consistency_level: str | int | None = None
    search_params: Mapping[str, Any] | None = None
    score_threshold: float | None = None
    timeout: float | None = 60.0

    _options: SearchOptions = PrivateAttr()
    _adapter: MilvusVLLMAdapter = PrivateAttr()

    @classmethod
    def from_vectorstore(
        cls, store: Any, ranker: VLLMRanker | None = None, **arguments: Any
    ) -> Self:
        """Make a retriever over the collection of a langchain_milvus.Milvus store.

        Connection, field names, embedding and search parameters are the store's.

        Args:
            store: The store; its blocking client is borrowed and stays open.
            ranker: How candidates are reranked.
            **arguments: Further arguments of the retriever; they win over the store's.

        Raises:
            ConfigurationError: It is not such a store, or an argument is wrong.
        """
        return cls(**{**langchain_arguments(store), "ranker": ranker, **arguments})

    @model_validator(mode="after")
    def _build(self) -> Self:
        self._options = SearchOptions(
            k=self.k,
            fetch_k=self.fetch_k,
            expr=self.expr,
            expr_params=self.expr_params,
            partition_names=self.partition_names,
            consistency_level=self.consistency_level,
            search_params=self.search_params,
            score_threshold=self.score_threshold,
            timeout=self.timeout,
        )
        self._adapter = MilvusVLLMAdapter(
            MilvusConnection.of(self),
            TargetSettings(
                collection_name=self.collection_name,
                text_field=self.text_field,
                vector_field=self.vector_field,
                output_fields=self.output_fields,
                encoders=to_encoders(self.embedding, self.sparse_embedding),
            ),
            self.ranker,
        )
        return self

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:  # noqa: ARG002
        """Make a retriever with some arguments changed, connections of its own included."""
        arguments = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self)(**{**arguments, **(update or {})})

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,  # noqa: ARG002 - LangChain's interface
        k: int | None = None,
        fetch_k: int | None = None,
        expr: str | None = None,
        expr_params: Mapping[str, Any] | None = None,
    ) -> list[Document]:
        options = self._options.narrowed(k=k, fetch_k=fetch_k, expr=expr, expr_params=expr_params)
        return [to_document(hit) for hit in self._adapter.retrieve(Query(query), options)]

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,  # noqa: ARG002 - LangChain's interface
        k: int | None = None,
        fetch_k: int | None = None,
        expr: str | None = None,
        expr_params: Mapping[str, Any] | None = None,
    ) -> list[Document]:
        options = self._options.narrowed(k=k, fetch_k=fetch_k, expr=expr, expr_params=expr_params)
        return [to_document(hit) for hit in await self._adapter.aretrieve(Query(query), options)]

    def batch(
        self,
        inputs: list[str],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[list[Document]]:
        """Retrieve for several queries, with as few requests as serve them best.

        The queries go to Milvus together: in one search, or, where Milvus reranks them one after
        another, in up to the ranker's `max_concurrency` searches at once. Rerank requests of this
        process are as many in flight. The embedding model is asked for several queries at once.

        Args:
            inputs: Query texts.
            config: One config, or one for each query.
            return_exceptions: Whether an exception takes the place of a query's documents.
            **kwargs: `k`, `fetch_k`, `expr`, `expr_params`, as for `invoke`.
        """
        runs = start_runs(self, inputs, config)
        try:
            queries = [Query(query) for query in inputs]
            found = self._adapter.retrieve_many(queries, self._options.narrowed(**kwargs))
            for outcome in found:
                if isinstance(outcome, Exception):
                    raise outcome
        except Exception as error:
            for run in runs:
                run.on_retriever_error(error)
            if not return_exceptions:
                raise
            # Which of the queries failed is found out by asking each alone.
            return super().batch(inputs, config, return_exceptions=True, **kwargs)
        answers = [[to_document(hit) for hit in hits] for hits in found]
        for run, documents in zip(runs, answers, strict=True):
            run.on_retriever_end(documents)
        return answers

    async def abatch(
        self,
        inputs: list[str],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[list[Document]]:
        """Retrieve for several queries; the async twin of `batch`."""
        runs = await astart_runs(self, inputs, config)
        try:
            queries = [Query(query) for query in inputs]
            found = await self._adapter.aretrieve_many(queries, self._options.narrowed(**kwargs))
            for outcome in found:
                if isinstance(outcome, Exception):
                    raise outcome
        except Exception as error:
            for run in runs:
                await run.on_retriever_error(error)
            if not return_exceptions:
                raise
            return await super().abatch(inputs, config, return_exceptions=True, **kwargs)
        answers = [[to_document(hit) for hit in hits] for hits in found]
        for run, documents in zip(runs, answers, strict=True):
            await run.on_retriever_end(documents)
        return answers

    def explain(self, query: str, **per_call: Any) -> Explanation:
        """Show what reranking does to a query: each result's place before and after.

        Args:
            query: The query text.
            **per_call: `k`, `fetch_k`, `expr`, `expr_params`, as for `invoke`.
        """
        return explain(self._adapter, Query(query), self._options.narrowed(**per_call))

    async def aexplain(self, query: str, **per_call: Any) -> Explanation:
        """Show what reranking does to a query; the async twin of `explain`."""
        return await aexplain(self._adapter, Query(query), self._options.narrowed(**per_call))
