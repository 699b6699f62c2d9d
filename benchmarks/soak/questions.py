"""What is asked: the rows, the retrievers and rerankers, and a query with all that goes with it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Literal

from tests import corpus

from milvus_vllm_retrievers.ranker import Mode, OnError

COLLECTION = "soak"
ROWS = 200
FETCH_K = 20
LOW, HIGH = 40, 120  # filters on the rows' numbers, fixed and per call
WORDS = sorted(set(" ".join(corpus.TEXTS).lower().replace(".", "").replace(",", "").split()))

# Seconds that a call may take. How fast a real model is on a busy machine is not the question.
_CALL_TIMEOUT = 15.0
_REAL_TIMEOUT = 60.0

Kind = Literal["retriever", "texts", "rows"]
Front = Literal["langchain", "llama_index"]


@dataclass(frozen=True)
class Setup:
    """A retriever or reranker: what it is and what it does when reranking fails.

    Attributes:
        front: The framework.
        kind: A retriever, a VLLMRerank ("texts") or a MilvusVLLMRerank ("rows").
        mode: Who reranks.
        on_error: What happens if that fails.
        fields: The vector fields that are searched.
        k: How many items come back.
        low: The rows' least number, its own filter.
        batch: Documents per rerank request.
        real: Whether it uses the real vLLM.
    """

    front: Front
    kind: Kind
    mode: Mode
    on_error: OnError
    fields: tuple[str, ...] = ("sparse", "dense")
    k: int = 5
    low: int = 0
    batch: int | None = None
    real: bool = False

    @property
    def timeout(self) -> float:
        """Seconds one call may take."""
        return _REAL_TIMEOUT if self.real else _CALL_TIMEOUT

    @property
    def has_batch(self) -> bool:
        """Whether it takes several questions in one call."""
        return self.front == "langchain" and self.kind == "retriever"

    @property
    def rerankers(self) -> set[str]:
        """Who may have reranked an answer."""
        if self.mode == "client" or self.kind == "texts":
            return {"client"}
        return {"milvus", "client"} if self.on_error == "client" else {"milvus"}


SETUPS = (
    Setup("langchain", "retriever", "server", "raise"),
    Setup("langchain", "retriever", "server", "client", ("sparse",), low=LOW),
    Setup("langchain", "retriever", "server", "skip", ("dense",), k=FETCH_K),
    Setup("langchain", "retriever", "client", "raise", ("dense",), batch=8),
    Setup("langchain", "retriever", "client", "skip", low=LOW),
    Setup("langchain", "retriever", "auto", "client"),
    Setup("llama_index", "retriever", "server", "raise", ("sparse",), low=LOW),
    Setup("llama_index", "retriever", "server", "client"),
    Setup("llama_index", "retriever", "client", "raise", ("dense",)),
    Setup("llama_index", "retriever", "client", "skip", batch=8),
    Setup("llama_index", "retriever", "auto", "skip", low=LOW),
    Setup("langchain", "texts", "client", "raise", batch=4),
    Setup("langchain", "texts", "client", "skip"),
    Setup("llama_index", "texts", "client", "raise"),
    Setup("llama_index", "texts", "client", "skip", batch=4),
    Setup("langchain", "rows", "server", "raise"),
    Setup("langchain", "rows", "auto", "client"),
    Setup("llama_index", "rows", "server", "skip"),
    Setup("llama_index", "rows", "server", "client"),
)
REAL_SETUPS = (
    Setup("langchain", "retriever", "server", "raise", ("sparse",), real=True),
    Setup("langchain", "retriever", "client", "raise", ("dense",), real=True),
    Setup("llama_index", "retriever", "client", "raise", real=True),
    Setup("llama_index", "texts", "client", "raise", real=True),
)


@dataclass(frozen=True)
class Question:
    """One query, and what goes with it.

    Attributes:
        text: The query.
        items: The rows that are to be reranked, in the order they are given.
        k: How many items are to come back; None leaves it to the retriever.
        high: The rows' highest number, exclusive: a filter per call; None is no filter.
    """

    text: str
    items: tuple[int, ...] = ()
    k: int | None = None
    high: int | None = None

    @property
    def per_call(self) -> dict[str, Any]:
        """What a LangChain retriever is given beside the query."""
        given = {"k": self.k, "expr": self.high and f"number < {self.high}"}
        return {name: value for name, value in given.items() if value}


def _texts() -> list[str]:
    rng = random.Random(4)
    return [
        " ".join(rng.choices(WORDS, k=rng.randrange(8, 60))) + f" {number}"
        for number in range(ROWS)
    ]


TEXTS = _texts()
