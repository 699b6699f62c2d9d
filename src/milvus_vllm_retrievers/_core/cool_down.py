"""How a rerank service has been doing: whether to ask it now, and what to tell the operator."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence

from milvus_vllm_retrievers._core.fork import forget_in_child
from milvus_vllm_retrievers.errors import MilvusVLLMError, RerankError, RerankStatusError

logger = logging.getLogger("milvus_vllm_retrievers")

FAILURES_BEFORE_REST = 3
# A refusal of these kinds is about what was sent, such as a document that is too long; the
# service itself is well.
_ABOUT_THE_REQUEST = frozenset({400, 413, 422})
# So many different texts with one and the same score are no coincidence.
_LEAST_CONSTANT_SCORES = 3


class _RestingError(RerankError):
    """The service was not asked."""


class CoolDown:
    """Spares callers with a fallback the wait for a rerank service that keeps failing.

    After three failures in a row the service rests for a while. Then one caller asks it again,
    and the others follow once that has worked.

    Args:
        name: Who calls the service, for the log.
        meanwhile: What is done while it fails, for the log.
        seconds: How long the rest is; 0 never rests.
    """

    def __init__(self, name: str, seconds: float, meanwhile: str = "") -> None:
        self._name = name
        self._meanwhile = meanwhile
        self._seconds = seconds
        self._lock = threading.Lock()
        self._failures = 0
        self._resting_until = 0.0
        self._last_error = ""
        self._incident_until = 0.0
        self._in_incident = False
        forget_in_child(self)

    def forget_connections(self) -> Sequence[object]:
        """Renew the lock in a forked process: a thread that is not there may have held it."""
        self._lock = threading.Lock()
        return ()

    def rest(self) -> RerankError | None:
        """Return why the service is not to be asked now; None if it is.

        Where a rest is over, the caller that is told so first asks on behalf of all.
        """
        with self._lock:
            now = time.monotonic()
            if self._failures < FAILURES_BEFORE_REST or not self._seconds:
                return None
            if now >= self._resting_until:
                self._resting_until = now + self._seconds
                return None
            return _RestingError(
                f"not asked: reranking {self._name} failed {self._failures} times in a row and is "
                f"tried again in {self._resting_until - now:.0f} s. The last failure: "
                f"{self._last_error}"
            )

    def note(self, errors: Sequence[MilvusVLLMError], *, worked: bool) -> None:
        """Note what a call with a fallback brought.

        Args:
            errors: Those of its queries that were degraded; the first of an incident is logged.
            worked: Whether the service scored anything, be it for another query.
        """
        met = [error for error in errors if not isinstance(error, _RestingError)]
        if met:
            self._failed(met, worked=worked)
        elif worked:
            self._worked()

    def _failed(self, errors: Sequence[MilvusVLLMError], *, worked: bool) -> None:
        blamed = next((error for error in errors if _is_of_service(error)), None)
        with self._lock:
            now = time.monotonic()
            first = not self._in_incident
            self._in_incident = True
            self._incident_until = now + self._seconds
            if blamed is None or worked:
                self._failures = 0
            else:
                self._failures += 1
                self._last_error = str(blamed)
                self._resting_until = now + self._seconds
        if first:
            logger.warning(
                "reranking %s failed; results are degraded as on_error says%s until it works "
                "again, which is logged too: %s",
                self._name,
                self._meanwhile,
                errors[0],
            )

    def _worked(self) -> None:
        """An incident is over when it works and failures have not come for a while."""
        with self._lock:
            self._failures = 0
            over = self._in_incident and time.monotonic() >= self._incident_until
            self._in_incident = self._in_incident and not over
        if over:
            logger.info("reranking %s works again", self._name)


def _is_of_service(error: MilvusVLLMError) -> bool:
    return not (isinstance(error, RerankStatusError) and error.status_code in _ABOUT_THE_REQUEST)


class Health:
    """How reranking has been going, both ways.

    Args:
        cool_down: Seconds for which a service that keeps failing is spared.
        model: The model's name, where the ranker has one.
        on_error: What the ranker does where Milvus cannot rerank.

    Attributes:
        in_milvus: How reranking inside Milvus has been going.
        from_here: How reranking from this process has been going.
        model: The model's name, or what the first answer says it is; empty until then.
    """

    def __init__(self, cool_down: float, model: str = "", on_error: str = "skip") -> None:
        instead = " (this process reranks instead)" if on_error == "client" else ""
        self.in_milvus = CoolDown("inside Milvus", cool_down, instead)
        self.from_here = CoolDown("from this process", cool_down)
        self.model = model
        self._warned = threading.Event()

    def check_spread(self, texts: Iterable[str | None], scores: Sequence[float | None]) -> None:
        """Warn, once, if different texts all have the same score."""
        values = {score for score in scores if score is not None}
        if len(values) != 1 or self._warned.is_set():
            return
        scored = {text for text, score in zip(texts, scores, strict=True) if score is not None}
        if len(scored) < _LEAST_CONSTANT_SCORES:
            return
        self._warned.set()
        logger.warning(
            "the rerank model gave %d different texts the same score, %s, so their order means "
            "nothing: it is probably served without its score template or head (Qwen3-Reranker "
            "needs --hf-overrides and a template), or its scores saturate",
            len(scored),
            values.pop(),
        )
