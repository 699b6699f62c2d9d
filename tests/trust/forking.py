"""A process that forks, or spawns, while it has retrievers: ``python -m tests.trust.forking CASE``.

It is started by tests, since pytest itself should not be forked. What happened is written as JSON.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import pickle
import select
import signal
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any

from langchain_core.documents import Document

from milvus_vllm_retrievers import MilvusVLLMError, VLLMRanker
from milvus_vllm_retrievers._core.cool_down import CoolDown
from milvus_vllm_retrievers.langchain import MilvusVLLMRetriever, VLLMRerank
from tests.corpus import TEXTS
from tests.fakes import LetterEmbeddings

# Each stands in one text alone.
WORDS = [
    *("cat", "dog", "Whales", "aeroplane", "engine", "Bread"),
    *("tomatoes", "library", "violin", "Glaciers", "mayor", "bees"),
]
COLLECTION = "fork_docs"
PARENTS_WORDS, CHILDS_WORDS = WORDS[:6], WORDS[6:]
ROUNDS = 5
CALL_SECONDS = 6.0  # for a call that may hang
CHILD_SECONDS = 60.0  # for all that a child does

Outcome = dict[str, Any]


class Subjects:
    """A retriever that reranks from here, and a reranker: both hold connections."""

    def __init__(self, milvus: str, vllm: str) -> None:
        ranker = VLLMRanker(vllm, mode="client", max_retries=0)
        self.retriever = MilvusVLLMRetriever(
            collection_name=COLLECTION,
            uri=milvus,
            ranker=ranker,
            vector_field="dense",
            embedding=LetterEmbeddings(),
            timeout=CALL_SECONDS,
        )
        self.reranker = VLLMRerank(ranker)
        self.documents = [Document(page_content=text) for text in TEXTS]

    def ask(self, word: str) -> list[str]:
        """Return the text that each has first."""
        found, ranked = (
            self.retriever.invoke(word),
            self.reranker.compress_documents(self.documents, word),
        )
        return [found[0].page_content, ranked[0].page_content]

    async def aask(self, word: str) -> list[str]:
        """Return the text that each has first; the async twin of `ask`."""
        found = await self.retriever.ainvoke(word)
        ranked = await self.reranker.acompress_documents(self.documents, word)
        return [found[0].page_content, ranked[0].page_content]

    async def aclose(self) -> None:
        """Close what this event loop has opened."""
        await self.retriever.aclose()
        await self.reranker.aclose()


def outcome(ask: Callable[[str], list[str]], words: list[str]) -> Outcome:
    """Ask for words over and over; tell how many answers were of another word, or the error."""
    wrong = 0
    try:
        for word in words * ROUNDS:
            wrong += sum(word not in text for text in ask(word))
    except MilvusVLLMError as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"wrong": wrong}


def in_a_child(
    work: Callable[[], Outcome], leave: Callable[[int], Any] = sys.exit
) -> Callable[[], Outcome]:
    """Fork; return what waits for the child and tells what it did and how it ended.

    A child leaves as any program does, with all that the interpreter does at its end, or at once,
    as the processes of multiprocessing do.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writing, json.dumps(work()).encode())
        leave(0)
    os.close(writing)

    def wait() -> Outcome:
        ready, _, _ = select.select([reading], [], [], CHILD_SECONDS)
        told = os.read(reading, 1_000_000) if ready else b""
        ended, _, _ = select.select([reading], [], [], CHILD_SECONDS) if ready else ([], [], [])
        if not ended:
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        return {**json.loads(told or b'{"error": "it told nothing"}'), "status": status}

    return wait


def used_by_both(subjects: Subjects) -> Outcome:
    """Have a child and its parent use the same objects at once."""
    wait = in_a_child(lambda: outcome(subjects.ask, CHILDS_WORDS))
    return {"parent": outcome(subjects.ask, PARENTS_WORDS), "child": wait()}


def blocking(subjects: Subjects) -> Outcome:
    """Fork before anything has connected, then with open connections, then in a forked process."""
    unused = used_by_both(subjects)
    subjects.ask("cat")
    used = used_by_both(subjects)

    def fork_again() -> Outcome:
        subjects.ask("dog")
        return used_by_both(subjects)

    return {"unused": unused, "used": used, "in a child": in_a_child(fork_again)()}


def used_async_and_closed(subjects: Subjects) -> Outcome:
    """Fork after an event loop has ended, whose connections were closed; then both are async."""

    def ask(word: str) -> list[str]:
        async def once() -> list[str]:
            try:
                return await subjects.aask(word)
            finally:
                await subjects.aclose()

        return asyncio.run(once())

    ask("cat")
    wait = in_a_child(lambda: outcome(ask, CHILDS_WORDS))
    return {"parent": outcome(ask, PARENTS_WORDS), "child": wait()}


def used_async_and_open(subjects: Subjects) -> Outcome:
    """Fork beside an event loop that goes on; children ask blocking, async, and after `aclose`."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    def in_loop(coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(CHILD_SECONDS)

    def ask(word: str) -> list[str]:
        return asyncio.run(subjects.aask(word))

    in_loop(subjects.aask("cat"))
    is_blocking = in_a_child(lambda: outcome(subjects.ask, CHILDS_WORDS))
    is_async = in_a_child(lambda: outcome(ask, CHILDS_WORDS))
    told = {
        "parent": outcome(lambda word: in_loop(subjects.aask(word)), PARENTS_WORDS),
        "blocking child": is_blocking(),
        "async child": is_async(),
    }
    in_loop(subjects.aclose())
    return told | {"after": in_a_child(lambda: outcome(ask, CHILDS_WORDS))()}


def while_a_lock_is_held(_: Subjects) -> Outcome:
    """Fork while another thread notes how reranking goes; the child has it rest."""
    cool_down = CoolDown("somewhere", 30.0)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with cool_down._lock:
            held.set()
            done.wait(CHILD_SECONDS)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(CHILD_SECONDS)

    def rest() -> Outcome:
        signal.alarm(int(CALL_SECONDS))  # of one that hangs
        return {"rest": cool_down.rest()}

    told = in_a_child(rest, os._exit)()
    done.set()
    thread.join()
    return told


def rank(ranker: VLLMRanker, word: str) -> list[str]:
    """Rerank with a ranker that came from another process."""
    documents = [Document(page_content=text) for text in TEXTS]
    with VLLMRerank(ranker) as reranker:
        return [d.page_content for d in reranker.compress_documents(documents, word)][:1]


def spawned(subjects: Subjects) -> Outcome:
    """Hand rankers to a process that is started anew."""
    ranker = subjects.reranker.ranker
    assert ranker is not None
    refused = ""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        told = pool.apply(outcome_of_rank, (ranker, CHILDS_WORDS))
        try:
            pool.apply(rank, (VLLMRanker(ranker.endpoint, api_key="sk-key"), "cat"))
        except (TypeError, pickle.PicklingError) as error:
            refused = str(error)
    return {"child": told, "refused": refused}


def outcome_of_rank(ranker: VLLMRanker, words: list[str]) -> Outcome:
    """Rerank for words and tell how many answers were of another one."""
    return outcome(lambda word: rank(ranker, word), words)


CASES = (
    blocking,
    used_async_and_closed,
    used_async_and_open,
    while_a_lock_is_held,
    spawned,
)

if __name__ == "__main__":
    case = next(each for each in CASES if each.__name__ == sys.argv[1])
    json.dump(case(Subjects(*sys.argv[2:4])), sys.stdout)
