"""Collections for the benchmarks: made-up rows of any number, size and number of vector fields."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache

from pymilvus import DataType, Function, FunctionType, MilvusClient

DIM = 768  # of the dense fields, as a usual embedding model's
QUERIES = (
    "how do I rotate the keys of the gateway",
    "which port does the index service listen on",
    "what happens when a replica falls behind",
    "limit the memory of a query node",
    "restore a collection from last night's backup",
    "who may read the audit log",
    "why is the first search after a restart slow",
    "rename a field without losing its data",
)
STDLIB_QUERIES = (
    "how do I read a file line by line?",
    "parse the arguments of a command line",
    "run a coroutine with a time limit",
    "which class counts how often items occur?",
    "write rows to a CSV file with a header",
    "compare two sequences of lines",
    "the difference between two dates",
    "send an e-mail with an attachment",
)
_WORDS = sorted({word for query in QUERIES for word in query.split()}) + [
    f"{first}{second}" for first in ("shard", "lease", "token", "quota") for second in "abcdefghij"
]
_INSERT_BYTES = 4_000_000


@cache
def query_vector(query: str) -> list[float]:
    """Return a query's dense vector; from the second time on it is ready-made."""
    return _vector(random.Random(query))


def dense_names(count: int) -> list[str]:
    """Return the names of the dense fields of a collection that has so many."""
    return [f"dense_{number}" for number in range(1, count + 1)]


def make_collection(
    client: MilvusClient,
    name: str,
    *,
    rows: int,
    dense: int = 1,
    bm25: bool = True,
    text_bytes: int = 200,
) -> None:
    """Make a collection and fill it, the same for the same arguments.

    Args:
        client: Where to make it.
        name: Its name.
        rows: How many rows.
        dense: How many dense vector fields, `dense_1` and so on.
        bm25: Whether to have a BM25 field `sparse` too.
        text_bytes: How long the field `text` is; beside it are `source` and `page`.
    """
    schema = client.create_schema()
    schema.add_field("pk", DataType.INT64, is_primary=True)
    schema.add_field("text", DataType.VARCHAR, max_length=65_535, enable_analyzer=True)
    schema.add_field("source", DataType.VARCHAR, max_length=100)
    schema.add_field("page", DataType.INT64)
    indexes = client.prepare_index_params()
    for field in dense_names(dense):
        schema.add_field(field, DataType.FLOAT_VECTOR, dim=DIM)
        indexes.add_index(field, index_type="AUTOINDEX", metric_type="COSINE")
    if bm25:
        schema.add_field("sparse", DataType.SPARSE_FLOAT_VECTOR)
        schema.add_function(Function("bm25", FunctionType.BM25, ["text"], ["sparse"]))
        indexes.add_index("sparse", index_type="SPARSE_INVERTED_INDEX", metric_type="BM25")
    client.create_collection(name, schema=schema, index_params=indexes)
    batch = max(1, _INSERT_BYTES // (text_bytes + 8 * DIM * dense))
    for start in range(0, rows, batch):
        numbers = range(start, min(start + batch, rows))
        client.insert(name, [_row(number, dense_names(dense), text_bytes) for number in numbers])


def _row(number: int, vectors: Sequence[str], text_bytes: int) -> dict[str, object]:
    source = random.Random(number)
    words = " ".join(source.choices(_WORDS, k=max(1, min(text_bytes, 2_000) // 6)))
    text = (f"{number} {words} " * (1 + text_bytes // len(words)))[:text_bytes]
    return {
        "pk": number,
        "text": text,
        "source": f"manual/part-{number % 7}.md",
        "page": number,
        **{field: _vector(source) for field in vectors},
    }


def _vector(source: random.Random) -> list[float]:
    return [source.uniform(-1, 1) for _ in range(DIM)]
