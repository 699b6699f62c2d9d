"""One retrieval, decided once, as generators that say what they need.

A flow yields steps (`Encode`, `CallMilvus`, `Rerank`, `Together`) and is sent each step's result,
or has its error thrown in. It never touches a socket: `drivers` does the steps, blocking or async.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from milvus_vllm_retrievers.core import hits as hits_
from milvus_vllm_retrievers.core import requests
from milvus_vllm_retrievers.core.collection import CollectionLayout
from milvus_vllm_retrievers.core.deadline import Deadline
from milvus_vllm_retrievers.core.hits import Hit, PrimaryKey, Ranking
from milvus_vllm_retrievers.core.milvus import Server
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
from milvus_vllm_retrievers.core.service import RerankService
from milvus_vllm_retrievers.errors import (
    ConfigurationError,
    MilvusVLLMError,
    RerankError,
    RerankTimeoutError,
    SearchError,
    SearchFailure,
)
from milvus_vllm_retrievers.ranker import Provider, VLLMRanker

T = TypeVar("T")

# What a search with a ranker may use of the time left where a fallback is to follow: one that
# searches and reranks takes longer than one that only searches.
_SHARE_BEFORE_FALLBACK = {"client": 0.5, "skip": 0.75}

Scores = list[float | None]
"""One score per text of a pool; None for a text that is null or empty."""


@dataclass(frozen=True, slots=True)
class Encode:
    """Turn queries into vectors."""

    encoder: Encoder
    queries: Sequence[Query]
    deadline: Deadline


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
    """Do several steps at once, at most `limit` in flight.

    The first error ends them all, unless `errors_apart`: then a step's error of this package
    takes the place of its result.
    """

    steps: Sequence[Rerank | CallMilvus]
    limit: int
    errors_apart: bool = False


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
        metadata_field: The JSON field whose keys count as fields of a row, if there is one.
    """

    settings: TargetSettings
    layout: CollectionLayout
    server: Server
    text_field: str
    output_fields: tuple[str, ...]
    expr: str | None
    metadata_field: str | None = None


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
        metadata_field=layout.metadata_field(text_field),
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
    service: RerankService | None,
    queries: Sequence[Query],
    options: SearchOptions,
    deadline: Deadline,
) -> Flow[list[list[Hit]]]:
    """Retrieve `k` hits for each query: search, rerank, fall back where that was asked for."""
    in_milvus = service is not None and reranks_in_milvus(service.ranker, target.server)
    if in_milvus:
        _provider(target.server, "mode='server'")
    search = yield from _prepared(target, queries, options, deadline)
    if service is None:
        return (yield from search.plain(options.k))
    if in_milvus:
        found = yield from _reranked_by_milvus(search, service)
    else:
        pools = yield from search.candidates()
        found = yield from _reranked_by_client(search, service, pools)
    return [hits_.above(hits, options.score_threshold) for hits in found]


def candidates(
    target: Target, queries: Sequence[Query], options: SearchOptions, deadline: Deadline
) -> Flow[list[list[Hit]]]:
    """Retrieve what would be reranked, in retrieval order."""
    search = yield from _prepared(target, queries, options, deadline)
    return (yield from search.candidates())


def rerank_texts(
    ranker: VLLMRanker,
    pools: Sequence[tuple[str, Sequence[str | None]]],
    deadline: Deadline,
    *,
    errors_apart: bool = False,
) -> Flow[list[Scores | MilvusVLLMError]]:
    """Score each query's texts in requests of `max_client_batch_size`, several at once.

    Texts that are null or empty are not sent: some models refuse them, and their whole request.

    Args:
        ranker: The model, the size of a request and how many may be in flight.
        pools: Query text and candidate texts, for each query.
        deadline: When all must be done.
        errors_apart: Whether a query's error takes the place of its scores.

    Returns:
        For each query one score per text, in the texts' order.
    """
    steps: list[Rerank] = []
    owners: list[tuple[int, list[int]]] = []  # for each step, its pool and its texts' places
    for owner, (query, texts) in enumerate(pools):
        filled = {i: text for i, text in enumerate(texts) if text and hits_.has_text(text)}
        size = ranker.max_client_batch_size or max(len(filled), 1)
        places = list(filled)
        for start in range(0, len(places), size):
            part = places[start : start + size]
            steps.append(Rerank(query, [filled[i] for i in part], deadline))
            owners.append((owner, part))
    results = (yield Together(steps, ranker.max_concurrency, errors_apart)) if steps else []
    scores: list[Scores | MilvusVLLMError] = [[None] * len(texts) for _, texts in pools]
    for (owner, part), result in zip(owners, results, strict=True):
        own = scores[owner]
        if isinstance(result, MilvusVLLMError):
            scores[owner] = result
        elif not isinstance(own, MilvusVLLMError):
            for i, score in zip(part, result, strict=True):
                own[i] = score
    return scores


def rank_texts(
    service: RerankService, query: Query, texts: Sequence[str], deadline: Deadline
) -> Flow[list[Ranking]]:
    """Rank given texts; with `on_error="skip"` a failure keeps their order, marked."""
    scores = (yield from _scores_from_here(service, [(query.text, texts)], deadline))[0]
    if isinstance(scores, MilvusVLLMError):
        return hits_.as_given(range(len(texts)), str(scores))
    return hits_.ranked_by_client(scores)


def _scores_from_here(
    service: RerankService,
    pools: Sequence[tuple[str, Sequence[str | None]]],
    deadline: Deadline,
) -> Flow[list[Scores | MilvusVLLMError]]:
    """Score pools; with `on_error="skip"` an error takes the place of a pool's scores."""
    may_fail = service.ranker.on_error == "skip"
    rest = service.from_here.rest() if may_fail else None
    if rest is not None:
        return [rest] * len(pools)
    scored = yield from rerank_texts(service.ranker, pools, deadline, errors_apart=may_fail)
    for (_, texts), scores in zip(pools, scored, strict=True):
        if not isinstance(scores, MilvusVLLMError):
            service.check_spread(texts, scores)
    if may_fail:
        service.from_here.note(scored)
    return scored


def rank_rows(
    target: Target,
    service: RerankService,
    query: Query,
    items: Sequence[Item],
    options: SearchOptions,
    deadline: Deadline,
    on_missing: OnMissing,
) -> Flow[list[Ranking]]:
    """Have Milvus rank items by their primary keys.

    Args:
        target: The collection.
        service: The model.
        query: The question.
        items: What to rank.
        options: Partitions, consistency level and search parameters.
        deadline: When it must be done.
        on_missing: What to do with items that have no row: raise, or keep them last, marked.
    """
    keys = [target.layout.keys_of(item) for item in items]
    on_error = service.ranker.on_error
    try:
        rest = service.in_milvus.rest() if on_error != "raise" else None
        if rest is not None:
            raise rest
        limit = deadline.share(_SHARE_BEFORE_FALLBACK.get(on_error, 1.0))
        scores = yield from _scores_by_key(target, service.ranker, query, keys, options, limit)
    except (RerankError, SearchError) as error:
        if on_error == "raise":
            raise
        service.in_milvus.failed(error)
        if on_error == "client":
            texts = [item.text for item in items]
            return (yield from rank_texts(service, query, texts, deadline))
        return hits_.as_given(range(len(items)), str(error))
    service.in_milvus.succeeded()
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
    keys: Sequence[Sequence[PrimaryKey]],
    options: SearchOptions,
    deadline: Deadline,
) -> Flow[dict[PrimaryKey, float]]:
    """Have the rows scored that have one of each item's keys."""
    layout = target.layout
    asked = list(dict.fromkeys(key for may_be in keys for key in may_be))
    if len(asked) > MAX_LIMIT:
        raise ConfigurationError(f"at most {MAX_LIMIT:,} items can be reranked at once")
    if not asked:
        return {}
    function = ranker.to_function(
        query.text, target.text_field, provider=_provider(target.server, "MilvusVLLMRerank")
    )
    try:
        call = requests.rows_call(layout, asked, options, function)
        rows = (yield from _call(target, call, deadline))[0]
    except SearchError as error:
        raise _meant_in_reranking(error) from error.__cause__
    hits = hits_.read_hits(rows, layout.primary_key, target.text_field)
    scores = {hit.pk: hit.retrieval_score or 0.0 for hit in hits}
    lost = [key for may_be in keys if not scores.keys() & set(may_be) for key in may_be]
    if lost:
        yield from _check_gone(target, lost, options, deadline)
    return scores


def _check_gone(
    target: Target, keys: Sequence[PrimaryKey], options: SearchOptions, deadline: Deadline
) -> Flow[None]:
    """Make sure that rows which a search has not returned are gone, not just not found."""
    layout = target.layout
    arguments = requests.lookup_arguments(layout, keys, options)
    what = f"query of collection {layout.name!r}"
    rows = yield CallMilvus(what, "query", arguments, deadline)
    if rows:
        raise SearchError(
            f"the index of collection {layout.name!r} did not return {len(rows)} rows that are "
            f"there, the first has key {rows[0][layout.primary_key]!r}: it is approximate. Pass "
            "search_params that have it look everywhere, or use VLLMRerank"
        )


def _prepared(
    target: Target, queries: Sequence[Query], options: SearchOptions, deadline: Deadline
) -> Flow[_Search]:
    if options.expr_params and target.server.is_lite:
        raise ConfigurationError(
            "Milvus Lite takes no filter templates (expr_params): write the values into expr, "
            "such as 'tenant == \"a\"'"
        )
    requests.check_search_params(options.search_params, target.layout)
    legs = yield from _legs(target, queries, deadline)
    return _Search(target, queries, legs, options.narrowed(expr=target.expr), deadline)


def _legs(target: Target, queries: Sequence[Query], deadline: Deadline) -> Flow[list[Leg]]:
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
                vectors = yield Encode(encoder, queries, deadline)
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
    queries: Sequence[Query]
    legs: Sequence[Leg]
    options: SearchOptions
    deadline: Deadline

    def of(self, places: Sequence[int]) -> _Search:
        """Return the same for some of the queries."""
        legs = [Leg(leg.field, [leg.data[i] for i in places]) for leg in self.legs]
        return replace(self, queries=[self.queries[i] for i in places], legs=legs)

    def plain(self, limit: int) -> Flow[list[list[Hit]]]:
        call = requests.plain_call(
            self.target.layout.name,
            self.legs,
            self.options,
            self.target.output_fields,
            limit=limit,
        )
        return self._hits((yield from _call(self.target, call, self.deadline)))

    def candidates(self) -> Flow[list[list[Hit]]]:
        return self.plain(requests.candidate_limit(self.legs, self.options))

    def reranked(self, ranker: VLLMRanker) -> Flow[list[list[Hit] | MilvusVLLMError]]:
        """Return each query's hits, scored by Milvus, or the error that takes their place."""
        # Milvus reranks the queries of one request one after another: several requests share them.
        size = math.ceil(len(self.queries) / ranker.max_concurrency)
        every = range(len(self.queries))
        starts = every[::size]
        parts = (
            [self]
            if len(starts) == 1
            else [self.of(every[start : start + size]) for start in starts]
        )
        answers = yield from _calls(
            self.target,
            [part.reranked_call(ranker) for part in parts],
            self.deadline.share(_SHARE_BEFORE_FALLBACK.get(ranker.on_error, 1.0)),
            ranker.max_concurrency,
        )
        found: list[list[Hit] | MilvusVLLMError] = []
        for part, answer in zip(parts, answers, strict=True):
            if isinstance(answer, MilvusVLLMError):
                found += [_meant_in_reranking(answer)] * len(part.queries)
            else:
                found += self._hits(answer)
        return found

    def reranked_call(self, ranker: VLLMRanker) -> SearchCall:
        server = self.target.server
        function = ranker.to_function(
            [query.text for query in self.queries],
            self.target.text_field,
            provider=_provider(server, "mode='server'"),
        )
        return requests.reranked_call(
            self.target.layout.name,
            self.legs,
            self.options,
            self.target.output_fields,
            function=function,
            search_reranks_exactly=not server.is_lite,
        )

    def _hits(self, answer: Sequence[Any]) -> list[list[Hit]]:
        target = self.target
        return [
            hits_.read_hits(
                rows, target.layout.primary_key, target.text_field, target.metadata_field
            )
            for rows in answer
        ]


def _reranked_by_milvus(search: _Search, service: RerankService) -> Flow[list[list[Hit]]]:
    falls_back = service.ranker.on_error != "raise"
    rest = service.in_milvus.rest() if falls_back else None
    found: list[list[Hit] | MilvusVLLMError]
    found = [rest] * len(search.queries) if rest else (yield from search.reranked(service.ranker))
    errors = {i: hits for i, hits in enumerate(found) if isinstance(hits, MilvusVLLMError)}
    if errors and not falls_back:
        raise next(iter(errors.values()))
    ranked = {
        i: _ranked_by_milvus(service, hits)
        for i, hits in enumerate(found)
        if not isinstance(hits, MilvusVLLMError)
    }
    if errors:
        fallen = yield from _fall_back(search.of(list(errors)), service, list(errors.values()))
        ranked.update(zip(errors, fallen, strict=True))
    else:
        service.in_milvus.succeeded()
    return [ranked[i] for i in range(len(found))]


def _ranked_by_milvus(service: RerankService, hits: Sequence[Hit]) -> list[Hit]:
    ranked = hits_.reranked_by_milvus(hits)
    service.check_spread([hit.text for hit in ranked], [hit.relevance_score for hit in ranked])
    return ranked


def _fall_back(
    search: _Search, service: RerankService, errors: Sequence[MilvusVLLMError]
) -> Flow[list[list[Hit]]]:
    """Do without Milvus's reranking.

    Servers word a rerank service's failure in many ways, so any failed search comes here. Where
    it was the search after all, the one that follows fails too, and says so.
    """
    from_here = service.ranker.on_error == "client"
    found = yield from (search.candidates() if from_here else search.plain(search.options.k))
    service.in_milvus.failed(errors[0])
    if from_here:
        return (yield from _reranked_by_client(search, service, found))
    return [
        hits_.unranked(hits, reason=str(error)) for hits, error in zip(found, errors, strict=True)
    ]


def _reranked_by_client(
    search: _Search, service: RerankService, pools: Sequence[Sequence[Hit]]
) -> Flow[list[list[Hit]]]:
    k = search.options.k
    texts = [[hit.text for hit in pool] for pool in pools]
    asked = [(query.text, pool) for query, pool in zip(search.queries, texts, strict=True)]
    scored = yield from _scores_from_here(service, asked, search.deadline)
    return [
        hits_.unranked(pool[:k], reason=str(scores))
        if isinstance(scores, MilvusVLLMError)
        else hits_.reranked_by_client(pool, scores)[:k]
        for pool, scores in zip(pools, scored, strict=True)
    ]


def _call(target: Target, call: SearchCall, deadline: Deadline) -> Flow[Any]:
    """Search once, and return the rows of every query."""
    answer = (yield from _calls(target, [call], deadline))[0]
    if isinstance(answer, MilvusVLLMError):
        raise answer
    return answer


def _calls(
    target: Target, calls: Sequence[SearchCall], deadline: Deadline, limit: int = 1
) -> Flow[list[Any]]:
    """Search, at most `limit` calls at once; return each one's rows, or its error in their place.

    A collection that turns out to be released is loaded first.
    """
    name = target.layout.name
    steps = [
        CallMilvus(f"{call.method} of collection {name!r}", call.method, call.arguments, deadline)
        for call in calls
    ]
    answers = yield from _all(steps, limit)
    released = [i for i, answer in enumerate(answers) if _failed_as(answer, "not_loaded")]
    if released:
        yield CallMilvus(
            f"loading collection {name!r}", "load_collection", {"collection_name": name}, deadline
        )
        again = yield from _all([steps[i] for i in released], limit)
        for i, answer in zip(released, again, strict=True):
            answers[i] = answer
    return answers


def _all(steps: Sequence[CallMilvus], limit: int) -> Flow[list[Any]]:
    if len(steps) > 1:
        return list((yield Together(steps, limit, errors_apart=True)))
    try:
        return [(yield steps[0])]
    except MilvusVLLMError as error:
        return [error]


def _failed_as(answer: Any, reason: SearchFailure) -> bool:
    return isinstance(answer, SearchError) and answer.reason == reason


def _meant_in_reranking(error: MilvusVLLMError) -> MilvusVLLMError:
    """Return what a failed search with a rerank Function means: a server's time limit is its."""
    if not _failed_as(error, "rerank_timeout"):
        return error
    late = RerankTimeoutError(f"reranking inside Milvus took too long: {error}")
    late.__cause__ = error
    return late
