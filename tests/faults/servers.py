"""Servers that fail in every way: sockets that refuse, hang or break off, and Milvus processes."""

from __future__ import annotations

import re
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.fakes import FakeVLLM
from tests.faults.table import Answers, BreaksOff, Fault, Floods, Hangs, Refuses

START_SECONDS = 120.0  # far more than it takes: other processes may keep the cores busy


def wait_until(condition: Callable[[], bool], what: str, seconds: float = START_SECONDS) -> None:
    """Return when the condition holds; fail if it does not in time."""
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, f"not in {seconds:.0f} s: {what}"
        time.sleep(0.02)


# Sockets


@contextmanager
def refusing() -> Iterator[str]:
    """The URL of a port on which nobody listens, held so that nobody will."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{holder.getsockname()[1]}"


class Listener(socketserver.ThreadingTCPServer):
    """Takes connections, and lets `converse` do with each what the test is about.

    Attributes:
        arrived: Released once for every request.
        gone: Released once for every connection that has ended.
    """

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, converse: Callable[[Listener, socket.socket], None], port: int = 0) -> None:
        self.converse = converse
        self.arrived = threading.Semaphore(0)
        self.gone = threading.Semaphore(0)
        self._connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), socketserver.BaseRequestHandler)

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def finish_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        try:
            self.converse(self, request)
        finally:
            self._connections.discard(request)
            self.gone.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: that the other side breaks off is what this is for."""

    def hang_up(self) -> None:
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def listening(
    converse: Callable[[Listener, socket.socket], None], port: int = 0
) -> Iterator[Listener]:
    """Run a listener; at the end nobody listens there, and its connections are cut."""
    with Listener(converse, port) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
            server.server_close()
            server.hang_up()


def _read_request(connection: socket.socket) -> None:
    head, _, body = _read_to(connection, b"\r\n\r\n").partition(b"\r\n\r\n")
    length = int(re.search(rb"(?i)content-length: *(\d+)", head)[1])  # type: ignore[index]
    while len(body) < length:
        body += connection.recv(65_536)


def _read_to(connection: socket.socket, mark: bytes) -> bytes:
    received = b""
    while mark not in received:
        part = connection.recv(65_536)
        if not part:
            raise ConnectionResetError
        received += part
    return received


def _keep_silent(server: Listener, connection: socket.socket) -> None:
    if connection.recv(65_536):
        server.arrived.release()
    while connection.recv(65_536):
        pass


def silent() -> AbstractContextManager[Listener]:
    """Run a listener that never answers, whatever the protocol."""
    return listening(_keep_silent)


def answering(answer: bytes) -> AbstractContextManager[Listener]:
    """Run a listener that answers every HTTP request with these bytes, and hangs up."""

    def converse(_: Listener, connection: socket.socket) -> None:
        _read_request(connection)
        connection.sendall(answer)

    return listening(converse)


def passing_on_to(
    url: str, port: int = 0, allowed: threading.Event | None = None
) -> AbstractContextManager[Listener]:
    """Run a listener that stands before an HTTP server, so that the server can come and go.

    Args:
        url: The server's.
        port: Where to listen; 0 is any free port.
        allowed: What a request waits for before it is passed on.
    """
    target = ("127.0.0.1", int(url.rpartition(":")[2]))

    def converse(server: Listener, connection: socket.socket) -> None:
        if not connection.recv(1, socket.MSG_PEEK):
            return
        server.arrived.release()
        if allowed is not None:
            allowed.wait(START_SECONDS)
        with socket.create_connection(target) as onward:
            back = threading.Thread(target=_pump, args=(onward, connection))
            back.start()
            _pump(connection, onward)
            back.join()

    return listening(converse, port)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while part := source.recv(65_536):
            sink.sendall(part)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)


_HALF_AN_ANSWER = b'HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{"results": ['


@contextmanager
def failing(fault: Fault, fake: FakeVLLM) -> Iterator[str]:
    """The URL of a vLLM with a fault; `fake` plays those that answer."""
    match fault:
        case Answers(reply, once):
            fake.replies, fake.always = ([reply], None) if once else ([], reply)
            yield fake.url
        case Refuses():
            with refusing() as url:
                yield url
        case Hangs():
            with silent() as server:
                yield server.url
        case BreaksOff():
            with answering(_HALF_AN_ANSWER) as server:
                yield server.url
        case Floods(body):
            head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\n\r\n"
            with answering(head.encode() + body) as server:
                yield server.url
        case _:
            raise NotImplementedError(fault)


# Milvus as a process


class MilvusProcess:
    """A Milvus Lite server as a process of its own, on a port and a folder that it keeps."""

    def __init__(self, data_dir: Path) -> None:
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        options = ["--data-dir", str(data_dir), "--host", "127.0.0.1", "--port", str(self.port)]
        options += ["--max-workers", "32"]  # a search that waits for vLLM holds one
        self._command = [sys.executable, "-m", "milvus_lite", "server", *options]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it unless it runs, and wait until it listens."""
        if self._process is None:
            self._process = subprocess.Popen(
                self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            wait_until(self._listens, "the Milvus Lite server is up")

    def kill(self) -> None:
        """End it as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop it in its tracks while the block runs: it holds its connections and says nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def _listens(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
            return True
        return False


@contextmanager
def milvus_process(data_dir: Path) -> Iterator[MilvusProcess]:
    """A Milvus Lite server while the block runs."""
    process = MilvusProcess(data_dir)
    try:
        process.start()
        yield process
    finally:
        process.kill()


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
