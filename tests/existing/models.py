"""The letter embedding of `tests.fakes` as LlamaIndex's model, and as sparse vectors."""

from __future__ import annotations

from llama_index.core.base.embeddings.base import BaseEmbedding

from tests.fakes import LetterEmbeddings


class LetterEmbedModel(BaseEmbedding):
    """What `LetterEmbeddings` is for LangChain."""

    def _get_text_embedding(self, text: str) -> list[float]:
        return LetterEmbeddings().embed_query(text)

    def _get_query_embedding(self, query: str) -> list[float]:
        return LetterEmbeddings().embed_query(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return LetterEmbeddings().embed_query(query)


def sparse_letters(text: str) -> dict[int, float]:
    """How often each letter of the alphabet stands in the text."""
    letters = [ord(c) - ord("a") for c in text.lower() if "a" <= c <= "z"]
    return {letter: float(letters.count(letter)) for letter in letters}
