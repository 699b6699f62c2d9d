"""A stand-in for vLLM's rerank API that costs next to nothing; see `harness.rerank_process`.

python -m benchmarks.rerank_server [--delay-ms 50]

It answers `/rerank`, `/v1/rerank` and `/v2/rerank` in vLLM's shape, the `top_n` best if a request
says so, each request after the same delay and any number at once. A document's score is a hash of
its text, so every client gets the same one. It listens on a free local port, prints its URL, and
ends when its standard input closes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import Any
from zlib import crc32

from benchmarks.serving import until_stdin_closes

_END_OF_HEAD = b"\r\n\r\n"
_PATHS = {b"/rerank", b"/v1/rerank", b"/v2/rerank"}
_STATUS = {200: "OK", 400: "Bad Request", 404: "Not Found"}


def score(text: str) -> float:
    """Return a document's score, from 0 to 1."""
    return crc32(text.encode()) / 0xFFFFFFFF


def answer(body: bytes) -> dict[str, Any]:
    """Return what vLLM answers to a rerank request."""
    asked = json.loads(body)
    documents = asked["documents"]
    results = [
        {"index": index, "document": {"text": text}, "relevance_score": score(text)}
        for index, text in enumerate(documents)
    ]
    results.sort(key=lambda result: -result["relevance_score"])
    tokens = len(documents)
    return {
        "id": "rerank-stand-in",
        "model": "stand-in",
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "results": results[: asked.get("top_n") or None],  # vLLM takes 0 for all of them
    }


class Connection(asyncio.Protocol):
    """One client's connection, kept alive; its requests are answered in their order."""

    def __init__(self, delay: float) -> None:
        self._delay = delay
        self._received = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember where to write."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer every request that is there to its end."""
        self._received += data
        while (request := self._next_request()) is not None:
            reply = _reply(*request)
            if self._delay:
                asyncio.get_running_loop().call_later(self._delay, self._send, reply)
            else:
                self._send(reply)

    def _next_request(self) -> tuple[bytes, bytes] | None:
        """Take one request's path and body from what was received, if it is complete."""
        end = self._received.find(_END_OF_HEAD)
        if end < 0:
            return None
        head = bytes(self._received[:end])
        start = end + len(_END_OF_HEAD)
        size = _content_length(head)
        if len(self._received) < start + size:
            return None
        body = bytes(self._received[start : start + size])
        del self._received[: start + size]
        return head.split(b" ", 2)[1], body

    def _send(self, reply: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(reply)


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            return int(value)
    return 0


def _reply(path: bytes, body: bytes) -> bytes:
    status, content = 404, {"detail": "Not Found"}
    if path in _PATHS:
        try:
            status, content = 200, answer(body)
        except (ValueError, KeyError, TypeError) as error:
            status, content = 400, {"error": {"message": str(error), "code": 400}}
    payload = json.dumps(content).encode()
    head = (
        f"HTTP/1.1 {status} {_STATUS[status]}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(payload)}\r\n\r\n"
    )
    return head.encode() + payload


async def serve(delay: float) -> None:
    """Serve until standard input closes."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(delay), "127.0.0.1", 0, backlog=1024)
    await until_stdin_closes(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    server.close()


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--delay-ms", type=float, default=0)
    asyncio.run(serve(parser.parse_args().delay_ms / 1000))


if __name__ == "__main__":
    main()
