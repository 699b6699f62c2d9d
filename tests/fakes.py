"""A fake vLLM, for scores a test chooses and for faults. Not for anything the real one can show."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from langchain_core.embeddings import Embeddings


@dataclass
class Reply:
    """What the fake answers in place of scores."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def json(cls, status: int, body: Any, **headers: str) -> Reply:
        return cls(
            status, json.dumps(body).encode(), {"content-type": "application/json", **headers}
        )


@dataclass
class Received:
    """One request as the fake received it."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]


@dataclass
class FakeVLLM:
    """Answers rerank requests with `score(query, document)`, or with the next of `replies`."""

    url: str = ""
    score: Callable[[str, str], float] = lambda query, document: float(len(document))
    replies: list[Reply] = field(default_factory=list)
    always: Reply | None = None
    # The models that are served; None cannot be asked for them. And how often it was asked.
    models: Sequence[str] | None = None
    asked_for_models: int = 0
    received: list[Received] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    # Reached by every request before it is answered; a test may make requests wait for others.
    gate: threading.Barrier | None = None

    def reset(self) -> None:
        self.score = FakeVLLM.score
        self.replies, self.received, self.always = [], [], None
        self.most_in_flight, self.gate = 0, None
        self.models, self.asked_for_models = None, 0

    def answer(self, received: Received) -> Reply:
        if self.replies:
            return self.replies.pop(0)
        if self.always:
            return self.always
        query, documents = received.body["query"], received.body["documents"]
        results = [
            {"index": i, "document": {"text": d}, "relevance_score": self.score(query, d)}
            for i, d in enumerate(documents)
        ]
        results.sort(key=lambda result: -result["relevance_score"])
        return Reply.json(200, {"id": "fake", "model": "fake", "usage": {}, "results": results})


@contextmanager
def running_fake_vllm() -> Iterator[FakeVLLM]:
    """Run a fake vLLM on a free local port."""
    fake = FakeVLLM()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            received = Received(
                self.path, {k.lower(): v for k, v in self.headers.items()}, json.loads(body)
            )
            with lock:
                fake.received.append(received)
                fake.in_flight += 1
                fake.most_in_flight = max(fake.most_in_flight, fake.in_flight)
            try:
                if fake.gate:
                    fake.gate.wait(timeout=10)
                with lock:
                    reply = fake.answer(received)
            finally:
                with lock:
                    fake.in_flight -= 1
            self.reply(reply)

        def do_GET(self) -> None:
            with lock:
                fake.asked_for_models += self.path.endswith("/v1/models")
                models = fake.models
            listed = {"data": [{"id": name} for name in models or ()]}
            self.reply(Reply.json(404 if models is None else 200, listed))

        def reply(self, reply: Reply) -> None:
            self.send_response(reply.status)
            for name, value in {**reply.headers, "content-length": str(len(reply.body))}.items():
                self.send_header(name, value)
            with suppress(ConnectionError):  # who asked may have hung up
                self.end_headers()
                self.wfile.write(reply.body)

        def log_message(self, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128  # a burst of connections is not refused

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield fake
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def tcp_server(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """The URL of a server whose answers need not be HTTP; it ends where one breaks off."""

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection:
                    connection.recv(65_536)
                    answer(connection)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class LetterEmbeddings(Embeddings):
    """A tiny deterministic embedding: how often each of eight letters stands in the text."""

    dim = 8

    def embed_query(self, text: str) -> list[float]:
        return [0.1 + text.lower().count(letter) for letter in "aeinorst"]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]
