"""The test suite at both ends of what the package supports: `make test` runs this after the suite.

    nox                                        both ends; skips one whose Python is not installed
    nox -s "compatibility(oldest)" -- -k unit  one of them, with arguments for pytest

Tests of real servers find them as VLLM_ENDPOINT and VLLM_CROSS_ENCODER_ENDPOINT, shared by all.
"""

from __future__ import annotations

import os
from pathlib import Path

import nox

nox.needs_version = ">=2025.2"
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = False
nox.options.download_python = "never"
nox.options.default_venv_backend = "virtualenv"

PAIRS = [
    nox.param("3.10", "pymilvus>=2.6,<3", id="oldest"),
    nox.param("3.13", "pymilvus>=3,<4", id="newest"),
]

# Packages that write collections, each with the pymilvus it works with. langchain-milvus 0.3
# cannot open a store with 2.6.10 or later; 2.6.8 and 2.6.9 take a Milvus Lite path for a database.
WRITERS = [
    nox.param("langchain-milvus==0.3.*", "pymilvus>=2.6,<2.6.8", id="langchain-0.3"),
    nox.param("langchain-milvus==0.4.*", "pymilvus>=3,<4", id="langchain-0.4"),
    nox.param(
        "llama-index-vector-stores-milvus==1.2.*", "pymilvus>=2.6.10,<3", id="llama-index-1.2"
    ),
]


@nox.session
@nox.parametrize(("python", "pymilvus"), PAIRS)
def compatibility(session: nox.Session, pymilvus: str) -> None:
    """Run the whole suite with one Python and one major version of pymilvus."""
    project = nox.project.load_toml()
    install(session, "-e", ".[all]", pymilvus, *nox.project.dependency_groups(project, "dev"))
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session
@nox.parametrize(("writer", "pymilvus"), WRITERS)
def existing(session: nox.Session, writer: str, pymilvus: str) -> None:
    """Read collections that the real packages wrote, and take over their stores."""
    install(session, "-e", ".[all]", writer, pymilvus, "pytest>=8.3", "pytest-asyncio>=0.26")
    session.run("python", "-m", "pytest", "tests/existing", *session.posargs)


def install(session: nox.Session, *requirements: str) -> None:
    """Install unless the very same was installed before: a second run starts at once."""
    stamp = Path(session.virtualenv.location, "installed.txt")
    wanted = "\n".join([*requirements, Path("pyproject.toml").read_text()])
    if not stamp.exists() or stamp.read_text() != wanted:
        session.install(*requirements)
        stamp.write_text(wanted)


def put_pyenv_on_path() -> None:
    """Let nox find what pyenv has installed: its shims only run the versions selected here."""
    versions = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    for pair in PAIRS:
        python, _ = pair.args
        for folder in sorted(versions.glob(f"{python}.*/bin")):
            os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"


put_pyenv_on_path()
