"""What the front ends call: one adapter to retrieve with, two rerankers of given items."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from typing_extensions import Self

from milvus_vllm_retrievers._core.cool_down import Health, logger
from milvus_vllm_retrievers._core.deadline import Deadline
from milvus_vllm_retrievers._core.drivers import AsyncDriver, SyncDriver
from milvus_vllm_retrievers._core.hits import Hit, Ranking
from milvus_vllm_retrievers._core.milvus import ConnectionArguments, MilvusConnection
from milvus_vllm_retrievers._core.query import (
    Item,
    OnMissing,
    Query,
    SearchOptions,
    check_count,
)
from milvus_vllm_retrievers._core.rerank_rows import rank_rows
from milvus_vllm_retrievers._core.rerank_texts import rank_texts, served_models
from milvus_vllm_retrievers._core.retrieve import Outcome, candidates, retrieve, retrieve_many
from milvus_vllm_retrievers._core.route import Route, asks_for_models, provider_of, route
from milvus_vllm_retrievers._core.services import RerankClient
from milvus_vllm_retrievers._core.steps import Flow
from milvus_vllm_retrievers._core.target import (
    Plan,
    Reranking,
    Target,
    TargetSettings,
    describe,
    find_target,
    fingerprint,
)
from milvus_vllm_retrievers.errors import (
    ConfigurationError,
    RerankError,
    SearchError,
)
from milvus_vllm_retrievers.ranker import VLLMRanker

# A collection may be made anew, or an alias be given to another, while a retriever lives: seconds
# after which a query looks at it again.
LOOK_AGAIN_AFTER = 30.0
_LONGEST_ASKED_FOR_MODELS = 2.0
_MOST_INSTRUCTIONS = 100
_UNRANKED = Route(None, "no ranker was given")
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
        if ranker is not None:
            connection.hide(*ranker.secrets)
        self._settings = settings
        self._ranker = ranker
        self._health = None
        if ranker is not None:
            self._health = Health(ranker.cool_down, ranker.model or "", ranker.on_error)
        self._client = None if ranker is None else _client(ranker, direct=ranker.mode == "client")
        self._driver = SyncDriver(connection, self._client)
        self._async_driver = AsyncDriver(connection, self._client)
        self._target: Target | None = None
        self._looked_at = 0.0
        self._served: Sequence[str] | None = None
        self._asked_for_models = False
        self._rerankings: dict[str | None, Reranking] = {}  # by the instruction
        self._told: set[tuple[bool, Route]] = set()  # of the target that is known now
        self._plans: set[Plan] = set()  # that were logged

    def retrieve(self, query: Query, options: SearchOptions) -> list[Hit]:
        """Retrieve one query's hits, best first.

        Raises:
            ConfigurationError: The collection, the server or the options do not fit together.
            SearchError: Milvus did not answer the search.
            RerankError: Reranking failed and the ranker's `on_error` does not cover it.
        """
        return self._driver.run(self._retrieval(query, options))

    async def aretrieve(self, query: Query, options: SearchOptions) -> list[Hit]:
        """Retrieve one query's hits; the async twin of `retrieve`."""
        return await self._async_driver.run(self._retrieval(query, options))

    def retrieve_many(
        self,
        queries: Sequence[Query],
        options: SearchOptions,
        max_concurrency: int | None = None,
    ) -> list[Outcome]:
        """Retrieve for several queries, each with an outcome of its own.

        Args:
            queries: The questions.
            options: How to search; the timeout is for each query.
            max_concurrency: What may be in flight at once: embeddings, searches and rerank
                requests. None leaves it to the ranker and the encoders.

        Returns:
            The hits of each query, or the error that took their place.
        """
        return self._driver.run(self._retrievals(queries, options, max_concurrency))

    async def aretrieve_many(
        self,
        queries: Sequence[Query],
        options: SearchOptions,
        max_concurrency: int | None = None,
    ) -> list[Outcome]:
        """Retrieve for several queries; the async twin of `retrieve_many`."""
        return await self._async_driver.run(self._retrievals(queries, options, max_concurrency))

    def explained(self, query: Query, options: SearchOptions) -> tuple[list[Hit], list[Hit], Plan]:
        """Return the candidates in retrieval order, the hits, and how they came about."""
        return self._driver.run(self._explanation(query, options))

    async def aexplained(
        self, query: Query, options: SearchOptions
    ) -> tuple[list[Hit], list[Hit], Plan]:
        """Return candidates, hits and plan; the async twin of `explained`."""
        return await self._async_driver.run(self._explanation(query, options))

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

    def refresh(self, timeout: float | None) -> None:
        """Look at the collection now, and ask again which models are served when that matters."""
        self._driver.run(self._refreshing(timeout))

    async def arefresh(self, timeout: float | None) -> None:
        """Look at the collection now; the async twin of `refresh`."""
        await self._async_driver.run(self._refreshing(timeout))

    def close(self) -> None:
        """Close the blocking connections that are ours."""
        self._connection.close()
        if self._client is not None:
            self._client.close()

    async def aclose(self) -> None:
        """Close this event loop's connections and the blocking ones, as far as ours."""
        await self._connection.aclose()
        if self._client is not None:
            await self._client.aclose()

    def _retrieval(self, query: Query, options: SearchOptions) -> Flow[list[Hit]]:
        deadline = Deadline.after(options.timeout)
        try:
            target, options = yield from self._prepared(options, deadline)
            reranking = yield from self._reranking(target, options, deadline)
            self._tell(target, reranking, embedded=query.embedding is not None)
            return (yield from retrieve(target, reranking, query, options, deadline))
        except SearchError as error:
            self._forget_what_may_have_changed(error)
            raise

    def _retrievals(
        self, queries: Sequence[Query], options: SearchOptions, max_concurrency: int | None
    ) -> Flow[list[Outcome]]:
        if not queries:
            return []
        deadline = Deadline.after(options.timeout)
        try:
            if max_concurrency is not None:
                check_count("max_concurrency", max_concurrency)
            target, options = yield from self._prepared(options, deadline)
            reranking = yield from self._reranking(target, options, deadline)
            embedded = any(query.embedding is not None for query in queries)
            self._tell(target, reranking, embedded=embedded)
            outcomes = yield from retrieve_many(
                target, reranking, queries, options, max_concurrency
            )
        except Exception as error:  # noqa: BLE001 - it is the outcome of every query
            outcomes = [error] * len(queries)
        for outcome in outcomes:
            if isinstance(outcome, SearchError):
                self._forget_what_may_have_changed(outcome)
        return outcomes

    def _explanation(
        self, query: Query, options: SearchOptions
    ) -> Flow[tuple[list[Hit], list[Hit], Plan]]:
        deadline = Deadline.after(options.timeout)
        try:
            target, options = yield from self._prepared(options, deadline)
            reranking = yield from self._reranking(target, options, deadline)
            embedded = query.embedding is not None
            chosen = self._tell(target, reranking, embedded=embedded)
            before = yield from candidates(target, query, options, deadline)
            after = yield from retrieve(target, reranking, query, options, deadline)
        except SearchError as error:
            self._forget_what_may_have_changed(error)
            raise
        return before, after, target.plan(chosen, embedded=embedded)

    def _ranking(
        self, query: Query, items: Sequence[Item], options: SearchOptions, on_missing: OnMissing
    ) -> Flow[list[Ranking]]:
        if self._ranker is None or self._health is None or not items:
            return []
        deadline = Deadline.after(options.timeout)
        try:
            target, options = yield from self._prepared(options, deadline)
            served = yield from self._served_models(target, deadline)
            provider = provider_of(self._ranker, target.facts(served), "MilvusVLLMRerank")
            route = Route("milvus", "MilvusVLLMRerank has Milvus rerank", provider)
            reranking = Reranking(self._ranker, route, self._health)
            return (
                yield from rank_rows(target, reranking, query, items, options, deadline, on_missing)
            )
        except SearchError as error:
            self._forget_what_may_have_changed(error)
            raise

    def _prepared(
        self, options: SearchOptions, deadline: Deadline
    ) -> Flow[tuple[Target, SearchOptions]]:
        """Return the collection as it is now, and the options with its filters written out."""
        target = self._target
        if target is None:
            target = yield from self._found(deadline)
        elif time.monotonic() - self._looked_at > LOOK_AGAIN_AFTER:
            target = yield from self._looked_at_again(target, deadline)
        options = options.resolved(target.layout)
        if options.expr:
            options = replace(options, expr=target.spelled(options.expr))
        return target, options

    def _found(self, deadline: Deadline) -> Flow[Target]:
        description = yield from describe(self._settings.collection_name, deadline)
        return (yield from self._read(description, deadline))

    def _read(self, description: Mapping[str, Any], deadline: Deadline) -> Flow[Target]:
        target = yield from find_target(self._settings, description, deadline)
        self._connection.hide(*target.layout.secrets)
        self._rerankings.clear()
        self._told.clear()
        self._target, self._looked_at = target, time.monotonic()
        return target

    def _looked_at_again(self, target: Target, deadline: Deadline) -> Flow[Target]:
        """Notice that an alias stands for another collection now, or that fields have come."""
        self._looked_at = time.monotonic()  # others that come meanwhile go on with what is known
        try:
            description = yield from describe(self._settings.collection_name, deadline)
        except SearchError:
            return target  # the search that follows tells what is the matter
        if fingerprint(description) == target.fingerprint:
            return target
        logger.info("collection %r has changed: reading it anew", self._settings.collection_name)
        return (yield from self._read(description, deadline))

    def _refreshing(self, timeout: float | None) -> Flow[None]:
        self._asked_for_models, self._served = False, None
        yield from self._found(Deadline.after(timeout))

    def _forget_what_may_have_changed(self, error: SearchError) -> None:
        """After a failed search the collection may have been made anew: the next looks again."""
        if error.reason not in _SAYS_NOTHING_OF_COLLECTION:
            self._target = None

    def _reranking(
        self, target: Target, options: SearchOptions, deadline: Deadline
    ) -> Flow[Reranking | None]:
        """Decide who reranks; what was decided for this target holds as long as it does."""
        ranker, instruction = self._ranker, options.instruction
        if ranker is None or self._health is None:
            return None
        known = self._rerankings.get(instruction)
        if known is not None:
            return known
        if instruction is not None:
            ranker = replace(ranker, instruction=instruction)
        served = yield from self._served_models(target, deadline)
        made = Reranking(ranker, route(ranker, target.facts(served)), self._health)
        if len(self._rerankings) >= _MOST_INSTRUCTIONS:
            self._rerankings.clear()
        self._rerankings[instruction] = made
        return made

    def _served_models(self, target: Target, deadline: Deadline) -> Flow[Sequence[str] | None]:
        """Ask, once, which models the endpoint serves, where the route depends on it."""
        ranker = self._ranker
        if ranker is None or self._asked_for_models or not asks_for_models(ranker, target.server):
            return self._served
        limit = Deadline.after(deadline.share(0.25).within(_LONGEST_ASKED_FOR_MODELS))
        try:
            self._served = yield from served_models(ranker, limit)
        except (RerankError, ConfigurationError) as error:
            if not self._asked_for_models:
                logger.info(
                    "cannot ask %s which models it serves: trusting that Milvus finds %r there "
                    "(%s)",
                    ranker.endpoint,
                    ranker.model,
                    error,
                )
        self._asked_for_models = True  # now: of queries that come at once, each must know
        return self._served

    def _tell(self, target: Target, reranking: Reranking | None, *, embedded: bool) -> Route:
        """Log once what was chosen for the user, and what was left out."""
        chosen = _UNRANKED if reranking is None else reranking.route
        if (embedded, chosen) in self._told:
            return chosen
        self._told.add((embedded, chosen))
        plan = target.plan(chosen, embedded=embedded)
        if plan in self._plans:
            return chosen
        self._plans.add(plan)
        logger.info("%s", plan)
        if reranking is not None and not target.server.known:
            logger.warning(
                "cannot tell from its version %r whether this Milvus can rerank: mode='auto' "
                "reranks from this process, mode='server' trusts it to",
                target.server.version,
            )
        left_out = target.layout.out_of_reach(self._settings.encoders)
        if self._settings.vector_field is None and left_out and not embedded:
            logger.warning("not every vector field is searched: %s", "; ".join(left_out))
        return chosen


def _client(ranker: VLLMRanker, *, direct: bool) -> RerankClient:
    """Make the client of a rerank service; one that is sure to be used is tried out at once."""
    client = RerankClient(ranker)
    if direct and ranker.on_error == "raise":
        client.check_environment()
    return client


class Reranker(Closes, Protocol):
    """Ranks items that are there already."""

    def rank(self, query: Query, items: Sequence[Item], timeout: float | None) -> list[Ranking]:
        """Rank items by relevance to the query, best first, in so many seconds."""

    async def arank(
        self, query: Query, items: Sequence[Item], timeout: float | None
    ) -> list[Ranking]:
        """Rank items by relevance to the query; the async twin of `rank`."""

    @property
    def model(self) -> str:
        """The rerank model's name as far as it is known; empty if it is not."""


class TextReranker:
    """Ranks the items' texts straight against vLLM; needs no Milvus and no pymilvus.

    Args:
        ranker: The model and how it is asked.
    """

    def __init__(self, ranker: VLLMRanker) -> None:
        self._ranker = ranker
        self._health = Health(ranker.cool_down, ranker.model or "")
        self._client = _client(ranker, direct=True)
        self._driver = SyncDriver(None, self._client)
        self._async_driver = AsyncDriver(None, self._client)

    def rank(self, query: Query, items: Sequence[Item], timeout: float | None) -> list[Ranking]:
        """Rank items by relevance to the query, best first; equal scores stay as given.

        Args:
            query: The question.
            items: What to rank.
            timeout: Seconds for the call with all its tries; None leaves it to the ranker's.

        Raises:
            RerankError: Reranking failed and the ranker's `on_error` is not ``"skip"``.
        """
        return self._driver.run(self._ranking(query, items, timeout))

    async def arank(
        self, query: Query, items: Sequence[Item], timeout: float | None
    ) -> list[Ranking]:
        """Rank items by relevance to the query; the async twin of `rank`."""
        return await self._async_driver.run(self._ranking(query, items, timeout))

    @property
    def model(self) -> str:
        """The model's name: the ranker's, or what an answer said."""
        return self._health.model

    def close(self) -> None:
        """Close the blocking connections."""
        self._client.close()

    async def aclose(self) -> None:
        """Close this event loop's connections and the blocking ones."""
        await self._client.aclose()

    def _ranking(
        self, query: Query, items: Sequence[Item], timeout: float | None
    ) -> Flow[list[Ranking]]:
        texts = [item.text for item in items]
        deadline = Deadline.after(timeout)
        return rank_texts(self._ranker, self._health, query, texts, deadline)


class RowRerankArguments(ConnectionArguments, Protocol):
    """What a front end's `MilvusVLLMRerank` holds."""

    collection_name: str
    ranker: VLLMRanker
    text_field: str | None
    partition_names: Sequence[str] | None
    consistency_level: str | int | None
    search_params: Mapping[str, Any] | None
    on_missing: OnMissing


class RowReranker:
    """Has Milvus rank the items' rows, found by primary key; no text travels.

    Args:
        connection: Where Milvus is.
        settings: The collection.
        ranker: How Milvus reranks.
        options: Partitions, consistency level and search parameters.
        on_missing: Items without a row raise, or are kept last, marked.
    """

    def __init__(
        self,
        connection: MilvusConnection,
        settings: TargetSettings,
        ranker: VLLMRanker,
        options: SearchOptions,
        on_missing: OnMissing,
    ) -> None:
        self._adapter = MilvusVLLMAdapter(connection, settings, ranker)
        self._ranker = ranker
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
        )
        return cls(
            MilvusConnection.of(arguments),
            settings,
            arguments.ranker,
            options,
            arguments.on_missing,
        )

    def rank(self, query: Query, items: Sequence[Item], timeout: float | None) -> list[Ranking]:
        """Rank items by relevance to the query, best first; see `MilvusVLLMAdapter.rank`."""
        options = replace(self._options, timeout=timeout)
        return self._adapter.rank(query, items, options, self._on_missing)

    async def arank(
        self, query: Query, items: Sequence[Item], timeout: float | None
    ) -> list[Ranking]:
        """Rank items by relevance to the query; the async twin of `rank`."""
        options = replace(self._options, timeout=timeout)
        return await self._adapter.arank(query, items, options, self._on_missing)

    @property
    def model(self) -> str:
        """The model's name: the ranker's; Milvus tells of no other."""
        return self._ranker.model or ""

    def close(self) -> None:
        """Close the blocking connections that are ours."""
        self._adapter.close()

    async def aclose(self) -> None:
        """Close this event loop's connections and the blocking ones, as far as ours."""
        await self._adapter.aclose()
