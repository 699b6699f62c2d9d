"""What the front ends call: retrieval over one collection, and reranking of given texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from typing_extensions import Self

from milvus_vllm_retrievers._core.cool_down import RerankService, logger
from milvus_vllm_retrievers._core.deadline import Deadline
from milvus_vllm_retrievers._core.drivers import AsyncDriver, SyncDriver
from milvus_vllm_retrievers._core.hits import Hit, Ranking
from milvus_vllm_retrievers._core.milvus import ConnectionArguments, MilvusConnection
from milvus_vllm_retrievers._core.query import Item, OnMissing, Query, SearchOptions
from milvus_vllm_retrievers._core.rerank_rows import rank_rows
from milvus_vllm_retrievers._core.rerank_texts import rank_texts
from milvus_vllm_retrievers._core.retrieve import candidates, retrieve
from milvus_vllm_retrievers._core.services import VLLMClient
from milvus_vllm_retrievers._core.steps import Flow
from milvus_vllm_retrievers._core.target import Target, TargetSettings, find_target
from milvus_vllm_retrievers.errors import ConfigurationError, SearchError
from milvus_vllm_retrievers.ranker import VLLMRanker

_SAYS_NOTHING_OF_COLLECTION = frozenset({"timeout", "disconnected"})


class Closes(Protocol):
    """Something with connections to close."""

    def close(self) -> None:
        """Close the blocking connections that are ours."""

    async def aclose(self) -> None:
        """Close this event loop's connections and the blocking ones, as far as ours."""


class Closing:
    """Gives a front end's class `close`, `aclose` and both kinds of context manager.

    The class keeps what holds its connections as `_adapter`.
    """

    _adapter: Closes

    def close(self) -> None:
        """Close the blocking connections that were made here; borrowed clients stay open."""
        self._adapter.close()

    async def aclose(self) -> None:
        """Close this event loop's connections and the blocking ones that were made here.

        Async calls under way finish, and the last of them closes what they use.
        """
        await self._adapter.aclose()

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        raise self._not_copied()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise self._not_copied()

    def _not_copied(self) -> TypeError:
        return TypeError(
            f"a {type(self).__name__} holds connections and secrets and is neither pickled nor "
            "copied: make it anew from its arguments where it is needed"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class _LastSeen:
    """What a collection looked like; forgotten where a call on it fails within the context.

    It may have been made anew since: the next call looks again.
    """

    target: Target | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if (
            isinstance(error, (SearchError, ConfigurationError))
            and getattr(error, "reason", None) not in _SAYS_NOTHING_OF_COLLECTION
        ):
            self.target = None


class MilvusVLLMAdapter:
    """Retrieves from one Milvus collection, reranked by vLLM. Connects on first use.

    Args:
        connection: Where Milvus is.
        settings: The collection and how it is searched.
        ranker: How candidates are reranked; None leaves them in retrieval order.
    """

    def __init__(
        self,
        connection: MilvusConnection,
        settings: TargetSettings,
        ranker: VLLMRanker | None = None,
    ) -> None:
        if ranker is not None and not isinstance(ranker, VLLMRanker):
            raise ConfigurationError(
                f"ranker must be a VLLMRanker, not {type(ranker).__name__}: "
                "VLLMRanker('http://localhost:8000')"
            )
        if not isinstance(settings.collection_name, str) or not settings.collection_name:
            raise ConfigurationError("collection_name must be the name of a collection")
        self._connection = connection
        if ranker is not None and ranker.api_key is not None:
            connection.hide(ranker.api_key.get_secret_value())
        self._settings = settings
        self._service = None if ranker is None else RerankService.of(ranker)
        self._vllm = None if ranker is None else VLLMClient(ranker)
        self._driver = SyncDriver(connection, self._vllm)
        self._async_driver = AsyncDriver(connection, self._vllm)
        self._seen = _LastSeen()
        self._reported: Target | None = None

    def retrieve(self, query: Query, options: SearchOptions) -> list[Hit]:
        """Retrieve one query's hits, best first.

        Raises:
            ConfigurationError: The collection, the server or the options do not fit together.
            SearchError: Milvus did not answer the search.
            RerankError: Reranking failed and the ranker's `on_error` does not cover it.
        """
        return self._driver.run(self._retrieval([query], options))[0]

    async def aretrieve(self, query: Query, options: SearchOptions) -> list[Hit]:
        """Retrieve one query's hits; the async twin of `retrieve`."""
        return (await self._async_driver.run(self._retrieval([query], options)))[0]

    def retrieve_many(self, queries: Sequence[Query], options: SearchOptions) -> list[list[Hit]]:
        """Retrieve the hits of several queries, in one search or a few at once.

        Returns:
            The hits of each query, in the queries' order.
        """
        return self._driver.run(self._retrieval(queries, options))

    async def aretrieve_many(
        self, queries: Sequence[Query], options: SearchOptions
    ) -> list[list[Hit]]:
        """Retrieve the hits of several queries; the async twin of `retrieve_many`."""
        return await self._async_driver.run(self._retrieval(queries, options))

    def candidates(self, query: Query, options: SearchOptions) -> list[Hit]:
        """Return what `retrieve` would rerank, unranked, in retrieval order."""
        return self._driver.run(self._candidates(query, options))

    async def acandidates(self, query: Query, options: SearchOptions) -> list[Hit]:
        """Return what `aretrieve` would rerank; the async twin of `candidates`."""
        return await self._async_driver.run(self._candidates(query, options))

    def rank(
        self,
        query: Query,
        items: Sequence[Item],
        options: SearchOptions,
        on_missing: OnMissing = "raise",
    ) -> list[Ranking]:
        """Have Milvus rank items by the primary keys of their rows, best first.

        With ``on_missing="keep"``, items without a row in the collection come last, with
        `Ranking.rerank_error` set.

        Raises:
            ConfigurationError: The server or the collection cannot rerank by key.
            SearchError: Milvus did not answer the search, or an item has no row.
            RerankError: Reranking failed and the ranker's `on_error` does not cover it.
        """
        return self._driver.run(self._ranking(query, items, options, on_missing))

    async def arank(
        self,
        query: Query,
        items: Sequence[Item],
        options: SearchOptions,
        on_missing: OnMissing = "raise",
    ) -> list[Ranking]:
        """Have Milvus rank items by the keys of their rows; the async twin of `rank`."""
        return await self._async_driver.run(self._ranking(query, items, options, on_missing))

    def close(self) -> None:
        """Close the blocking connections that are ours."""
        self._connection.close()
        if self._vllm is not None:
            self._vllm.close()

    async def aclose(self) -> None:
        """Close this event loop's connections and the blocking ones, as far as ours."""
        await self._connection.aclose()
        if self._vllm is not None:
            await self._vllm.aclose()

    def _retrieval(self, queries: Sequence[Query], options: SearchOptions) -> Flow[list[list[Hit]]]:
        if not queries:
            return []

        deadline = Deadline.after(options.timeout)
        with self._seen:
            target = self._seen.target or (yield from self._found(deadline))
            if target is not self._reported and any(query.embedding is None for query in queries):
                self._report_unsearched(target)
            return (yield from retrieve(target, self._service, queries, options, deadline))

    def _candidates(self, query: Query, options: SearchOptions) -> Flow[list[Hit]]:
        deadline = Deadline.after(options.timeout)
        with self._seen:
            target = self._seen.target or (yield from self._found(deadline))
            return (yield from candidates(target, [query], options, deadline))[0]

    def _ranking(
        self, query: Query, items: Sequence[Item], options: SearchOptions, on_missing: OnMissing
    ) -> Flow[list[Ranking]]:
        service = self._service
        if service is None or not items:
            return []
        deadline = Deadline.after(options.timeout)
        with self._seen:
            target = self._seen.target or (yield from self._found(deadline))
            ranking = rank_rows(target, service, query, items, options, deadline, on_missing)
            return (yield from ranking)

    def _found(self, deadline: Deadline) -> Flow[Target]:
        """Read what the collection looks like, on first use and again after a failure."""
        target = self._seen.target = yield from find_target(self._settings, deadline)
        self._connection.hide(*target.layout.secrets)
        self._report(target)
        return target

    def _report(self, target: Target) -> None:
        if self._service is not None and not target.server.known:
            logger.warning(
                "cannot tell from its version %r whether this Milvus can rerank: mode='auto' "
                "reranks from this process, mode='server' trusts it to",
                target.server.version,
            )

    def _report_unsearched(self, target: Target) -> None:
        if target is self._reported:
            return
        self._reported = target
        left_out = target.layout.out_of_reach(self._settings.encoders)
        if self._settings.vector_field is None and left_out:
            logger.warning("not every vector field is searched: %s", "; ".join(left_out))


class Reranker(Closes, Protocol):
    """Ranks items that are there already."""

    def rank(self, query: Query, items: Sequence[Item]) -> list[Ranking]:
        """Rank items by relevance to the query, best first."""

    async def arank(self, query: Query, items: Sequence[Item]) -> list[Ranking]:
        """Rank items by relevance to the query; the async twin of `rank`."""


class TextReranker:
    """Ranks the items' texts straight against vLLM; needs no Milvus and no pymilvus.

    Args:
        ranker: The model and how it is asked.
        timeout: Seconds for one call with all its tries; None leaves it to the ranker's.
    """

    def __init__(self, ranker: VLLMRanker, timeout: float | None = None) -> None:
        self._service = RerankService.of(ranker)
        self._timeout = timeout
        self._vllm = VLLMClient(ranker)
        self._driver = SyncDriver(None, self._vllm)
        self._async_driver = AsyncDriver(None, self._vllm)

    def rank(self, query: Query, items: Sequence[Item]) -> list[Ranking]:
        """Rank items by relevance to the query, best first; equal scores stay as given.

        Raises:
            RerankError: Reranking failed and the ranker's `on_error` is not ``"skip"``.
        """
        return self._driver.run(self._ranking(query, items))

    async def arank(self, query: Query, items: Sequence[Item]) -> list[Ranking]:
        """Rank items by relevance to the query; the async twin of `rank`."""
        return await self._async_driver.run(self._ranking(query, items))

    def close(self) -> None:
        """Close the blocking connections."""
        self._vllm.close()

    async def aclose(self) -> None:
        """Close this event loop's connections and the blocking ones."""
        await self._vllm.aclose()

    def _ranking(self, query: Query, items: Sequence[Item]) -> Flow[list[Ranking]]:
        texts = [item.text for item in items]
        return rank_texts(self._service, query, texts, Deadline.after(self._timeout))


class RowRerankArguments(ConnectionArguments, Protocol):
    """What a front end's `MilvusVLLMRerank` holds."""

    collection_name: str
    ranker: VLLMRanker
    text_field: str | None
    partition_names: Sequence[str] | None
    consistency_level: str | int | None
    search_params: Mapping[str, Any] | None
    timeout: float | None
    on_missing: OnMissing


class RowReranker:
    """Has Milvus rank the items' rows, found by primary key; no text travels.

    Args:
        adapter: The collection, with a ranker.
        options: Partitions, consistency level, search parameters and timeout.
        on_missing: Items without a row raise, or are kept last, marked.
    """

    def __init__(
        self, adapter: MilvusVLLMAdapter, options: SearchOptions, on_missing: OnMissing
    ) -> None:
        self._adapter = adapter
        self._options = options
        self._on_missing: OnMissing = on_missing

    @classmethod
    def of(cls, arguments: RowRerankArguments) -> RowReranker:
        """Make the reranker that a front end's arguments describe."""
        settings = TargetSettings(
            collection_name=arguments.collection_name, text_field=arguments.text_field
        )
        options = SearchOptions(
            partition_names=arguments.partition_names,
            consistency_level=arguments.consistency_level,
            search_params=arguments.search_params,
            timeout=arguments.timeout,
        )
        connection = MilvusConnection.of(arguments)
        adapter = MilvusVLLMAdapter(connection, settings, arguments.ranker)
        return cls(adapter, options, arguments.on_missing)

    def rank(self, query: Query, items: Sequence[Item]) -> list[Ranking]:
        """Rank items by relevance to the query, best first; see `MilvusVLLMAdapter.rank`."""
        return self._adapter.rank(query, items, self._options, self._on_missing)

    async def arank(self, query: Query, items: Sequence[Item]) -> list[Ranking]:
        """Rank items by relevance to the query; the async twin of `rank`."""
        return await self._adapter.arank(query, items, self._options, self._on_missing)

    def close(self) -> None:
        """Close the blocking connections that are ours."""
        self._adapter.close()

    async def aclose(self) -> None:
        """Close this event loop's connections and the blocking ones, as far as ours."""
        await self._adapter.aclose()
