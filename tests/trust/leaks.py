"""A pytest plugin: a test in which one of the tests' secrets shows has failed.

It looks where a secret would end up in production: in every record of this package's log (and the
warnings of everyone else's), in every error this package makes, with its causes, in what the tests
write to their standard output and error, and in what the tracers of LangChain and LlamaIndex see.

The tests' secrets are recognised by how they look. A new one begins with ``sk-``.
"""

from __future__ import annotations

import contextvars
import logging
import re
import sys
import threading
import weakref
from collections.abc import Generator, Iterator
from typing import Any

import pytest

from milvus_vllm_retrievers.errors import MilvusVLLMError

SECRET = re.compile(r"\b(?:sk-[a-z][\w-]*|pa55word|hidden)\b")
_PACKAGE = "milvus_vllm_retrievers"
_AROUND = 60  # characters of the text around a find that are shown
_SEEN_SECTIONS = pytest.StashKey[int]()


def texts_of(error: BaseException) -> Iterator[str]:
    """Yield all that a log or an error tracker may hold of an error, its causes' texts included.

    Neither lines of source code nor local variables are among it: a test's own would be found.
    """
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield f"{one} {one!r} {one.args} {vars(one)}"
        yield from getattr(one, "__notes__", ())
        waiting += [one.__cause__, one.__context__]


class LeakWatch(logging.Handler):
    """Looks at what is logged, raised and traced, and keeps what it should not have seen."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self._found: dict[tuple[str, str], str] = {}
        self._errors: weakref.WeakSet[MilvusVLLMError] = weakref.WeakSet()
        self._told: dict[int, MilvusVLLMError] = {}  # kept, so that their ids stay theirs
        self._errors_lock = threading.Lock()

    def look(self, where: str, text: str) -> bool:
        """Keep what is found, once for each place, with a little of what stands around it."""
        found = None
        for found in SECRET.finditer(text):
            start, end = max(0, found.start() - _AROUND), found.end() + _AROUND
            told = f"{where} shows {found.group()!r}: …{text[start:end]}…"
            self._found.setdefault((where, found.group()), told)
        return found is not None

    def take(self) -> list[str]:
        """Return what was found since the last time, errors that are still there included."""
        with self._errors_lock:
            alive = list(self._errors)
        for error in alive:
            self.look_at_error(error)
        found, self._found = self._found, {}
        return list(found.values())

    def emit(self, record: logging.LogRecord) -> None:
        """Look at a record that someone logs."""
        if record.levelno < logging.WARNING and not record.name.startswith(_PACKAGE):
            return
        where = f"a record of logger {record.name!r}"
        self.look(where, record.getMessage())
        error = record.exc_info[1] if record.exc_info else None
        for text in texts_of(error) if error else ():
            self.look(where, text)

    def watch(self, error: MilvusVLLMError) -> None:
        """Look at an error later: what it says may change before it is raised."""
        with self._errors_lock:
            self._errors.add(error)

    def look_at_error(self, error: MilvusVLLMError) -> None:
        """Look at an error and all that led to it; one that shows a secret is told of once."""
        where = f"an error of kind {type(error).__name__}"
        if id(error) not in self._told and any(self.look(where, t) for t in texts_of(error)):
            self._told[id(error)] = error


class Plugin:
    """Watches the tests of one pytest session."""

    def __init__(self) -> None:
        self.watch = LeakWatch()
        self._logger = logging.getLogger(_PACKAGE)
        self._level = self._logger.level

    def start(self) -> None:
        """Begin to watch logs and errors."""
        logging.getLogger().addHandler(self.watch)
        self._logger.setLevel(logging.DEBUG)
        watch = self.watch

        def init(self: MilvusVLLMError, *args: Any, **kwargs: Any) -> None:
            super(MilvusVLLMError, self).__init__(*args, **kwargs)
            watch.watch(self)

        def delete(self: MilvusVLLMError) -> None:
            watch.look_at_error(self)

        # An error that nobody keeps is looked at when it goes, in its last state.
        MilvusVLLMError.__init__ = init  # type: ignore[method-assign]
        MilvusVLLMError.__del__ = delete  # type: ignore[attr-defined]

    def stop(self) -> None:
        """Leave everything as it was."""
        logging.getLogger().removeHandler(self.watch)
        self._logger.setLevel(self._level)
        del MilvusVLLMError.__init__, MilvusVLLMError.__del__  # type: ignore[attr-defined]

    def pytest_collection_finish(self) -> None:
        """Watch the tracers of the frameworks that the tests use."""
        if "langchain_core" in sys.modules:
            _trace_langchain(self.watch)
        if "llama_index_instrumentation" in sys.modules:
            _trace_llama_index(self.watch)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Turn the report of a test that showed a secret into one of a failure."""
        report = yield
        seen = item.stash.get(_SEEN_SECTIONS, 0)
        for name, text in report.sections[seen:]:
            self.watch.look(f"{name!r} of the test", text)
        item.stash[_SEEN_SECTIONS] = len(report.sections)
        found = self.watch.take()
        if found:
            told = "A secret shows.\n" + "\n".join(found)
            report.sections.append(("Secrets shown", told))
            report.longrepr = report.longrepr if report.failed else told
            report.outcome = "failed"
        return report


def _trace_langchain(watch: LeakWatch) -> None:
    from langchain_core.callbacks import BaseCallbackHandler
    from langchain_core.tracers.context import register_configure_hook

    class Tracer(BaseCallbackHandler):
        """Looks at all that a tracer is given when a retriever or a tool starts or fails."""

        def on_retriever_start(self, *args: Any, **kwargs: Any) -> None:
            watch.look("a trace of LangChain", f"{args} {kwargs}")

        def on_tool_start(self, *args: Any, **kwargs: Any) -> None:
            watch.look("a trace of LangChain", f"{args} {kwargs}")

        def on_chain_start(self, *args: Any, **kwargs: Any) -> None:
            watch.look("a trace of LangChain", f"{args} {kwargs}")

        def on_retriever_error(self, error: BaseException, **kwargs: Any) -> None:
            watch.look("a trace of LangChain", f"{error!r} {kwargs}")

    # By default, since a value that is set would be one of this thread's context alone.
    everywhere = contextvars.ContextVar("leaks", default=Tracer())  # noqa: B039
    register_configure_hook(everywhere, inheritable=True)


def _trace_llama_index(watch: LeakWatch) -> None:
    from llama_index_instrumentation import get_dispatcher
    from llama_index_instrumentation.event_handlers import BaseEventHandler

    class Events(BaseEventHandler):
        """Looks at every event that is sent."""

        @classmethod
        def class_name(cls) -> str:
            return "LeakEvents"

        def handle(self, event: Any, **_: Any) -> None:
            watch.look("an event of LlamaIndex", repr(event))

    get_dispatcher().add_event_handler(Events())


def pytest_configure(config: pytest.Config) -> None:
    """Watch this session."""
    plugin = Plugin()
    plugin.start()
    config.add_cleanup(plugin.stop)
    config.pluginmanager.register(plugin, "secrets-shown")
