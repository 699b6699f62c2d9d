"""Run Milvus 2.3.5 until standard input ends; for `.venv-old-milvus`'s Python, not the tests'.

Prints `ready` when Milvus answers.

    python serve.py DATA_DIR PROGRAMS_DIR PROXY_PORT ETCD_PORT ETCD_PEER_PORT
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from milvus import MilvusServer

START_TIMEOUT = 60_000  # milliseconds

ETCD = """\
name: default
listen-client-urls: http://127.0.0.1:{port}
advertise-client-urls: http://127.0.0.1:{port}
listen-peer-urls: http://127.0.0.1:{peer_port}
initial-advertise-peer-urls: http://127.0.0.1:{peer_port}
initial-cluster: default=http://127.0.0.1:{peer_port}
"""


def main() -> None:
    """Start Milvus, say so, and end it with whoever started this."""
    data_dir, programs, port, etcd_port, etcd_peer_port = sys.argv[1:]
    share_programs(Path(data_dir), Path(programs))
    # The setting `etcd_port` only tells Milvus where to look: etcd itself keeps to 2379 and 2380.
    etcd = Path(data_dir, "etcd.yaml")
    etcd.write_text(ETCD.format(port=etcd_port, peer_port=etcd_peer_port))
    os.environ["ETCD_CONFIG_PATH"] = str(etcd.resolve())
    server = MilvusServer(
        data_dir=data_dir, proxy_port=port, etcd_port=etcd_port, wait_for_started=False
    )
    try:
        server.start()
        server.wait_started(START_TIMEOUT)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        sys.stdin.read()
    finally:
        server.stop()


def share_programs(data_dir: Path, programs: Path) -> None:
    """Let all data folders use the same unpacked programs: 250 MB and 5 s each otherwise."""
    programs.mkdir(exist_ok=True)
    link = data_dir / "bin"
    if not link.exists():
        link.symlink_to(programs.resolve())


if __name__ == "__main__":
    main()
