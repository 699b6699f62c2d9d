"""One retrieval, and many together, driven by hand: which steps are asked for, and what of it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pymilvus import Function, RRFRanker

from milvus_vllm_retrievers import (
    ConfigurationError,
    RerankConnectionError,
    RerankStatusError,
    SearchError,
    VLLMRanker,
)
from milvus_vllm_retrievers._core import retrieve as retrieve_module
from milvus_vllm_retrievers._core.cool_down import FAILURES_BEFORE_REST, Health
from milvus_vllm_retrievers._core.deadline import Deadline
from milvus_vllm_retrievers._core.hits import NO_TEXT, Hit
from milvus_vllm_retrievers._core.query import Encoder, Encoders, Query, SearchOptions
from milvus_vllm_retrievers._core.requests import MAX_QUERIES
from milvus_vllm_retrievers._core.retrieve import candidates, retrieve, retrieve_many
from milvus_vllm_retrievers._core.steps import CallMilvus, Encode, Flow, Send, Step, Together
from milvus_vllm_retrievers._core.target import Target
from tests.unit.flows import (
    DEADLINE,
    DOWN,
    ENCODER,
    FOUND,
    LITE,
    QUESTION,
    URL,
    ByHand,
    _aencode,
    body,
    finish,
    keys,
    reranking,
    rows,
    scored,
    searched_for,
    target,
)


def start(
    ranker: VLLMRanker | None,
    query: Query = QUESTION,
    on: Target | None = None,
    health: Health | None = None,
    **options: Any,
) -> Flow[list[Hit]]:
    on = on or target()
    asked = ranker and reranking(ranker, on, health)
    return retrieve(on, asked, query, SearchOptions(**options), DEADLINE)


def call(step: Step) -> CallMilvus:
    assert isinstance(step, CallMilvus)
    return step


def test_filter_templates_are_refused_on_milvus_lite_before_anything_is_done() -> None:
    flow = start(None, on=target(LITE), expr="a == {x}", expr_params={"x": 1})

    with pytest.raises(ConfigurationError, match="takes no filter templates"):
        next(flow)


# Query vectors


def test_one_encoder_is_used_once_for_all_its_fields() -> None:
    flow = start(None, on=target(fields=["dense", "sparse", "dense_2"]))

    assert next(flow) == Encode(ENCODER, QUESTION, DEADLINE)
    search = call(flow.send([0.0, 1.0]))

    assert [(r.anns_field, r.data) for r in search.arguments["reqs"]] == [
        ("dense", [[0.0, 1.0]]),
        ("sparse", ["a question"]),
        ("dense_2", [[0.0, 1.0]]),
    ]


def test_each_encoder_of_its_own_field_is_used() -> None:
    other = Encoder(lambda query: [], _aencode)
    encoders = Encoders(dense=ENCODER, by_field={"dense_2": other})
    flow = start(None, on=target(fields=["dense", "dense_2"], encoders=encoders))

    assert next(flow) == Encode(ENCODER, QUESTION, DEADLINE)
    assert flow.send([0.0, 1.0]) == Encode(other, QUESTION, DEADLINE)


def test_an_embedding_models_own_error_is_passed_on_and_says_whose_it_is() -> None:
    own = KeyError("no such model")
    flow = start(None, on=target(fields=["dense"]))
    next(flow)

    with pytest.raises(KeyError) as caught:
        flow.throw(own)

    assert caught.value is own
    notes = getattr(own, "__notes__", None)  # Python 3.10 has none
    assert notes is None or "embedding the query for field 'dense'" in notes[0]


def test_a_query_that_brings_its_vector_is_not_encoded() -> None:
    flow = start(None, Query("first", embedding=[0.0, 1.0]), on=target(fields=["dense", "sparse"]))

    assert [r.data for r in call(next(flow)).arguments["reqs"]] == [[[0.0, 1.0]], ["first"]]


@pytest.mark.parametrize(("fetch_k", "legs"), [(5, ["dense", "sparse"]), (10, ["sparse"])])
def test_several_fields_may_yield_together_what_is_asked_for(fetch_k: int, legs: list[str]) -> None:
    flow = start(VLLMRanker(URL), on=target(fields=legs), k=10, fetch_k=fetch_k)
    step = next(flow)
    if isinstance(step, Encode):
        step = flow.send([0.0, 1.0])

    search = call(step)
    asked = search.arguments.get("reqs") or []
    assert search.arguments["limit"] == 10
    assert [leg.limit for leg in asked] == ([5, 5] if len(legs) == 2 else [])


def test_one_field_that_yields_too_few_is_refused_naming_fetch_k() -> None:
    with pytest.raises(ConfigurationError, match=r"fetch_k \(5\) is smaller .*fetch_k=10"):
        next(start(VLLMRanker(URL), k=10, fetch_k=5))


# Without a ranker


def test_without_a_ranker_hits_come_in_retrieval_order_and_unscored() -> None:
    flow = start(None, k=3)

    search = call(next(flow))
    found = finish(flow, [FOUND])

    assert (search.method, search.arguments["limit"]) == ("search", 3)
    assert keys(found) == [1, 2, 3]
    assert {(hit.relevance_score, hit.reranked_by) for hit in found} == {(None, None)}


# In Milvus


@pytest.mark.parametrize(("version", "provider"), [("2.6.4", "vllm"), (LITE, "cohere")])
def test_milvus_reranks_with_a_function_bound_to_the_query(version: str, provider: str) -> None:
    flow = start(VLLMRanker(URL, mode="server"), on=target(version), k=2, fetch_k=20)

    search = call(next(flow))
    found = finish(flow, [rows((9, "nine", 0.1), (7, "seven", 0.4))])

    function = search.arguments["ranker"]
    assert isinstance(function, Function)
    assert (function.params["provider"], function.params["queries"]) == (provider, ["a question"])
    assert list(function.input_field_names) == ["document"]
    assert (search.method, search.arguments["limit"]) == ("hybrid_search", 2)
    assert [(r.data, r.limit) for r in search.arguments["reqs"]] == [(["a question"], 20)]
    assert keys(found) == [7, 9]
    assert found[0] == Hit(7, "seven", {"pk": 7}, None, 0.4, "milvus")


def test_a_plain_search_reranks_where_all_candidates_are_returned_but_on_milvus_lite() -> None:
    ranker = VLLMRanker(URL, mode="server")
    on_milvus = call(next(start(ranker, k=5, fetch_k=5)))
    on_lite = call(next(start(ranker, on=target(LITE), k=5, fetch_k=5)))

    assert (on_milvus.method, on_lite.method) == ("search", "hybrid_search")


# From here


def test_this_client_reranks_all_candidates_and_returns_the_best() -> None:
    flow = start(VLLMRanker(URL, mode="client"), k=2, fetch_k=30)

    search = call(next(flow))
    asked = flow.send([FOUND])
    found = finish(flow, scored(0.25, 0.5, 0.5))

    assert (search.method, search.arguments["limit"]) == ("search", 30)
    assert "ranker" not in search.arguments
    assert body(asked)["query"] == "a question"
    assert body(asked)["documents"] == ["one", "two", "three"]
    assert found == [
        Hit(2, "two", {"pk": 2}, 0.8, 0.5, "client"),
        Hit(3, "three", {"pk": 3}, 0.7, 0.5, "client"),
    ]


def test_this_client_reranks_the_fused_candidates_of_several_legs() -> None:
    flow = start(VLLMRanker(URL, mode="client"), on=target(fields=["dense", "sparse"]), fetch_k=30)
    next(flow)

    search = call(flow.send([0.0, 1.0]))

    assert isinstance(search.arguments["ranker"], RRFRanker)
    assert search.arguments["limit"] == 60


def test_nothing_found_is_nothing_to_ask_vllm() -> None:
    flow = start(VLLMRanker(URL, mode="client"))
    next(flow)

    assert finish(flow, [[]]) == []


# Rows without a text


def test_rows_without_a_text_are_not_sent_and_come_last_unscored() -> None:
    flow = start(VLLMRanker(URL, mode="client"))
    next(flow)

    asked = flow.send([rows((3, None, 0.9), (2, " \n", 0.8), (1, "one", 0.7))])

    assert body(asked)["documents"] == ["one"]
    found = finish(flow, scored(-5.0))
    assert [(hit.pk, hit.relevance_score) for hit in found] == [(1, -5.0), (2, None), (3, None)]
    assert [hit.rerank_error for hit in found] == [None, NO_TEXT, NO_TEXT]


def test_where_no_row_has_a_text_nothing_is_sent() -> None:
    flow = start(VLLMRanker(URL, mode="client"))
    next(flow)

    assert keys(finish(flow, [rows((2, None, 0.9), (1, "", 0.8))])) == [1, 2]


def test_a_row_without_a_text_takes_no_others_place_where_milvus_has_cut() -> None:
    flow = start(VLLMRanker(URL), k=2, fetch_k=3)
    assert call(next(flow)).arguments["limit"] == 2

    again = call(flow.send([rows((1, "", 0.9), (2, "two", 0.5))]))
    assert again.arguments["limit"] == 3
    found = finish(flow, [rows((1, "", 0.9), (2, "two", 0.5), (3, "three", 0.25))])

    assert [(hit.pk, hit.relevance_score) for hit in found] == [(2, 0.5), (3, 0.25)]


def test_rows_without_a_text_come_last_where_milvus_has_scored_them() -> None:
    flow = start(VLLMRanker(URL))
    next(flow)

    found = finish(flow, [rows((1, "", 0.9), (2, "two", 0.5))])

    assert [(hit.pk, hit.relevance_score) for hit in found] == [(2, 0.5), (1, None)]
    assert [hit.rerank_error for hit in found] == [None, NO_TEXT]


def test_milvus_lite_is_given_only_rows_with_a_text_since_one_null_fails_its_search() -> None:
    lite = target(LITE, nullable=True)
    flow = start(VLLMRanker(URL, mode="server"), on=lite, k=3, expr="pk > 0")

    look = call(next(flow))
    narrowed = call(flow.send([rows((3, None, 0.9), (2, "", 0.8), (1, "one", 0.7))]))
    found = finish(flow, [rows((2, "", 0.9), (1, "one", 0.25))])

    assert "ranker" not in look.arguments
    assert [leg.expr for leg in narrowed.arguments["reqs"]] == ["(pk > 0) and (pk in [2, 1])"]
    assert narrowed.arguments["limit"] == 2
    assert [(hit.pk, hit.relevance_score) for hit in found] == [(1, 0.25), (2, None), (3, None)]
    assert [hit.rerank_error for hit in found] == [None, NO_TEXT, NO_TEXT]


def test_milvus_lite_is_asked_for_no_scores_where_every_text_is_null() -> None:
    flow = start(VLLMRanker(URL, mode="server"), on=target(LITE, nullable=True))
    next(flow)

    found = finish(flow, [rows((2, None, 0.9), (1, None, 0.8))])

    assert [(hit.pk, hit.rerank_error) for hit in found] == [(1, NO_TEXT), (2, NO_TEXT)]


# Thresholds


def test_a_threshold_holds_for_scores_from_milvus() -> None:
    flow = start(VLLMRanker(URL, mode="server"), score_threshold=0.75)
    next(flow)

    assert keys(finish(flow, [FOUND])) == [1, 2]


def test_a_threshold_holds_for_scores_from_here() -> None:
    flow = start(VLLMRanker(URL, mode="client"), score_threshold=0.5)
    next(flow)
    flow.send([FOUND])

    assert keys(finish(flow, scored(0.25, 0.5, 0.75))) == [3, 2]


# When reranking fails


def test_a_failure_in_milvus_is_raised() -> None:
    flow = start(VLLMRanker(URL, mode="server"))
    next(flow)

    with pytest.raises(RerankConnectionError, match=f"vLLM is down. Milvus was given .*{URL}"):
        flow.throw(DOWN)


def test_a_failure_in_milvus_is_made_up_for_from_here() -> None:
    flow = start(VLLMRanker(URL, mode="server", on_error="client"), k=2, fetch_k=30)
    next(flow)

    search = call(flow.throw(DOWN))
    asked = flow.send([FOUND])
    found = finish(flow, scored(0.25, 0.5, 0.75))

    assert (search.method, search.arguments["limit"]) == ("search", 30)
    assert body(asked)["documents"] == ["one", "two", "three"]
    assert keys(found) == [3, 2]
    assert {hit.reranked_by for hit in found} == {"client"}


def test_a_failure_in_milvus_may_leave_the_retrieval_order_marked() -> None:
    flow = start(VLLMRanker(URL, mode="server", on_error="skip"), k=3, score_threshold=0.99)
    next(flow)

    search = call(flow.throw(DOWN))
    found = finish(flow, [FOUND])

    assert (search.method, search.arguments["limit"]) == ("search", 3)
    assert "ranker" not in search.arguments
    assert keys(found) == [1, 2, 3]
    assert {hit.reranked_by for hit in found} == {None}
    assert all("vLLM is down" in (hit.rerank_error or "") for hit in found)


@pytest.mark.parametrize(("mode", "on_error"), [("client", "raise"), ("client", "client")])
def test_a_failure_from_here_is_raised(mode: Any, on_error: Any) -> None:
    flow = start(VLLMRanker(URL, mode=mode, on_error=on_error, max_retries=0))
    next(flow)
    flow.send([FOUND])

    with pytest.raises(RerankConnectionError):
        flow.throw(DOWN)


def test_a_failure_of_both_is_raised() -> None:
    flow = start(VLLMRanker(URL, mode="server", on_error="client", max_retries=0))
    next(flow)
    flow.throw(DOWN)
    flow.send([FOUND])

    with pytest.raises(RerankConnectionError):
        flow.throw(DOWN)


def test_a_failure_from_here_may_leave_the_retrieval_order_marked() -> None:
    flow = start(VLLMRanker(URL, mode="client", on_error="skip", max_retries=0), k=2)
    next(flow)
    flow.send([FOUND])

    with pytest.raises(StopIteration) as end:
        flow.throw(DOWN)
    assert keys(end.value.value) == [1, 2]
    assert {hit.rerank_error for hit in end.value.value} == {"vLLM is down"}


def test_a_query_of_which_one_request_failed_is_not_scored_by_the_others() -> None:
    ranker = VLLMRanker(URL, mode="client", on_error="skip", max_client_batch_size=2, max_retries=0)

    def answer(step: Step) -> Any:
        if isinstance(step, CallMilvus):
            return [FOUND]
        return DOWN if body(step)["documents"] == ["three"] else scored(0.9, 0.8)

    hits = ByHand(answer).run(start(ranker))

    assert [(hit.pk, hit.relevance_score) for hit in hits] == [(1, None), (2, None), (3, None)]


def test_a_service_that_keeps_failing_in_milvus_is_not_asked_for_a_while() -> None:
    ranker, health = VLLMRanker(URL, on_error="skip"), Health(60)
    for _ in range(FAILURES_BEFORE_REST):
        flow = start(ranker, health=health)
        assert "ranker" in call(next(flow)).arguments
        flow.throw(DOWN)
        finish(flow, [FOUND])

    flow = start(ranker, health=health)
    assert "ranker" not in call(next(flow)).arguments
    hits = finish(flow, [FOUND])

    assert "not asked" in str(hits[0].rerank_error)
    assert "vLLM is down" in str(hits[0].rerank_error)


def test_a_failed_search_is_not_held_against_the_rerank_service() -> None:
    ranker, health = VLLMRanker(URL, on_error="client"), Health(60)
    for _ in range(FAILURES_BEFORE_REST):
        flow = start(ranker, health=health)
        next(flow)
        flow.throw(SearchError("Milvus is down"))
        with pytest.raises(SearchError):
            flow.throw(SearchError("Milvus is down"))

    assert health.in_milvus.rest() is None


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

    again = call(flow.throw(SearchError("Expecting value: line 1 column 1")))

    assert "ranker" not in again.arguments
    with pytest.raises(SearchError, match="disk full"):
        flow.throw(SearchError("disk full"))


def test_a_time_limit_inside_milvus_counts_as_a_failure_of_reranking() -> None:
    flow = start(VLLMRanker(URL, mode="server", on_error="skip"))
    next(flow)

    step = call(flow.throw(SearchError("context deadline exceeded", reason="rerank_timeout")))

    assert "ranker" not in step.arguments
    assert [hit.reranked_by for hit in finish(flow, [FOUND])] == [None, None, None]


# Candidates


def test_candidates_are_all_that_would_be_reranked_in_retrieval_order() -> None:
    options = SearchOptions(k=2, fetch_k=30)
    flow = candidates(target(fields=["sparse", "dense"]), QUESTION, options, DEADLINE)
    next(flow)

    search = call(flow.send([0.0, 1.0]))
    found = finish(flow, [FOUND])

    assert (search.method, search.arguments["limit"]) == ("hybrid_search", 60)
    assert found == [
        Hit(1, "one", {"pk": 1}, 0.9),
        Hit(2, "two", {"pk": 2}, 0.8),
        Hit(3, "three", {"pk": 3}, 0.7),
    ]


# Many queries


def many(count: int) -> list[Query]:
    return [Query(f"q{i}") for i in range(count)]


def batch(
    ranker: VLLMRanker | None,
    queries: list[Query],
    on: Target | None = None,
    health: Health | None = None,
    max_concurrency: int | None = None,
    **options: Any,
) -> Flow[list[Any]]:
    on = on or target()
    asked = ranker and reranking(ranker, on, health)
    return retrieve_many(on, asked, queries, SearchOptions(**options), max_concurrency)


class World:
    """A Milvus that finds for query qN the rows N and N+1, and a vLLM that likes the second."""

    def __init__(self, text: str = "text", poisoned: tuple[Any, ...] = ()) -> None:
        self.text = text
        self.poisoned = poisoned
        self.by_hand = ByHand(self.answer)

    def answer(self, step: Step) -> Any:
        if isinstance(step, Encode):
            return DOWN if step.query.text in self.poisoned else [0.0, 1.0]
        if isinstance(step, Send):
            sent = body(step)
            return DOWN if sent["query"] in self.poisoned else scored(0.25, 0.75)
        assert isinstance(step, CallMilvus)
        asked = [str(data) for data in searched_for(step)]
        if any(text in self.poisoned for text in asked):
            return SearchError("refused")
        found = [int(text.removeprefix("q")) if text[0] == "q" else 0 for text in asked]
        scores = (0.25, 0.75) if isinstance(step.arguments.get("ranker"), Function) else (0.9, 0.8)
        return [
            rows((n, f"{self.text} {n}", scores[0]), (n + 1, f"{self.text} {n + 1}", scores[1]))
            for n in found
        ]

    def searches(self) -> list[list[Any]]:
        return [searched_for(step) for step in self.by_hand.of(CallMilvus)]


def test_queries_that_are_reranked_from_here_share_a_search_and_keep_their_own_candidates() -> None:
    world = World()

    found = world.by_hand.run(batch(VLLMRanker(URL, mode="client"), many(3)))

    assert world.searches() == [["q0", "q1", "q2"]]
    assert [body(step)["query"] for step in world.by_hand.of(Send)] == ["q0", "q1", "q2"]
    assert [keys(hits) for hits in found] == [[1, 0], [2, 1], [3, 2]]
    assert {hit.reranked_by for hits in found for hit in hits} == {"client"}


@pytest.mark.parametrize("version", ["2.6.4", LITE])
def test_queries_that_milvus_reranks_are_searches_by_themselves(version: str) -> None:
    world = World()
    ranker = VLLMRanker(URL, mode="server", max_concurrency=2)

    found = world.by_hand.run(batch(ranker, many(3), target(version)))

    (together,) = world.by_hand.of(Together)
    assert together.limit == 2
    assert together.return_exceptions
    assert world.searches() == [["q0"], ["q1"], ["q2"]]
    bound = [
        call(step).arguments["ranker"].params["queries"] for step in world.by_hand.of(CallMilvus)
    ]
    assert bound == [["q0"], ["q1"], ["q2"]]
    assert [keys(hits) for hits in found] == [[1, 0], [2, 1], [3, 2]]


@given(
    st.sampled_from([None, "client", "server"]),
    st.sampled_from(["2.6.4", LITE]),
    st.lists(st.integers(0, 5), min_size=1, max_size=12),
    st.integers(1, 4),
    st.sets(st.integers(0, 5), max_size=2),
)
def test_a_batch_answers_each_query_as_it_would_be_answered_alone(
    mode: Any, version: str, numbers: list[int], share: int, poisoned: set[int]
) -> None:
    """Hits, order and errors, whatever the path and however the queries are shared out."""
    ranker = mode and VLLMRanker(URL, mode=mode, max_retries=0)
    queries = [Query(f"q{n}") for n in numbers]
    texts = tuple(f"q{n}" for n in poisoned)

    def outcome(run: Flow[Any]) -> Any:
        try:
            return World(poisoned=texts).by_hand.run(run)
        except (SearchError, RerankConnectionError) as error:
            return str(error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieve_module, "_share", lambda row_bytes, rows: share)
        together = outcome(batch(ranker, queries, target(version)))
    alone = [outcome(start(ranker, query, target(version))) for query in queries]

    assert [str(each) if isinstance(each, Exception) else each for each in together] == alone


def test_queries_of_their_own_vectors_share_searches_with_their_like() -> None:
    world = World()
    own = Query("own", embedding=[1.0, 0.0])
    on = target(fields=None, encoders=Encoders())

    found = world.by_hand.run(batch(None, [QUESTION, own, QUESTION, own], on))

    assert world.searches() == [["a question", "a question"], [[1.0, 0.0], [1.0, 0.0]]]
    assert [len(hits) for hits in found] == [2, 2, 2, 2]


# Shared out by number and by size


def test_no_search_is_for_more_queries_than_milvus_allows() -> None:
    world = World("")
    queries = [QUESTION] * (MAX_QUERIES + 1)

    found = world.by_hand.run(batch(None, queries, k=1, fetch_k=1))

    sizes = [len(asked) for asked in world.searches()]
    assert len(found) == sum(sizes) == MAX_QUERIES + 1
    assert max(sizes) <= MAX_QUERIES


@given(st.integers(1, 300_000), st.integers(1, 100_000))
def test_a_share_is_between_one_query_and_what_an_answer_can_bring(
    row_bytes: int, row_count: int
) -> None:
    size = retrieve_module._share(row_bytes, row_count)

    assert 1 <= size <= MAX_QUERIES
    assert size == 1 or size * row_bytes * min(row_count, 16_384) <= 64_000_000


def test_heavy_rows_make_the_next_shares_smaller() -> None:
    world = World("x" * 64_000)
    queries = many(200)

    found = world.by_hand.run(batch(VLLMRanker(URL, mode="client"), queries))

    first, *others = [len(asked) for asked in world.searches()]
    assert max(others) < first / 3
    assert max(others) * 50 * 64_000 < 64_000_000
    assert len(found) == first + sum(others) == 200
    assert not any(isinstance(outcome, Exception) for outcome in found)


TOO_LARGE = SearchError("RESOURCE_EXHAUSTED: larger than max", reason="too_large")


@pytest.mark.parametrize("mode", [None, "client"])
def test_what_is_too_much_for_one_search_is_searched_for_one_by_one(mode: Any) -> None:
    world = World()
    by_hand = ByHand(
        lambda step: (
            TOO_LARGE
            if isinstance(step, CallMilvus) and len(searched_for(step)) > 1
            else world.answer(step)
        )
    )
    ranker = mode and VLLMRanker(URL, mode=mode)

    found = by_hand.run(batch(ranker, many(3)))

    assert [searched_for(step) for step in by_hand.of(CallMilvus)] == [
        ["q0", "q1", "q2"],
        ["q0"],
        ["q1"],
        ["q2"],
    ]
    assert [keys(hits) for hits in found] == [[1, 0], [2, 1], [3, 2]] if mode else [[0, 1]]


def test_a_milvus_that_is_gone_is_not_asked_once_more_for_each_query() -> None:
    gone = SearchError("UNAVAILABLE", reason="disconnected")
    by_hand = ByHand(lambda step: gone if isinstance(step, CallMilvus) else None)

    found = by_hand.run(batch(VLLMRanker(URL, mode="client"), many(30), timeout=0.05, fetch_k=5))

    assert all(isinstance(outcome, SearchError) for outcome in found)
    assert {len(searched_for(step)) for step in by_hand.of(CallMilvus)} == {30}


# Limits


@pytest.mark.parametrize(
    ("max_concurrency", "of_encoder", "limit"),
    [(None, None, 16), (2, None, 2), (20, None, 20), (None, 3, 3), (2, 3, 2), (20, 3, 3)],
)
def test_queries_are_embedded_as_many_at_once_as_the_call_and_the_encoder_allow(
    max_concurrency: int | None, of_encoder: int | None, limit: int
) -> None:
    world = World()
    encoder = Encoder(lambda query: [], _aencode, of_encoder)
    on = target(fields=["dense"], encoders=Encoders(dense=encoder))

    world.by_hand.run(batch(None, many(30), on, max_concurrency=max_concurrency))

    assert world.by_hand.of(Together)[0].limit == limit
    assert [step.query for step in world.by_hand.of(Encode)] == many(30)


@pytest.mark.parametrize("mode", [None, "client", "server"])
@pytest.mark.parametrize("version", ["2.6.4", LITE])
def test_one_at_a_time_is_one_of_everything(mode: Any, version: str) -> None:
    world = World()
    ranker = mode and VLLMRanker(URL, mode=mode, max_client_batch_size=1)

    def answer(step: Step) -> Any:
        return scored(0.5) if isinstance(step, Send) else world.answer(step)

    by_hand = ByHand(answer)
    by_hand.run(batch(ranker, many(5), target(version, ["dense"]), max_concurrency=1))

    assert {step.limit for step in by_hand.of(Together)} == {1}


@pytest.mark.parametrize(("count", "in_flight"), [(1, 4), (2, 2), (3, 1), (30, 1)])
@pytest.mark.parametrize("version", ["2.6.4", LITE])
def test_the_queries_of_a_batch_share_what_the_ranker_may_have_in_flight(
    count: int, in_flight: int, version: str
) -> None:
    world = World()
    ranker = VLLMRanker(URL, mode="client", max_client_batch_size=1, max_concurrency=4)
    by_hand = ByHand(lambda step: scored(0.5) if isinstance(step, Send) else world.answer(step))

    by_hand.run(batch(ranker, many(count), target(version)))

    of_queries = [s for s in by_hand.of(Together) if s.return_exceptions]
    of_requests = [s for s in by_hand.of(Together) if not s.return_exceptions]
    assert of_queries[-1].limit <= 4
    assert {step.limit for step in of_requests} == {in_flight}
    assert min(count, of_queries[-1].limit) * in_flight <= 4


# Time


class Clock:
    now = 100.0


@pytest.fixture
def moving(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The monotonic clock of deadlines, which the test moves."""
    clock = Clock()
    monkeypatch.setattr("time.monotonic", lambda: clock.now)
    return clock


@pytest.mark.parametrize("mode", [None, "client", "server"])
@pytest.mark.parametrize("version", ["2.6.4", LITE])
def test_a_querys_time_does_not_pass_while_it_waits_for_its_turn(
    mode: Any, version: str, moving: Clock
) -> None:
    """Every step takes almost a third of the timeout; they come one after another."""
    world = World()
    left: list[float] = []

    def answer(step: Step) -> Any:
        remaining = step.deadline.remaining()  # type: ignore[union-attr]
        left.append(remaining)
        moving.now += 0.45
        return world.answer(step)

    ranker = mode and VLLMRanker(URL, mode=mode)
    on = target(version, ["dense"])
    found = ByHand(answer).run(batch(ranker, many(20), on, timeout=1.5))

    assert not any(isinstance(outcome, Exception) for outcome in found)
    assert min(left) > 0.4


def test_queries_that_are_searched_for_one_by_one_after_all_have_their_time_anew(
    moving: Clock,
) -> None:
    world = World()
    left: list[float] = []

    def answer(step: Step) -> Any:
        if isinstance(step, CallMilvus):
            remaining = step.deadline.remaining()
            left.append(remaining or 0.0)
            moving.now += 0.9
            return TOO_LARGE if len(searched_for(step)) > 1 else world.answer(step)
        return world.answer(step)

    found = ByHand(answer).run(batch(None, many(5), timeout=1.0))

    assert [len(hits) for hits in found] == [2] * 5
    assert left == pytest.approx([1.0] * 6)


def test_a_search_that_queries_share_takes_of_each_only_its_part(moving: Clock) -> None:
    world = World()

    def answer(step: Step) -> Any:
        if isinstance(step, CallMilvus):
            moving.now += 1.0
        return world.answer(step)

    by_hand = ByHand(answer)
    by_hand.run(batch(VLLMRanker(URL, mode="client"), many(4), timeout=2.0))

    left = [step.deadline.at - moving.now for step in by_hand.of(Send)]
    assert left == pytest.approx([1.75] * 4)


def test_without_a_timeout_no_step_has_a_limit() -> None:
    world = World()

    world.by_hand.run(batch(VLLMRanker(URL, mode="client"), many(2), timeout=None))

    limits = [step.deadline for step in world.by_hand.steps if isinstance(step, (CallMilvus, Send))]
    assert set(limits) == {Deadline()}


# Failures


@pytest.mark.parametrize("mode", ["client", "server"])
@pytest.mark.parametrize("version", ["2.6.4", LITE])
def test_one_poisoned_query_among_twenty_fails_alone(mode: Any, version: str) -> None:
    world = World(poisoned=("q7",))
    ranker = VLLMRanker(URL, mode=mode, max_retries=0)

    found = world.by_hand.run(batch(ranker, many(20), target(version)))

    assert [i for i, each in enumerate(found) if isinstance(each, Exception)] == [7]
    assert [keys(hits) for i, hits in enumerate(found) if i != 7] == [
        [i + 1, i] for i in range(20) if i != 7
    ]


def test_a_query_that_cannot_be_embedded_fails_alone() -> None:
    world = World(poisoned=("q1",))

    found = world.by_hand.run(batch(None, many(3), target(fields=["dense"])))

    assert [isinstance(outcome, Exception) for outcome in found] == [False, True, False]


def test_only_the_query_whose_reranking_failed_from_here_is_degraded() -> None:
    poison = RerankStatusError("too long", status_code=400, body="")
    world = World()
    by_hand = ByHand(
        lambda step: (
            poison if isinstance(step, Send) and body(step)["query"] == "q0" else world.answer(step)
        )
    )

    degraded, reranked = by_hand.run(
        batch(VLLMRanker(URL, mode="client", on_error="skip"), many(2))
    )

    assert [hit.rerank_error for hit in degraded] == ["too long"] * 2
    assert [hit.reranked_by for hit in reranked] == ["client"] * 2


@pytest.mark.parametrize("on_error", ["client", "skip"])
def test_only_the_query_that_milvus_failed_to_rerank_falls_back(on_error: Any) -> None:
    world = World()

    def answer(step: Step) -> Any:
        fails = isinstance(step, CallMilvus) and "ranker" in step.arguments
        return DOWN if fails and searched_for(step) == ["q0"] else world.answer(step)

    ranker = VLLMRanker(URL, mode="server", on_error=on_error)
    fallen, reranked = ByHand(answer).run(batch(ranker, many(2)))

    assert {hit.reranked_by for hit in fallen} == {"client" if on_error == "client" else None}
    assert {hit.reranked_by for hit in reranked} == {"milvus"}


@pytest.mark.parametrize("mode", ["client", "server"])
def test_a_service_that_is_down_is_spared_by_the_rest_of_a_batch(mode: Any) -> None:
    world, health, asked = World(), Health(60), []

    def answer(step: Step) -> Any:
        if isinstance(step, Send) or isinstance(step.arguments.get("ranker"), Function):  # type: ignore[union-attr]
            asked.append(step)
            return DOWN
        return world.answer(step)

    ranker = VLLMRanker(URL, mode=mode, on_error="skip", max_retries=0)
    found = ByHand(answer).run(batch(ranker, many(20), health=health))

    assert len(asked) == FAILURES_BEFORE_REST
    assert [[hit.reranked_by for hit in hits] for hits in found] == [[None, None]] * 20
    assert all("vLLM is down" in hit.rerank_error for hits in found for hit in hits)


@pytest.mark.parametrize("mode", ["client", "server"])
def test_a_service_that_serves_some_queries_of_a_batch_is_not_spared(mode: Any) -> None:
    poisoned = tuple(f"q{i}" for i in range(0, 20, 2))
    world, health = World(), Health(60)

    def answer(step: Step) -> Any:
        reranks = isinstance(step, Send) or isinstance(step.arguments.get("ranker"), Function)  # type: ignore[union-attr]
        if reranks:
            text = body(step)["query"] if isinstance(step, Send) else searched_for(step)[0]  # type: ignore[arg-type]
            if text in poisoned:
                return DOWN
        return world.answer(step)

    ranker = VLLMRanker(URL, mode=mode, on_error="skip", max_retries=0)
    found = ByHand(answer).run(batch(ranker, many(20), health=health))

    who = [hits[0].reranked_by for hits in found]
    assert who == [None, "client" if mode == "client" else "milvus"] * 10
