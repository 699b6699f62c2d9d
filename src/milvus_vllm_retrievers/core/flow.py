"""One retrieval, decided once, as generators that say what they need.

A flow yields steps (`Encode`, `CallMilvus`, `Rerank`, `Together`) and is sent each step's result,
or has its error thrown in. It never touches a socket: `drivers` does the steps, blocking or async.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from milvus_vllm_retrievers.core import hits as hits_
from milvus_vllm_retrievers.core import requests
from milvus_vllm_retrievers.core.collection import CollectionLayout
from milvus_vllm_retrievers.core.deadline import Deadline
from milvus_vllm_retrievers.core.hits import Hit, PrimaryKey, Ranking
from milvus_vllm_retrievers.core.milvus import Server, is_deadline_of_server, is_not_loaded
from milvus_vllm_retrievers.core.query import (
    MAX_LIMIT,
    Encoder,
    Encoders,
    Item,
    OnMissing,
    Query,
    SearchOptions,
)
from milvus_vllm_retrievers.core.requests import Leg, SearchCall
from milvus_vllm_retrievers.errors import (
    ConfigurationError,
    RerankError,
    RerankTimeoutError,
    SearchError,
)
from milvus_vllm_retrievers.ranker import Provider, VLLMRanker

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Encode:
    """Turn queries into vectors."""

    encoder: Encoder
    queries: Sequence[Query]


@dataclass(frozen=True, slots=True)
class CallMilvus:
    """Call a method of the Milvus client."""

    what: str
    method: str
    arguments: Mapping[str, Any]
    deadline: Deadline


@dataclass(frozen=True, slots=True)
class Rerank:
    """Ask vLLM for the scores of texts."""

    query: str
    texts: Sequence[str]
    deadline: Deadline


@dataclass(frozen=True, slots=True)
class Together:
    """Do several steps at once, at most `limit` in flight."""

    steps: Sequence[Rerank | CallMilvus]
    limit: int


Step = Encode | CallMilvus | Rerank | Together
Flow = Generator[Step, Any, T]


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSettings:
    """What the caller says of the collection; None leaves it to the collection's layout.

    Attributes:
        collection_name: The collection.
        text_field: The VARCHAR field that is reranked.
        vector_field: The vector field or fields to search.
        output_fields: What to fetch of each hit.
        encoders: How queries become vectors.
        where: A filter that can only be written once the layout is known.
    """

    collection_name: str
    text_field: str | None = None
    vector_field: str | Sequence[str] | None = None
    output_fields: Sequence[str] | None = None
    encoders: Encoders = field(default_factory=Encoders)
    where: Callable[[CollectionLayout], str | None] | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """A collection and how it is searched, found out once.

    Attributes:
        settings: What the caller said of it.
        layout: The collection's fields.
        server: What its server can do.
        text_field: The field that is reranked.
        output_fields: What is fetched of each hit.
        expr: What `settings.where` says for this layout.
    """

    settings: TargetSettings
    layout: CollectionLayout
    server: Server
    text_field: str
    output_fields: tuple[str, ...]
    expr: str | None


def find_target(settings: TargetSettings, deadline: Deadline) -> Flow[Target]:
    """Read the collection's layout and the server's version."""
    name = settings.collection_name
    description = yield CallMilvus(
        f"description of collection {name!r}",
        "describe_collection",
        {"collection_name": name},
        deadline,
    )
    # An alias is described by the name of what it stands for now; requests must follow the alias.
    layout = CollectionLayout.from_description({**description, "collection_name": name})
    text_field = layout.text_field(settings.text_field)
    version = yield CallMilvus("version of the Milvus server", "get_server_version", {}, deadline)
    return Target(
        settings=settings,
        layout=layout,
        server=Server.from_version(str(version)),
        text_field=text_field,
        output_fields=tuple(layout.output_fields(settings.output_fields, text_field)),
        expr=settings.where(layout) if settings.where else None,
    )


def reranks_in_milvus(ranker: VLLMRanker, server: Server) -> bool:
    """Decide who reranks: Milvus (True) or this process (False)."""
    if ranker.mode == "auto":
        return server.known and server.provider == "vllm" and not ranker.client_only_reasons
    return ranker.mode == "server"


def _provider(server: Server, what: str) -> Provider:
    """Return the provider through which the server reranks.

    Raises:
        ConfigurationError: It has none, and would ignore a ranker in silence.
    """
    if server.provider is None:
        raise ConfigurationError(
            f"{what} needs Milvus 2.6 or later; this server is {server.version!r} and would "
            "ignore the ranker in silence. Rerank from this process: mode='auto' or 'client', "
            "or VLLMRerank"
        )
    return server.provider


def retrieve(
    target: Target,
    ranker: VLLMRanker | None,
    queries: Sequence[Query],
    options: SearchOptions,
    deadline: Deadline,
) -> Flow[list[list[Hit]]]:
    """Retrieve `k` hits for each query: search, rerank, fall back where that was asked for."""
    in_milvus = ranker is not None and reranks_in_milvus(ranker, target.server)
    if in_milvus:
        _provider(target.server, "mode='server'")
    search = yield from _prepared(target, queries, options, deadline)
    if ranker is None:
        return (yield from search.plain(options.k))
    if in_milvus:
        found = yield from _reranked_by_milvus(search, ranker, queries)
    else:
        found = yield from _reranked_by_client(search, ranker, queries)
    return [hits_.above(hits, options.score_threshold) for hits in found]


def candidates(
    target: Target, queries: Sequence[Query], options: SearchOptions, deadline: Deadline
) -> Flow[list[list[Hit]]]:
    """Retrieve what would be reranked, in retrieval order."""
    search = yield from _prepared(target, queries, options, deadline)
    return (yield from search.candidates())


def rerank_texts(
    ranker: VLLMRanker, pools: Sequence[tuple[str, Sequence[str]]], deadline: Deadline
) -> Flow[list[list[float]]]:
    """Score each query's texts in requests of `max_client_batch_size`, several at once.

    Args:
        ranker: The model, the size of a request and how many may be in flight.
        pools: Query text and candidate texts, for each query.
        deadline: When all must be done.

    Returns:
        For each query one score per text, in the texts' order.
    """
    steps, owners = [], []
    for owner, (query, texts) in enumerate(pools):
        size = ranker.max_client_batch_size or max(len(texts), 1)
        for start in range(0, len(texts), size):
            steps.append(Rerank(query, texts[start : start + size], deadline))
            owners.append(owner)
    scores: list[list[float]] = [[] for _ in pools]
    if steps:
        batches = yield Together(steps, ranker.max_concurrency)
        for owner, batch in zip(owners, batches, strict=True):
            scores[owner].extend(batch)
    return scores


def rank_texts(
    ranker: VLLMRanker, query: Query, texts: Sequence[str], deadline: Deadline
) -> Flow[list[Ranking]]:
    """Rank given texts; with `on_error="skip"` a failure keeps their order, marked."""
    try:
        scores = (yield from rerank_texts(ranker, [(query.text, texts)], deadline))[0]
    except RerankError as error:
        if ranker.on_error != "skip":
            raise
        return hits_.as_given(range(len(texts)), str(error))
    return hits_.ranked_by_client(scores)


def rank_rows(
    target: Target,
    ranker: VLLMRanker,
    query: Query,
    items: Sequence[Item],
    options: SearchOptions,
    deadline: Deadline,
    on_missing: OnMissing,
) -> Flow[list[Ranking]]:
    """Have Milvus rank items by their primary keys.

    Args:
        target: The collection.
        ranker: The model.
        query: The question.
        items: What to rank.
        options: Partitions and consistency level.
        deadline: When it must be done.
        on_missing: What to do with items that have no row: raise, or keep them last, marked.
    """
    keys = [target.layout.keys_of(item) for item in items]
    asked = list(dict.fromkeys(key for may_be in keys for key in may_be))
    if len(asked) > MAX_LIMIT:
        raise ConfigurationError(f"at most {MAX_LIMIT:,} items can be reranked at once")
    try:
        scores = yield from _scores_by_key(target, ranker, query, asked, options, deadline)
    except (RerankError, SearchError) as error:
        if ranker.on_error == "raise":
            raise
        if ranker.on_error == "client":
            texts = [item.text for item in items]
            return (yield from rank_texts(ranker, query, texts, deadline))
        return hits_.as_given(range(len(items)), str(error))
    rankings = hits_.ranked_by_milvus(keys, scores, target.layout.name)
    missing = [ranking.index for ranking in rankings if ranking.reranked_by is None]
    if missing and on_missing == "raise":
        raise SearchError(
            f"{len(missing)} of {len(items)} items have no row in collection "
            f"{target.layout.name!r}, the first has id {items[missing[0]].id!r}. Pass "
            "on_missing='keep' to get such items last, marked"
        )
    return rankings


def _scores_by_key(
    target: Target,
    ranker: VLLMRanker,
    query: Query,
    keys: Sequence[PrimaryKey],
    options: SearchOptions,
    deadline: Deadline,
) -> Flow[dict[PrimaryKey, float]]:
    if not keys:
        return {}
    function = ranker.to_function(
        query.text, target.text_field, provider=_provider(target.server, "MilvusVLLMRerank")
    )
    call = requests.rows_call(target.layout, keys, options, function)
    rows = (yield from _reranking(_call(target, [call], deadline)))[0]
    hits = hits_.read_hits(rows, target.layout.primary_key, target.text_field)
    return {hit.pk: hit.retrieval_score or 0.0 for hit in hits}


def _prepared(
    target: Target, queries: Sequence[Query], options: SearchOptions, deadline: Deadline
) -> Flow[_Search]:
    if options.expr_params and target.server.is_lite:
        raise ConfigurationError(
            "Milvus Lite takes no filter templates (expr_params): write the values into expr, "
            "such as 'tenant == \"a\"'"
        )
    requests.check_search_params(options.search_params, target.layout)
    legs = yield from _legs(target, queries)
    return _Search(target, legs, options.narrowed(expr=target.expr), deadline)


def _legs(target: Target, queries: Sequence[Query]) -> Flow[list[Leg]]:
    settings = target.settings
    embeddings = [query.embedding for query in queries if query.embedding is not None]
    searched = target.layout.searched_fields(
        settings.vector_field, settings.encoders, embedded=len(embeddings) == len(queries)
    )
    encoded: dict[int, Sequence[Any]] = {}
    legs = []
    for vector, encoder in searched:
        if vector.takes_text:
            legs.append(Leg(vector, [query.text for query in queries]))
        elif encoder is None:
            legs.append(requests.make_leg(vector, embeddings))
        else:
            if id(encoder) not in encoded:
                vectors = yield Encode(encoder, queries)
                if len(vectors) != len(queries):
                    raise ConfigurationError(
                        f"the encoder of field {vector.name!r} made {len(vectors)} vectors for "
                        f"{len(queries)} queries"
                    )
                encoded[id(encoder)] = vectors
            legs.append(requests.make_leg(vector, encoded[id(encoder)]))
    return legs


@dataclass(frozen=True, slots=True)
class _Search:
    """The searches one retrieval may need, over the same legs."""

    target: Target
    legs: Sequence[Leg]
    options: SearchOptions
    deadline: Deadline

    def plain(self, limit: int) -> Flow[list[list[Hit]]]:
        call = requests.plain_call(
            self.target.layout.name,
            self.legs,
            self.options,
            self.target.output_fields,
            limit=limit,
        )
        return self._hits(call)

    def candidates(self) -> Flow[list[list[Hit]]]:
        return self.plain(requests.candidate_limit(self.legs, self.options))

    def reranked(self, ranker: VLLMRanker, queries: Sequence[Query]) -> Flow[list[list[Hit]]]:
        # Milvus reranks the queries of one request one after another: several requests share them.
        size = math.ceil(len(queries) / ranker.max_concurrency)
        calls = [
            self._reranked_call(ranker, queries, slice(start, start + size))
            for start in range(0, len(queries), size)
        ]
        return self._hits(*calls, limit=ranker.max_concurrency)

    def _reranked_call(
        self, ranker: VLLMRanker, queries: Sequence[Query], part: slice
    ) -> SearchCall:
        server = self.target.server
        function = ranker.to_function(
            [query.text for query in queries[part]],
            self.target.text_field,
            provider=_provider(server, "mode='server'"),
        )
        return requests.reranked_call(
            self.target.layout.name,
            [Leg(leg.field, leg.data[part]) for leg in self.legs],
            self.options,
            self.target.output_fields,
            function=function,
            search_reranks_exactly=not server.is_lite,
        )

    def _hits(self, *calls: SearchCall, limit: int = 1) -> Flow[list[list[Hit]]]:
        answer = yield from _call(self.target, calls, self.deadline, limit)
        layout, text_field = self.target.layout, self.target.text_field
        metadata_field = layout.metadata_field(text_field)
        return [
            hits_.read_hits(rows, layout.primary_key, text_field, metadata_field) for rows in answer
        ]


def _reranking(search: Flow[T]) -> Flow[T]:
    """Run a search with a rerank Function; the server's own time limit is the reranking's."""
    try:
        return (yield from search)
    except SearchError as error:
        if is_deadline_of_server(error):
            raise RerankTimeoutError(f"reranking inside Milvus took too long: {error}") from error
        raise


def _call(
    target: Target, calls: Sequence[SearchCall], deadline: Deadline, limit: int = 1
) -> Flow[list[Any]]:
    """Search, at most `limit` calls at once, and return the rows of every query.

    A collection that turns out to be released is loaded first.
    """
    name = target.layout.name
    steps = [
        CallMilvus(f"{call.method} of collection {name!r}", call.method, call.arguments, deadline)
        for call in calls
    ]
    try:
        answers = yield from _all(steps, limit)
    except SearchError as error:
        if not is_not_loaded(error):
            raise
        yield CallMilvus(
            f"loading collection {name!r}", "load_collection", {"collection_name": name}, deadline
        )
        answers = yield from _all(steps, limit)
    return [rows for answer in answers for rows in answer]


def _all(steps: Sequence[CallMilvus], limit: int) -> Flow[list[Any]]:
    if len(steps) == 1:
        return [(yield steps[0])]
    answers: list[Any] = yield Together(steps, limit)
    return answers


def _reranked_by_milvus(
    search: _Search, ranker: VLLMRanker, queries: Sequence[Query]
) -> Flow[list[list[Hit]]]:
    try:
        answer = yield from _reranking(search.reranked(ranker, queries))
    except (RerankError, SearchError) as error:
        # Servers word a rerank service's failure in many ways. Where it was the search after all,
        # the one that follows fails too, and says so.
        if ranker.on_error == "raise":
            raise
        if ranker.on_error == "client":
            return (yield from _reranked_by_client(search, ranker, queries))
        found = yield from search.plain(search.options.k)
        return [hits_.unranked(hits, reason=str(error)) for hits in found]
    return [hits_.reranked_by_milvus(hits) for hits in answer]


def _reranked_by_client(
    search: _Search, ranker: VLLMRanker, queries: Sequence[Query]
) -> Flow[list[list[Hit]]]:
    k = search.options.k
    pools = yield from search.candidates()
    texts = [[hit.text or "" for hit in pool] for pool in pools]
    asked = [(query.text, pool) for query, pool in zip(queries, texts, strict=True)]
    try:
        scores = yield from rerank_texts(ranker, asked, search.deadline)
    except RerankError as error:
        if ranker.on_error != "skip":
            raise
        return [hits_.unranked(pool[:k], reason=str(error)) for pool in pools]
    return [
        hits_.reranked_by_client(pool, pool_scores)[:k]
        for pool, pool_scores in zip(pools, scores, strict=True)
    ]
