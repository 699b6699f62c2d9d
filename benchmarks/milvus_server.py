"""The stand-in for Milvus 2.6 with a choice of worker threads; see `harness.milvus_process`.

python -m benchmarks.milvus_server --data-dir D [--workers N]

It ends when its standard input closes.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc
from milvus_lite.db import MilvusLite
from pymilvus.grpc_gen import milvus_pb2_grpc
from tests.milvus26.servicer import Milvus26Servicer
from tests.milvus26.vllm_provider import ServerConfig

_MAX_MESSAGE_BYTES = 256 * 1024 * 1024


def main() -> None:
    """Serve until standard input closes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--workers", type=int, default=10)
    arguments = parser.parse_args()
    db = MilvusLite(arguments.data_dir)
    server = grpc.server(
        ThreadPoolExecutor(max_workers=arguments.workers),
        options=[
            ("grpc.so_reuseport", 0),
            ("grpc.http2.max_ping_strikes", 0),  # pymilvus pings more often than the default allows
            ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
        ],
    )
    servicer = Milvus26Servicer(db, ServerConfig(retry_wait=0.01))
    milvus_pb2_grpc.add_MilvusServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(f"http://127.0.0.1:{port}", flush=True)
    try:
        sys.stdin.read()
    finally:
        server.stop(grace=None)
        db.close()
        sys.stdout.flush()
        os._exit(0)  # a search that waits for its rerank call holds a thread; do not wait for it


if __name__ == "__main__":
    main()
