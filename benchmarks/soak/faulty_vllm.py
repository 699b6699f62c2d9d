"""A stand-in for vLLM's rerank API that fails now and then; see `benchmarks.soak`.

    python -m benchmarks.soak.faulty_vllm [--every 50] [--stall 4]

A document's score is a pure function of query and document, so that a client knows every right
answer. Every 50th request gets the next of `FAULTS` in place of it. In every second round of the
list, a fault that a further try could mend lasts for all the tries of its request, so that it is
seen behind the retries too.

    GET /stats                          how many requests came, and what was done to them
    POST /outage?seconds=2&of=client    answer all its requests (or milvus's) with 503 for so long

It listens on a free local port, prints its URL, and ends when its standard input closes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import struct
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from urllib.parse import parse_qsl, urlsplit
from zlib import crc32

from benchmarks.serving import until_stdin_closes

FAULTS = (
    "503",
    "429",
    "500",
    "HTML 502",
    "bad JSON",
    "dropped result",
    "duplicate index",
    "NaN",
    "broken off",
    "stall",
    "redirect",
    "401",
    "400",
    "big body",
)
# Milvus reads results by position and fills up with zeros, so that no client of Milvus can see
# these: there is no right answer to expect of one.
_UNSEEN_BY_MILVUS = {"dropped result", "duplicate index"}
# What a further try could mend. Milvus tries again after any status but 200.
_TRIED_AGAIN = {
    "client": {"503", "429", "500", "HTML 502", "broken off"},
    "milvus": {"503", "429", "500", "HTML 502", "broken off", "redirect", "401", "400"},
}
_TRIES = 3
_STICKS_SECONDS = 5.0
_DIFFERENT_SCORES = 1000
_BIG = 20_000_000
_PAGE = b"<html><body><h1>502 Bad Gateway</h1></body></html>"
_DELAY = 0.01  # so that requests are in flight together
_KEEP_ALIVE_SECONDS = 5.0  # as vLLM's
_PATHS = {"/rerank": "milvus", "/v1/rerank": "client", "/v2/rerank": "milvus"}
_REASONS = {
    200: "OK",
    307: "Temporary Redirect",
    400: "Bad Request",
    401: "Unauthorized",
    404: "Not Found",
    429: "Too Many Requests",
    500: "Internal Server Error",
    502: "Bad Gateway",
    503: "Service Unavailable",
}


def score(query: str, document: str) -> float:
    """Return a score from -0.5 to 0.5; coarse, so that some documents share one."""
    return crc32(f"{query}\0{document}".encode()) % _DIFFERENT_SCORES / _DIFFERENT_SCORES - 0.5


def float32(value: float) -> float:
    """Return the value as Milvus holds a score."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


@dataclass(frozen=True)
class Request:
    """One request as it was received."""

    target: str
    body: bytes

    @property
    def sender(self) -> str | None:
        """Who asks: Milvus calls another path than the client does."""
        return _PATHS.get(self.target)


@dataclass(frozen=True)
class Reply:
    """What is sent back, at once or late, in full or in part."""

    status: int
    payload: bytes
    headers: Sequence[tuple[str, str]] = ()
    delay: float = _DELAY
    breaks_off: bool = False

    def encoded(self) -> bytes:
        """Return its bytes; of one that breaks off, the first half of the body."""
        head = [f"HTTP/1.1 {self.status} {_REASONS[self.status]}"]
        head += [f"{name}: {value}" for name, value in self.headers]
        head += [f"content-length: {len(self.payload)}", "", ""]
        size = len(self.payload) // 2 if self.breaks_off else len(self.payload)
        return "\r\n".join(head).encode() + self.payload[:size]


def _json(status: int, content: Any, **headers: str) -> Reply:
    named = [(name.replace("_", "-"), value) for name, value in headers.items()]
    payload = json.dumps(content).encode()
    return Reply(status, payload, [("content-type", "application/json"), *named])


def _refusal(status: int, **headers: str) -> Reply:
    error = {"message": f"fault {status}", "type": "fault", "param": None, "code": status}
    return _json(status, {"error": error}, **headers)


def _results(body: bytes) -> list[dict[str, Any]]:
    asked = json.loads(body)
    results = [
        {"index": i, "document": {"text": text}, "relevance_score": score(asked["query"], text)}
        for i, text in enumerate(asked["documents"])
    ]
    return sorted(results, key=lambda result: -result["relevance_score"])


def _answer(results: Sequence[dict[str, Any]]) -> Reply:
    return _json(200, {"id": "x", "model": "stand-in", "usage": {}, "results": list(results)})


def _faulty(fault: str, body: bytes, stall: float) -> Reply:
    """Return the reply that a fault makes of a request."""
    results = _results(body)
    good = _answer(results)
    replies = {
        "429": lambda: _refusal(429, retry_after="0"),
        "HTML 502": lambda: Reply(502, _PAGE, [("content-type", "text/html")]),
        "bad JSON": lambda: replace(good, payload=good.payload[:-20]),
        "dropped result": lambda: _answer(results[1:]),
        "duplicate index": lambda: _answer([*results[1:], results[-1]]),
        "NaN": lambda: _answer([{**results[0], "relevance_score": math.nan}, *results[1:]]),
        "broken off": lambda: replace(good, breaks_off=True),
        "stall": lambda: replace(good, delay=stall),
        "redirect": lambda: _json(307, {}, location="/elsewhere"),
        "big body": lambda: replace(good, payload=good.payload + b" " * _BIG),
    }
    return replies[fault]() if fault in replies else _refusal(int(fault))


@dataclass
class Faults:
    """Decides which request fails, and how; counts.

    Attributes:
        every: Each so-manieth request gets a fault.
        stall: Seconds that a stalled answer takes.
    """

    every: int
    stall: float
    _requests: Counter[str] = field(default_factory=Counter)
    _injected: Counter[str] = field(default_factory=Counter)
    _repeated: Counter[str] = field(default_factory=Counter)
    _during_outage: int = 0
    _turn: int = 0
    _outages: dict[str, float] = field(default_factory=dict)
    _sticking: dict[bytes, tuple[str, int, float]] = field(default_factory=dict)

    def reply(self, request: Request) -> Reply:
        """Answer any request."""
        path = urlsplit(request.target)
        if request.sender is not None:
            return self._rerank(request, request.sender)
        if path.path == "/stats":
            return _json(200, self._stats())
        if path.path == "/outage":
            asked = dict(parse_qsl(path.query))
            self._outages[asked["of"]] = time.monotonic() + float(asked["seconds"])
            return _json(200, {})
        return _json(404, {"detail": "Not Found"})

    def _rerank(self, request: Request, sender: str) -> Reply:
        self._requests[sender] += 1
        if time.monotonic() < self._outages.get(sender, 0.0):
            self._during_outage += 1
            return _refusal(503)
        fault = self._next_fault(request, sender)
        if fault is None:
            return _answer(_results(request.body))
        return _faulty(fault, request.body, self.stall)

    def _next_fault(self, request: Request, sender: str) -> str | None:
        fault, left, until = self._sticking.pop(request.body, ("", 0, 0.0))
        if left and time.monotonic() < until:
            self._repeated[f"{fault}, {sender}"] += 1
            self._stick(request, fault, left - 1)
            return fault
        if sum(self._requests.values()) % self.every:
            return None
        fault = self._in_turn(sender)
        self._injected[f"{fault}, {sender}"] += 1
        if self._turn // len(FAULTS) % 2 and fault in _TRIED_AGAIN[sender]:
            self._stick(request, fault, _TRIES - 1)
        return fault

    def _in_turn(self, sender: str) -> str:
        while True:
            fault = FAULTS[self._turn % len(FAULTS)]
            self._turn += 1
            if sender != "milvus" or fault not in _UNSEEN_BY_MILVUS:
                return fault

    def _stick(self, request: Request, fault: str, tries: int) -> None:
        if tries:
            self._sticking[request.body] = (fault, tries, time.monotonic() + _STICKS_SECONDS)

    def _stats(self) -> dict[str, Any]:
        return {
            "requests": self._requests,
            "injected": self._injected,
            "repeated": self._repeated,
            "during_outage": self._during_outage,
        }


async def _converse(
    faults: Faults, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Answer one connection's requests in their order, while they come."""
    # The other side may hang up at any moment; that is tested too.
    with suppress(OSError, asyncio.IncompleteReadError, asyncio.TimeoutError):
        while await _answer_one(faults, reader, writer):
            pass
    writer.close()


async def _answer_one(
    faults: Faults, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> bool:
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), _KEEP_ALIVE_SECONDS)
    lines = head.decode("latin-1").lower().split("\r\n")
    size = next((int(line[15:]) for line in lines if line.startswith("content-length:")), 0)
    request = Request(head.split(b" ", 2)[1].decode(), await reader.readexactly(size))
    reply = faults.reply(request)
    if request.sender is not None:
        await asyncio.sleep(reply.delay)
    writer.write(reply.encoded())
    await writer.drain()
    return not reply.breaks_off


async def serve(faults: Faults) -> None:
    """Serve until standard input closes."""
    server = await asyncio.start_server(partial(_converse, faults), "127.0.0.1", 0, backlog=1024)
    await until_stdin_closes(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    server.close()


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=50, help="each so-manieth request fails")
    parser.add_argument("--stall", type=float, default=4.0, help="seconds that a stall takes")
    arguments = parser.parse_args()
    asyncio.run(serve(Faults(every=arguments.every, stall=arguments.stall)))


if __name__ == "__main__":
    main()
