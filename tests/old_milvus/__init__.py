"""A real Milvus from before 2.6: it ignores a rerank Function in silence, as no imitation proves.

The PyPI package `milvus` 2.3.5 carries a whole standalone Milvus (version string `v2.3.5-lite`) and
needs nothing else; any Python will do. It gets an environment of its own, `.venv-old-milvus` in the
project's root, made on first use.

Measured: 6 s to make the environment, 9 s for the first start and 4 s for each later one. Create,
insert, load, query and search work from pymilvus 2.6 and 3.0, sync and async. `hybrid_search` ends
in gRPC's UNIMPLEMENTED.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = "milvus==2.3.5"
ENV = Path(__file__).resolve().parents[2] / ".venv-old-milvus"
PYTHON = ENV / "bin" / "python"
STAMP = ENV / "installed.txt"
PROGRAMS = ENV / "milvus-programs"
SERVE = Path(__file__).with_name("serve.py")


@contextmanager
def running_old_milvus(data_dir: Path) -> Iterator[str]:
    """Run Milvus 2.3.5 as a process of its own, and give its URI.

    Its ports are free ones, so several can run at once. All but etcd's are open on every network
    interface: this version has no setting for that.

    Args:
        data_dir: where it keeps data and logs; takes 140 MB even when empty.
    """
    install()
    data_dir.mkdir(parents=True, exist_ok=True)
    proxy, etcd, etcd_peer = free_ports(3)
    command = [PYTHON, SERVE, data_dir, PROGRAMS, proxy, etcd, etcd_peer]
    with (data_dir / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )
    # `with` closes the pipes, then waits; serve.py ends Milvus when its standard input ends, which
    # also happens when the tests are killed.
    with process:
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            logs = f"{data_dir / 'serve.log'} and {data_dir / 'logs'}"
            raise RuntimeError(f"Milvus 2.3.5 did not start; see {logs}")
        yield f"http://127.0.0.1:{proxy}"


def install() -> None:
    """Make the environment unless it is complete."""
    if STAMP.exists() and STAMP.read_text() == PACKAGE:
        return
    shutil.rmtree(ENV, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(ENV)], check=True)
    pip = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, PACKAGE], check=True)
    STAMP.write_text(PACKAGE)


def free_ports(count: int) -> list[int]:
    """Return ports on which nobody listens."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
