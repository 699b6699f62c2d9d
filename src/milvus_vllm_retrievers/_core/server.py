"""What a Milvus server can do, as far as its version tells."""

from __future__ import annotations

import re
from dataclasses import dataclass

from milvus_vllm_retrievers.ranker import Provider

_FIRST_WITH_RERANK = (2, 6)
_FIRST_LITE_WITH_RERANK = (3, 0)


@dataclass(frozen=True, slots=True)
class Server:
    """What a Milvus server can do, as far as its version tells.

    Attributes:
        version: The version as the server words it.
        known: Whether the version could be read.
        provider: The rerank provider through which it reaches vLLM; None if it has none and
            ignores rerank Functions in silence.
    """

    version: str
    known: bool
    provider: Provider | None

    @classmethod
    def from_version(cls, version: str) -> Server:
        """Read ``2.6.4``, ``v2.6.4-dev``, ``milvus_lite-3.2.2`` or a sentence with a version."""
        lite = re.search(r"milvus[_-]lite\D*(\d+)\.(\d+)", version, re.IGNORECASE)
        if lite:
            capable = _numbers(lite) >= _FIRST_LITE_WITH_RERANK
            return cls(version, known=True, provider="cohere" if capable else None)
        found = re.search(r"(\d+)\.(\d+)", version)
        if not found:
            return cls(version, known=False, provider="vllm")
        capable = _numbers(found) >= _FIRST_WITH_RERANK
        return cls(version, known=True, provider="vllm" if capable else None)

    @property
    def is_lite(self) -> bool:
        """Whether this is Milvus Lite 3 or later."""
        return self.provider == "cohere"


def _numbers(found: re.Match[str]) -> tuple[int, ...]:
    return tuple(int(group) for group in found.groups())
