"""One retrieval, decided once, as a flow: search, rerank, fall back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from milvus_vllm_retrievers._core import hits as hits_
from milvus_vllm_retrievers._core import requests
from milvus_vllm_retrievers._core.cool_down import RerankService
from milvus_vllm_retrievers._core.deadline import Deadline
from milvus_vllm_retrievers._core.hits import Hit
from milvus_vllm_retrievers._core.layout import VectorField
from milvus_vllm_retrievers._core.milvus_calls import (
    before_fallback,
    call_all,
    call_once,
    meant_in_reranking,
    provider_of,
)
from milvus_vllm_retrievers._core.query import Encoder, Query, SearchOptions
from milvus_vllm_retrievers._core.requests import Leg, SearchCall
from milvus_vllm_retrievers._core.rerank_texts import scores_from_here
from milvus_vllm_retrievers._core.server import Server
from milvus_vllm_retrievers._core.steps import Encode, Flow
from milvus_vllm_retrievers._core.target import Target
from milvus_vllm_retrievers.errors import ConfigurationError, MilvusVLLMError
from milvus_vllm_retrievers.ranker import VLLMRanker


def reranks_in_milvus(ranker: VLLMRanker, server: Server) -> bool:
    """Decide who reranks: Milvus (True) or this process (False)."""
    if ranker.mode == "auto":
        return server.known and server.provider == "vllm" and not ranker.client_only_reasons
    return ranker.mode == "server"


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
        provider_of(target.server, "mode='server'")
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
    embeddings = [query.embedding for query in queries if query.embedding is not None]
    searched = target.searched_fields(embedded=len(embeddings) == len(queries))
    encoded: dict[tuple[int, bool], Sequence[Any]] = {}
    legs = []
    for vector, encoder in searched:
        if vector.takes_text:
            legs.append(Leg(vector, [query.text for query in queries]))
        elif encoder is None:
            legs.append(requests.make_leg(vector, embeddings))
        else:
            kind = id(encoder), vector.is_dense
            if kind not in encoded:
                encoded[kind] = yield from _encoded(vector, encoder, queries, deadline)
            legs.append(requests.make_leg(vector, encoded[kind]))
    return legs


def _encoded(
    vector: VectorField, encoder: Encoder, queries: Sequence[Query], deadline: Deadline
) -> Flow[list[Any]]:
    """Return each query's vector: its own dense one where it brings one, else the encoder's."""
    asked = [query for query in queries if query.embedding is None or not vector.is_dense]
    vectors = yield Encode(encoder, asked, deadline)
    if len(vectors) != len(asked):
        raise ConfigurationError(
            f"the encoder of field {vector.name!r} made {len(vectors)} vectors for "
            f"{len(asked)} queries"
        )
    made = iter(vectors)
    return [
        query.embedding if query.embedding is not None and vector.is_dense else next(made)
        for query in queries
    ]


class _Search(NamedTuple):
    """The searches one retrieval may need, over the same legs."""

    target: Target
    queries: Sequence[Query]
    legs: Sequence[Leg]
    options: SearchOptions
    deadline: Deadline

    def of(self, places: Sequence[int]) -> _Search:
        """Return the same for some of the queries."""
        legs = [Leg(leg.field, [leg.data[i] for i in places]) for leg in self.legs]
        return self._replace(queries=[self.queries[i] for i in places], legs=legs)

    def shares(self, most: int) -> list[_Search]:
        """Share the queries out to so many requests: Milvus reranks those of one in turn."""
        size = math.ceil(len(self.queries) / most)
        every = range(len(self.queries))
        if size >= len(every):
            return [self]
        return [self.of(every[start : start + size]) for start in every[::size]]

    def plain(self, limit: int) -> Flow[list[list[Hit]]]:
        call = requests.plain_call(
            self.target.layout.name,
            self.legs,
            self.options,
            self.target.output_fields,
            limit=limit,
        )
        answer = yield from call_once(self.target, call, self.deadline)
        return [self.target.rows.retrieved(rows) for rows in answer]

    @property
    def pool(self) -> int:
        """How many candidates there can be for a query."""
        return requests.candidate_limit(self.legs, self.options)

    def candidates(self) -> Flow[list[list[Hit]]]:
        return self.plain(self.pool)

    def reranked(self, ranker: VLLMRanker, limit: int) -> Flow[list[list[Hit] | MilvusVLLMError]]:
        """Return each query's hits, scored by Milvus, or the error that takes their place."""
        parts = self.shares(ranker.max_concurrency)
        answers = yield from call_all(
            self.target,
            [part.reranked_call(ranker, limit) for part in parts],
            before_fallback(self.deadline, ranker.on_error),
            ranker.max_concurrency,
        )
        found: list[list[Hit] | MilvusVLLMError] = []
        for part, answer in zip(parts, answers, strict=True):
            if isinstance(answer, MilvusVLLMError):
                found += [meant_in_reranking(answer)] * len(part.queries)
            else:
                found += [self.target.rows.reranked(rows) for rows in answer]
        return found

    def reranked_call(self, ranker: VLLMRanker, limit: int) -> SearchCall:
        server = self.target.server
        function = ranker.to_function(
            [query.text for query in self.queries],
            self.target.text_field,
            provider=provider_of(server, "mode='server'"),
        )
        return requests.reranked_call(
            self.target.layout.name,
            self.legs,
            self.options,
            self.target.output_fields,
            function=function,
            limit=limit,
            search_reranks_exactly=not server.is_lite,
        )


def _reranked_by_milvus(search: _Search, service: RerankService) -> Flow[list[list[Hit]]]:
    falls_back = service.ranker.on_error != "raise"
    rest = service.in_milvus.rest() if falls_back else None
    found: list[list[Hit] | MilvusVLLMError]
    if rest:
        found = [rest] * len(search.queries)
    else:
        found = yield from _all_with_texts(search, service.ranker)
    ranked = [hits for hits in found if not isinstance(hits, MilvusVLLMError)]
    for hits in ranked:
        service.check_spread((hit.text for hit in hits), [hit.relevance_score for hit in hits])
    worked = any(ranked)
    if len(ranked) == len(found):
        service.in_milvus.note([], worked=worked)
        return ranked
    errors = {i: hits for i, hits in enumerate(found) if isinstance(hits, MilvusVLLMError)}
    if not falls_back:
        raise next(iter(errors.values()))
    fallen = yield from _fall_back(
        search.of(list(errors)), service, list(errors.values()), worked=worked
    )
    instead = dict(zip(errors, fallen, strict=True))
    return [
        instead[i] if isinstance(hits, MilvusVLLMError) else hits for i, hits in enumerate(found)
    ]


def _all_with_texts(search: _Search, ranker: VLLMRanker) -> Flow[list[list[Hit] | MilvusVLLMError]]:
    """Have Milvus rerank, and see to it that a row without a text takes no other row's place.

    Milvus scores it like any other and cuts to `k` then. Where one is among the `k`, all
    candidates are asked for, and the cut is made here.
    """
    k = search.options.k
    found = yield from search.reranked(ranker, k)
    short = [
        i
        for i, hits in enumerate(found)
        if not isinstance(hits, MilvusVLLMError) and len(hits) == k < search.pool
        # Unscored rows come last.
        if hits[-1].relevance_score is None
    ]
    if not short:
        return found
    again = yield from search.of(short).reranked(ranker, search.pool)
    replaced = dict(zip(short, again, strict=True))
    everything = [replaced.get(i, hits) for i, hits in enumerate(found)]
    return [hits if isinstance(hits, MilvusVLLMError) else hits[:k] for hits in everything]


def _fall_back(
    search: _Search, service: RerankService, errors: Sequence[MilvusVLLMError], *, worked: bool
) -> Flow[list[list[Hit]]]:
    """Do without Milvus's reranking.

    Servers word a rerank service's failure in many ways, so any failed search comes here. Where
    it was the search after all, the one that follows fails too, and says so.
    """
    from_here = service.ranker.on_error == "client"
    found = yield from (search.candidates() if from_here else search.plain(search.options.k))
    service.in_milvus.note(errors, worked=worked)
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
    scored = yield from scores_from_here(service, asked, search.deadline)
    return [
        hits_.unranked(pool[:k], reason=str(scores))
        if isinstance(scores, MilvusVLLMError)
        else hits_.reranked_by_client(pool, scores, k)
        for pool, scores in zip(pools, scored, strict=True)
    ]
