"""LangChain: a retriever over Milvus reranked by vLLM, and a document compressor for any documents.

```python
from milvus_vllm_retrievers.langchain import MilvusVLLMRetriever, VLLMRanker

retriever = MilvusVLLMRetriever("docs", ranker=VLLMRanker("http://localhost:8000"))
retriever.invoke("how do I rotate the keys?")
```
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from milvus_vllm_retrievers.core.hits import Hit, Ranking, rescored
from milvus_vllm_retrievers.core.milvus import DEFAULT_URI, MilvusConnection
from milvus_vllm_retrievers.core.query import (
    Encoder,
    Encoders,
    Item,
    OnMissing,
    Query,
    SearchOptions,
    encoded_together,
    sparse_encoder,
)
from milvus_vllm_retrievers.core.target import TargetSettings
from milvus_vllm_retrievers.errors import MissingDependencyError, configuration_errors
from milvus_vllm_retrievers.explain import Explanation, aexplain, explain
from milvus_vllm_retrievers.ranker import VLLMRanker, ranker_from, server_ranker
from milvus_vllm_retrievers.stores import langchain_arguments

try:
    from langchain_core.callbacks import (
        AsyncCallbackManagerForRetrieverRun,
        CallbackManagerForRetrieverRun,
        Callbacks,
    )
    from langchain_core.documents import BaseDocumentCompressor, Document
    from langchain_core.embeddings import Embeddings
    from langchain_core.retrievers import BaseRetriever
    from langchain_core.runnables import RunnableConfig
    from langchain_core.runnables.config import ContextThreadPoolExecutor

    from milvus_vllm_retrievers.langchain_runs import astart_runs, start_runs
except ImportError as error:
    raise MissingDependencyError(
        "milvus_vllm_retrievers.langchain needs langchain-core: "
        "pip install 'milvus-vllm-retrievers[langchain]'"
    ) from error

__all__ = ["MilvusVLLMRerank", "MilvusVLLMRetriever", "VLLMRanker", "VLLMRerank"]


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
    timeout: float | None = None

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
                encoders=_encoders(self.embedding, self.sparse_embedding),
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
        return [_document(hit) for hit in self._adapter.retrieve(Query(query), options)]

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
        return [_document(hit) for hit in await self._adapter.aretrieve(Query(query), options)]

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
        except Exception as error:
            for run in runs:
                run.on_retriever_error(error)
            if not return_exceptions:
                raise
            # Which of the queries failed is found out by asking each alone.
            return super().batch(inputs, config, return_exceptions=True, **kwargs)
        answers = [[_document(hit) for hit in hits] for hits in found]
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
        except Exception as error:
            for run in runs:
                await run.on_retriever_error(error)
            if not return_exceptions:
                raise
            return await super().abatch(inputs, config, return_exceptions=True, **kwargs)
        answers = [[_document(hit) for hit in hits] for hits in found]
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


class _Rerank(Closing, BaseDocumentCompressor):
    """What both compressors do around the ranking itself."""

    model_config = ConfigDict(
        extra="forbid", arbitrary_types_allowed=True, hide_input_in_errors=True
    )

    top_n: PositiveInt | None = None

    _adapter: Reranker = PrivateAttr()

    def compress_documents(
        self,
        documents: Sequence[Document],
        query: str,
        callbacks: Callbacks | None = None,  # noqa: ARG002 - LangChain's interface
    ) -> Sequence[Document]:
        """Return copies of the documents, most relevant first, at most `top_n`."""
        return self._ranked(documents, self._adapter.rank(Query(query), _items(documents)))

    async def acompress_documents(
        self,
        documents: Sequence[Document],
        query: str,
        callbacks: Callbacks | None = None,  # noqa: ARG002 - LangChain's interface
    ) -> Sequence[Document]:
        """Return copies of the documents, most relevant first, at most `top_n`."""
        return self._ranked(documents, await self._adapter.arank(Query(query), _items(documents)))

    def _ranked(self, documents: Sequence[Document], rankings: Sequence[Ranking]) -> list[Document]:
        return [_ranked_copy(documents[r.index], r) for r in rankings[: self.top_n]]


@configuration_errors("ranker")
class VLLMRerank(_Rerank):
    """Reranks any Documents straight against vLLM, best first.

    For use in a ContextualCompressionRetriever or by itself. The Documents that were given stay
    as they are; copies come back with ``relevance_score`` and ``reranked_by`` in their metadata.
    Equal scores keep the given order.

    Args:
        ranker: How documents are reranked. In place of it, name `endpoint` and `model`.
        endpoint: vLLM's base URL, such as ``http://localhost:8000``.
        model: The served model's name; None is the server's only one.
        top_n: Documents to return; None is all.
        timeout: Seconds for one call with all its tries; None (default) leaves it to the
            ranker's `timeout` of each try.

    Raises:
        ConfigurationError: Neither or both of `ranker` and `endpoint` are given, or an argument
            is unknown or out of range.
        RerankError: Reranking failed and the ranker's `on_error` is not ``"skip"`` (on a call).
    """

    ranker: VLLMRanker | None = None
    endpoint: str | None = None
    model: str | None = None
    timeout: PositiveFloat | None = None

    @model_validator(mode="after")
    def _build(self) -> Self:
        ranker = ranker_from(self.ranker, self.endpoint, self.model)
        self._adapter = TextReranker(ranker, self.timeout)
        return self


@configuration_errors("collection_name")
class MilvusVLLMRerank(_Rerank):
    """Has Milvus rerank Documents by primary key: no text travels, vLLM need not be in reach.

    The Documents must be rows of the collection: their id, or the primary key in their metadata,
    names the row, and the row's stored text is what is scored. Ties are by primary key.

    Args:
        collection_name: The collection the documents came from. It needs a dense vector field.
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
        top_n: Documents to return; None is all.
        on_missing: Documents without a row ``"raise"`` (default), or are returned last, marked
            by ``rerank_error`` in their metadata: ``"keep"``.

    Raises:
        ConfigurationError: An argument is unknown or out of range, or the collection or the
            server cannot do it.
        SearchError: Milvus did not answer, or a document has no row (on a call).
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
        server_ranker(self.ranker)
        self._adapter = RowReranker.of(self)
        return self


def _items(documents: Sequence[Document]) -> list[Item]:
    return [Item(text=d.page_content, id=d.id, metadata=d.metadata) for d in documents]


def _document(hit: Hit) -> Document:
    metadata = {**hit.fields, **hit.scores()}
    # LlamaIndex stores a whole node in here, beside the metadata that it also stores flat.
    metadata.pop("_node_content", None)
    metadata.pop("_node_type", None)
    return Document(id=str(hit.pk), page_content=hit.text or "", metadata=metadata)


def _ranked_copy(document: Document, ranking: Ranking) -> Document:
    metadata = rescored(document.metadata, ranking.scores())
    return document.model_copy(update={"metadata": metadata})


def _encoders(embedding: Embeddings | Mapping[str, Any] | None, sparse_embedding: Any) -> Encoders:
    by_field = embedding if isinstance(embedding, Mapping) else {}
    return Encoders(
        dense=_encoder(embedding) if isinstance(embedding, Embeddings) else None,
        sparse=None if sparse_embedding is None else sparse_encoder(sparse_embedding),
        by_field={name: _encoder(model) for name, model in by_field.items()},
    )


def _encoder(embedding: Any) -> Encoder:
    if not isinstance(embedding, Embeddings):
        return sparse_encoder(embedding)

    def encode(queries: Sequence[Query]) -> list[list[float]]:
        texts = [query.text for query in queries]
        if len(texts) == 1:
            return [embedding.embed_query(texts[0])]
        # In as many threads as LangChain's own `batch` would call `invoke` in.
        with ContextThreadPoolExecutor() as threads:
            return list(threads.map(embedding.embed_query, texts))

    async def aencode(queries: Sequence[Query]) -> list[list[float]]:
        return await encoded_together([embedding.aembed_query(query.text) for query in queries])

    return Encoder(encode, aencode)
