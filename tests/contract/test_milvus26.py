"""The stand-in for Milvus 2.6 keeps section 2 of the contract, seen through plain pymilvus."""

from __future__ import annotations

import errno
import json
import socket
import ssl
import threading
from contextlib import contextmanager, suppress
from http.client import IncompleteRead, RemoteDisconnected
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from pymilvus import AnnSearchRequest, DataType, Function, FunctionType, MilvusClient
from pymilvus.exceptions import MilvusException

from tests.fakes import Reply, running_fake_vllm
from tests.milvus26 import running_milvus26
from tests.milvus26.vllm_provider import in_gos_words

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROWS = [
    {"pk": 1, "dense": [0.10, 0.0], "text": "one", "title": "milvus"},
    {"pk": 2, "dense": [0.20, 0.0], "text": "two", "title": "milvus vector"},
    {"pk": 3, "dense": [0.30, 0.0], "text": "three", "title": "vllm"},
    {"pk": 4, "dense": [0.40, 0.0], "text": "four", "title": "rerank"},
    {"pk": 5, "dense": [0.50, 0.0], "text": "", "title": "rerank"},
    {"pk": 6, "dense": [0.60, 0.0], "text": "six", "title": "milvus milvus"},
]
ORIGIN = [0.0, 0.0]  # L2: the rows come in the order of their keys
COLLECTION = "documents"


class FakeVLLM:
    """A fake of vLLM's rerank API that records what it was sent.

    It scores a document by ``scores``, 0 by default, and lists the results best first, as vLLM
    does. Answers put into ``next_answers`` come first, as they are.
    """

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.scores: dict[str, float] = {}
        self.next_answers: list[tuple[int, str]] = []
        self.url = ""

    def answer(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> tuple[int, str]:
        self.requests.append({"path": path, "headers": headers, "body": body})
        if self.next_answers:
            return self.next_answers.pop(0)
        results = [
            {"index": index, "relevance_score": self.scores.get(document, 0.0)}
            for index, document in enumerate(body["documents"])
        ]
        best_first = sorted(results, key=lambda result: -result["relevance_score"])
        return 200, json.dumps({"results": best_first})

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [request["body"] for request in self.requests]

    @property
    def documents(self) -> list[list[str]]:
        return [body["documents"] for body in self.bodies]


@contextmanager
def running(fake: FakeVLLM) -> Iterator[FakeVLLM]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, text = fake.answer(self.path, headers, body)
            self.send_response(status)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        fake.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield fake
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def vllm() -> Iterator[FakeVLLM]:
    with running(FakeVLLM()) as fake:
        yield fake


def fill(client: MilvusClient, *, nulls: bool = False) -> None:
    schema = client.create_schema(auto_id=False)
    schema.add_field("pk", DataType.INT64, is_primary=True)
    schema.add_field("dense", DataType.FLOAT_VECTOR, dim=2)
    schema.add_field("text", DataType.VARCHAR, max_length=100, nullable=nulls)
    schema.add_field("title", DataType.VARCHAR, max_length=100, enable_analyzer=True)
    schema.add_field("sparse", DataType.SPARSE_FLOAT_VECTOR)
    schema.add_function(Function("bm25", FunctionType.BM25, ["title"], ["sparse"]))
    indexes = client.prepare_index_params()
    indexes.add_index("dense", index_type="FLAT", metric_type="L2")
    indexes.add_index("sparse", index_type="SPARSE_INVERTED_INDEX", metric_type="BM25")
    client.create_collection(COLLECTION, schema=schema, index_params=indexes)
    client.insert(
        COLLECTION, [{**row, "text": row["text"] or (None if nulls else "")} for row in ROWS]
    )


@contextmanager
def connected(uri: str, *, nulls: bool = False) -> Iterator[MilvusClient]:
    client = MilvusClient(uri)
    try:
        fill(client, nulls=nulls)
        yield client
    finally:
        client.close()


@pytest.fixture(scope="module")
def milvus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MilvusClient]:
    data_dir = tmp_path_factory.mktemp("milvus26")
    credentials = {"gpu_box": "s3cret"}
    with running_milvus26(data_dir, credentials=credentials) as uri, connected(uri) as client:
        yield client


def ranker(
    endpoint: str,
    queries: Any = ("which?",),
    *,
    input_fields: tuple[str, ...] = ("text",),
    without: str | None = None,
    **params: Any,
) -> Function:
    """A Function as a user writes it; ``without`` leaves one of its usual params out."""
    usual = {"reranker": "model", "provider": "vllm", "endpoint": endpoint}
    usual["queries"] = list(queries) if isinstance(queries, tuple) else queries
    usual = {key: value for key, value in {**usual, **params}.items() if key != without}
    return Function("rerank", FunctionType.RERANK, list(input_fields), params=usual)


def search(
    client: MilvusClient, ranker: Function | None = None, data: Any = (ORIGIN,), **kwargs: Any
) -> list[list[Any]]:
    arguments = {"anns_field": "dense", "limit": 3, "output_fields": ["text"], **kwargs}
    return client.search(COLLECTION, data=list(data), ranker=ranker, **arguments)


def leg(field: str = "dense", limit: int = 3, data: Any = (ORIGIN,), **param: Any) -> Any:
    return AnnSearchRequest(data=list(data), anns_field=field, param=param, limit=limit)


def keys(hits: list[Any]) -> list[int]:
    return [hit["pk"] for hit in hits]


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(MilvusException) as caught:
        call()
    return str(caught.value.message)


# The request


def test_the_path_of_the_endpoint_is_replaced_by_rerank(milvus, vllm):
    search(milvus, ranker(vllm.url + "/team-a/v1/"))
    assert [request["path"] for request in vllm.requests] == ["/rerank"]


def test_the_body_is_the_query_and_the_documents_only(milvus, vllm):
    search(milvus, ranker(vllm.url, model="bge", instruction="Be kind", max_batch=1, maxBatch=1))
    assert vllm.bodies == [{"query": "which?", "documents": ["one", "two", "three"]}]


def test_truncation_is_sent_as_a_number_when_the_function_has_it(milvus, vllm):
    search(milvus, ranker(vllm.url, truncate_prompt_tokens=-1))
    assert vllm.bodies[0]["truncate_prompt_tokens"] == -1


def test_no_authorization_is_sent_without_a_credential(milvus, vllm):
    search(milvus, ranker(vllm.url, api_key="never read"))
    assert "authorization" not in vllm.requests[0]["headers"]


def test_a_credential_names_the_key_that_is_sent(milvus, vllm):
    search(milvus, ranker(vllm.url, credential="gpu_box"))
    assert vllm.requests[0]["headers"]["authorization"] == "Bearer s3cret"


def test_keys_match_in_any_case(milvus, vllm):
    function = ranker(
        vllm.url,
        without="provider",
        Provider="VLLM",
        MAX_CLIENT_BATCH_SIZE=2,
    )
    search(milvus, function)
    assert vllm.documents == [["one", "two"], ["three"]]


def test_the_key_queries_matches_in_its_own_case_only(milvus, vllm):
    function = ranker(vllm.url, without="queries", Queries=["which?"])
    assert "missing required param: queries" in refusal(lambda: search(milvus, function))


def test_batches_are_sent_one_after_the_other_in_the_order_of_the_hits(milvus, vllm):
    vllm.scores = {"one": 0.1, "two": 0.2, "three": 0.3, "four": 0.4, "six": 0.6}
    hits = search(milvus, ranker(vllm.url, max_client_batch_size=4), limit=6)
    assert vllm.documents == [["one", "two", "three", "four"], ["", "six"]]
    assert keys(hits[0]) == [6, 4, 3, 2, 1, 5]


def test_a_batch_holds_32_documents_by_default(milvus, vllm):
    pks = list(range(100, 140))
    rows = [{"pk": pk, "dense": [9.0, pk], "text": f"text {pk}", "title": "x"} for pk in pks]
    milvus.insert(COLLECTION, rows)
    try:
        search(milvus, ranker(vllm.url), data=[[9.0, 0.0]], limit=40, filter="pk >= 100")
    finally:
        milvus.delete(COLLECTION, ids=pks)
    assert [len(documents) for documents in vllm.documents] == [32, 8]


def test_every_query_vector_is_reranked_with_the_query_in_its_place(milvus, vllm):
    function = ranker(vllm.url, ("first", "second"))
    search(milvus, function, data=[ORIGIN, [0.6, 0.0]], limit=2)
    assert [(body["query"], body["documents"]) for body in vllm.bodies] == [
        ("first", ["one", "two"]),
        ("second", ["six", ""]),
    ]


def test_a_null_document_counts_as_empty_from_milvus_3_on(tmp_path, vllm):
    with (
        running_milvus26(tmp_path, version="3.0.1") as uri,
        connected(uri, nulls=True) as client,
    ):
        search(client, ranker(vllm.url), filter="pk == 5")
    assert vllm.documents == [[""]]


@pytest.mark.parametrize("version", ["2.6.4", "v2.7.0-dev"])
@pytest.mark.parametrize("row", [1, 5])
def test_a_field_that_may_hold_nulls_is_refused_before_milvus_3(tmp_path, vllm, version, row):
    with running_milvus26(tmp_path, version=version) as uri, connected(uri, nulls=True) as client:
        refused = refusal(lambda: search(client, ranker(vllm.url), filter=f"pk == {row}"))
    assert refused == "function input field cannot be nullable"
    assert vllm.requests == []


def test_no_candidates_means_no_request(milvus, vllm):
    hits = search(milvus, ranker(vllm.url), filter="pk > 1000")
    assert hits[0] == []
    assert vllm.requests == []


# The answer


def test_the_score_replaces_the_distance_as_a_float32(milvus, vllm):
    vllm.scores = {"one": 0.1, "two": 0.7, "three": -0.3}
    hits = search(milvus, ranker(vllm.url))[0]
    assert keys(hits) == [2, 1, 3]
    assert [hit["distance"] for hit in hits] == [
        0.699999988079071,
        0.10000000149011612,
        -0.30000001192092896,
    ]


def test_the_output_fields_come_with_the_hit_and_the_input_field_only_when_asked(milvus, vllm):
    hits = search(milvus, ranker(vllm.url), output_fields=["title"])[0]
    assert hits[0]["entity"] == {"title": "milvus"}


def test_equal_scores_are_ordered_by_primary_key(milvus, vllm):
    hits = search(milvus, ranker(vllm.url), data=[[0.6, 0.0]], limit=4)
    assert vllm.documents == [["six", "", "four", "three"]]
    assert keys(hits[0]) == [3, 4, 5, 6]


def test_scores_that_differ_below_float32_are_equal(milvus, vllm):
    vllm.scores = {"one": 0.5, "two": 0.5 + 1e-9}
    assert keys(search(milvus, ranker(vllm.url), limit=2)[0]) == [1, 2]


def test_results_are_read_by_position_so_a_dropped_one_shifts_the_rest(milvus, vllm):
    results = [{"index": 2, "relevance_score": 0.9}, {"index": 0, "relevance_score": 0.1}]
    vllm.next_answers = [(200, json.dumps({"results": results}))]
    hits = search(milvus, ranker(vllm.url))[0]
    assert [(hit["pk"], round(hit["distance"], 3)) for hit in hits] == [(2, 0.9), (1, 0.1), (3, 0)]


def test_more_results_than_documents_fail_the_search(milvus, vllm):
    results = [{"index": index, "relevance_score": 0.1} for index in range(4)]
    vllm.next_answers = [(200, json.dumps({"results": results}))]
    assert "index out of range" in refusal(lambda: search(milvus, ranker(vllm.url)))


@pytest.mark.parametrize(
    "body",
    ["<html>", '{"results": [{"index": 0, "relevance_score": NaN}]}', "[]", '{"results": "x"}'],
)
def test_an_answer_that_is_not_a_rerank_answer_fails_the_search_at_once(milvus, vllm, body):
    vllm.next_answers = [(200, body)]
    message = refusal(lambda: search(milvus, ranker(vllm.url)))
    assert "call service failed, unmarshal response failed" in message
    assert len(vllm.requests) == 1


# The tries


@pytest.mark.parametrize("status", [400, 404, 500, 503, 201])
def test_any_status_but_200_is_tried_three_times_then_fails_the_search(milvus, vllm, status):
    vllm.next_answers = [(status, '{"detail":"out of luck"}')] * 3
    message = refusal(lambda: search(milvus, ranker(vllm.url)))
    assert "call service failed" in message
    assert str(status) in message
    assert '{"detail":"out of luck"}' in message
    assert len(vllm.requests) == 3


def test_a_third_try_that_works_is_an_answer(milvus, vllm):
    vllm.next_answers = [(500, "no"), (503, "not yet")]
    vllm.scores = {"two": 1.0}
    assert keys(search(milvus, ranker(vllm.url))[0]) == [2, 1, 3]


def test_a_batch_that_fails_fails_the_whole_search(milvus, vllm):
    vllm.next_answers = [(200, '{"results": []}'), (500, "no"), (500, "no"), (500, "no")]
    message = refusal(lambda: search(milvus, ranker(vllm.url, max_client_batch_size=1)))
    assert "call service failed" in message
    assert vllm.documents == [["one"], ["two"], ["two"], ["two"]]


def test_a_refused_connection_fails_the_search(milvus):
    endpoint = f"http://127.0.0.1:{closed_port()}"
    message = refusal(lambda: search(milvus, ranker(endpoint)))
    address = endpoint.removeprefix("http://")
    assert (
        f'call service failed, errs:[Post "{endpoint}/rerank": dial tcp {address}: connect: '
        "connection refused]" in message
    )


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (socket.gaierror(-2, "Name or service not known"), "dial tcp: lookup vllm on"),
        (OSError(errno.EHOSTUNREACH, "No route to host"), "vllm:8000: connect: no route to host"),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), "connect: network is unreachable"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), "connection reset by peer"),
        (RemoteDisconnected("closed"), "EOF"),
        (IncompleteRead(b"", 5), "unexpected EOF"),
        (
            ssl.SSLError(1, "wrong version number"),
            "http: server gave HTTP response to HTTPS client",
        ),
        (ssl.SSLCertVerificationError(1, "self-signed"), "tls: failed to verify certificate"),
        (TimeoutError("timed out"), "context deadline exceeded"),
    ],
)
def test_a_broken_exchange_is_told_in_the_words_of_go(error, words):
    assert words in in_gos_words(error, urlsplit("http://vllm:8000/rerank"))


@pytest.mark.parametrize(("status", "is_asked"), [(307, True), (308, True), (302, False)])
def test_a_redirect_is_followed_and_some_lose_the_method_and_the_body(milvus, status, is_asked):
    with running_fake_vllm() as fake:
        fake.replies = [Reply(status, b"", {"location": "/rerank/"})] * 3
        if is_asked:
            del fake.replies[1:]
            assert len(search(milvus, ranker(fake.url))[0]) == 3
        else:  # it comes as a GET, for which the fake has nothing there
            assert "404 Not Found" in refusal(lambda: search(milvus, ranker(fake.url)))
        assert {request.path for request in fake.received} == (
            {"/rerank", "/rerank/"} if is_asked else {"/rerank"}
        )


def test_a_time_limit_of_the_function_ends_the_tries(milvus, vllm):
    vllm.next_answers = [(500, "no")] * 3
    message = refusal(lambda: search(milvus, ranker(vllm.url, timeout_ms=1)))
    assert "context deadline exceeded" in message
    assert len(vllm.requests) <= 1


# The candidates


def test_search_reranks_its_limit_of_hits_and_no_more(milvus, vllm):
    vllm.scores = {"six": 1.0}
    assert keys(search(milvus, ranker(vllm.url), limit=2)[0]) == [1, 2]
    assert vllm.documents == [["one", "two"]]


def test_search_reranks_limit_and_offset_then_skips_the_offset(milvus, vllm):
    vllm.scores = {"three": 0.9, "two": 0.5, "one": 0.1}
    hits = search(milvus, ranker(vllm.url), limit=2, search_params={"offset": 1})
    assert vllm.documents == [["one", "two", "three"]]
    assert keys(hits[0]) == [2, 1]


def test_search_filters_before_it_reranks(milvus, vllm):
    search(milvus, ranker(vllm.url), filter="pk in [4, 6]")
    assert vllm.documents == [["four", "six"]]


def test_search_by_text_is_reranked(milvus, vllm):
    vllm.scores = {"six": 0.3, "two": 0.2, "one": 0.1}
    hits = search(milvus, ranker(vllm.url), data=["milvus"], anns_field="sparse")
    assert keys(hits[0]) == [6, 2, 1]


def test_hybrid_search_reranks_the_union_of_its_legs_once_each(milvus, vllm):
    vllm.scores = {"six": 0.9, "one": 0.5}
    legs = [leg(limit=2), leg("sparse", 3, data=["milvus"])]
    hits = milvus.hybrid_search(COLLECTION, legs, ranker=ranker(vllm.url), limit=2)
    assert len(vllm.documents) == 1
    assert sorted(vllm.documents[0]) == ["one", "six", "two"]
    assert keys(hits[0]) == [6, 1]


def test_hybrid_search_with_one_leg_has_a_pool_larger_than_its_answer(milvus, vllm):
    vllm.scores = {"four": 1.0}
    hits = milvus.hybrid_search(
        COLLECTION, [leg(limit=4)], ranker=ranker(vllm.url), limit=1, output_fields=["text"]
    )
    assert vllm.documents == [["one", "two", "three", "four"]]
    assert hits[0][0]["entity"] == {"text": "four"}


def test_hybrid_search_skips_its_offset_after_the_reranking(milvus, vllm):
    hits = milvus.hybrid_search(
        COLLECTION, [leg(limit=4)], ranker=ranker(vllm.url), limit=2, offset=1
    )
    assert keys(hits[0]) == [2, 3]


def test_the_offset_of_a_leg_is_ignored(milvus, vllm):
    milvus.hybrid_search(COLLECTION, [leg(offset=2)], ranker=ranker(vllm.url), limit=1)
    assert vllm.documents == [["one", "two", "three"]]


def test_a_varchar_primary_key_can_be_the_text(milvus, vllm):
    milvus.create_collection("names", dimension=2, id_type="string", max_length=20)
    milvus.insert("names", [{"id": "b", "vector": [1.0, 0.0]}, {"id": "a", "vector": [1.0, 0.1]}])
    function = ranker(vllm.url, input_fields=("id",))
    hits = milvus.search("names", data=[[1.0, 0.0]], limit=2, ranker=function)
    milvus.drop_collection("names")
    assert vllm.documents == [["b", "a"]]
    assert [hit["id"] for hit in hits[0]] == ["a", "b"]


# The refusals


REFUSALS = {
    "rerank function lost params endpoint": {"without": "endpoint"},
    "endpoint: [vllm:8000] is not a valid http/https link": {"endpoint": "vllm:8000"},
    "endpoint: [ftp://h] is not a valid http/https link": {"endpoint": "ftp://h"},
    "endpoint: [http://] is not a valid http/https link": {"endpoint": "http://"},
    "endpoint: [http://h:x] is not a valid http/https link": {"endpoint": "http://h:x"},
    "reranker name not specified": {"without": "reranker"},
    "unsupported reranker best": {"reranker": "best"},
    "lost rerank params:provider": {"without": "provider"},
    "unknown rerank model provider:cohere": {"provider": "cohere"},
    "parse rerank params [queries] failed": {"queries": "which?"},
    "parse rerank params [queries] failed: not a JSON array": {"queries": [1]},
    "rerank queries must not be empty": {"queries": []},
    "rerank function missing required param: queries": {"without": "queries"},
    "queries count (3) != nq count (1)": {"queries": ["a", "b", "c"]},
    "input field body not found in collection schema": {"input_fields": ("body",)},
    "model input field pk must be VarChar, got Int64": {"input_fields": ("pk",)},
    "model input field dense must be VarChar, got FloatVector": {"input_fields": ("dense",)},
    "model reranker requires exactly 1 input field, got 2": {"input_fields": ("text", "title")},
    "[max_client_batch_size param's value: many] is not a valid number": {
        "max_client_batch_size": "many"
    },
    "[max_client_batch_size param's value: 0] must be greater than 0": {"max_client_batch_size": 0},
    "truncate_prompt_tokens: all is not a number": {"truncate_prompt_tokens": "all"},
    "gone is not a apikey crediential": {"credential": "gone"},
}


@pytest.mark.parametrize(("message", "params"), REFUSALS.items(), ids=REFUSALS)
def test_what_milvus_refuses_is_refused_in_its_words_by_search(milvus, vllm, message, params):
    function = ranker(**{"endpoint": vllm.url, **params})
    assert message in refusal(lambda: search(milvus, function))
    assert vllm.requests == []


@pytest.mark.parametrize(("message", "params"), REFUSALS.items(), ids=REFUSALS)
def test_what_milvus_refuses_is_refused_by_hybrid_search_too(milvus, vllm, message, params):
    function = ranker(**{"endpoint": vllm.url, **params})
    assert message in refusal(
        lambda: milvus.hybrid_search(COLLECTION, [leg()], ranker=function, limit=1)
    )
    assert vllm.requests == []


def test_grouping_is_refused(milvus, vllm):
    message = refusal(lambda: search(milvus, ranker(vllm.url), group_by_field="title"))
    assert "does not support grouping search" in message


def test_legs_with_different_numbers_of_queries_are_refused(milvus, vllm):
    legs = [leg(), leg("sparse", data=["a", "b"])]
    message = refusal(
        lambda: milvus.hybrid_search(COLLECTION, legs, ranker=ranker(vllm.url), limit=1)
    )
    assert "sub search request nq should be the same" in message


def test_a_missing_collection_is_refused(milvus, vllm):
    function = ranker(vllm.url)
    message = refusal(lambda: milvus.search("nowhere", data=[ORIGIN], ranker=function))
    assert "nowhere" in message


def test_a_released_collection_is_refused(milvus, vllm):
    milvus.release_collection(COLLECTION)
    try:
        assert "load" in refusal(lambda: search(milvus, ranker(vllm.url)))
    finally:
        milvus.load_collection(COLLECTION)


# The rest of the server


def test_the_version_is_the_one_it_was_started_with(milvus):
    assert milvus.get_server_version() == "2.6.4"


def test_an_unranked_bm25_search_has_positive_scores_best_first(milvus):
    scores = [hit["distance"] for hit in search(milvus, data=["milvus"], anns_field="sparse")[0]]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    assert min(scores) > 0


def test_an_unranked_search_keeps_its_distances(milvus):
    hits = search(milvus)[0]
    assert keys(hits) == [1, 2, 3]
    assert hits[0]["distance"] == pytest.approx(0.01)


def test_rrf_fusion_is_left_to_milvus_lite(milvus):
    fusion = Function("rrf", FunctionType.RERANK, [], params={"reranker": "rrf", "k": 60})
    legs = [leg(limit=2), leg("sparse", 3, data=["milvus"])]
    hits = milvus.hybrid_search(COLLECTION, legs, ranker=fusion, limit=3)
    assert sorted(keys(hits[0])) == [1, 2, 6]


def test_a_server_before_2_6_ignores_the_ranker_in_silence(tmp_path):
    nowhere = ranker(f"http://127.0.0.1:{closed_port()}", ("too", "many"))
    with running_milvus26(tmp_path, version="v2.5.9-dev") as uri, connected(uri) as client:
        assert client.get_server_version() == "v2.5.9-dev"
        assert keys(search(client, nowhere)[0]) == [1, 2, 3]
        hits = client.hybrid_search(COLLECTION, [leg()], ranker=nowhere, limit=2)
        assert keys(hits[0]) == [1, 2]


def test_a_server_whose_operator_disabled_vllm_refuses_it(tmp_path, vllm):
    with running_milvus26(tmp_path, vllm_enabled=False) as uri, connected(uri) as client:
        message = refusal(lambda: search(client, ranker(vllm.url)))
    assert "rerank provider: [vllm] is disabled" in message


def test_the_server_ends_with_its_block_even_while_a_rerank_call_hangs(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent_vllm:
        function = ranker(f"http://127.0.0.1:{silent_vllm.getsockname()[1]}")
        with running_milvus26(tmp_path) as uri, connected(uri) as client:
            searching = threading.Thread(target=search_in_vain, args=(client, function))
            searching.start()
            call, _ = silent_vllm.accept()
        searching.join()
        call.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(uri.rpartition(":")[2])))


def search_in_vain(client: MilvusClient, function: Function) -> None:
    with suppress(Exception):  # the server goes away meanwhile
        search(client, function)
