"""Retrieval as a flow: search, rerank, fall back; for one query, and for many together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from milvus_vllm_retrievers._core import hits as hits_
from milvus_vllm_retrievers._core import milvus_calls, requests
from milvus_vllm_retrievers._core.deadline import Deadline
from milvus_vllm_retrievers._core.hits import Hit
from milvus_vllm_retrievers._core.layout import VectorField
from milvus_vllm_retrievers._core.query import MAX_LIMIT, Encoder, Query, SearchOptions
from milvus_vllm_retrievers._core.requests import Leg
from milvus_vllm_retrievers._core.rerank_texts import scores_from_here
from milvus_vllm_retrievers._core.steps import Encode, Flow, Together
from milvus_vllm_retrievers._core.target import Reranking, Target
from milvus_vllm_retrievers.errors import (
    ConfigurationError,
    MilvusVLLMError,
    RerankError,
    SearchError,
)

# How many queries of a batch are embedded, or searched for alone, at once, unless a limit is given.
AT_ONCE = 16
# What one search for many queries may bring: gRPC refuses more than 256 MB.
_BYTES_OF_ONE_ANSWER = 64_000_000
_BYTES_OF_A_ROW = 16_000  # until rows have been seen

Outcome = list[Hit] | Exception


def retrieve(
    target: Target,
    reranking: Reranking | None,
    query: Query,
    options: SearchOptions,
    deadline: Deadline,
    in_flight: int | None = None,
) -> Flow[list[Hit]]:
    """Retrieve one query's `k` hits, best first.

    Args:
        target: The collection.
        reranking: How candidates are reranked; None leaves them in retrieval order.
        query: The question.
        options: How to search, resolved for the target's layout.
        deadline: When it must be done.
        in_flight: Rerank requests at once; None is the ranker's `max_concurrency`.
    """
    search = yield from _prepared(target, query, options, deadline)
    return (yield from _answered(search, reranking, query, in_flight))


def candidates(
    target: Target, query: Query, options: SearchOptions, deadline: Deadline
) -> Flow[list[Hit]]:
    """Retrieve what would be reranked, in retrieval order."""
    search = yield from _prepared(target, query, options, deadline)
    return (yield from search.candidates())[0]


def retrieve_many(
    target: Target,
    reranking: Reranking | None,
    queries: Sequence[Query],
    options: SearchOptions,
    max_concurrency: int | None,
) -> Flow[list[Outcome]]:
    """Retrieve for several queries, each with a time limit and an outcome of its own.

    Where Milvus reranks, each query is a search by itself, since Milvus reranks the queries of one
    search in turn. Else queries share searches, as many as one answer can bring.

    Args:
        target: The collection.
        reranking: How candidates are reranked; None leaves them in retrieval order.
        queries: The questions.
        options: How to search, resolved for the target's layout.
        max_concurrency: What may be in flight at once: embeddings, searches, rerank requests.
            None is the ranker's `max_concurrency` for what it concerns, and 16.

    Returns:
        The hits of each query, or the error that took their place.
    """
    rerank_limit = AT_ONCE if reranking is None else reranking.ranker.max_concurrency
    limit = min(rerank_limit, max_concurrency or rerank_limit)
    together = _Together(target, reranking, options, limit, max_concurrency or AT_ONCE)
    in_milvus = reranking is not None and reranking.route.reranked_by == "milvus"
    if in_milvus or target.server.is_lite or len(queries) == 1:
        return (yield from together.each_alone(queries))
    outcomes: list[Outcome] = []
    row_bytes = _BYTES_OF_A_ROW
    while len(outcomes) < len(queries):
        size = _share(row_bytes, len(target.layout.vector_fields) * options.pool)
        share = queries[len(outcomes) : len(outcomes) + size]
        found, row_bytes = yield from together.sharing(share, row_bytes)
        outcomes += found
    return outcomes


def _answered(
    search: _Search, reranking: Reranking | None, query: Query, in_flight: int | None
) -> Flow[list[Hit]]:
    """Search and rerank, where the query's vectors are there."""
    if reranking is None:
        return (yield from search.plain(search.options.k))[0]
    if reranking.route.reranked_by == "milvus":
        found = yield from _reranked_by_milvus(search, reranking, query, in_flight)
    else:
        pool = (yield from search.candidates())[0]
        found = yield from _reranked_by_client(search, reranking, query, pool, in_flight)
    return hits_.above(found, search.options.score_threshold)


def _share(row_bytes: int, rows: int) -> int:
    """Return for how many queries one search can answer with so many rows each."""
    size = _BYTES_OF_ONE_ANSWER // (row_bytes * min(rows, MAX_LIMIT))
    return min(max(size, 1), requests.MAX_QUERIES)


class _Together(NamedTuple):
    """What the queries of one batch have in common."""

    target: Target
    reranking: Reranking | None
    options: SearchOptions
    limit: int  # of searches that rerank, and of rerank requests
    embedding_limit: int

    def each_alone(self, queries: Sequence[Query]) -> Flow[list[Outcome]]:
        """Retrieve for each query by itself."""
        limit = self._limit_of(self.limit, queries)
        in_flight = max(self.limit // min(limit, len(queries)), 1)
        flows = [self._alone(query, in_flight) for query in queries]
        return (yield Together(flows, limit, return_exceptions=True))  # type: ignore[no-any-return]

    def _alone(self, query: Query, in_flight: int) -> Flow[list[Hit]]:
        deadline = Deadline.after(self.options.timeout)
        return (
            yield from retrieve(
                self.target, self.reranking, query, self.options, deadline, in_flight
            )
        )

    def sharing(self, queries: Sequence[Query], row_bytes: int) -> Flow[tuple[list[Outcome], int]]:
        """Retrieve for queries that share searches; return also what a row may weigh."""
        limit = self._limit_of(self.embedding_limit, queries)
        flows = [self._prepared_in_turn(query) for query in queries]
        prepared: list[_Ready | Exception] = yield Together(flows, limit, return_exceptions=True)
        outcomes: dict[int, Outcome] = {}
        groups: dict[tuple[str, ...], list[int]] = {}
        for i, ready in enumerate(prepared):
            if isinstance(ready, Exception):
                outcomes[i] = ready
            else:  # queries with a vector of their own may search other fields
                groups.setdefault(ready.search.fields, []).append(i)
        for places in groups.values():
            share = [prepared[i] for i in places]
            found, row_bytes = yield from self._one_search(share, row_bytes)
            outcomes.update(zip(places, found, strict=True))
        return [outcomes[i] for i in range(len(queries))], row_bytes

    def _prepared_in_turn(self, query: Query) -> Flow[_Ready]:
        deadline = Deadline.after(self.options.timeout)  # from now: not while it waited
        search = yield from _prepared(self.target, query, self.options, deadline)
        return _Ready(query, search, deadline.remaining())

    def _one_search(self, share: Sequence[Any], row_bytes: int) -> Flow[tuple[list[Outcome], int]]:
        searches = [ready.search for ready in share]
        limit = self.options.k if self.reranking is None else searches[0].pool
        seconds = min((ready.seconds for ready in share if ready.seconds is not None), default=None)
        deadline = Deadline.after(seconds)
        try:
            pools = yield from _merged(searches, deadline).plain(limit)
        except SearchError as error:
            if error.is_of_connection or len(share) == 1:
                return [error] * len(share), row_bytes
            # What was too much for one search, or wrong with one query, is found out one by one.
            alone = [self._searched_alone(ready) for ready in share]
            return (yield Together(alone, self.limit, return_exceptions=True)), row_bytes
        row_bytes = max(row_bytes, *map(_weight, pools))
        if self.reranking is None:
            return list(pools), row_bytes
        # Each query has done its part of the search that they shared.
        spent = 0.0 if seconds is None else (seconds - (deadline.remaining() or 0.0)) / len(share)
        in_flight = max(self.limit // len(share), 1)
        rest = [
            self._rest(ready, spent, pool, in_flight)
            for ready, pool in zip(share, pools, strict=True)
        ]
        return (yield Together(rest, self.limit, return_exceptions=True)), row_bytes

    def _searched_alone(self, ready: _Ready) -> Flow[list[Hit]]:
        search = ready.search._replace(deadline=Deadline.after(ready.seconds))
        return (yield from _answered(search, self.reranking, ready.query, 1))

    def _rest(
        self, ready: _Ready, spent: float, pool: Sequence[Hit], in_flight: int
    ) -> Flow[list[Hit]]:
        """Rerank one query's candidates in the time that it has left."""
        assert self.reranking is not None
        left = None if ready.seconds is None else ready.seconds - spent
        search = ready.search._replace(deadline=Deadline.after(left))
        found = yield from _reranked_by_client(search, self.reranking, ready.query, pool, in_flight)
        return hits_.above(found, self.options.score_threshold)

    def _limit_of(self, limit: int, queries: Sequence[Query]) -> int:
        """Return `limit`, or what the encoders allow where that is less."""
        embedded = all(query.embedding is not None for query in queries)
        try:
            fields = self.target.searched_fields(embedded=embedded)
        except ConfigurationError:
            return limit  # each query meets it by itself
        own = [encoder.limit for _, encoder in fields if encoder is not None and encoder.limit]
        return min([limit, *own])


def _weight(pool: Sequence[Hit]) -> int:
    """Return roughly what the heaviest of a few rows takes in an answer, in bytes."""
    return max((len(repr((hit.text, hit.fields)).encode()) for hit in pool[:3]), default=0)


def _prepared(
    target: Target, query: Query, options: SearchOptions, deadline: Deadline
) -> Flow[_Search]:
    if options.expr_params and target.server.is_lite:
        raise ConfigurationError(
            "Milvus Lite takes no filter templates (expr_params): pass the values as filters="
        )
    requests.check_search_params(options.search_params, target.layout)
    legs = yield from _legs(target, query, deadline)
    options.check_pool(len(legs))
    return _Search(target, legs, options, deadline)


def _legs(target: Target, query: Query, deadline: Deadline) -> Flow[list[Leg]]:
    encoded: dict[tuple[int, bool], Any] = {}
    legs = []
    for vector, encoder in target.searched_fields(embedded=query.embedding is not None):
        if vector.takes_text:
            legs.append(Leg(vector, [query.text]))
        elif encoder is None:
            legs.append(requests.make_leg(vector, [query.embedding]))
        else:
            kind = id(encoder), vector.is_dense
            if kind not in encoded:
                encoded[kind] = yield from _encoded(vector, encoder, query, deadline)
            legs.append(requests.make_leg(vector, [encoded[kind]]))
    return legs


def _encoded(vector: VectorField, encoder: Encoder, query: Query, deadline: Deadline) -> Flow[Any]:
    try:
        return (yield Encode(encoder, query, deadline))
    except Exception as error:
        if hasattr(error, "add_note"):  # from Python 3.11 on
            error.add_note(
                f"This came from embedding the query for field {vector.name!r}: look at the model "
                "given as embedding= (LangChain), embed_model= (LlamaIndex) or sparse_embedding="
            )
        raise


class _Search(NamedTuple):
    """The searches that a retrieval may need, over the same legs."""

    target: Target
    legs: Sequence[Leg]
    options: SearchOptions
    deadline: Deadline

    @property
    def fields(self) -> tuple[str, ...]:
        """The vector fields that are searched."""
        return tuple(leg.field.name for leg in self.legs)

    @property
    def pool(self) -> int:
        """How many candidates there can be for a query."""
        return requests.candidate_limit(self.legs, self.options)

    def plain(self, limit: int) -> Flow[list[list[Hit]]]:
        """Search without a ranker; return each query's hits."""
        name = self.target.layout.name
        wanted = requests.plain_call(
            name, self.legs, self.options, self.target.output_fields, limit=limit
        )
        answer = yield from milvus_calls.search(name, wanted, self.deadline)
        return [self.target.rows.retrieved(rows) for rows in answer]

    def candidates(self) -> Flow[list[list[Hit]]]:
        """Search for what is to be reranked."""
        return self.plain(self.pool)

    def reranked(self, reranking: Reranking, query: Query, limit: int) -> Flow[list[Hit]]:
        """Return one query's hits, scored by Milvus."""
        target = self.target
        wanted = requests.reranked_call(
            target.layout.name,
            self.legs,
            self.options,
            target.output_fields,
            function=reranking.function(query, target),
            limit=limit,
            search_reranks_exactly=not target.server.is_lite,
        )
        answer = yield from milvus_calls.search_and_rerank(
            target.layout.name, wanted, reranking.ranker, self.deadline
        )
        return target.rows.reranked(answer[0])


class _Ready(NamedTuple):
    """A query whose vectors are there.

    Attributes:
        query: The question.
        search: Its search.
        seconds: The time it has left; None is without limit.
    """

    query: Query
    search: _Search
    seconds: float | None


def _merged(searches: Sequence[_Search], deadline: Deadline) -> _Search:
    """Return one search for the queries of several."""
    legs = [
        Leg(legs[0].field, [data for leg in legs for data in leg.data])
        for legs in zip(*(search.legs for search in searches), strict=True)
    ]
    return searches[0]._replace(legs=legs, deadline=deadline)


def _reranked_by_milvus(
    search: _Search, reranking: Reranking, query: Query, in_flight: int | None
) -> Flow[list[Hit]]:
    ranker, _, health = reranking
    falls_back = ranker.on_error != "raise"
    error: MilvusVLLMError | None = health.in_milvus.rest() if falls_back else None
    if error is None:
        try:
            hits = yield from _with_texts(search, reranking, query)
        except MilvusVLLMError as failed:
            if not falls_back:
                raise
            error = failed
        else:
            health.in_milvus.note([], worked=bool(hits))
            health.check_spread((hit.text for hit in hits), [hit.relevance_score for hit in hits])
            return hits
    return (yield from _fall_back(search, reranking, query, error, in_flight))


def _with_texts(search: _Search, reranking: Reranking, query: Query) -> Flow[list[Hit]]:
    """Have Milvus rerank, and see to it that a row without a text takes no other row's place.

    Milvus scores it like any other and cuts to `k` then. Where one is among the `k`, all
    candidates are asked for, and the cut is made here.
    """
    k = search.options.k
    if search.target.server.is_lite and search.target.text.nullable:
        return (yield from _with_texts_on_lite(search, reranking, query))[:k]
    hits = yield from search.reranked(reranking, query, k)
    # Unscored rows come last.
    if len(hits) == k < search.pool and hits[-1].relevance_score is None:
        hits = yield from search.reranked(reranking, query, search.pool)
    return hits[:k]


def _with_texts_on_lite(search: _Search, reranking: Reranking, query: Query) -> Flow[list[Hit]]:
    """Have Milvus Lite rerank the candidates that have a text: one null fails its whole search."""
    pool = (yield from search.candidates())[0]
    empty = [hit for hit in pool if hit.text is None]
    if not empty:
        return (yield from search.reranked(reranking, query, search.pool))
    keys = [hit.pk for hit in pool if hit.text is not None]
    hits: list[Hit] = []
    if keys:
        expr = requests.has_key_in(search.target.layout, keys)
        narrowed = search._replace(options=search.options.narrowed(expr=expr))
        hits = yield from narrowed.reranked(reranking, query, len(keys))
    hits += hits_.unranked(empty, hits_.NO_TEXT)
    return sorted(hits, key=lambda hit: hits_.relevance_order(hit.relevance_score, hit.pk))


def _fall_back(
    search: _Search,
    reranking: Reranking,
    query: Query,
    error: MilvusVLLMError,
    in_flight: int | None,
) -> Flow[list[Hit]]:
    """Do without Milvus's reranking.

    Servers word a rerank service's failure in many ways, so any failed search comes here. Where
    it was the search after all, the one that follows fails too, and says so.
    """
    from_here = reranking.ranker.on_error == "client"
    pool = (yield from search.plain(search.pool if from_here else search.options.k))[0]
    reranking.health.in_milvus.note([error], worked=False)
    if from_here:
        return (yield from _reranked_by_client(search, reranking, query, pool, in_flight))
    return hits_.unranked(pool, reason=str(error))


def _reranked_by_client(
    search: _Search,
    reranking: Reranking,
    query: Query,
    pool: Sequence[Hit],
    in_flight: int | None,
) -> Flow[list[Hit]]:
    ranker, _, health = reranking
    k = search.options.k
    texts = [hit.text for hit in pool]
    try:
        scores = yield from scores_from_here(
            ranker, health, query.text, texts, search.deadline, in_flight
        )
    except RerankError as error:
        if ranker.on_error != "skip":
            raise
        return hits_.unranked(pool[:k], reason=str(error))
    return hits_.reranked_by_client(pool, scores, k)
