"""`rerank_server` that keeps to `top_n`, as vLLM does: the peers ask for no more than they return.

python -m benchmarks.peers_rerank_server [--delay-ms 50]
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks import rerank_server

_answer = rerank_server.answer


def answer(body: bytes) -> dict[str, Any]:
    """Return what vLLM answers to a rerank request: its `top_n` best, all of them by default."""
    reply = _answer(body)
    reply["results"] = reply["results"][: json.loads(body).get("top_n") or None]
    return reply


if __name__ == "__main__":
    rerank_server.answer = answer
    rerank_server.main()
