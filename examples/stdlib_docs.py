"""Real text for the examples: the docstrings of the running Python's standard library."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = (  # noqa: SIM905 - a list of one word a line is no easier to read
    "argparse asyncio collections concurrent configparser contextlib csv dataclasses datetime "
    "decimal difflib email enum fractions ftplib functools gettext glob gzip heapq http imaplib "
    "importlib inspect ipaddress json logging mailbox multiprocessing os pathlib pickle platform "
    "plistlib poplib pprint queue random re sched secrets selectors shelve shlex shutil smtplib "
    "socket socketserver sqlite3 ssl statistics string subprocess tarfile tempfile textwrap "
    "threading timeit tokenize trace traceback typing unittest urllib uuid warnings wave weakref "
    "webbrowser wsgiref xml zipfile zoneinfo"
).split()

# One text fits a model of 256 tokens: Milvus Lite cannot truncate when it reranks.
MAX_CHARACTERS = 320
MIN_CHARACTERS = 60


@dataclass(frozen=True)
class Entry:
    """One documented function, class or module."""

    id: str
    module: str
    text: str


def load(limit: int | None = None) -> list[Entry]:
    """Read up to `limit` entries, spread over all modules; the same on every run of one Python."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    entries = {}
    for package in PACKAGES:
        for path in _sources(stdlib, package):
            module = ".".join(path.relative_to(stdlib).with_suffix("").parts)
            if "._" in module.removesuffix(".__init__"):
                continue
            for entry in _entries(path, module.removesuffix(".__init__")):
                entries.setdefault(entry.id, entry)
    every = list(entries.values())
    wanted = min(limit or len(every), len(every))
    return [every[i * len(every) // wanted] for i in range(wanted)]


def _sources(stdlib: Path, package: str) -> list[Path]:
    folder = stdlib / package
    if folder.is_dir():
        return sorted(p for p in folder.rglob("*.py") if "test" not in p.parts)
    return [folder.with_suffix(".py")]


def _entries(path: Path, module: str) -> Iterator[Entry]:
    def walk(node: ast.AST, name: str) -> Iterator[Entry]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                if child.name.startswith("_"):
                    continue
                qualified = f"{name}.{child.name}"
                text = " ".join((ast.get_docstring(child) or "").split())
                if len(text) >= MIN_CHARACTERS:
                    yield Entry(qualified, module, f"{qualified}: {text}"[:MAX_CHARACTERS])
                yield from walk(child, qualified)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), module)
