"""LlamaIndex node postprocessors: straight against vLLM, and by Milvus."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import ImageNode, MetadataMode, NodeWithScore, QueryBundle
from llama_index_instrumentation import get_dispatcher
from pydantic import BeforeValidator, ConfigDict, Field, PrivateAttr, SecretStr
from typing_extensions import Self, TypedDict, Unpack

from milvus_vllm_retrievers._core.adapter import Closing, Reranker, RowReranker, TextReranker
from milvus_vllm_retrievers._core.arguments import RowRerankArguments, other_names, remade
from milvus_vllm_retrievers._core.hits import Ranking, score_among
from milvus_vllm_retrievers._core.milvus import DEFAULT_URI
from milvus_vllm_retrievers._core.query import (
    DEFAULT_TIMEOUT,
    Item,
    OnMissing,
    SearchOptions,
    check_count,
)
from milvus_vllm_retrievers.errors import ConfigurationError, configuration_errors
from milvus_vllm_retrievers.llama_index._convert import to_query, with_hidden
from milvus_vllm_retrievers.ranker import VLLMRanker, ranker_from, server_ranker

dispatcher = get_dispatcher(__name__)


def _no_url(ranker: Any) -> Any:
    if isinstance(ranker, str):
        raise ConfigurationError("ranker is a text: pass ranker=VLLMRanker(url) in its place")
    return ranker


def _seconds(value: Any) -> float | None:
    return SearchOptions(timeout=value).timeout


Ranker = Annotated[VLLMRanker, BeforeValidator(_no_url)]
Seconds = Annotated[float | None, BeforeValidator(_seconds)]
Count = Annotated[int, BeforeValidator(partial(check_count, "top_n"))]

_SETTABLE = ("top_n", "timeout", "keep_retrieval_score", "callback_manager")
_MEANT = other_names("top_n")


class VLLMRerankArguments(TypedDict, total=False):
    """What `VLLMRerank` takes beside a ranker; documented there."""

    endpoint: str | None
    model: str | None
    top_n: int | None
    metadata_mode: MetadataMode
    keep_retrieval_score: bool
    timeout: float | None
    callback_manager: CallbackManager


class MilvusVLLMRerankArguments(RowRerankArguments, total=False):
    """What `MilvusVLLMRerank` takes beside a collection and a ranker; documented there."""

    on_missing: OnMissing
    keep_retrieval_score: bool
    callback_manager: CallbackManager


class _Rerank(Closing, BaseNodePostprocessor):
    """What both postprocessors do around the ranking itself: events, texts, copies."""

    model_config = ConfigDict(
        extra="forbid",
        arbitrary_types_allowed=True,
        hide_input_in_errors=True,
        validate_assignment=True,
    )

    top_n: Count | None = None
    keep_retrieval_score: bool = True
    timeout: Seconds = None

    _adapter: Reranker = PrivateAttr()

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:  # noqa: ARG002
        """Make another one, with some arguments changed and checked."""
        return remade(self, update)

    def __copy__(self) -> Self:
        return self.model_copy()

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
                rankings = self._adapter.rank(
                    to_query(query_bundle), self._items(nodes), self.timeout
                )
                reranked.extend(self._ranked(nodes, rankings))
        return reranked

    @dispatcher.span
    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        with self._reranking(nodes, query_bundle) as reranked:
            if nodes:
                rankings = await self._adapter.arank(
                    to_query(query_bundle), self._items(nodes), self.timeout
                )
                reranked.extend(self._ranked(nodes, rankings))
        return reranked

    @contextmanager
    def _reranking(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None
    ) -> Iterator[list[NodeWithScore]]:
        """Emit LlamaIndex's events around the block, which fills the list it is given."""
        model = self._adapter.model
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
            event.on_end(
                payload={EventPayload.NODES: reranked, EventPayload.MODEL_NAME: self._adapter.model}
            )
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


@configuration_errors("ranker", meant=_MEANT, settable=_SETTABLE)
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

    ranker: Ranker | None = None
    endpoint: str | None = None
    model: str | None = None
    metadata_mode: MetadataMode = MetadataMode.NONE

    _adapter: TextReranker = PrivateAttr()

    if TYPE_CHECKING:  # pydantic's own takes a ranker by name only

        def __init__(
            self, ranker: VLLMRanker | None = None, **arguments: Unpack[VLLMRerankArguments]
        ) -> None: ...

    def model_post_init(self, context: Any, /) -> None:
        """Make what reranks."""
        super().model_post_init(context)
        self._adapter = TextReranker(ranker_from(self.ranker, self.endpoint, self.model))

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


@configuration_errors("collection_name", meant=_MEANT, settable=_SETTABLE)
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
        timeout: Seconds for one call as a whole, default 60; None waits without limit.
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
    timeout: Seconds = DEFAULT_TIMEOUT
    on_missing: OnMissing = "raise"

    _adapter: RowReranker = PrivateAttr()

    if TYPE_CHECKING:  # pydantic's own takes a collection's name by name only

        def __init__(
            self,
            collection_name: str,
            *,
            ranker: VLLMRanker,
            **arguments: Unpack[MilvusVLLMRerankArguments],
        ) -> None: ...

    def model_post_init(self, context: Any, /) -> None:
        """Make what reranks."""
        super().model_post_init(context)
        server_ranker(self.ranker)
        self._adapter = RowReranker.of(self)
