"""Milvus retrieval reranked by vLLM, for LangChain and LlamaIndex.

The front ends are `milvus_vllm_retrievers.langchain` and `milvus_vllm_retrievers.llama_index`.
This module offers what both share, and imports neither framework.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from milvus_vllm_retrievers.errors import (
        ConfigurationError,
        MilvusVLLMError,
        MissingDependencyError,
        RerankConnectionError,
        RerankError,
        RerankResponseError,
        RerankStatusError,
        RerankTimeoutError,
        SearchError,
    )
    from milvus_vllm_retrievers.explain import Explanation
    from milvus_vllm_retrievers.ranker import VLLMRanker

__version__ = "0.1.0"

__all__ = [
    "ConfigurationError",
    "Explanation",
    "MilvusVLLMError",
    "MissingDependencyError",
    "RerankConnectionError",
    "RerankError",
    "RerankResponseError",
    "RerankStatusError",
    "RerankTimeoutError",
    "SearchError",
    "VLLMRanker",
    "__version__",
]

# Where what is no error is at home.
_HOME = {"Explanation": "explain", "VLLMRanker": "ranker"}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
