"""Starts the stand-in: ``python -m tests.milvus26 --data-dir D --port P``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc
from milvus_lite.db import MilvusLite
from pymilvus.grpc_gen import milvus_pb2_grpc

from .servicer import Milvus26Servicer
from .vllm_provider import ServerConfig

_MAX_MESSAGE_BYTES = 256 * 1024 * 1024


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="milvus26", description="A stand-in for Milvus 2.6.")
    parser.add_argument("--data-dir", required=True, help="where collections are stored")
    parser.add_argument("--port", type=int, default=0, help="on 127.0.0.1; 0 picks a free one")
    parser.add_argument("--version", default=ServerConfig.version, help="the version to report")
    parser.add_argument(
        "--retry-wait",
        type=float,
        default=ServerConfig.retry_wait,
        metavar="SECONDS",
        help="wait before the second try of a rerank call, doubled before the third",
    )
    parser.add_argument(
        "--credential",
        action="append",
        default=[],
        metavar="NAME=KEY",
        help="an API key that Functions may name; may be repeated",
    )
    parser.add_argument("--disable-vllm", action="store_true", help="refuse the provider vllm")
    parser.add_argument(
        "--stop-at-eof",
        action="store_true",
        help="stop when standard input closes, so as not to outlive the starting process",
    )
    return parser.parse_args()


def _serve(arguments: argparse.Namespace) -> None:
    config = ServerConfig(
        version=arguments.version,
        retry_wait=arguments.retry_wait,
        credentials=dict(pair.split("=", 1) for pair in arguments.credential),
        vllm_enabled=not arguments.disable_vllm,
    )
    db = MilvusLite(arguments.data_dir)
    server = grpc.server(
        ThreadPoolExecutor(max_workers=10),
        options=[
            ("grpc.so_reuseport", 0),
            # pymilvus pings every 10 s, more often than grpc's default lets a client; Milvus does.
            ("grpc.http2.max_ping_strikes", 0),
            ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
        ],
    )
    milvus_pb2_grpc.add_MilvusServiceServicer_to_server(Milvus26Servicer(db, config), server)
    try:
        port = server.add_insecure_port(f"127.0.0.1:{arguments.port}")
        server.start()
        sys.stdout.write(f"http://127.0.0.1:{port}\n")
        sys.stdout.flush()
        if arguments.stop_at_eof:
            sys.stdin.read()
        else:
            server.wait_for_termination()
    finally:
        server.stop(grace=None)
        db.close()


def _exit_at_signal(*_: object) -> None:
    sys.exit(0)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _exit_at_signal)
    signal.signal(signal.SIGINT, _exit_at_signal)
    try:
        _serve(_arguments())
    except SystemExit as stopped:
        # A rerank call that hangs holds a worker thread; a plain exit would wait for it.
        sys.stdout.flush()
        os._exit(stopped.code if isinstance(stopped.code, int) else 1)
