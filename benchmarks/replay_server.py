"""Stands between a client and Milvus and answers a search that it has seen before by itself.

python -m benchmarks.replay_server --upstream URI [--delay-ms 50] [--same-answer]

The first time, a search goes on to Milvus and its answer is kept; the same request is later
answered with the same bytes, after a fixed delay, any number at once. Everything else always goes
on to Milvus. With `--same-answer`, every search gets the answer of the first one.

So the client does all its work while the server costs next to nothing: what is measured is the
client, not the stand-in's searches in Python. See `harness.replaying`. It ends when its standard
input closes.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

import grpc

from benchmarks.serving import until_stdin_closes

_SEARCHES = ("/Search", "/HybridSearch")
_NO_LIMIT = [
    ("grpc.http2.max_ping_strikes", 0),  # pymilvus pings more often than the default allows
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
]

Answer = Callable[[bytes, grpc.aio.ServicerContext], Awaitable[bytes]]


class Replay(grpc.GenericRpcHandler):
    """Handles every method, its messages as the bytes they are."""

    def __init__(self, upstream: grpc.aio.Channel, delay: float, *, same_answer: bool) -> None:
        self._upstream = upstream
        self._delay = delay
        self._same_answer = same_answer
        self._kept: dict[bytes, bytes] = {}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        """Return what answers a method."""
        method = handler_call_details.method
        answer = self._searching(method) if method.endswith(_SEARCHES) else self._passing(method)
        return grpc.unary_unary_rpc_method_handler(answer)

    def _passing(self, method: str) -> Answer:
        call = self._upstream.unary_unary(method)

        async def answer(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
            try:
                answered: bytes = await call(request)
            except grpc.aio.AioRpcError as error:
                await context.abort(error.code(), error.details() or "")
            return answered

        return answer

    def _searching(self, method: str) -> Answer:
        passing = self._passing(method)

        async def answer(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
            key = b"" if self._same_answer else request
            kept = self._kept.get(key)
            if kept is None:
                kept = self._kept[key] = await passing(request, context)
            elif self._delay:
                await asyncio.sleep(self._delay)
            return kept

        return answer


async def serve(upstream: str, delay: float, *, same_answer: bool) -> None:
    """Serve until standard input closes."""
    async with grpc.aio.insecure_channel(urlsplit(upstream).netloc, options=_NO_LIMIT) as channel:
        server = grpc.aio.server(options=_NO_LIMIT)
        server.add_generic_rpc_handlers([Replay(channel, delay, same_answer=same_answer)])
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        await until_stdin_closes(f"http://127.0.0.1:{port}")
        await server.stop(grace=None)


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upstream", required=True, help="Milvus's URI")
    parser.add_argument("--delay-ms", type=float, default=0)
    parser.add_argument("--same-answer", action="store_true", help="to every search")
    given = parser.parse_args()
    asyncio.run(serve(given.upstream, given.delay_ms / 1000, same_answer=given.same_answer))


if __name__ == "__main__":
    main()
