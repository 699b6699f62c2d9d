"""What is documented type-checks, as a user's own code would: with mypy and with pyright.

Checked are the consumer files beside this one, which use each public name, and the Python of
README and docs: the pieces of one page are one module, as they build upon each other. Neither
checker has a plugin.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import milvus_vllm_retrievers
import milvus_vllm_retrievers.langchain
import milvus_vllm_retrievers.llama_index

ROOT = Path(__file__).parents[2]
SRC = Path(milvus_vllm_retrievers.__file__).parents[1]
CONSUMERS = sorted(Path(__file__).parent.glob("consumer*.py"))
PAGES = [
    page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if "```python" in page.read_text()
]
# pymilvus says that it is typed, but its generated stubs are not valid.
MYPY = """
[mypy]
strict = true
follow_imports = silent
[mypy-pymilvus.*]
ignore_missing_imports = true
follow_imports = skip
"""

Errors = dict[str, list[str]]


def module_of(page: Path) -> str:
    """Return the name of the module that holds a page's Python."""
    return f"{page.stem.replace('-', '_')}.py"


def python_of(page: Path) -> str:
    """Return the Python of a page, each line where it stands there."""
    inside, lines = False, []
    for line in page.read_text().splitlines():
        opens = line.startswith("```python")
        lines.append(line if inside and not line.startswith("```") else "")
        inside = opens or (inside and not line.startswith("```"))
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of what is to be checked."""
    made = tmp_path_factory.mktemp("documented")
    for page in PAGES:
        (made / module_of(page)).write_text(python_of(page))
    for consumer in CONSUMERS:
        shutil.copy(consumer, made)
    return made


@pytest.fixture(scope="module")
def found_by_mypy(folder: Path) -> Errors:
    """What mypy --strict finds, by file."""
    (folder / "mypy.ini").write_text(MYPY)
    cache = ROOT / ".mypy_cache" / "typing"
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--cache-dir", cache, "--no-error-summary"),
            *("--no-pretty", "."),
        ],
        cwd=folder,
        env={**os.environ, "MYPYPATH": str(SRC)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode in {0, 1}, ran.stdout + ran.stderr
    errors: Errors = defaultdict(list)
    for line in ran.stdout.splitlines():
        errors[line.partition(":")[0]].append(line)
    return errors


@pytest.fixture(scope="module")
def found_by_pyright(folder: Path) -> Errors:
    """What pyright finds, by file."""
    settings = {
        "extraPaths": [str(SRC)],
        "enableTypeIgnoreComments": False,
        "reportUnnecessaryTypeIgnoreComment": True,
    }
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    ran = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable],
        cwd=folder,
        env={**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode in {0, 1}, ran.stdout + ran.stderr
    answer = json.loads(ran.stdout)
    assert answer["summary"]["filesAnalyzed"] == len(MODULES)
    errors: Errors = defaultdict(list)
    for each in answer["generalDiagnostics"]:
        line = each["range"]["start"]["line"] + 1
        errors[Path(each["file"]).name].append(f"{line}: {each['message']}")
    return errors


MODULES = [*(consumer.name for consumer in CONSUMERS), *map(module_of, PAGES)]


@pytest.mark.parametrize("name", MODULES)
def test_mypy_finds_nothing_wrong_in_what_is_documented(name: str, found_by_mypy: Errors) -> None:
    assert found_by_mypy[name] == []


@pytest.mark.parametrize("name", MODULES)
def test_pyright_finds_nothing_wrong_in_what_is_documented(
    name: str, found_by_pyright: Errors
) -> None:
    assert found_by_pyright[name] == []


@pytest.mark.parametrize(
    "package",
    [
        milvus_vllm_retrievers,
        milvus_vllm_retrievers.langchain,
        milvus_vllm_retrievers.llama_index,
    ],
)
def test_each_public_name_is_used_by_a_consumer(package: object) -> None:
    used = set(re.findall(r"\w+", "".join(file.read_text() for file in CONSUMERS)))

    assert set(package.__all__) <= used


def test_the_readme_has_python_to_check() -> None:
    assert "MilvusVLLMRetriever(" in python_of(ROOT / "README.md")
