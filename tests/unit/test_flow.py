"""Flows driven by hand: which steps they ask for, and what they make of the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from pymilvus import Function, RRFRanker

from milvus_vllm_retrievers import (
    ConfigurationError,
    RerankConnectionError,
    RerankError,
    SearchError,
    VLLMRanker,
)
from milvus_vllm_retrievers._core.cool_down import FAILURES_BEFORE_REST, RerankService
from milvus_vllm_retrievers._core.deadline import Deadline
from milvus_vllm_retrievers._core.hits import NO_TEXT, Hit, Ranking, RowReader, as_given
from milvus_vllm_retrievers._core.query import Encoder, Encoders, Item, Query, SearchOptions
from milvus_vllm_retrievers._core.rerank_rows import rank_rows
from milvus_vllm_retrievers._core.rerank_texts import rank_texts, rerank_texts
from milvus_vllm_retrievers._core.retrieve import candidates, reranks_in_milvus, retrieve
from milvus_vllm_retrievers._core.server import Server
from milvus_vllm_retrievers._core.steps import CallMilvus, Encode, Flow, Rerank, Together
from milvus_vllm_retrievers._core.target import Target, TargetSettings, find_target
from tests.unit.builders import (
    DENSE,
    FROM_TEXT,
    KEY,
    SPARSE,
    TEXT,
    description,
    layout,
)

URL = "http://vllm"
DEADLINE = Deadline(at=1e12)
DOWN = RerankConnectionError("vLLM is down")
RELEASED = SearchError("search failed: collection not loaded[collection=docs]", reason="not_loaded")
QUESTION = Query("a question")


async def _aencode(queries: Sequence[Query]) -> list[list[float]]:
    raise NotImplementedError


ENCODER = Encoder(lambda queries: [], _aencode)


def target(
    server: str = "2.6.4",
    fields: Sequence[str] = ("sparse",),
    encoders: Encoders = Encoders(dense=ENCODER),  # noqa: B008 - frozen
    expr: str | None = None,
) -> Target:
    """The collection docs: `pk`, the text `document`, two dense fields and a BM25 field."""
    return Target(
        settings=TargetSettings(collection_name="docs", vector_field=fields, encoders=encoders),
        layout=layout(
            KEY, TEXT, DENSE, {**DENSE, "name": "dense_2"}, SPARSE, functions=[FROM_TEXT]
        ),
        server=Server.from_version(server),
        text_field="document",
        output_fields=("pk", "document"),
        expr=expr,
        rows=RowReader("pk", "document"),
    )


def start(
    ranker: VLLMRanker | None,
    *queries: Query,
    on: Target | None = None,
    **options: Any,
) -> Flow[list[list[Hit]]]:
    return retrieve(
        on or target(),
        ranker and RerankService.of(ranker),
        queries or (QUESTION,),
        SearchOptions(**options),
        DEADLINE,
    )


def rows(*triples: tuple[int, str | None, float]) -> list[Mapping[str, Any]]:
    """One query's answer: key, text and score of each hit."""
    return [
        {"pk": pk, "distance": score, "entity": {"pk": pk, "document": text}}
        for pk, text, score in triples
    ]


FOUND = rows((1, "one", 0.9), (2, "two", 0.8), (3, "three", 0.7))


def finish(flow: Flow[Any], answer: Any) -> Any:
    """Send the answer of the last step and return the flow's result."""
    with pytest.raises(StopIteration) as end:
        flow.send(answer)
    return end.value.value


def keys(found: list[list[Hit]]) -> list[list[int | str]]:
    return [[hit.pk for hit in hits] for hits in found]


# The target


def test_a_target_is_read_from_the_collection_and_the_server() -> None:
    settings = TargetSettings(
        collection_name="docs", where=lambda layout: f"{layout.primary_key} > 0"
    )
    flow = find_target(settings, DEADLINE)

    asked = next(flow)
    assert asked == CallMilvus(
        "description of collection 'docs'",
        "describe_collection",
        {"collection_name": "docs"},
        DEADLINE,
    )
    asked = flow.send(description())
    assert asked == CallMilvus("version of the Milvus server", "get_server_version", {}, DEADLINE)
    found = finish(flow, "v2.6.4-dev")

    assert found == Target(
        settings,
        layout(),
        Server("v2.6.4-dev", known=True, provider="vllm"),
        "document",
        ("pk", "document"),
        "pk > 0",
        RowReader("pk", "document"),
    )


def test_a_text_field_that_does_not_exist_is_refused_before_the_version_is_asked_for() -> None:
    flow = find_target(TargetSettings(collection_name="docs", text_field="txt"), DEADLINE)
    next(flow)

    with pytest.raises(ConfigurationError, match="no field 'txt'"):
        flow.send(description())


# Who reranks


@pytest.mark.parametrize(
    ("mode", "version", "in_milvus"),
    [
        ("auto", "2.6.4", True),
        ("auto", "3.0.0", True),
        ("auto", "2.5.14", False),
        ("auto", "milvus_lite-3.2.2", False),
        ("auto", "no version", False),
        ("server", "2.6.4", True),
        ("server", "milvus_lite-3.2.2", True),
        ("server", "no version", True),
        ("client", "2.6.4", False),
        ("client", "2.5.14", False),
    ],
)
def test_mode_and_version_decide_who_reranks(mode: Any, version: str, in_milvus: bool) -> None:
    ranker = VLLMRanker(URL, mode=mode)

    assert reranks_in_milvus(ranker, Server.from_version(version)) is in_milvus


def test_auto_reranks_from_here_what_milvus_would_drop() -> None:
    ranker = VLLMRanker(URL, instruction="find code")

    assert not reranks_in_milvus(ranker, Server.from_version("2.6.4"))


@pytest.mark.parametrize("version", ["2.5.14", "v2.3.5-lite", "milvus_lite-2.5.1"])
def test_a_server_that_would_ignore_the_ranker_is_not_searched(version: str) -> None:
    flow = start(VLLMRanker(URL, mode="server"), on=target(version))

    with pytest.raises(ConfigurationError, match=r"mode='server' needs .* in silence"):
        next(flow)


def test_filter_templates_are_refused_on_milvus_lite_before_anything_is_done() -> None:
    flow = start(None, on=target("milvus_lite-3.2.2"), expr="a == {x}", expr_params={"x": 1})

    with pytest.raises(ConfigurationError, match="takes no filter templates"):
        next(flow)


# Query vectors


def test_one_encoder_is_used_once_for_all_its_fields() -> None:
    queries = [Query("first"), Query("second")]
    flow = start(None, *queries, on=target(fields=["dense", "sparse", "dense_2"]))

    assert next(flow) == Encode(ENCODER, list(queries), DEADLINE)
    search = flow.send([[0.0, 1.0], [1.0, 0.0]])

    assert [(r.anns_field, r.data) for r in search.arguments["reqs"]] == [
        ("dense", [[0.0, 1.0], [1.0, 0.0]]),
        ("sparse", ["first", "second"]),
        ("dense_2", [[0.0, 1.0], [1.0, 0.0]]),
    ]


def test_each_encoder_of_its_own_field_is_used() -> None:
    other = Encoder(lambda queries: [], _aencode)
    encoders = Encoders(dense=ENCODER, by_field={"dense_2": other})
    flow = start(None, on=target(fields=["dense", "dense_2"], encoders=encoders))

    assert next(flow) == Encode(ENCODER, [QUESTION], DEADLINE)
    assert flow.send([[0.0, 1.0]]) == Encode(other, [QUESTION], DEADLINE)


def test_queries_that_bring_their_vector_are_not_encoded() -> None:
    queries = [Query("first", embedding=[0.0, 1.0]), Query("second", embedding=[1.0, 0.0])]
    flow = start(None, *queries, on=target(fields=["dense", "sparse"]))

    search = next(flow)

    assert [r.data for r in search.arguments["reqs"]] == [
        [[0.0, 1.0], [1.0, 0.0]],
        ["first", "second"],
    ]


def test_only_queries_without_a_vector_of_their_own_are_encoded() -> None:
    queries = Query("first", embedding=[0.0, 1.0]), Query("second"), Query("third")
    flow = start(None, *queries, on=target(fields=["dense"]))

    assert next(flow) == Encode(ENCODER, list(queries[1:]), DEADLINE)
    search = flow.send([[2.0, 2.0], [3.0, 3.0]])

    assert search.arguments["data"] == [[0.0, 1.0], [2.0, 2.0], [3.0, 3.0]]


def test_the_targets_own_filter_narrows_every_search() -> None:
    flow = start(None, on=target(expr="tenant == 1"), expr="a > 1 or b > 1")

    search = next(flow)

    assert search.arguments["filter"] == "(a > 1 or b > 1) and (tenant == 1)"


# Without a ranker


def test_without_a_ranker_hits_come_in_retrieval_order_and_unscored() -> None:
    flow = start(None, k=3, score_threshold=0.85)

    search = next(flow)
    found = finish(flow, [FOUND])

    assert (search.method, search.arguments["limit"]) == ("search", 3)
    assert keys(found) == [[1, 2, 3]]
    assert {(hit.relevance_score, hit.reranked_by) for hit in found[0]} == {(None, None)}


# In Milvus


@pytest.mark.parametrize(
    ("version", "provider"), [("2.6.4", "vllm"), ("milvus_lite-3.2.2", "cohere")]
)
def test_milvus_reranks_with_a_function_bound_to_the_queries(version: str, provider: str) -> None:
    queries = [Query("first"), Query("second")]
    ranker = VLLMRanker(URL, mode="server", max_concurrency=1)
    flow = start(ranker, *queries, on=target(version), k=2, fetch_k=20)

    search = next(flow)
    found = finish(flow, [FOUND[:2], rows((9, "nine", 0.1), (7, "seven", 0.4))])

    function = search.arguments["ranker"]
    assert isinstance(function, Function)
    assert (function.params["provider"], function.params["queries"]) == (
        provider,
        ["first", "second"],
    )
    assert list(function.input_field_names) == ["document"]
    assert (search.method, search.arguments["limit"]) == ("hybrid_search", 2)
    assert [(r.data, r.limit) for r in search.arguments["reqs"]] == [(["first", "second"], 20)]
    assert keys(found) == [[1, 2], [7, 9]]
    assert found[1][0] == Hit(7, "seven", {"pk": 7}, None, 0.4, "milvus")


def test_a_plain_search_reranks_where_all_candidates_are_returned_but_on_milvus_lite() -> None:
    ranker = VLLMRanker(URL, mode="server")
    on_milvus = next(start(ranker, k=5, fetch_k=5))
    on_lite = next(start(ranker, on=target("milvus_lite-3.2.2"), k=5, fetch_k=5))

    assert (on_milvus.method, on_lite.method) == ("search", "hybrid_search")


# From here


def test_this_client_reranks_all_candidates_and_returns_the_best() -> None:
    flow = start(VLLMRanker(URL, mode="client"), k=2, fetch_k=30)

    search = next(flow)
    asked = flow.send([FOUND])
    found = finish(flow, [[0.25, 0.5, 0.5]])

    assert (search.method, search.arguments["limit"]) == ("search", 30)
    assert "ranker" not in search.arguments
    assert asked == Together([Rerank("a question", ["one", "two", "three"], DEADLINE)], 4)
    assert found == [
        [
            Hit(2, "two", {"pk": 2}, 0.8, 0.5, "client"),
            Hit(3, "three", {"pk": 3}, 0.7, 0.5, "client"),
        ]
    ]


def test_this_client_reranks_the_fused_candidates_of_several_legs() -> None:
    flow = start(VLLMRanker(URL, mode="client"), on=target(fields=["dense", "sparse"]), fetch_k=30)
    next(flow)

    search = flow.send([[0.0, 1.0]])

    assert isinstance(search.arguments["ranker"], RRFRanker)
    assert search.arguments["limit"] == 60


def test_rows_without_a_text_are_not_sent_and_come_last_unscored() -> None:
    flow = start(VLLMRanker(URL, mode="client"))
    next(flow)

    asked = flow.send([rows((3, None, 0.9), (2, " \n", 0.8), (1, "one", 0.7))])

    assert asked.steps[0].texts == ["one"]
    found = finish(flow, [[-5.0]])[0]
    assert [(hit.pk, hit.relevance_score) for hit in found] == [(1, -5.0), (2, None), (3, None)]
    assert [hit.rerank_error for hit in found] == [None, NO_TEXT, NO_TEXT]


def test_where_no_row_has_a_text_nothing_is_sent() -> None:
    flow = start(VLLMRanker(URL, mode="client"))
    next(flow)

    with pytest.raises(StopIteration) as end:
        flow.send([rows((2, None, 0.9), (1, "", 0.8))])

    assert keys(end.value.value) == [[1, 2]]


def test_a_row_without_a_text_takes_no_others_place_where_milvus_has_cut() -> None:
    flow = start(VLLMRanker(URL, max_concurrency=1), Query("a"), Query("b"), k=2, fetch_k=3)
    assert next(flow).arguments["limit"] == 2

    again = flow.send([rows((1, "", 0.9), (2, "two", 0.5)), FOUND[:2]])
    assert (again.arguments["data"], again.arguments["limit"]) == (["a"], 3)
    first, second = finish(flow, [rows((1, "", 0.9), (2, "two", 0.5), (3, "three", 0.25))])

    assert [(hit.pk, hit.relevance_score) for hit in first] == [(2, 0.5), (3, 0.25)]
    assert [hit.pk for hit in second] == [1, 2]


def test_rows_without_a_text_come_last_where_milvus_has_scored_them() -> None:
    flow = start(VLLMRanker(URL))
    next(flow)

    found = finish(flow, [rows((1, "", 0.9), (2, "two", 0.5))])[0]

    assert [(hit.pk, hit.relevance_score) for hit in found] == [(2, 0.5), (1, None)]
    assert [hit.rerank_error for hit in found] == [None, NO_TEXT]


def test_queries_are_reranked_together_each_with_its_own_candidates() -> None:
    flow = start(VLLMRanker(URL, mode="client"), Query("first"), Query("none"), Query("third"))
    next(flow)

    asked = flow.send([FOUND[:2], [], FOUND[2:]])
    found = finish(flow, [[0.25, 0.5], [0.75]])

    assert [(step.query, step.texts) for step in asked.steps] == [
        ("first", ["one", "two"]),
        ("third", ["three"]),
    ]
    assert keys(found) == [[2, 1], [], [3]]


def test_candidates_are_scored_in_batches_and_put_together_again() -> None:
    ranker = VLLMRanker(URL, max_client_batch_size=2, max_concurrency=3)
    flow = rerank_texts(ranker, [("first", list("abcde")), ("second", ["f"])], DEADLINE)

    asked = next(flow)
    scores = finish(flow, [[0.1, 0.2], [0.3, 0.4], [0.5], [0.6]])

    assert asked.limit == 3
    assert [(step.query, step.texts) for step in asked.steps] == [
        ("first", ["a", "b"]),
        ("first", ["c", "d"]),
        ("first", ["e"]),
        ("second", ["f"]),
    ]
    assert scores == [[0.1, 0.2, 0.3, 0.4, 0.5], [0.6]]


def test_nothing_found_is_nothing_to_ask_vllm() -> None:
    flow = start(VLLMRanker(URL, mode="client"))
    next(flow)

    assert finish(flow, [[]]) == [[]]


# Thresholds


def test_a_threshold_holds_for_scores_from_milvus() -> None:
    flow = start(VLLMRanker(URL, mode="server"), score_threshold=0.75)
    next(flow)

    assert keys(finish(flow, [FOUND])) == [[1, 2]]


def test_a_threshold_holds_for_scores_from_here() -> None:
    flow = start(VLLMRanker(URL, mode="client"), score_threshold=0.5)
    next(flow)
    flow.send([FOUND])

    assert keys(finish(flow, [[0.25, 0.5, 0.75]])) == [[3, 2]]


# When reranking fails


def test_a_failure_in_milvus_is_raised() -> None:
    flow = start(VLLMRanker(URL, mode="server"))
    next(flow)

    with pytest.raises(RerankConnectionError) as caught:
        flow.throw(DOWN)
    assert caught.value is DOWN


def test_a_failure_in_milvus_is_made_up_for_from_here() -> None:
    flow = start(VLLMRanker(URL, mode="server", on_error="client"), k=2, fetch_k=30)
    next(flow)

    search = flow.throw(DOWN)
    asked = flow.send([FOUND])
    found = finish(flow, [[0.25, 0.5, 0.75]])

    assert (search.method, search.arguments["limit"]) == ("search", 30)
    assert asked.steps[0].texts == ["one", "two", "three"]
    assert keys(found) == [[3, 2]]
    assert {hit.reranked_by for hit in found[0]} == {"client"}


def test_a_failure_in_milvus_may_leave_the_retrieval_order_marked() -> None:
    flow = start(VLLMRanker(URL, mode="server", on_error="skip"), k=3, score_threshold=0.99)
    next(flow)

    search = flow.throw(DOWN)
    found = finish(flow, [FOUND])

    assert (search.method, search.arguments["limit"]) == ("search", 3)
    assert "ranker" not in search.arguments
    assert keys(found) == [[1, 2, 3]]
    assert {(hit.reranked_by, hit.rerank_error) for hit in found[0]} == {(None, "vLLM is down")}


@pytest.mark.parametrize(("mode", "on_error"), [("client", "raise"), ("client", "client")])
def test_a_failure_from_here_is_raised(mode: Any, on_error: Any) -> None:
    flow = start(VLLMRanker(URL, mode=mode, on_error=on_error))
    next(flow)
    flow.send([FOUND])

    with pytest.raises(RerankConnectionError):
        flow.throw(DOWN)


def test_a_failure_of_both_is_raised() -> None:
    flow = start(VLLMRanker(URL, mode="server", on_error="client"))
    next(flow)
    flow.throw(DOWN)
    flow.send([FOUND])

    with pytest.raises(RerankConnectionError):
        flow.throw(DOWN)


def test_a_failure_from_here_may_leave_the_retrieval_order_marked() -> None:
    flow = start(VLLMRanker(URL, mode="client", on_error="skip"), Query("a"), Query("b"), k=2)
    next(flow)
    asked = flow.send([FOUND, FOUND[2:]])

    assert asked.errors_apart
    found = finish(flow, [DOWN, DOWN])
    assert keys(found) == [[1, 2], [3]]
    assert {hit.rerank_error for hits in found for hit in hits} == {"vLLM is down"}


def test_only_the_query_whose_reranking_failed_from_here_is_degraded() -> None:
    flow = start(VLLMRanker(URL, mode="client", on_error="skip"), Query("a"), Query("b"))
    next(flow)
    flow.send([FOUND, FOUND])

    degraded, reranked = finish(flow, [DOWN, [0.1, 0.2, 0.3]])

    assert [hit.rerank_error for hit in degraded] == ["vLLM is down"] * 3
    assert [(hit.pk, hit.reranked_by) for hit in reranked] == [
        (3, "client"),
        (2, "client"),
        (1, "client"),
    ]


def test_a_query_of_which_one_request_failed_is_not_scored_by_the_others() -> None:
    ranker = VLLMRanker(URL, mode="client", on_error="skip", max_client_batch_size=2)
    flow = start(ranker)
    next(flow)
    flow.send([FOUND])

    (hits,) = finish(flow, [[0.9, 0.8], DOWN])

    assert [(hit.pk, hit.relevance_score) for hit in hits] == [(1, None), (2, None), (3, None)]


@pytest.mark.parametrize("on_error", ["client", "skip"])
def test_only_the_queries_of_a_search_that_failed_in_milvus_fall_back(on_error: Any) -> None:
    ranker = VLLMRanker(URL, on_error=on_error, max_concurrency=2)
    flow = start(ranker, Query("a"), Query("b"), Query("c"))
    together = next(flow)
    assert [len(call.arguments["reqs"][0].data) for call in together.steps] == [2, 1]

    step = flow.send([DOWN, [FOUND]])
    assert step.arguments["data"] == ["a", "b"]
    if on_error == "client":
        step = flow.send([FOUND[:1], FOUND[1:2]])
        assert [rerank.query for rerank in step.steps] == ["a", "b"]
        found = finish(flow, [[0.5], [0.4]])
    else:
        found = finish(flow, [FOUND[:1], FOUND[1:2]])

    assert keys(found) == [[1], [2], [1, 2, 3]]
    fallen = "client" if on_error == "client" else None
    assert [hits[0].reranked_by for hits in found] == [fallen, fallen, "milvus"]


def test_a_service_that_keeps_failing_in_milvus_is_not_asked_for_a_while() -> None:
    service = RerankService.of(VLLMRanker(URL, on_error="skip", cool_down=60))
    for _ in range(FAILURES_BEFORE_REST):
        flow = retrieve(target(), service, [QUESTION], SearchOptions(), DEADLINE)
        assert "ranker" in next(flow).arguments
        flow.throw(DOWN)
        finish(flow, [FOUND])

    flow = retrieve(target(), service, [QUESTION], SearchOptions(), DEADLINE)
    assert "ranker" not in next(flow).arguments
    (hits,) = finish(flow, [FOUND])

    assert "not asked" in str(hits[0].rerank_error)
    assert "vLLM is down" in str(hits[0].rerank_error)


def test_a_failed_search_is_not_held_against_the_rerank_service() -> None:
    service = RerankService.of(VLLMRanker(URL, on_error="client", cool_down=60))
    for _ in range(FAILURES_BEFORE_REST):
        flow = retrieve(target(), service, [QUESTION], SearchOptions(), DEADLINE)
        next(flow)
        flow.throw(SearchError("Milvus is down"))
        with pytest.raises(SearchError):
            flow.throw(SearchError("Milvus is down"))

    assert service.in_milvus.rest() is None


def test_a_service_that_keeps_failing_from_here_is_not_asked_for_a_while() -> None:
    service = RerankService.of(VLLMRanker(URL, on_error="skip", cool_down=60))
    for _ in range(FAILURES_BEFORE_REST):
        flow = rank_texts(service, QUESTION, ["a", "b"], DEADLINE)
        next(flow)
        finish(flow, [DOWN])

    with pytest.raises(StopIteration) as end:
        next(rank_texts(service, QUESTION, ["a", "b"], DEADLINE))

    assert [ranking.index for ranking in end.value.value] == [0, 1]
    assert "not asked" in end.value.value[0].rerank_error


@pytest.mark.parametrize(("on_error", "share"), [("raise", 1.0), ("skip", 0.75), ("client", 0.5)])
def test_a_search_with_a_ranker_leaves_time_for_the_fallback(on_error: Any, share: float) -> None:
    deadline = Deadline.after(100)
    service = RerankService.of(VLLMRanker(URL, on_error=on_error))

    asked = next(retrieve(target(), service, [QUESTION], SearchOptions(), deadline))

    assert asked.deadline.remaining() == pytest.approx(100 * share, abs=1)


@pytest.mark.parametrize("on_error", ["raise", "client", "skip"])
def test_a_failed_search_is_raised_whatever_is_asked_of_failed_reranking(on_error: Any) -> None:
    flow = start(VLLMRanker(URL, mode="client", on_error=on_error))
    next(flow)

    with pytest.raises(SearchError, match="disk full"):
        flow.throw(SearchError("disk full"))


@pytest.mark.parametrize("on_error", ["client", "skip"])
def test_a_failed_search_with_a_ranker_is_tried_without_it_since_servers_word_it_in_many_ways(
    on_error: Any,
) -> None:
    flow = start(VLLMRanker(URL, mode="server", on_error=on_error))
    next(flow)

    again = flow.throw(SearchError("Expecting value: line 1 column 1"))

    assert "ranker" not in again.arguments
    with pytest.raises(SearchError, match="disk full"):
        flow.throw(SearchError("disk full"))


def test_an_alias_is_searched_by_its_own_name() -> None:
    settings = TargetSettings(collection_name="docs_alias")
    flow = find_target(settings, Deadline())
    next(flow)
    flow.send(description())

    with pytest.raises(StopIteration) as end:
        flow.send("2.6.4")
    assert end.value.value.layout.name == "docs_alias"


# Released collections


def test_a_released_collection_is_loaded_and_searched_again() -> None:
    flow = start(VLLMRanker(URL, mode="server"))
    search = next(flow)

    load = flow.throw(RELEASED)
    again = flow.send(None)

    assert load == CallMilvus(
        "loading collection 'docs'", "load_collection", {"collection_name": "docs"}, DEADLINE
    )
    assert again is search
    assert keys(finish(flow, [FOUND])) == [[1, 2, 3]]


def test_a_model_that_vllm_has_not_loaded_is_no_released_collection() -> None:
    flow = start(VLLMRanker(URL, mode="server"))
    next(flow)

    with pytest.raises(RerankError):
        flow.throw(RerankError("call service failed: model not loaded"))


def test_a_collection_that_is_released_again_is_not_loaded_twice() -> None:
    flow = start(None)
    next(flow)
    flow.throw(RELEASED)
    flow.send(None)

    with pytest.raises(SearchError, match="not loaded"):
        flow.throw(RELEASED)


def test_a_collection_that_cannot_be_loaded_is_an_error() -> None:
    flow = start(None)
    next(flow)
    flow.throw(RELEASED)

    with pytest.raises(SearchError, match="no index"):
        flow.throw(SearchError("loading failed: no index"))


# Candidates, and given texts


def test_candidates_are_all_that_would_be_reranked_in_retrieval_order() -> None:
    options = SearchOptions(k=2, fetch_k=30)
    flow = candidates(target(fields=["sparse", "dense"]), [QUESTION], options, DEADLINE)
    next(flow)

    search = flow.send([[0.0, 1.0]])
    found = finish(flow, [FOUND])

    assert (search.method, search.arguments["limit"]) == ("hybrid_search", 60)
    assert found == [
        [
            Hit(1, "one", {"pk": 1}, 0.9),
            Hit(2, "two", {"pk": 2}, 0.8),
            Hit(3, "three", {"pk": 3}, 0.7),
        ]
    ]


def test_given_texts_are_ranked_best_first() -> None:
    flow = rank_texts(RerankService.of(VLLMRanker(URL)), Query("q"), ["a", "b", "c"], DEADLINE)

    assert next(flow) == Together([Rerank("q", ["a", "b", "c"], DEADLINE)], 4)
    assert finish(flow, [[0.25, 0.75, 0.5]]) == [
        Ranking(1, 0.75, "client"),
        Ranking(2, 0.5, "client"),
        Ranking(0, 0.25, "client"),
    ]


@pytest.mark.parametrize("on_error", ["raise", "client"])
def test_given_texts_that_cannot_be_ranked_are_an_error(on_error: Any) -> None:
    flow = rank_texts(
        RerankService.of(VLLMRanker(URL, on_error=on_error)), Query("q"), ["a"], DEADLINE
    )
    next(flow)

    with pytest.raises(RerankConnectionError):
        flow.throw(DOWN)


def test_given_texts_may_keep_their_order_marked() -> None:
    flow = rank_texts(
        RerankService.of(VLLMRanker(URL, on_error="skip")), Query("q"), ["a", "b"], DEADLINE
    )
    next(flow)

    assert finish(flow, [DOWN]) == as_given([0, 1], "vLLM is down")


def test_given_texts_that_are_empty_come_last_without_being_sent() -> None:
    flow = rank_texts(RerankService.of(VLLMRanker(URL)), Query("q"), ["", "b", "\t"], DEADLINE)

    assert next(flow).steps[0].texts == ["b"]
    assert finish(flow, [[0.5]]) == [
        Ranking(1, 0.5, "client"),
        *as_given([0, 2], NO_TEXT),
    ]


# Rows by their keys

ITEMS = [Item("one", "1"), Item("two", "2"), Item("three", "3")]


def rank(
    ranker: VLLMRanker,
    items: Sequence[Item] = ITEMS,
    on_missing: Any = "raise",
    on: Target | None = None,
) -> Flow[list[Ranking]]:
    options = SearchOptions()
    return rank_rows(
        on or target(), RerankService.of(ranker), QUESTION, items, options, DEADLINE, on_missing
    )


@pytest.mark.parametrize(
    ("version", "provider"), [("2.6.4", "vllm"), ("milvus_lite-3.2.2", "cohere")]
)
def test_milvus_ranks_the_items_rows(version: str, provider: str) -> None:
    flow = rank(VLLMRanker(URL), [*ITEMS, Item("one again", "1")], on=target(version))

    search = next(flow)
    ranked = finish(flow, [rows((2, None, 0.75), (1, None, 0.5), (3, None, 0.25))])

    assert search.method == "search"
    assert search.arguments["filter"] == "pk in [1, 2, 3]"
    assert search.arguments["ranker"].params["provider"] == provider
    assert search.arguments["ranker"].params["queries"] == ["a question"]
    assert ranked == [
        Ranking(1, 0.75, "milvus"),
        Ranking(0, 0.5, "milvus"),
        Ranking(3, 0.5, "milvus"),
        Ranking(2, 0.25, "milvus"),
    ]


def test_items_without_a_row_are_an_error_that_counts_them() -> None:
    flow = rank(VLLMRanker(URL), [*ITEMS, Item("none", "a-uuid")])
    next(flow)
    lookup = flow.send([rows((1, None, 0.5), (3, None, 0.25))])
    assert (lookup.method, lookup.arguments["filter"]) == ("query", "pk in [2]")

    with pytest.raises(SearchError, match=r"2 of 4 items have no row .* the first has id '2'"):
        flow.send([])


@pytest.mark.parametrize("on_error", ["raise", "client", "skip"])
def test_rows_that_an_approximate_index_has_not_returned_are_not_called_gone(on_error: Any) -> None:
    flow = rank(VLLMRanker(URL, on_error=on_error), on_missing="keep")
    next(flow)
    flow.send([rows((1, None, 0.5), (3, None, 0.25))])

    if on_error == "raise":
        with pytest.raises(SearchError, match=r"did not return 1 rows .* has key 2: it is approx"):
            flow.send([{"pk": 2}])
    elif on_error == "client":
        assert flow.send([{"pk": 2}]).steps[0].texts == ["one", "two", "three"]
    else:
        ranked = finish(flow, [{"pk": 2}])
        assert [r.index for r in ranked] == [0, 1, 2]
        assert "approximate" in ranked[0].rerank_error


def test_items_without_a_row_may_be_kept_last_and_marked() -> None:
    flow = rank(VLLMRanker(URL), on_missing="keep")
    next(flow)
    flow.send([rows((3, None, 0.25))])

    ranked = finish(flow, [])

    assert [(r.index, r.reranked_by) for r in ranked] == [(2, "milvus"), (0, None), (1, None)]
    assert ranked[1].rerank_error == "collection 'docs' has no row with this item's primary key"


def test_items_of_which_none_has_a_key_are_not_searched_for() -> None:
    flow = rank(VLLMRanker(URL), [Item("a", "a-uuid")])

    with pytest.raises(SearchError, match="1 of 1 items have no row"):
        next(flow)


def test_rows_are_not_ranked_by_a_server_that_would_ignore_the_ranker() -> None:
    with pytest.raises(ConfigurationError, match=r"MilvusVLLMRerank needs Milvus 2\.6"):
        next(rank(VLLMRanker(URL), on=target("2.5.14")))


def test_rows_that_milvus_fails_to_rank_are_an_error() -> None:
    flow = rank(VLLMRanker(URL))
    next(flow)

    with pytest.raises(RerankConnectionError):
        flow.throw(DOWN)


def test_rows_that_milvus_fails_to_rank_may_be_ranked_by_their_texts() -> None:
    flow = rank(VLLMRanker(URL, on_error="client"))
    next(flow)

    asked = flow.throw(DOWN)
    ranked = finish(flow, [[0.25, 0.75, 0.5]])

    assert asked.steps == [Rerank("a question", ["one", "two", "three"], DEADLINE)]
    assert [(r.index, r.reranked_by) for r in ranked] == [
        (1, "client"),
        (2, "client"),
        (0, "client"),
    ]


def test_rows_that_milvus_fails_to_rank_may_stay_as_given_and_marked() -> None:
    flow = rank(VLLMRanker(URL, on_error="skip"))
    next(flow)

    with pytest.raises(StopIteration) as end:
        flow.throw(DOWN)

    assert end.value.value == as_given([0, 1, 2], "vLLM is down")


def test_an_encoder_that_makes_too_few_vectors_is_refused() -> None:
    flow = start(None, Query("a"), Query("b"), on=target(fields=["dense"]))
    next(flow)

    with pytest.raises(ConfigurationError, match="made 1 vectors for 2 queries"):
        flow.send([[0.0, 1.0]])


def test_a_time_limit_inside_milvus_counts_as_a_failure_of_reranking() -> None:
    flow = start(VLLMRanker(URL, mode="server", on_error="skip"))
    next(flow)

    step = flow.throw(SearchError("search failed: context deadline exceeded"))

    assert "ranker" not in step.arguments
    assert [hit.reranked_by for hit in finish(flow, [FOUND])[0]] == [None, None, None]


def test_milvus_gets_several_queries_in_as_many_searches_as_may_be_in_flight() -> None:
    queries = [Query(text) for text in ("a", "b", "c")]
    flow = start(VLLMRanker(URL, mode="server", max_concurrency=2), *queries)

    step = next(flow)
    found = finish(flow, [[FOUND, FOUND[:1]], [FOUND[:2]]])

    assert step.limit == 2
    bound = [call.arguments["ranker"].params["queries"] for call in step.steps]
    assert bound == [["a", "b"], ["c"]]
    assert [len(hits) for hits in found] == [3, 1, 2]
