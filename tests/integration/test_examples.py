"""The examples and the README's snippets run as printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.real_vllm

ROOT = Path(__file__).parents[2]


def run(path: Path, cwd: Path, vllm: str, entries: int = 60) -> str:
    environment = {
        **os.environ,
        "VLLM_ENDPOINT": vllm,
        "EXAMPLE_ENTRIES": str(entries),
        "COLUMNS": "120",
    }
    for variable in ("CHAT_ENDPOINT", "MILVUS_URI"):
        environment.pop(variable, None)
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_quickstart_compares_both_modes_for_at_least_five_questions(
    vllm: str, tmp_path: Path
) -> None:
    printed = run(ROOT / "examples/quickstart.py", tmp_path, vllm)

    served = re.findall(r"Served by: (\w+) \(mode server\),\s+(\w+) \(mode client\)", printed)
    assert len(served) >= 5
    assert set(served) == {("milvus", "client")}
    assert "no" not in re.findall(r"both ways:\s+(\w+)", printed)
    through_llama_index = printed.partition("Through LlamaIndex:")[2]
    assert re.findall(r"^  (yes|no) ", through_llama_index, re.MULTILINE) == ["yes"] * len(served)
    assert list(tmp_path.iterdir()) == []


def test_the_rag_chain_prints_the_prompt_it_would_send(vllm: str, tmp_path: Path) -> None:
    printed = run(ROOT / "examples/rag_chain.py", tmp_path, vllm)

    assert "this would be sent" in printed
    assert "Question: How do I run a program and capture what it prints?" in printed


def test_the_agent_calls_the_retriever_as_a_tool(vllm: str, tmp_path: Path) -> None:
    printed = run(ROOT / "examples/agent_tool.py", tmp_path, vllm)

    assert "Name: search_python_docs" in printed
    assert re.search(r"Name: search_python_docs\s+\w+[\w.]*: \w+", printed)


def test_the_query_engines_print_the_prompt_and_its_sources_best_first(
    vllm: str, tmp_path: Path
) -> None:
    # Enough that on every Python some entry holds one of the question's words.
    printed = run(ROOT / "examples/query_engine.py", tmp_path, vllm, entries=200)

    assert printed.count("Query: How do I run a program and capture what it prints?") == 2
    answers = printed.split("Sources, best first:")[1:]
    assert len(answers) == 2
    for answer in answers:
        scores = re.findall(r"^(\S+) \(reranked by client\)", answer, re.MULTILINE)
        assert 1 <= len(scores) <= 4
        assert scores == sorted(scores, key=float, reverse=True)


def test_of_two_hundred_tools_both_frameworks_offer_the_same_few_that_fit(
    vllm: str, tmp_path: Path
) -> None:
    printed = run(ROOT / "examples/tool_retrieval.py", tmp_path, vllm)

    assert printed.count("these tools would be sent") == 2
    offered = re.findall(r"^- (\w+)$", printed, re.MULTILINE)
    assert len(offered) == 10
    assert offered[:5] == offered[5:]
    assert "statistics_mean" in offered


def test_the_readmes_snippets_run_as_printed_one_after_the_other(vllm: str, tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    script = tmp_path / "snippets.py"
    script.write_text("\n".join(snippets).replace("http://localhost:8000", vllm), encoding="utf-8")

    printed = run(script, tmp_path, vllm).splitlines()

    assert re.fullmatch(r"0\.\d{3} API keys are rotated with .*", printed[0])
    assert printed[-1] == printed[0].partition(" ")[2]
