"""What to do about an answer of a rerank service: the same, whoever asked it."""

from __future__ import annotations

LATE = "raise the ranker's timeout, or rerank fewer candidates (fetch_k)"
CHECK_ENDPOINT = "is the endpoint vLLM's base URL, such as http://localhost:8000?"
NOT_HTTP = (
    "what listens there does not speak HTTP: is that vLLM's port? Milvus's own (19530) answers so"
)
_SERVED_FOR = "vLLM serves /v1/rerank only for embedding and one-label classification models"
NOT_SERVED = f"Does that vLLM serve a rerank model? {_SERVED_FOR}"
_CHECK_MODEL = (
    f"Check the ranker's model name and endpoint; {_SERVED_FOR}, and the endpoint is its base URL, "
    "such as http://localhost:8000"
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


def sentences(*each: str) -> str:
    """Write sentences one after another, without a last full stop; leave out empty ones."""
    return ". ".join(one.removesuffix(".") for one in each if one).replace("?. ", "? ")


def status_advice(
    status: int,
    said: str,
    *,
    about_key: str = "",
    not_served: str = "",
    endpoint: str = "<endpoint>",
) -> str:
    """Return a sentence for an HTTP status other than 200, without its full stop, or ``""``.

    Args:
        status: The status.
        said: What the service said.
        about_key: The sentence for a key that is missing or wrong: Milvus is given one in another
            way than this process.
        not_served: The sentence for a route that is not there, where the usual one does not fit.
        endpoint: What was asked, where it is known.
    """
    if status in {401, 403}:
        return about_key
    if _ADVICE.get(status) is _CHECK_MODEL and "model" in said and "does not exist" in said:
        return f"Check the ranker's model name: {endpoint}/v1/models lists what vLLM serves"
    if _ADVICE.get(status) is _CHECK_MODEL and not_served:
        return not_served
    return _ADVICE.get(status, "")
