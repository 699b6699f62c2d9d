"""What to do about an answer of a rerank service: the same, whoever asked it."""

from __future__ import annotations

LATE = "raise the ranker's timeout, or rerank fewer candidates (fetch_k)"
CHECK_ENDPOINT = "is the endpoint vLLM's base URL, such as http://localhost:8000?"
_CHECK_MODEL = (
    "Check the ranker's model name and endpoint; vLLM serves /v1/rerank only for embedding and "
    "one-label classification models, and the endpoint is its base URL, such as "
    "http://localhost:8000"
)
_BUSY = (
    "It has more to do than it takes: try again later, lower the ranker's max_concurrency, or "
    "say with on_error what is to happen meanwhile"
)
_ILL = "The log of vLLM, or of the gateway before it, says why; is a rerank model served there?"
_ADVICE: dict[int, str] = {
    400: "If a document is too long, keep truncate_prompt_tokens=-1; one bad document fails its "
    "whole request",
    404: _CHECK_MODEL,
    405: _CHECK_MODEL,
    413: "Send fewer documents in a request: lower the ranker's max_client_batch_size",
    429: _BUSY,
    500: _ILL,
    502: _ILL,
    503: _BUSY,
    504: _ILL,
}


def status_advice(status: int, said: str, about_key: str) -> str:
    """Return a sentence for an HTTP status other than 200, without its full stop, or ``""``.

    Args:
        status: The status.
        said: What the service said.
        about_key: The sentence for a key that is missing or wrong: Milvus is given one in another
            way than this process.
    """
    if status in {401, 403}:
        return about_key
    if _ADVICE.get(status) is _CHECK_MODEL and "model" in said and "does not exist" in said:
        return "Check the ranker's model name: <endpoint>/v1/models lists what vLLM serves"
    return _ADVICE.get(status, "")
