"""What the front ends call: retrieval over one collection, and reranking of given texts."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from milvus_vllm_retrievers.core import flow
from milvus_vllm_retrievers.core.deadline import Deadline
from milvus_vllm_retrievers.core.drivers import AsyncDriver, SyncDriver
from milvus_vllm_retrievers.core.flow import Flow, Target, TargetSettings
from milvus_vllm_retrievers.core.hits import Hit, Ranking
from milvus_vllm_retrievers.core.milvus import MilvusConnection
from milvus_vllm_retrievers.core.query import Query, SearchOptions
from milvus_vllm_retrievers.core.vllm import VLLMClient
from milvus_vllm_retrievers.errors import SearchError
from milvus_vllm_retrievers.ranker import VLLMRanker

logger = logging.getLogger("milvus_vllm_retrievers")


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
        self._connection = connection
        self._settings = settings
        self._ranker = ranker
        self._vllm = None if ranker is None else VLLMClient(ranker)
        self._driver = SyncDriver(connection, self._vllm)
        self._async_driver = AsyncDriver(connection, self._vllm)
        self._target: Target | None = None

    def retrieve(self, query: Query, options: SearchOptions) -> list[Hit]:
        """Retrieve one query's hits, best first.

        Raises:
            ConfigurationError: The collection, the server or the options do not fit together.
            SearchError: Milvus did not answer the search.
            RerankError: Reranking failed and the ranker's `on_error` does not cover it.
        """
        return self.retrieve_many([query], options)[0]

    async def aretrieve(self, query: Query, options: SearchOptions) -> list[Hit]:
        """Retrieve one query's hits; the async twin of `retrieve`."""
        return (await self.aretrieve_many([query], options))[0]

    def retrieve_many(self, queries: Sequence[Query], options: SearchOptions) -> list[list[Hit]]:
        """Retrieve the hits of several queries with one search request.

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
        target = yield from self._found_target(deadline)
        try:
            return (yield from flow.retrieve(target, self._ranker, queries, options, deadline))
        except SearchError:
            # The collection may have been made anew since it was read: look again next time.
            self._target = None
            raise

    def _candidates(self, query: Query, options: SearchOptions) -> Flow[list[Hit]]:
        deadline = Deadline.after(options.timeout)
        target = yield from self._found_target(deadline)
        return (yield from flow.candidates(target, [query], options, deadline))[0]

    def _found_target(self, deadline: Deadline) -> Flow[Target]:
        if self._target is None:
            self._target = yield from flow.find_target(self._settings, deadline)
            self._report(self._target)
        return self._target

    def _report(self, target: Target) -> None:
        if self._ranker is not None and not target.server.known:
            logger.warning(
                "cannot tell from its version %r whether this Milvus can rerank: mode='auto' "
                "reranks from this process, mode='server' trusts it to",
                target.server.version,
            )


class TextReranker:
    """Reranks texts straight against vLLM; needs no Milvus and no pymilvus.

    Args:
        ranker: The model and how it is asked.
    """

    def __init__(self, ranker: VLLMRanker) -> None:
        self._ranker = ranker
        self._vllm = VLLMClient(ranker)
        self._driver = SyncDriver(None, self._vllm)
        self._async_driver = AsyncDriver(None, self._vllm)

    def rank(self, query: Query, texts: Sequence[str]) -> list[Ranking]:
        """Rank texts by relevance to the query, best first.

        Raises:
            RerankError: Reranking failed and the ranker's `on_error` is not ``"skip"``.
        """
        return self._driver.run(self._ranking(query, texts))

    async def arank(self, query: Query, texts: Sequence[str]) -> list[Ranking]:
        """Rank texts by relevance to the query; the async twin of `rank`."""
        return await self._async_driver.run(self._ranking(query, texts))

    def close(self) -> None:
        """Close the blocking connections."""
        self._vllm.close()

    async def aclose(self) -> None:
        """Close this event loop's connections and the blocking ones."""
        await self._vllm.aclose()

    def _ranking(self, query: Query, texts: Sequence[str]) -> Flow[list[Ranking]]:
        return flow.rank_texts(self._ranker, query.text, texts, Deadline())
