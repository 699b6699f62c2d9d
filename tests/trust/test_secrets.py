"""No secret shows: not where an object is written, nor in a log, an error, a trace or a request.

Every secret here begins with "sk-", so that a part of one is found as well.
"""

from __future__ import annotations

import base64
import copy
import dataclasses
import inspect
import json
import logging
import pickle
import pprint
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.documents import Document
from langchain_core.load import dumpd, dumps
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import create_retriever_tool
from langchain_core.tracers import BaseTracer
from llama_index.core.callbacks import CallbackManager, LlamaDebugHandler
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.event_handlers import BaseEventHandler
from llama_index_instrumentation.span import BaseSpan
from llama_index_instrumentation.span_handlers import BaseSpanHandler
from pydantic import BaseModel, TypeAdapter
from pymilvus import DataType, Function, FunctionType, MilvusClient, MilvusException
from rich.pretty import pretty_repr

from milvus_vllm_retrievers import (
    ConfigurationError,
    MilvusVLLMError,
    RerankError,
    RerankStatusError,
    SearchError,
    VLLMRanker,
    langchain,
)
from milvus_vllm_retrievers import llama_index as li
from tests.corpus import create_collection
from tests.fakes import FakeVLLM, Reply, running_fake_vllm, tcp_server
from tests.trust.leaks import texts_of

KEY = "sk-key-of-vllm"
PASSWORD = "sk-password-of-milvus"
IN_URI = "sk-password-in-uri"
LOGIN = {"token": f"root:{PASSWORD}", "connection_args": {"password": PASSWORD}}
NAME = "secret_docs"
# Neither does this begin with "sk-", nor does the plugin that watches the suite know it: Milvus
# Lite knows it by itself, and what pymilvus logs of it is not ours.
KEY_OF_COLLECTION = "Collection-Key-70f3"

Act = Callable[[Any], Awaitable[Any]]


def is_shown(text: str) -> bool:
    """Tell whether a secret, or the beginning of one, is in a text, in clear or in base64."""
    coded = [base64.b64encode(secret.encode()).decode() for secret in (KEY, LOGIN["token"])]
    return "sk-" in text or any(code in text for code in coded)


def written(error: BaseException) -> str:
    """Return all that a log or an error tracker may hold of an error, its local variables aside."""
    told = "".join(traceback.TracebackException.from_exception(error).format())
    return "\n".join([*texts_of(error), told])


def uri_of(uri: str) -> str:
    """Put a login into an address."""
    return uri.replace("://", f"://root:{IN_URI}@")


def ranker(endpoint: str = "http://127.0.0.1:1", **arguments: Any) -> VLLMRanker:
    return VLLMRanker(endpoint, **{"api_key": KEY, "max_retries": 0, **arguments})


def made(class_: type, milvus: str = "http://127.0.0.1:1", **arguments: Any) -> Any:
    """Make an object of a front end's class, with a secret wherever it takes one."""
    given = {"ranker": ranker()} | arguments
    if class_.__name__ == "VLLMRerank":
        return class_(**given)
    if class_.__name__ == "MilvusVLLMRerank":  # refuses a key that Milvus would not send
        given["ranker"] = dataclasses.replace(given["ranker"], credential="vllm-prod")
    return class_(collection_name=NAME, uri=uri_of(milvus), **(LOGIN | given))


CLASSES = [
    getattr(module, name)
    for module in (langchain, li)
    for name in ("MilvusVLLMRetriever", "VLLMRerank", "MilvusVLLMRerank")
]
RETRIEVERS = [class_ for class_ in CLASSES if "Retriever" in class_.__name__]
every_class = pytest.mark.parametrize(
    "class_", CLASSES, ids=lambda c: f"{c.__module__.rpartition('.')[2]}.{c.__name__}"
)
every_retriever = pytest.mark.parametrize(
    "class_", RETRIEVERS, ids=lambda c: c.__module__.rpartition(".")[2]
)
DOCUMENTS = [Document(id=str(i), page_content=text) for i, text in enumerate(["one", "another"])]
NODES = [NodeWithScore(node=TextNode(id_=d.id, text=d.page_content)) for d in DOCUMENTS]


@pytest.fixture(params=["sync", "async"])
def act(request: pytest.FixtureRequest) -> Act:
    """Use an object as it is meant to be used, and close it; blocking in one run, then async."""
    methods = {
        (langchain, "Retriever"): ("invoke", ("a text",)),
        (langchain, "Rerank"): ("compress_documents", (DOCUMENTS, "a text")),
        (li, "Retriever"): ("retrieve", ("a text",)),
        (li, "Rerank"): ("postprocess_nodes", (NODES, None, "a text")),
    }

    async def use(subject: Any) -> Any:
        module = li if type(subject).__module__ == li.__name__ else langchain
        kind = "Retriever" if "Retriever" in type(subject).__name__ else "Rerank"
        method, arguments = methods[module, kind]
        try:
            if request.param == "sync":
                return getattr(subject, method)(*arguments)
            return await getattr(subject, f"a{method}")(*arguments)
        finally:
            await subject.aclose()

    return use


# What is written of an object


def dumped(thing: Any) -> Iterator[tuple[str, str]]:
    """Yield every way in which an object is written, and what it writes."""
    for write in (repr, str, pprint.pformat, pretty_repr, dumpd, dumps, "{}".format):
        yield getattr(write, "__name__", "format"), str(write(thing))
    if isinstance(thing, BaseModel):
        yield "model_dump", str(thing.model_dump())
        yield "model_dump to JSON", str(thing.model_dump(mode="json"))
        yield "model_dump_json", thing.model_dump_json()
    for method in ("to_dict", "to_json"):
        if hasattr(thing, method):
            yield method, str(getattr(thing, method)())


@every_class
def test_no_way_of_writing_an_object_shows_a_secret(class_: type) -> None:
    ways = dict(dumped(made(class_)))

    assert [way for way, text in ways.items() if is_shown(text)] == []
    assert len(ways) >= 7


@pytest.mark.parametrize("secret", ["token", "ranker"])
@every_class
def test_a_secret_that_an_object_holds_is_masked_also_among_its_variables(
    class_: type, secret: str
) -> None:
    held = vars(made(class_))

    assert not is_shown(repr(held.get(secret)))


@pytest.mark.parametrize(
    "arguments", [{}, {"headers": {"x-key": KEY}}, {"api_key": partial(str, KEY)}]
)
def test_no_way_of_writing_a_ranker_shows_its_key(arguments: dict[str, Any]) -> None:
    given = ranker(credential="vllm-prod", **arguments)
    adapter = TypeAdapter(VLLMRanker)
    ways = dict(dumped(given)) | {
        "vars": str(vars(given)),
        "asdict": str(dataclasses.asdict(given)),
        "astuple": str(dataclasses.astuple(given)),
        "pydantic": str(adapter.dump_python(given)),
        "pydantic to JSON": adapter.dump_json(given).decode(),
        "JSON by str": json.dumps(dataclasses.asdict(given), default=str),
    }

    assert [way for way, text in ways.items() if is_shown(text)] == []
    assert "vllm-prod" in ways["repr"]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@every_class
def test_no_object_is_pickled_and_the_error_says_what_to_do(class_: type, protocol: int) -> None:
    subject = made(class_)

    with pytest.raises(TypeError, match="neither pickled nor copied: make it anew") as caught:
        pickle.dumps(subject, protocol)

    assert not is_shown(written(caught.value))


@every_class
def test_no_object_is_copied_deeply_and_the_error_says_what_to_do(class_: type) -> None:
    subject = made(class_)

    with pytest.raises(TypeError, match="neither pickled nor copied: make it anew") as caught:
        copy.deepcopy(subject)

    assert not is_shown(written(caught.value))


def test_a_ranker_with_a_key_is_not_pickled() -> None:
    with pytest.raises(TypeError, match="with an api_key is not pickled") as caught:
        pickle.dumps(ranker())

    assert not is_shown(written(caught.value))


# What Milvus is given


def test_the_function_for_milvus_names_a_credential_and_holds_no_key() -> None:
    function = ranker(credential="vllm-prod").to_function("a text", "document")

    assert function.params["credential"] == "vllm-prod"
    assert KEY.encode() not in pickle.dumps(function)
    assert not is_shown(f"{function.params} {function.to_dict()}")


@pytest.mark.parametrize("arguments", [{}, {"credential": "vllm-prod"}])
def test_there_is_no_function_for_milvus_lite_that_would_hold_a_key(
    arguments: dict[str, str],
) -> None:
    with pytest.raises(ConfigurationError, match="would carry the api_key in clear") as caught:
        ranker(**arguments).to_function("a text", "document", provider="cohere")

    assert not is_shown(written(caught.value))


class Milvus:
    """Stands for both of pymilvus's clients: notes what it is given; its searches may fail."""

    def __init__(self, error: BaseException | None = None, *, is_async: bool = False) -> None:
        self.error = error
        self.fails_without_ranker = True
        self.is_async = is_async
        self.given: list[Any] = []

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("_"):
            raise AttributeError(method)

        def call(**arguments: Any) -> Any:
            self.given.append(arguments)
            fails = self.fails_without_ranker or "ranker" in arguments
            if self.error and "search" in method and fails:
                raise self.error
            return self._answers.get(method)

        async def acall(**arguments: Any) -> Any:
            return call(**arguments)

        return acall if self.is_async else call

    @property
    def _answers(self) -> dict[str, Any]:
        fields = [
            {"name": "pk", "type": DataType.INT64, "is_primary": True},
            {"name": "text", "type": DataType.VARCHAR},
            {"name": "sparse", "type": DataType.SPARSE_FLOAT_VECTOR, "is_function_output": True},
            {"name": "dense", "type": DataType.FLOAT_VECTOR, "params": {"dim": 2}},
        ]
        bm25 = {"name": "bm25", "type": FunctionType.BM25, "input_field_names": ["text"]}
        functions = [{**bm25, "output_field_names": ["sparse"], "params": {}}]
        hits = [[{"pk": 0, "distance": 0.5, "entity": {"text": "one"}}]]
        return {
            "describe_collection": {
                "collection_name": NAME,
                "enable_dynamic_field": True,
                "fields": fields,
                "functions": functions,
            },
            "get_server_version": "2.6.4",
            "search": hits,
            "hybrid_search": hits,
        }


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Milvus]]:
    """Put stubs in the place of pymilvus's clients, which raise an error if one is given."""

    def put(error: BaseException | None = None) -> list[Milvus]:
        stubs = [Milvus(error), Milvus(error, is_async=True)]
        for name, stub in zip(("MilvusClient", "AsyncMilvusClient"), stubs, strict=True):
            stub.close = stub.close  # type: ignore[attr-defined]
            monkeypatch.setattr(f"pymilvus.{name}", lambda stub=stub, **_: stub)
        return stubs

    return put


@every_retriever
@pytest.mark.parametrize("mode", ["auto", "server", "client"])
async def test_nothing_that_is_sent_to_milvus_holds_the_key_of_vllm(
    class_: type, act: Act, stubbed: Callable[..., list[Milvus]], fake_vllm: FakeVLLM, mode: Any
) -> None:
    stubs = stubbed()
    asked = ranker(fake_vllm.url, mode=mode, credential="vllm-prod")

    await act(made(class_, ranker=asked, vector_field="sparse"))

    given = [arguments for stub in stubs for arguments in stub.given]
    assert len(given) >= 3
    assert KEY.encode() not in pickle.dumps(given)
    assert (b"vllm-prod" in pickle.dumps(given)) == (mode != "client")


# Errors of Milvus


def failures() -> Iterator[Any]:
    """Yield errors that show a login, in the ways that servers and clients have."""
    token, code = LOGIN["token"], base64.b64encode(LOGIN["token"].encode()).decode()
    chained = MilvusException(1, "not authorised")
    chained.__cause__ = ValueError(f"bad metadata: authorization={token}")
    hidden = MilvusException(1, "not authorised")
    hidden.__context__ = ValueError(f"bad metadata: authorization={token}")
    refused = f"call service failed, errs:[401 Unauthorized, no such key: {token}]"
    yield pytest.param(MilvusException(1, f"login of {token} failed"), id="the token")
    yield pytest.param(MilvusException(1, f"password {PASSWORD} is wrong"), id="the password")
    yield pytest.param(MilvusException(1, f"host {IN_URI}@milvus"), id="the address")
    yield pytest.param(MilvusException(1, f"authorization: {code}"), id="the token in base64")
    yield pytest.param(MilvusException(1, f"{'x' * 185} {token}"), id="cut off in the token")
    yield pytest.param(MilvusException(1, refused), id="of the rerank service")
    yield pytest.param(ValueError(f"cannot use {token}"), id="of another kind")
    yield pytest.param(chained, id="in the cause of the cause")
    yield pytest.param(hidden, id="in the context of the cause")


@every_retriever
@pytest.mark.parametrize("error", list(failures()))
async def test_no_error_of_milvus_shows_a_login(
    class_: type, act: Act, stubbed: Callable[..., list[Milvus]], error: Exception
) -> None:
    stubbed(error)

    with pytest.raises(MilvusVLLMError) as caught:
        await act(made(class_, vector_field="sparse"))

    assert not is_shown(written(caught.value))


@every_retriever
@pytest.mark.parametrize(
    "arguments",
    [
        {"token": "", "connection_args": {"user": "root", "password": PASSWORD}},
        {"token": "", "connection_args": {"token": f"root:{PASSWORD}"}},
        {"token": "", "connection_args": {"uri": f"http://root:{PASSWORD}@127.0.0.1:1"}},
    ],
    ids=["a password", "a token", "an address"],
)
async def test_no_error_shows_a_login_among_the_connections_arguments(
    class_: type,
    act: Act,
    stubbed: Callable[..., list[Milvus]],
    arguments: dict[str, Any],
) -> None:
    stubbed(MilvusException(1, f"login of root:{PASSWORD} failed"))

    with pytest.raises(MilvusVLLMError) as caught:
        await act(made(class_, vector_field="sparse", **arguments))

    assert not is_shown(written(caught.value))


@every_retriever
async def test_no_error_shows_the_login_of_a_client_that_was_passed_in(
    class_: type, act: Act
) -> None:
    error = MilvusException(1, f"login of root:{PASSWORD} failed")
    client, async_client = Milvus(error), Milvus(error, is_async=True)
    for stub in (client, async_client):
        stub._config = SimpleNamespace(
            uri="http://milvus", token=f"root:{PASSWORD}", db_name="", handler_kwargs=()
        )
    subject = class_(
        collection_name=NAME,
        ranker=None,
        client=client,
        async_client=async_client,
        vector_field="sparse",
    )

    with pytest.raises(SearchError) as caught:
        await act(subject)

    assert not is_shown(written(caught.value))


@every_retriever
@pytest.mark.parametrize("on_error", ["raise", "skip"])
async def test_the_key_that_milvus_tells_of_is_not_shown_either(
    class_: type,
    act: Act,
    stubbed: Callable[..., list[Milvus]],
    caplog: pytest.LogCaptureFixture,
    on_error: Any,
) -> None:
    for stub in stubbed(MilvusException(65535, f"call service failed, errs:[401, no key: {KEY}]")):
        stub.fails_without_ranker = False
    asked = ranker(mode="server", credential="vllm-prod", on_error=on_error)

    try:
        shown = repr(await act(made(class_, ranker=asked, vector_field="sparse")))
    except RerankStatusError as error:
        shown = written(error)

    assert "rerank_error" in shown or "RerankStatusError" in shown
    assert not is_shown(shown)
    assert not is_shown(caplog.text)


@every_retriever
async def test_an_unreachable_milvus_is_named_without_the_login(class_: type, act: Act) -> None:
    with pytest.raises(SearchError, match=r"127\.0\.0\.1:1") as caught:
        await act(made(class_, timeout=0.3))

    assert not is_shown(written(caught.value))


@pytest.mark.parametrize(
    "wrong",
    [{"k": 0, "similarity_top_k": 0}, {"timeout": "soon"}, {"tokn": PASSWORD}, {"expr": "("}],
    ids=repr,
)
@every_retriever
def test_an_argument_that_is_refused_brings_no_secret_to_light(
    class_: type, wrong: dict[str, Any]
) -> None:
    unknown = {"langchain": "similarity_top_k", "llama_index": "k"}
    other = unknown[class_.__module__.rpartition(".")[2]]

    with pytest.raises(ConfigurationError) as caught:
        made(class_, **{name: value for name, value in wrong.items() if name != other})

    assert not is_shown(written(caught.value))


def test_an_attribute_that_is_set_wrongly_brings_no_secret_to_light() -> None:
    subject = made(langchain.MilvusVLLMRetriever)

    for name, value in (("k", 0), ("token", [PASSWORD]), ("connection_args", PASSWORD)):
        with pytest.raises(ValueError, match=r".") as caught:
            setattr(subject, name, value)
        assert not is_shown(written(caught.value))


# Errors of vLLM

ECHOES = [
    Reply.json(401, {"error": f"no such key: {KEY}"}),
    Reply.json(403, {"error": {"message": f"no such key: {KEY}"}}),
    Reply.json(400, {"detail": [{"input": {"authorization": f"Bearer {KEY}"}}]}),
    Reply(500, f"<html>{'x' * 185} Bearer {KEY}</html>".encode()),
    Reply.json(200, {"you": f"sent {KEY}"}),
    Reply(200, f"Authorization: Bearer {KEY}".encode(), {"content-type": f"text/{KEY}"}),
    Reply(307, b"", {"location": f"/login?key={KEY}"}),
    Reply(302, b"", {"location": f"http://{KEY}@127.0.0.1:1/"}),
]


SECRET_ARGUMENTS = {
    "api_key": {"api_key": KEY},
    "callable": {"api_key": lambda: KEY},
    "header": {"api_key": None, "headers": {"authorization": f"Bearer {KEY}"}},
}


@pytest.mark.parametrize("reply", ECHOES, ids=lambda reply: f"{reply.status} {reply.body[:20]}")
@pytest.mark.parametrize("secret", SECRET_ARGUMENTS.values(), ids=SECRET_ARGUMENTS)
@pytest.mark.parametrize("class_", [c for c in CLASSES if c.__name__ != "MilvusVLLMRerank"])
async def test_a_key_that_vllm_answers_with_is_not_shown(
    class_: type,
    act: Act,
    stubbed: Callable[..., list[Milvus]],
    fake_vllm: FakeVLLM,
    reply: Reply,
    secret: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    stubbed()
    fake_vllm.always = reply
    more = {"vector_field": "sparse"} if "Retriever" in class_.__name__ else {}

    with pytest.raises(RerankError) as caught:
        await act(made(class_, ranker=ranker(fake_vllm.url, mode="client", **secret), **more))
    asked = ranker(fake_vllm.url, mode="client", on_error="skip", **secret)
    degraded = await act(made(class_, ranker=asked, **more))

    assert not is_shown(written(caught.value))
    assert not is_shown(repr(degraded))
    assert not is_shown(caplog.text)
    assert "rerank_error" in repr(degraded)


@pytest.mark.parametrize(
    "answer",
    [
        b"Authorization: Bearer %b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nBearer %b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: %b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%b\r\n",
        b"HTTP/1.1 401 %b\r\ncontent-length: 0\r\n\r\n",
    ],
    ids=["no HTTP", "a bad header", "a bad length", "a bad chunk", "a reason"],
)
@pytest.mark.parametrize("module", [langchain, li], ids=["langchain", "llama_index"])
async def test_a_key_in_an_answer_that_is_no_http_is_not_shown(
    act: Act, module: Any, answer: bytes
) -> None:
    with (
        tcp_server(lambda connection: connection.sendall(answer % KEY.encode())) as url,
        pytest.raises(RerankError) as caught,
    ):
        await act(module.VLLMRerank(ranker=ranker(url)))

    assert not is_shown(written(caught.value))


# Redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("module", [langchain, li], ids=["langchain", "llama_index"])
async def test_a_redirect_takes_the_key_to_no_other_origin(
    act: Act, module: Any, fake_vllm: FakeVLLM, status: int
) -> None:
    asked = ranker(fake_vllm.url, headers={"x-key": KEY})
    with running_fake_vllm() as other:
        targets = [f"{other.url}/v1/rerank", other.url.removeprefix("http:")]
        for target in targets:
            fake_vllm.replies = [Reply(status, b"", {"location": target})]
            with pytest.raises(RerankStatusError, match="which is not followed"):
                await act(module.VLLMRerank(ranker=asked))

        assert other.received == []

    sent = [(each.path, each.headers["authorization"]) for each in fake_vllm.received]
    assert sent == [("/v1/rerank", f"Bearer {KEY}")] * len(targets)


# Logs


@pytest.fixture(scope="module")
def collection(milvus26: MilvusClient) -> None:
    """A collection that reranks with a model and by key."""
    create_collection(milvus26, NAME, texts=["a text", "another text"])


@every_class
async def test_nobody_logs_a_secret_however_closely_one_listens(
    class_: type,
    act: Act,
    collection: None,
    milvus26_uri: str,
    fake_vllm: FakeVLLM,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    for mode in ("client", "auto"):
        if mode == "client" and class_.__name__ == "MilvusVLLMRerank":
            continue
        subject = made(class_, milvus26_uri, ranker=ranker(fake_vllm.url, mode=mode))
        async with subject:
            assert len(await act(subject)) == 2
            fake_vllm.always = Reply.json(401, {"error": "Unauthorized"})
            with pytest.raises(RerankError):
                await act(subject)
        fake_vllm.always = None

    logged = [f"{record.getMessage()} {record.args}" for record in caplog.records]
    asks_itself = class_.__name__ != "MilvusVLLMRerank"  # pymilvus says nothing of what we tell
    assert any("httpcore" in record.name for record in caplog.records) == asks_itself
    assert [text for text in logged if is_shown(text)] == []
    assert not is_shown(caplog.text)


# Traces


class Runs(BaseTracer):
    """Keeps all that a tracer of LangChain may send away."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[str] = []

    def _persist_run(self, run: Any) -> None:
        self.sent.append(str(run.model_dump(exclude={"client", "child_runs", "parent_run"})))

    def _start_trace(self, run: Any) -> None:
        super()._start_trace(run)
        self.sent.append(f"{run.name} {run.serialized} {run.extra} {run.inputs} {run.tags}")

    def _end_trace(self, run: Any) -> None:
        super()._end_trace(run)
        self.sent.append(f"{run.name} {run.outputs} {run.error} {run.events}")


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("how", ["alone", "batch", "chain", "tool", "compressed"])
@pytest.mark.parametrize("is_async", [False, True])
async def test_a_trace_of_langchain_holds_no_secret(
    collection: None,
    milvus26_uri: str,
    fake_vllm: FakeVLLM,
    how: str,
    *,
    fails: bool,
    is_async: bool,
) -> None:
    runs, runnable = Runs(), traced(how, milvus26_uri, fake_vllm.url)
    if fails:
        fake_vllm.always = Reply.json(401, {"error": f"no such key: {KEY}"})
    method = ("abatch" if how == "batch" else "ainvoke") if is_async else "invoke"
    method = "batch" if how == "batch" and not is_async else method
    asked = ["a text"] if how == "batch" else "a text"

    with suppress(MilvusVLLMError):
        result = getattr(runnable, method)(asked, {"callbacks": [runs]})
        result = await result if is_async else result

    assert any("MilvusVLLMRetriever" in sent for sent in runs.sent)
    assert any("RerankStatusError" in sent for sent in runs.sent) == fails
    assert [sent for sent in runs.sent if is_shown(sent)] == []


def traced(how: str, milvus: str, vllm: str) -> Any:
    """Make what uses a retriever with secrets in one of LangChain's ways."""
    retriever = made(langchain.MilvusVLLMRetriever, milvus, ranker=ranker(vllm, mode="client"))
    if how == "chain":
        return RunnableLambda(str) | retriever.with_config(metadata={"of": "a test"}) | len
    if how == "tool":
        return create_retriever_tool(retriever, "search", "Search.")
    if how == "compressed":
        return ContextualCompressionRetriever(
            base_retriever=retriever,
            base_compressor=made(langchain.VLLMRerank, ranker=ranker(vllm)),
        )
    return retriever


class Events(BaseEventHandler):
    """Keeps all that LlamaIndex's events hold."""

    sent: list[str] = []  # noqa: RUF012 - pydantic copies it

    @classmethod
    def class_name(cls) -> str:
        return "TrustEvents"

    def handle(self, event: Any, **_: Any) -> None:
        self.sent.append(f"{event!r} {event.dict()}")


class Spans(BaseSpanHandler[BaseSpan]):
    """Keeps all that LlamaIndex's spans hold, and the instances they are about."""

    sent: list[str] = []  # noqa: RUF012 - pydantic copies it

    @classmethod
    def class_name(cls) -> str:
        return "TrustSpans"

    def new_span(
        self, id_: str, bound_args: inspect.BoundArguments, instance: Any = None, **more: Any
    ) -> BaseSpan:
        self.sent.append(f"{id_} {bound_args.arguments} {instance!r} {more}")
        return BaseSpan(id_=id_)

    def prepare_to_exit_span(self, id_: str, *_: Any, result: Any = None, **more: Any) -> None:
        self.sent.append(f"{id_} {result!r} {more}")

    def prepare_to_drop_span(self, id_: str, *_: Any, err: Any = None, **more: Any) -> None:
        self.sent.append(f"{id_} {err!r} {more}")


@pytest.fixture
def instrumented() -> Iterator[list[str]]:
    """All that LlamaIndex's instrumentation sends while a test runs."""
    sent: list[str] = []
    root, events, spans = get_dispatcher(), Events(), Spans()
    events.sent, spans.sent = sent, sent
    root.add_event_handler(events)
    root.add_span_handler(spans)
    yield sent
    root.event_handlers.remove(events)
    root.span_handlers.remove(spans)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("class_", [c for c in CLASSES if c.__module__ == li.__name__])
async def test_a_trace_of_llama_index_holds_no_secret(
    class_: type,
    act: Act,
    instrumented: list[str],
    collection: None,
    milvus26_uri: str,
    fake_vllm: FakeVLLM,
    *,
    fails: bool,
) -> None:
    mode = "auto" if class_.__name__ == "MilvusVLLMRerank" else "client"
    debug = LlamaDebugHandler(print_trace_on_end=False)
    manager = CallbackManager([debug])
    subject = made(
        class_, milvus26_uri, ranker=ranker(fake_vllm.url, mode=mode), callback_manager=manager
    )
    if fails:
        body = {} if mode == "auto" else {"error": f"no such key: {KEY}"}
        fake_vllm.always = Reply.json(401, body)

    with suppress(RerankError):
        async with subject:
            await act(subject)

    payloads = str([event.payload for event in debug.get_events()])
    assert any("ReRank" in sent or "Retrieval" in sent for sent in instrumented)
    assert not is_shown(payloads)
    assert [sent for sent in instrumented if is_shown(sent)] == []


# What a collection itself knows


EMBEDDING = Reply.json(200, {"data": [{"index": 0, "embedding": [0.6, 0.8]}]})


@pytest.fixture(scope="module")
def embedding_collection(lite: MilvusClient, _fake_vllm: FakeVLLM) -> None:
    """A collection whose own embedding function holds a key."""
    _fake_vllm.always = EMBEDDING
    schema = lite.create_schema(enable_dynamic_field=True)
    schema.add_field("pk", DataType.INT64, is_primary=True)
    schema.add_field("document", DataType.VARCHAR, max_length=1000)
    schema.add_field("embedded", DataType.FLOAT_VECTOR, dim=2)
    service = {"provider": "openai", "model_name": "a", "base_url": f"{_fake_vllm.url}/v1"}
    params = {**service, "api_key": KEY_OF_COLLECTION}
    schema.add_function(
        Function("embed", FunctionType.TEXTEMBEDDING, ["document"], ["embedded"], params=params)
    )
    index = lite.prepare_index_params()
    index.add_index("embedded", index_type="AUTOINDEX", metric_type="COSINE")
    lite.drop_collection(NAME)
    lite.create_collection(NAME, schema=schema, index_params=index, consistency_level="Strong")
    lite.insert(NAME, [{"pk": 0, "document": "a text"}])


@pytest.fixture
def embedded(embedding_collection: None, fake_vllm: FakeVLLM) -> FakeVLLM:
    """The service that a collection's own embedding function asks."""
    fake_vllm.always = EMBEDDING
    return fake_vllm


def of_this_package(caplog: pytest.LogCaptureFixture) -> str:
    ours = [r for r in caplog.records if r.name.startswith("milvus_vllm_retrievers")]
    return str([(record.getMessage(), record.args, record.exc_text) for record in ours])


@every_retriever
async def test_the_key_of_a_collections_function_is_nowhere(
    class_: type,
    act: Act,
    embedded: FakeVLLM,
    lite: MilvusClient,
    lite_uri: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    assert KEY_OF_COLLECTION in str(lite.describe_collection(NAME))
    async with class_(collection_name=NAME, ranker=None, uri=lite_uri) as subject:
        found = repr(await act(subject))
        explained = repr(subject.explain("a text"))
        kept = pprint.pformat(vars(subject._adapter))

    assert "a text" in found
    assert KEY_OF_COLLECTION not in found + explained + kept + of_this_package(caplog)
    assert KEY_OF_COLLECTION in embedded.received[-1].headers["authorization"]


@every_retriever
@pytest.mark.parametrize(
    "reply",
    [
        Reply.json(401, {"error": "Unauthorized"}),
        Reply(500, b"it broke"),
        Reply.json(401, {"error": f"no such key: {KEY_OF_COLLECTION}"}),
        Reply.json(200, {"data": []}),
        Reply.json(200, {"data": [{"index": 0, "embedding": [0.5] * 3}]}),
    ],
    ids=lambda reply: f"{reply.status} {reply.body[:24]!r}",
)
async def test_the_key_of_a_collections_function_is_in_no_error(
    class_: type,
    act: Act,
    embedded: FakeVLLM,
    lite_uri: str,
    reply: Reply,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    embedded.always = reply

    async with class_(collection_name=NAME, ranker=None, uri=lite_uri) as subject:
        with pytest.raises(SearchError) as caught:
            await act(subject)

    assert KEY_OF_COLLECTION not in written(caught.value) + of_this_package(caplog)


@every_retriever
@pytest.mark.parametrize(
    "arguments", [{"text_field": "documnt"}, {"vector_field": "embeded"}, {"output_fields": ["x"]}]
)
async def test_a_collection_that_does_not_fit_is_described_without_its_functions_params(
    class_: type, act: Act, embedded: FakeVLLM, lite_uri: str, arguments: dict[str, Any]
) -> None:
    async with class_(collection_name=NAME, ranker=None, uri=lite_uri, **arguments) as subject:
        try:
            shown = repr(await act(subject))
        except MilvusVLLMError as error:
            shown = written(error)

    assert KEY_OF_COLLECTION not in shown
