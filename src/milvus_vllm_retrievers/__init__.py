"""Milvus retrieval reranked by vLLM, for LangChain and LlamaIndex.

The front ends are `milvus_vllm_retrievers.langchain` and `milvus_vllm_retrievers.llama_index`.
This module offers what both share, and imports neither framework.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from milvus_vllm_retrievers.errors import (
        ConfigurationError as ConfigurationError,
    )
    from milvus_vllm_retrievers.errors import (
        MilvusVLLMError as MilvusVLLMError,
    )
    from milvus_vllm_retrievers.errors import (
        MissingDependencyError as MissingDependencyError,
    )
    from milvus_vllm_retrievers.errors import (
        RerankConnectionError as RerankConnectionError,
    )
    from milvus_vllm_retrievers.errors import (
        RerankError as RerankError,
    )
    from milvus_vllm_retrievers.errors import (
        RerankResponseError as RerankResponseError,
    )
    from milvus_vllm_retrievers.errors import (
        RerankStatusError as RerankStatusError,
    )
    from milvus_vllm_retrievers.errors import (
        RerankTimeoutError as RerankTimeoutError,
    )
    from milvus_vllm_retrievers.errors import (
        SearchError as SearchError,
    )
    from milvus_vllm_retrievers.ranker import VLLMRanker as VLLMRanker

__version__ = "0.1.0"

_HOME = {
    "VLLMRanker": "ranker",
    **dict.fromkeys(
        (
            "ConfigurationError",
            "MilvusVLLMError",
            "MissingDependencyError",
            "RerankConnectionError",
            "RerankError",
            "RerankResponseError",
            "RerankStatusError",
            "RerankTimeoutError",
            "SearchError",
        ),
        "errors",
    ),
}

__all__ = [  # noqa: PLE0604 - the lazy names are known
    "__version__",
    *_HOME,
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
