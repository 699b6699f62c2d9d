"""The stand-in as a process that a fixture starts and ends."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_PACKAGE = __package__ or "milvus26"
_IMPORT_ROOT = Path(__file__).resolve().parents[_PACKAGE.count(".") + 1]
_START_SECONDS = 60.0
_STOP_SECONDS = 10.0


@contextmanager
def running_milvus26(
    data_dir: str | os.PathLike[str],
    *,
    version: str = "2.6.4",
    retry_wait: float = 0.01,
    credentials: Mapping[str, str] | None = None,
    vllm_enabled: bool = True,
) -> Iterator[str]:
    """Runs the stand-in on a free local port while the block runs, and yields its URI.

    The server's log goes to this process's standard error. It ends with the block, and also when
    this process dies without leaving the block, since its standard input closes then.

    Args:
        data_dir: Where the collections are stored; made if missing.
        version: What ``get_server_version()`` answers. Below 2.6, rerank Functions are ignored.
        retry_wait: Seconds before the second try of a rerank call; twice that before the third.
            A real server waits 1 s and 2 s.
        credentials: API keys by name, as a real server has them in its ``milvus.yaml``.
        vllm_enabled: False for a server whose operator disabled the provider.

    Raises:
        RuntimeError: The server did not start; its own error is on standard error.
    """
    arguments = ["--data-dir", os.fspath(data_dir)]
    arguments += ["--version", version, "--retry-wait", str(retry_wait), "--stop-at-eof"]
    for name, key in (credentials or {}).items():
        arguments += ["--credential", f"{name}={key}"]
    if not vllm_enabled:
        arguments.append("--disable-vllm")
    with running_module(_PACKAGE, *arguments) as uri:
        yield uri


@contextmanager
def running_module(module: str, *arguments: str) -> Iterator[str]:
    """Runs a module as a server while the block runs, and yields the URI it prints.

    It ends with the block, and also when this process dies without leaving the block, since its
    standard input closes then.

    Raises:
        RuntimeError: The server did not start; its own error is on standard error.
    """
    search_path = os.pathsep.join(filter(None, [str(_IMPORT_ROOT), os.environ.get("PYTHONPATH")]))
    with subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": search_path},
    ) as server:
        try:
            yield _uri_of(server, module)
        finally:
            _stop(server)


def _uri_of(server: subprocess.Popen[str], module: str) -> str:
    """The URI that the server prints once it answers."""
    assert server.stdout is not None
    watchdog = threading.Timer(_START_SECONDS, server.kill)
    watchdog.start()
    try:
        uri = server.stdout.readline().strip()
    finally:
        watchdog.cancel()
    if not uri:
        raise RuntimeError(f"{module} did not start; see its standard error")
    return uri


def _stop(server: subprocess.Popen[str]) -> None:
    server.terminate()
    try:
        server.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
