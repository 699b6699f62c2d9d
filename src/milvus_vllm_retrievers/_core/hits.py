"""From what Milvus and vLLM answered to hits in their final order."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeGuard, cast

from milvus_vllm_retrievers.errors import SearchError

PrimaryKey = int | str
NO_TEXT = "there is no text to rerank: it is null or empty"
# What a front end writes into an item's metadata: it belongs to one query, not to the item.
SCORE_KEYS = frozenset(
    {"relevance_score", "retrieval_score", "reranked_by", "reranked_with", "rerank_error"}
)
RerankedBy = Literal["milvus", "client"]


class Hit(NamedTuple):
    """One row that a search returned.

    A tuple, since making a frozen dataclass of it for every row is felt in the time of a query.

    Attributes:
        pk: The primary key.
        text: The text field's value; None where the row has none.
        fields: The other fields that were fetched, by name, the primary key included.
        retrieval_score: What the search gave: a distance or similarity in the index's metric,
            or an RRF score over several legs. None where a rerank score replaced it.
        relevance_score: The rerank model's score (a float32), on the model's own scale. None
            if the item was not reranked.
        reranked_by: Who asked the model: ``"milvus"``, ``"client"`` or, unranked, None.
        rerank_error: Why it is unranked although a ranker was given.
        pk_field: The primary key field's name.
    """

    pk: PrimaryKey
    text: str | None
    fields: Mapping[str, Any] = MappingProxyType({})
    retrieval_score: float | None = None
    relevance_score: float | None = None
    reranked_by: RerankedBy | None = None
    rerank_error: str | None = None
    pk_field: str = "pk"

    def scores(self) -> dict[str, Any]:
        """Return what a front end writes into an item's metadata, by its public names."""
        return _metadata(self, self.retrieval_score)


Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RowReader:
    """Reads rows as pymilvus returns them.

    Attributes:
        primary_key: The primary key field's name.
        text_field: The text field's name.
        metadata_field: A JSON field whose keys count as fields of the row.
    """

    primary_key: str
    text_field: str
    metadata_field: str | None = None

    def retrieved(self, rows: Iterable[Row]) -> list[Hit]:
        """Read one query's rows, their scores taken as retrieval scores."""
        key = self.primary_key
        return [
            Hit(pk, text, fields, score, None, None, None, key)
            for pk, text, fields, score in self._read(rows)
        ]

    def scores(self, rows: Iterable[Row]) -> dict[PrimaryKey, float]:
        """Read one query's rows that were fetched without their fields: each key's score."""
        return {_key(row, self.primary_key): float(row["distance"]) for row in rows}

    def reranked(self, rows: Iterable[Row]) -> list[Hit]:
        """Read one query's rows of a search with a rerank Function, in order.

        Milvus has null and empty texts scored too, as if "" were relevant to something; here, as
        on the client path, they come last, unscored.
        """
        key = self.primary_key
        hits = [
            Hit(pk, text, fields, None, score, "milvus", None, key)
            if has_text(text)
            else Hit(pk, text, fields, None, None, None, NO_TEXT, key)
            for pk, text, fields, score in self._read(rows)
        ]
        hits.sort(key=lambda hit: relevance_order(hit.relevance_score, hit.pk))
        return hits

    def _read(
        self, rows: Iterable[Row]
    ) -> Iterator[tuple[PrimaryKey, str | None, dict[str, Any], float]]:
        key = self.primary_key
        for row in rows:
            entity = row["entity"]
            fields = dict(entity)
            if not _PLAIN.issuperset(map(type, entity.values())):
                fields = {name: _plain(value) for name, value in entity.items()}
            if self.text_field not in fields:
                raise SearchError(
                    f"Milvus returned a row without the field {self.text_field!r}: the collection "
                    "has been made anew with other fields? The next call reads it again"
                )
            text = fields.pop(self.text_field)
            metadata_field = self.metadata_field
            if metadata_field is not None and isinstance(fields.get(metadata_field), dict):
                fields.update(fields.pop(metadata_field))
            fields = stored(fields)
            pk = fields[key] = _key(row, key)
            yield pk, text, fields, float(row["distance"])


def stored(fields: dict[str, Any]) -> dict[str, Any]:
    """Rename what is stored under a name of our scores: ``stored_relevance_score`` and so on."""
    if SCORE_KEYS.isdisjoint(fields):
        return fields
    renamed = {}
    for name, value in fields.items():
        free = name
        while free in SCORE_KEYS or (free != name and free in fields):
            free = f"stored_{free}"
        renamed[free] = value
    return renamed


def _key(row: Row, field: str) -> PrimaryKey:
    # Servers before 2.4 answer with the key under "id", later ones under its field's name.
    pk = row[field] if field in row else row.get("id")
    if pk is None:
        raise SearchError(f"Milvus returned a row without its primary key {field!r}")
    return cast(PrimaryKey, pk)


_PLAIN_TYPES: tuple[type, ...] = (str, int, float, bool, bytes, dict, list, type(None))
_PLAIN = frozenset(_PLAIN_TYPES)


def _plain(value: Any) -> Any:
    """Make a list of what protobuf hands over as a repeated field."""
    if isinstance(value, _PLAIN_TYPES):
        return value
    return list(value) if isinstance(value, Iterable) else value


def float32(value: float) -> float:
    """Round to float32, as Milvus stores every score."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def fits_float32(value: float) -> bool:
    """Whether a score is a finite number, and stays one as a float32."""
    return math.isfinite(float32(value))


def has_text(text: str | None) -> TypeGuard[str]:
    """Whether there is anything that a model could score."""
    return text is not None and bool(text.strip())


def relevance_order(score: float | None, pk: PrimaryKey) -> tuple[bool, float, PrimaryKey]:
    """Sort key of reranked hits: relevance descending, unscored ones last, ties by primary key."""
    return score is None, -(score or 0.0), pk


def reranked_by_client(
    hits: Sequence[Hit], scores: Sequence[float | None], k: int | None = None
) -> list[Hit]:
    """Give hits the scores of the same positions and return the best `k`; None is no text."""
    rounded = [None if score is None else float32(score) for score in scores]
    pairs = list(zip(hits, rounded, strict=True))
    pairs.sort(key=lambda pair: relevance_order(pair[1], pair[0].pk))
    return [
        hit._replace(rerank_error=NO_TEXT)
        if score is None
        else hit._replace(relevance_score=score, reranked_by="client")
        for hit, score in pairs[:k]
    ]


def unranked(hits: Sequence[Hit], reason: str) -> list[Hit]:
    """Keep the retrieval order, with the reason on every hit."""
    return [hit._replace(rerank_error=reason) for hit in hits]


def above(hits: Iterable[Hit], threshold: float | None) -> list[Hit]:
    """Drop hits whose relevance score is below the threshold; unscored ones stay."""
    if threshold is None:
        return list(hits)
    least = float32(threshold)  # as the scores are: 0.7 is not below a threshold of 0.7
    return [h for h in hits if h.relevance_score is None or h.relevance_score >= least]


@dataclass(frozen=True, slots=True)
class Ranking:
    """The place of one given item after reranking.

    Attributes:
        index: The item's position in what was given.
        relevance_score: The model's score (a float32); None if the item was not reranked.
        reranked_by: Who asked the model: ``"milvus"``, ``"client"`` or, unranked, None.
        rerank_error: Why it was not reranked.
    """

    index: int
    relevance_score: float | None = None
    reranked_by: RerankedBy | None = None
    rerank_error: str | None = None

    def scores(self) -> dict[str, Any]:
        """Return what a front end writes into an item's metadata, by its public names."""
        return _metadata(self, None)


def ranked_by_client(scores: Sequence[float | None]) -> list[Ranking]:
    """Order positions by score descending; equal scores keep the given order, None is no text."""
    ranked = [
        Ranking(index, float32(score), "client")
        for index, score in enumerate(scores)
        if score is not None
    ]
    ranked.sort(key=lambda r: -(r.relevance_score or 0.0))
    return ranked + as_given([i for i, score in enumerate(scores) if score is None], NO_TEXT)


def ranked_by_milvus(
    keys: Sequence[Sequence[PrimaryKey]], scores: Mapping[PrimaryKey, float], collection: str
) -> list[Ranking]:
    """Order items by their rows' scores, ties by primary key; those without a row come last.

    Args:
        keys: The keys that may be each given item's, likeliest first.
        scores: The scores of the rows that were found.
        collection: The collection's name, for the marks.
    """
    rows = [next((key for key in may_be if key in scores), None) for may_be in keys]
    found = [(key, index) for index, key in enumerate(rows) if key is not None]
    found.sort(key=lambda item: (-scores[item[0]], item[0], item[1]))
    lost = [index for index, key in enumerate(rows) if key is None]
    return [Ranking(index, float32(scores[key]), "milvus") for key, index in found] + as_given(
        lost, f"collection {collection!r} has no row with this item's primary key"
    )


def score_among(scored: Hit | Ranking, retrieval_score: float | None) -> float | None:
    """Return the one score of an item beside the others': the model's, else the retrieval's.

    An item without a text has none: its retrieval score is on another scale than theirs.
    """
    ranked = scored.relevance_score is not None or scored.rerank_error == NO_TEXT
    return scored.relevance_score if ranked else retrieval_score


def as_given(indices: Iterable[int], reason: str) -> list[Ranking]:
    """Leave items unranked, in the order they were given."""
    return [Ranking(index, rerank_error=reason) for index in indices]


def rescored(metadata: Mapping[str, Any], scores: Mapping[str, Any]) -> dict[str, Any]:
    """Return an item's metadata with new scores; of old ones only the retrieval's stays."""
    kept = {k: v for k, v in metadata.items() if k not in SCORE_KEYS or k == "retrieval_score"}
    return {**kept, **scores}


def _metadata(scored: Hit | Ranking, retrieval_score: float | None) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "relevance_score": scored.relevance_score,
        "reranked_by": scored.reranked_by,
    }
    if scored.rerank_error is not None:
        metadata["rerank_error"] = scored.rerank_error
    if retrieval_score is not None:
        metadata["retrieval_score"] = retrieval_score
    return metadata
