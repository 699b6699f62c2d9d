"""Values that several unit tests start from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from milvus_vllm_retrievers._core.layout import CollectionLayout, FieldType

BM25, TEXT_EMBEDDING, RERANK = 1, 2, 3


def field(name: str, type_: int, **more: Any) -> dict[str, Any]:
    """A field as `describe_collection` tells of it."""
    return {"field_id": 100, "name": name, "description": "", "type": type_, "params": {}, **more}


def function(
    type_: int, inputs: Sequence[str] | str, outputs: Sequence[str] | str
) -> dict[str, Any]:
    """A function as `describe_collection` tells of it."""
    return {
        "name": "f",
        "type": type_,
        "params": {"api_key": "sk-secret"},
        "input_field_names": inputs,
        "output_field_names": outputs,
    }


KEY = field("pk", FieldType.INT64, is_primary=True)
TEXT = field("document", FieldType.VARCHAR, params={"max_length": 100})
DENSE = field("dense", FieldType.FLOAT_VECTOR, params={"dim": 2})
SPARSE = field("sparse", FieldType.SPARSE_FLOAT_VECTOR)
FROM_TEXT = function(BM25, ["document"], ["sparse"])


def description(
    *fields: Mapping[str, Any],
    functions: Sequence[Mapping[str, Any]] = (),
    dynamic: bool = False,
) -> dict[str, Any]:
    """What `describe_collection` answers; without fields a BM25 collection."""
    if not fields:
        fields, functions = (KEY, TEXT, DENSE, SPARSE), [FROM_TEXT]
    return {
        "collection_name": "docs",
        "auto_id": False,
        "fields": [dict(f) for f in fields],
        "functions": [dict(f) for f in functions],
        "enable_dynamic_field": dynamic,
    }


def layout(
    *fields: Mapping[str, Any],
    functions: Sequence[Mapping[str, Any]] = (),
    dynamic: bool = False,
) -> CollectionLayout:
    """The layout that is read from such a description."""
    return CollectionLayout.from_description(
        description(*fields, functions=functions, dynamic=dynamic)
    )
