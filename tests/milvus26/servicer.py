"""Milvus Lite's gRPC service with the model reranker of Milvus 2.6."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from milvus_lite.adapter.grpc.errors import success_status_kwargs, to_status_kwargs
from milvus_lite.adapter.grpc.reranker import parse_rank_params
from milvus_lite.adapter.grpc.servicer import MilvusServicer
from milvus_lite.adapter.grpc.translators.result import build_search_result_data
from milvus_lite.adapter.grpc.translators.search import parse_search_request
from milvus_lite.exceptions import MilvusLiteError
from pymilvus.grpc_gen import common_pb2, milvus_pb2, schema_pb2

from .filters import as_milvus_reads
from .vllm_provider import (
    InvalidParameterError,
    RerankError,
    ServerConfig,
    VLLMProvider,
    provider_from,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

_LITE_RERANKERS = {"rrf", "weighted", "decay", "boost"}
_MILVUS_TYPE_NAMES = {name.upper(): name for name in schema_pb2.DataType.keys()}  # noqa: SIM118

Hit = dict[str, Any]
"""A hit of Milvus Lite: ``id``, ``distance`` and ``entity``, a dict of fields."""


class Milvus26Servicer(MilvusServicer):  # type: ignore[misc]  # Milvus Lite is untyped
    """Answers ``search`` and ``hybrid_search`` with a model ranker itself, the rest as Lite."""

    def __init__(self, db: Any, config: ServerConfig) -> None:
        super().__init__(db)
        self._config = config
        release = re.search(r"(\d+)\.(\d+)", config.version)
        numbers = (int(release[1]), int(release[2])) if release else (3, 0)
        self._knows_rankers = numbers >= (2, 6)
        self._takes_nulls = numbers >= (3, 0)

    def GetVersion(self, request: Any, context: Any) -> Any:  # noqa: N802
        answer = super().GetVersion(request, context)
        answer.version = self._config.version
        return answer

    def Connect(self, request: Any, context: Any) -> Any:  # noqa: N802
        answer = super().Connect(request, context)
        answer.server_info.build_tags = self._config.version
        return answer

    def Query(self, request: Any, context: Any) -> Any:  # noqa: N802
        request.expr = as_milvus_reads(request.expr)
        return super().Query(request, context)

    def Search(self, request: Any, context: Any) -> Any:  # noqa: N802
        request.dsl = as_milvus_reads(request.dsl)
        if self._wants_model_ranker(request):
            return self._reranked(request, context)
        answer = super().Search(request, context)
        if answer.results.scores and self._is_bm25(request, context):
            answer.results.scores[:] = [abs(score) for score in answer.results.scores]
        return answer

    def HybridSearch(self, request: Any, context: Any) -> Any:  # noqa: N802
        for leg in request.requests:
            leg.dsl = as_milvus_reads(leg.dsl)
        if self._wants_model_ranker(request):
            return self._reranked(request, context)
        return super().HybridSearch(request, context)

    def _wants_model_ranker(self, request: Any) -> bool:
        """Whether to rerank here. On an old server, drops the ranker as a field unknown to it."""
        if not self._knows_rankers:
            request.ClearField("function_score")
        functions = request.function_score.functions
        return any(_reranker_name(function) not in _LITE_RERANKERS for function in functions)

    def _is_bm25(self, request: Any, context: Any) -> bool:
        search = parse_search_request(request)
        collection = self._get_collection(request, context)
        metric = collection.resolve_search_metric(search["anns_field"], search["metric_type"])
        return bool(metric == "BM25")

    def _reranked(self, request: Any, context: Any) -> Any:
        try:
            return self._rerank(request, context)
        except RerankError as error:
            status = {"error_code": 1, "code": error.code, "reason": str(error)}
        except (MilvusLiteError, ValueError, TypeError) as error:
            status = to_status_kwargs(error)
        return milvus_pb2.SearchResults(status=common_pb2.Status(**status))

    def _rerank(self, request: Any, context: Any) -> Any:
        collection = self._get_collection(request, context)
        ranker = _ranker_from(
            request.function_score, collection.schema, self._config, takes_nulls=self._takes_nulls
        )
        page = _page_of(request)
        output_fields = list(request.output_fields)
        legs = [
            collection.search(
                query_vectors=leg["query_vectors"],
                top_k=leg["top_k"],
                metric_type=leg["metric_type"],
                partition_names=leg["partition_names"] or list(request.partition_names) or None,
                expr=leg["expr"],
                output_fields=[*output_fields, ranker.input_field],
                anns_field=leg["anns_field"],
                radius=leg["radius"],
                range_filter=leg["range_filter"],
                search_params=leg["search_params"],
            )
            for leg in page.legs
        ]
        hits = ranker.rerank([_union(pools) for pools in zip(*legs, strict=True)])
        data = build_search_result_data(
            results=[ranked[page.offset : page.offset + page.limit] for ranked in hits],
            schema=collection.schema,
            top_k=page.limit,
            pk_name=_primary_key_of(collection.schema),
            output_fields=output_fields or None,
        )
        return milvus_pb2.SearchResults(
            status=common_pb2.Status(**success_status_kwargs()),
            results=data,
            collection_name=collection.name,
        )


@dataclass(frozen=True)
class _Page:
    """The part of the ranking to answer with, and the searches that find the candidates.

    A leg of a hybrid search has an offset too: Milvus ignores it, and pymilvus fills it in.
    """

    limit: int
    offset: int
    legs: list[dict[str, Any]]


def _page_of(request: Any) -> _Page:
    if isinstance(request, milvus_pb2.HybridSearchRequest):
        legs = [parse_search_request(leg) for leg in request.requests]
        final = parse_rank_params(request.rank_params)
        if len({len(leg["query_vectors"]) for leg in legs}) > 1:
            raise InvalidParameterError("sub search request nq should be the same")
        page = _Page(final["limit"], final["offset"], legs)
    else:
        final = leg = parse_search_request(request)
        limit, offset = leg["top_k"], leg["offset"]
        page = _Page(limit, offset, [{**leg, "top_k": limit + offset}])
    if final["group_by_field"] is not None:
        raise InvalidParameterError("current rerank does not support grouping search")
    return page


def _union(pools: Sequence[Sequence[Hit]]) -> list[Hit]:
    """The hits of all legs for one query, each primary key once."""
    candidates: dict[Any, Hit] = {}
    for pool in pools:
        for hit in pool:
            candidates.setdefault(hit["id"], hit)
    return list(candidates.values())


@dataclass(frozen=True)
class _ModelRanker:
    input_field: str
    is_primary_key: bool
    queries: list[str]
    provider: VLLMProvider

    def rerank(self, candidates: Sequence[Sequence[Hit]]) -> list[list[Hit]]:
        """Best first for every query; the score replaces the distance."""
        if len(self.queries) != len(candidates):
            raise RerankError(
                f"model: queries count ({len(self.queries)}) != nq count ({len(candidates)})"
            )
        return [
            self._rerank_one(query, hits)
            for query, hits in zip(self.queries, candidates, strict=True)
        ]

    def _rerank_one(self, query: str, hits: Sequence[Hit]) -> list[Hit]:
        scores = self.provider.score(query, [self._text_of(hit) for hit in hits])
        scored = [{**hit, "distance": score} for hit, score in zip(hits, scores, strict=True)]
        return sorted(scored, key=lambda hit: (-hit["distance"], hit["id"]))

    def _text_of(self, hit: Hit) -> str:
        text = hit["id"] if self.is_primary_key else hit["entity"].get(self.input_field)
        return "" if text is None else str(text)


def _ranker_from(
    function_score: Any, schema: Any, config: ServerConfig, *, takes_nulls: bool
) -> _ModelRanker:
    """Checks in the order of Milvus: name, input field, queries, provider."""
    if len(function_score.functions) > 1:
        raise InvalidParameterError("currently only supports one rerank function")
    function = function_score.functions[0]
    name = _reranker_name(function)
    if not name:
        raise InvalidParameterError("reranker name not specified")
    if name != "model":
        raise InvalidParameterError(f"unsupported reranker {name}")
    input_field = _input_field_of(function, schema)
    if not takes_nulls and any(f.nullable for f in schema.fields if f.name == input_field):
        raise InvalidParameterError("function input field cannot be nullable")
    params = {param.key: param.value for param in function.params}
    return _ModelRanker(
        input_field=input_field,
        is_primary_key=input_field == _primary_key_of(schema),
        queries=_queries_of(params),
        provider=provider_from(params, config),
    )


def _reranker_name(function: Any) -> str:
    params = {param.key.lower(): param.value for param in function.params}
    return str(params.get("reranker", "")).lower()


def _input_field_of(function: Any, schema: Any) -> str:
    names = list(function.input_field_names)
    if len(names) != 1:
        raise InvalidParameterError(
            f"model reranker requires exactly 1 input field, got {len(names)}"
        )
    types = {field.name: field.dtype.name for field in schema.fields}
    if names[0] not in types:
        raise InvalidParameterError(f"input field {names[0]} not found in collection schema")
    if types[names[0]] != "VARCHAR":
        got = _MILVUS_TYPE_NAMES[types[names[0]].replace("_", "")]
        raise InvalidParameterError(f"model input field {names[0]} must be VarChar, got {got}")
    return str(names[0])


def _queries_of(params: dict[str, str]) -> list[str]:
    if "queries" not in params:
        raise InvalidParameterError("rerank function missing required param: queries")
    try:
        queries = json.loads(params["queries"])
    except ValueError as error:
        raise InvalidParameterError(f"parse rerank params [queries] failed: {error}") from error
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise InvalidParameterError(
            "parse rerank params [queries] failed: not a JSON array of strings"
        )
    if not queries:
        raise InvalidParameterError("rerank queries must not be empty")
    return queries


def _primary_key_of(schema: Any) -> str:
    return next(str(field.name) for field in schema.fields if field.is_primary)
