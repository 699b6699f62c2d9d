"""LangChain document compressors: straight against vLLM, and by Milvus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from pydantic import ConfigDict, Field, PrivateAttr, SecretStr, model_validator
from typing_extensions import Self, Unpack

from milvus_vllm_retrievers._core.adapter import Reranker, RowReranker, TextReranker
from milvus_vllm_retrievers._core.hits import Ranking
from milvus_vllm_retrievers._core.milvus import DEFAULT_URI
from milvus_vllm_retrievers._core.query import DEFAULT_TIMEOUT, OnMissing, Query
from milvus_vllm_retrievers.errors import configuration_errors, refuse_unknown
from milvus_vllm_retrievers.langchain._arguments import (
    MilvusVLLMRerankArguments,
    Number,
    Ranker,
    VLLMRerankArguments,
    WholeNumber,
)
from milvus_vllm_retrievers.langchain._convert import ranked_copy, to_items
from milvus_vllm_retrievers.langchain._settings import Settable
from milvus_vllm_retrievers.ranker import VLLMRanker, ranker_from, server_ranker


class _Rerank(Settable, BaseDocumentCompressor):
    """What both compressors do around the ranking itself."""

    model_config = ConfigDict(
        extra="forbid", arbitrary_types_allowed=True, hide_input_in_errors=True
    )

    _settable = frozenset({"top_n", "timeout"})

    top_n: Annotated[WholeNumber, Field(ge=1)] | None = None
    timeout: Annotated[Number, Field(gt=0, allow_inf_nan=False)] | None = None

    _adapter: Reranker = PrivateAttr()

    def __init__(self, **arguments: Any) -> None:
        refuse_unknown(type(self).__name__, arguments, type(self).model_fields, self._meant)
        super().__init__(**arguments)

    def compress_documents(
        self,
        documents: Sequence[Document],
        query: str,
        callbacks: Callbacks | None = None,  # noqa: ARG002 - LangChain's interface
    ) -> Sequence[Document]:
        """Return copies of the documents, most relevant first, at most `top_n`."""
        return self._ranked(
            documents, self._adapter.rank(Query(query), to_items(documents), self.timeout)
        )

    async def acompress_documents(
        self,
        documents: Sequence[Document],
        query: str,
        callbacks: Callbacks | None = None,  # noqa: ARG002 - LangChain's interface
    ) -> Sequence[Document]:
        """Return copies of the documents, most relevant first, at most `top_n`."""
        return self._ranked(
            documents, await self._adapter.arank(Query(query), to_items(documents), self.timeout)
        )

    def _ranked(self, documents: Sequence[Document], rankings: Sequence[Ranking]) -> list[Document]:
        return [ranked_copy(documents[r.index], r) for r in rankings[: self.top_n]]


@configuration_errors("ranker")
class VLLMRerank(_Rerank):
    """Reranks any Documents straight against vLLM, best first.

    For use in a ContextualCompressionRetriever or by itself. ``top_n`` and ``timeout`` can be set
    as attributes. The Documents that were given stay
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

    ranker: Ranker | None = None
    endpoint: str | None = None
    model: str | None = None

    _adapter: TextReranker = PrivateAttr()

    def __init__(
        self, ranker: VLLMRanker | None = None, **arguments: Unpack[VLLMRerankArguments]
    ) -> None:
        super().__init__(ranker=ranker, **arguments)

    @model_validator(mode="after")
    def _build(self) -> Self:
        ranker = ranker_from(self.ranker, self.endpoint, self.model)
        self._adapter = TextReranker(ranker)
        return self


@configuration_errors("collection_name", "ranker")
class MilvusVLLMRerank(_Rerank):
    """Has Milvus rerank Documents by primary key: no text travels, vLLM need not be in reach.

    The Documents must be rows of the collection: their id, or the primary key in their metadata,
    names the row, and the row's stored text is what is scored. Ties are by primary key.
    ``top_n`` and ``timeout`` can be set as attributes.

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
        timeout: Seconds for one call as a whole, default 60; None waits without limit.
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
    ranker: Ranker
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
    timeout: Annotated[Number, Field(gt=0, allow_inf_nan=False)] | None = DEFAULT_TIMEOUT
    on_missing: OnMissing = "raise"

    _adapter: RowReranker = PrivateAttr()

    def __init__(
        self,
        collection_name: str,
        ranker: VLLMRanker,
        **arguments: Unpack[MilvusVLLMRerankArguments],
    ) -> None:
        super().__init__(collection_name=collection_name, ranker=ranker, **arguments)

    @model_validator(mode="after")
    def _build(self) -> Self:
        server_ranker(self.ranker)
        self._adapter = RowReranker.of(self)
        return self
