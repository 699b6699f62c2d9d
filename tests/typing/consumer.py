"""What a user of either framework imports from the package itself; type-checked, never run."""

from __future__ import annotations

from typing_extensions import assert_type

import milvus_vllm_retrievers
from milvus_vllm_retrievers import (
    ConfigurationError,
    Explanation,
    MilvusVLLMError,
    MissingDependencyError,
    RerankConnectionError,
    RerankError,
    RerankResponseError,
    RerankStatusError,
    RerankTimeoutError,
    SearchError,
    VLLMRanker,
)


def ranking() -> None:
    """Describe a ranker, and bind it to a query for plain pymilvus."""
    ranker = VLLMRanker(
        "http://localhost:8000/v1",
        server_endpoint="http://vllm:8000",
        model="bge",
        api_key="sk-mine",
        credential="vllm",
        mode="auto",
        on_error="client",
        truncate_prompt_tokens=512,
        max_client_batch_size=32,
        max_concurrency=8,
        timeout=None,
        max_retries=0,
        cool_down=5,
        extra_body={"use_activation": False},
    )
    VLLMRanker(endpoint="http://localhost:8000", instruction="find the newest")
    assert_type(ranker.endpoint, str)
    ranker.to_function("whales", "text")
    ranker.to_function(["whales", "bread"], "text", provider="cohere", name="mine")
    assert_type(milvus_vllm_retrievers.__version__, str)


def explained(explanation: Explanation) -> None:
    """Read what reranking did."""
    assert_type(explanation.candidates, int)
    assert_type(
        [(row.rank, row.retrieval_rank) for row in explanation.hits], list[tuple[int, int | None]]
    )


def failing(error: MilvusVLLMError) -> str:
    """Tell errors apart."""
    if isinstance(error, RerankStatusError):
        return f"{error.status_code} {error.body} {error.retry_after}"
    if isinstance(error, SearchError):
        return error.reason or "unknown"
    kinds: tuple[type[MilvusVLLMError], ...] = (
        *(ConfigurationError, MissingDependencyError, RerankError),
        *(RerankConnectionError, RerankTimeoutError, RerankResponseError),
    )
    return next(kind.__name__ for kind in kinds if isinstance(error, kind))


def wrong(ranker: VLLMRanker) -> None:
    """Write what is an error already to a type checker: each line is one that it must find."""
    VLLMRanker("http://localhost:8000", "bge")  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    VLLMRanker("http://localhost:8000", mode="both")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    ranker.endpoint = "http://vllm"  # type: ignore[misc] # pyright: ignore[reportAttributeAccessIssue]
