"""What a Milvus server can do, as far as its version tells."""

from __future__ import annotations

import re
from dataclasses import dataclass

from milvus_vllm_retrievers.ranker import Provider

_FIRST_WITH_RERANK = (2, 6)
_FIRST_WITH_NULLABLE_TEXT = (3, 0)  # milvus#47919
_FIRST_LITE_WITH_RERANK = (3, 0)


@dataclass(frozen=True, slots=True)
class Server:
    """What a Milvus server can do, as far as its version tells.

    Attributes:
        version: The version as the server words it.
        known: Whether the version could be read.
        is_lite: Whether this is Milvus Lite.
        provider: The rerank provider through which it reaches vLLM; None if it has none and
            ignores rerank Functions in silence.
        reranks_nullable: Whether it reranks by a text field whose values may be null.
    """

    version: str
    known: bool
    is_lite: bool
    provider: Provider | None
    reranks_nullable: bool = True

    @classmethod
    def from_version(cls, version: str) -> Server:
        """Read ``2.6.4``, ``v2.6.4-dev``, ``milvus_lite-3.2.2`` or a sentence with a version."""
        lite = re.search(r"milvus[_-]lite\D*(\d+)\.(\d+)", version, re.IGNORECASE)
        if lite:
            capable = _numbers(lite) >= _FIRST_LITE_WITH_RERANK
            return cls(version, known=True, is_lite=True, provider="cohere" if capable else None)
        found = re.search(r"(\d+)\.(\d+)", version)
        if not found:
            return cls(version, known=False, is_lite=False, provider="vllm")
        return cls(
            version,
            known=True,
            is_lite=False,
            provider="vllm" if _numbers(found) >= _FIRST_WITH_RERANK else None,
            reranks_nullable=_numbers(found) >= _FIRST_WITH_NULLABLE_TEXT,
        )


def _numbers(found: re.Match[str]) -> tuple[int, ...]:
    return tuple(int(group) for group in found.groups())
