"""What happens on the way: Milvus is killed and restarted, released; vLLM refuses everything."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx
from pymilvus import MilvusClient

from benchmarks.harness import ROOT
from benchmarks.soak.progress import say
from benchmarks.soak.questions import COLLECTION

# A Milvus that is up again is found again within gRPC's second and our own two of retries.
_GRACE = 4.0


class Milvus:
    """The stand-in for Milvus, which is killed and comes back where it was.

    Args:
        folder: Where its data and its log are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.socket() as finder:
            finder.bind(("127.0.0.1", 0))
            self._port = finder.getsockname()[1]
        self._process: subprocess.Popen[str] | None = None

    @property
    def uri(self) -> str:
        """Return where clients reach it."""
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start it, and return when it answers."""
        command = [sys.executable, "-m", "tests.milvus26", "--data-dir", str(self._folder / "data")]
        command += ["--port", str(self._port), "--retry-wait", "0.05", "--stop-at-eof"]
        log_file = self._folder / "milvus.log"
        with log_file.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise RuntimeError(f"Milvus did not start: {log_file.read_text()[-2000:]}")

    def kill(self) -> None:
        """End it without warning."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


@contextmanager
def running_milvus() -> Iterator[Milvus]:
    """Run it with its data in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        milvus = Milvus(Path(folder))
        try:
            milvus.start()
            yield milvus
        finally:
            milvus.kill()


class Disturbances:
    """What happens on the way, besides the faults that come with every so-manieth request.

    Args:
        milvus: The Milvus that is disturbed.
        vllm: The URL of the vLLM that fails.
        calls: How many calls there are; disturbances are spread over them.

    Attributes:
        counts: How often each has happened.
    """

    def __init__(self, milvus: Milvus, vllm: str, calls: int) -> None:
        self._milvus = milvus
        self._vllm = vllm
        self.counts: Counter[str] = Counter()
        self._windows: list[list[float]] = []
        self._running: set[asyncio.Future[None]] = set()
        # Started beforehand, so that it counts from the first figures on.
        self._thread = ThreadPoolExecutor(1)
        self._thread.submit(int).result()
        parts: dict[float, Callable[[], None]] = {
            0.15: partial(self._restart, down=0.0),
            0.30: self._release,
            0.45: partial(self._restart, down=3.0),
            0.60: partial(self._outage, seconds=2.0),
            0.75: partial(self._restart, down=1.0),
            0.90: partial(self._outage, seconds=1.0),
        }
        self._at = {round(calls * part): what for part, what in parts.items()}

    def happen(self, call: int) -> None:
        """Start what is to happen at this call."""
        if call in self._at:
            done = asyncio.get_running_loop().run_in_executor(self._thread, self._at[call])
            self._running.add(done)

    async def finished(self) -> None:
        """Wait for what is going on."""
        await asyncio.gather(*self._running)
        self._running.clear()

    def of_milvus(self, started: float, ended: float) -> bool:
        """Tell whether Milvus was disturbed at some moment between the two."""
        return any(start < ended and started < end for start, end in self._windows)

    def close(self) -> None:
        """Let go of the thread."""
        self._thread.shutdown()

    @contextmanager
    def _of_milvus(self) -> Iterator[None]:
        window = [time.monotonic(), float("inf")]
        self._windows.append(window)
        yield
        window[1] = time.monotonic() + _GRACE

    def _restart(self, down: float) -> None:
        with self._of_milvus():
            self.counts["Milvus killed and restarted"] += 1
            say(f"Milvus is killed, and down for {down:.0f} s")
            self._milvus.kill()
            time.sleep(down)
            self._milvus.start()

    def _release(self) -> None:
        with self._of_milvus():
            self.counts["collection released"] += 1
            say("the collection is released")
            client = MilvusClient(self._milvus.uri)
            client.release_collection(COLLECTION)
            client.close()

    def _outage(self, seconds: float) -> None:
        self.counts["vLLM outage"] += 1
        say(f"vLLM answers nothing but 503 for {seconds:.0f} s")
        for sender in ("milvus", "client"):
            outage(self._vllm, seconds, of=sender)


def outage(vllm: str, seconds: float, *, of: str) -> None:
    """Have the vLLM that fails refuse everything that Milvus, or the client, asks."""
    httpx.post(f"{vllm}/outage", params={"seconds": seconds, "of": of}).raise_for_status()
