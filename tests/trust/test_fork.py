"""Processes that fork, or spawn others, while they have retrievers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pymilvus import MilvusClient

from tests.corpus import create_collection
from tests.fakes import FakeVLLM
from tests.trust.forking import COLLECTION
from tests.trust.subjects import fits

ROOT = Path(__file__).parents[2]
SECONDS = 120  # far more than it takes

Run = Callable[[str], Any]

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


@pytest.fixture(scope="module")
def run(milvus26: MilvusClient, milvus26_uri: str, _fake_vllm: FakeVLLM) -> Run:
    """Run a case of `tests.trust.forking` in a process of its own and return what it tells."""
    create_collection(milvus26, COLLECTION)

    def once(case: str) -> Any:
        _fake_vllm.reset()
        _fake_vllm.score = fits
        command = [sys.executable, "-m", "tests.trust.forking", case, milvus26_uri, _fake_vllm.url]
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=SECONDS, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return once


@pytest.fixture(scope="module")
def blocking(run: Run) -> Any:
    """What a process and those that it forks tell of blocking calls."""
    return run("blocking")


GOOD = {"wrong": 0}
GOOD_CHILD = {"wrong": 0, "status": 0}
BOTH_GOOD = {"parent": GOOD, "child": GOOD_CHILD}


@needs_fork
def test_what_was_made_before_a_fork_works_in_both_processes(blocking: Any) -> None:
    assert blocking["unused"] == BOTH_GOOD


@needs_fork
def test_what_was_used_before_a_fork_gives_each_process_its_own_answers(blocking: Any) -> None:
    assert blocking["used"] == BOTH_GOOD


@needs_fork
def test_a_forked_process_may_fork_in_turn(blocking: Any) -> None:
    assert blocking["in a child"] == BOTH_GOOD | {"status": 0}


@needs_fork
def test_a_fork_after_an_event_loop_has_ended_stops_neither_process(run: Run) -> None:
    assert run("used_async_and_closed") == BOTH_GOOD


@needs_fork
def test_a_fork_while_async_connections_are_open_leaves_a_child_with_blocking_calls(
    run: Run,
) -> None:
    told = run("used_async_and_open")

    assert told["parent"] == GOOD
    assert told["blocking child"] == told["after"] == GOOD_CHILD
    refused = told["async child"]
    assert (refused["error"], refused["status"]) == ("ConfigurationError", 0)
    assert "make blocking calls here, fork before the first async call" in refused["message"]


@needs_fork
def test_a_fork_while_another_thread_reports_a_failure_does_not_stop_the_child(run: Run) -> None:
    assert run("while_a_lock_is_held") == {"rest": None, "status": 0}


def test_a_ranker_is_handed_to_a_process_that_is_started_anew_unless_it_has_a_key(
    run: Run,
) -> None:
    told = run("spawned")

    assert told["child"] == GOOD
    assert "is not pickled, since the key would be in the pickle" in told["refused"]
