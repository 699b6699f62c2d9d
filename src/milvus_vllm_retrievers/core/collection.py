"""What a collection looks like, read from `describe_collection`, and how a query reaches it."""

from __future__ import annotations

import ast
import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from milvus_vllm_retrievers.core.query import Encoder, Encoders
from milvus_vllm_retrievers.errors import ConfigurationError, did_you_mean


class FieldType(enum.IntEnum):
    """Milvus's numbers for the field types that matter here (schema.proto, DataType)."""

    BOOL = 1
    INT8 = 2
    INT16 = 3
    INT32 = 4
    INT64 = 5
    FLOAT = 10
    DOUBLE = 11
    VARCHAR = 21
    ARRAY = 22
    JSON = 23
    BINARY_VECTOR = 100
    FLOAT_VECTOR = 101
    FLOAT16_VECTOR = 102
    BFLOAT16_VECTOR = 103
    SPARSE_FLOAT_VECTOR = 104
    INT8_VECTOR = 105


_DENSE = {FieldType.FLOAT_VECTOR, FieldType.FLOAT16_VECTOR, FieldType.BFLOAT16_VECTOR}
_VECTORS = {*_DENSE, *(t for t in FieldType if t >= FieldType.BINARY_VECTOR)}
_TEXT_FUNCTIONS = {1: "BM25", 2: "TEXT_EMBEDDING"}  # schema.proto, FunctionType

# How the ecosystem's tools name the field that holds the text, most telling first.
_TEXT_FIELD_NAMES = ("text", "page_content", "document", "content", "chunk", "passage", "body")


@dataclass(frozen=True, slots=True)
class VectorField:
    """One vector field.

    Attributes:
        name: The field's name.
        type: Milvus's DataType number.
        dim: Dimensions of a dense field, None for a sparse one.
        takes_text: Milvus turns a query text into the vector itself (BM25, TEXT_EMBEDDING).
    """

    name: str
    type: int
    dim: int | None
    takes_text: bool

    @property
    def is_dense(self) -> bool:
        """Whether a framework's embedding model can make this field's vectors."""
        return self.type in _DENSE

    @property
    def is_sparse(self) -> bool:
        """Whether the vectors are maps of dimension to weight."""
        return self.type == FieldType.SPARSE_FLOAT_VECTOR


@dataclass(frozen=True, slots=True)
class ScalarField:
    """One field that is not a vector.

    Attributes:
        name: The field's name.
        type: Milvus's DataType number.
        element_type: The DataType number of an ARRAY field's elements, None for other types.
        nullable: Whether rows may lack a value.
    """

    name: str
    type: int
    element_type: int | None = None
    nullable: bool = False


@dataclass(frozen=True, slots=True)
class CollectionLayout:
    """A collection's fields, by the part they play in a search.

    Attributes:
        name: The collection's name.
        primary_key: The primary key field's name.
        text_fields: VARCHAR fields that are not the primary key.
        vector_fields: Every vector field.
        scalars: Every other field, the primary key and the text included.
        text_inputs: Fields that feed a BM25 or TEXT_EMBEDDING function.
        dynamic: Whether rows may hold fields that the schema does not name.
    """

    name: str
    primary_key: str
    text_fields: tuple[str, ...]
    vector_fields: tuple[VectorField, ...]
    scalars: tuple[ScalarField, ...]
    text_inputs: tuple[str, ...]
    dynamic: bool

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> CollectionLayout:
        """Read what pymilvus's ``describe_collection`` answers."""
        fields = description["fields"]
        functions = [f for f in description.get("functions", ()) if f["type"] in _TEXT_FUNCTIONS]
        outputs = {name for f in functions for name in _names(f["output_field_names"])}
        inputs = dict.fromkeys(name for f in functions for name in _names(f["input_field_names"]))
        return cls(
            name=description["collection_name"],
            primary_key=next(f["name"] for f in fields if f.get("is_primary")),
            text_fields=tuple(
                f["name"]
                for f in fields
                if f["type"] == FieldType.VARCHAR and not f.get("is_primary")
            ),
            vector_fields=tuple(
                VectorField(
                    name=f["name"],
                    type=int(f["type"]),
                    dim=int(f["params"]["dim"]) if "dim" in f.get("params", {}) else None,
                    takes_text=f["name"] in outputs,
                )
                for f in fields
                if f["type"] in _VECTORS
            ),
            scalars=tuple(
                ScalarField(
                    name=f["name"],
                    type=int(f["type"]),
                    element_type=int(f["element_type"]) if f.get("element_type") else None,
                    nullable=bool(f.get("nullable")),
                )
                for f in fields
                if f["type"] not in _VECTORS
            ),
            text_inputs=tuple(inputs),
            dynamic=bool(description.get("enable_dynamic_field")),
        )

    @property
    def scalar_fields(self) -> tuple[str, ...]:
        """The names of `scalars`."""
        return tuple(field.name for field in self.scalars)

    @property
    def json_fields(self) -> tuple[str, ...]:
        """The names of the JSON fields; the one of dynamic fields is not among them."""
        return tuple(field.name for field in self.scalars if field.type == FieldType.JSON)

    def text_field(self, name: str | None) -> str:
        """Return the field whose text is reranked: `name`, or the one the schema points to.

        Without a name it is the input of the collection's BM25 or TEXT_EMBEDDING function, a
        VARCHAR field with a usual name (``text``, ``page_content``, ``document``, ...), or the
        only VARCHAR field there is.

        Raises:
            ConfigurationError: The field is missing or not VARCHAR, or none can be singled out.
        """
        if name is not None:
            if name in self.text_fields:
                return name
            raise ConfigurationError(self._not_a_text_field(name))
        inputs = [name for name in self.text_inputs if name in self.text_fields]
        named = [name for name in _TEXT_FIELD_NAMES if name in self.text_fields]
        choices = inputs or named[:1] or list(self.text_fields)
        if len(choices) == 1:
            return choices[0]
        found = f"could be any of {choices}" if choices else "has no VARCHAR field"
        raise ConfigurationError(
            f"collection {self.name!r}: which field holds the text to rerank? It {found}; "
            "pass text_field="
        )

    def searched_fields(
        self, names: str | Sequence[str] | None, encoders: Encoders
    ) -> tuple[tuple[VectorField, Encoder | None], ...]:
        """Return the vector fields to search, each with what encodes a query for it.

        Args:
            names: One field, several, or None for every field that a query can reach.
            encoders: What the caller can encode with.

        Raises:
            ConfigurationError: A field is missing, not a vector, named twice or out of reach.
        """
        if names is None:
            reachable = [
                (vector, self._encoder(vector, encoders))
                for vector in self.vector_fields
                if self._out_of_reach(vector, encoders) is None
            ]
            if not reachable:
                raise ConfigurationError(self._nothing_searchable(encoders))
            return tuple(reachable)
        chosen = [names] if isinstance(names, str) else list(names)
        if not chosen or len(set(chosen)) != len(chosen):
            raise ConfigurationError("vector_field must name at least one field, each only once")
        return tuple(self._searched_field(name, encoders) for name in chosen)

    def _searched_field(self, name: str, encoders: Encoders) -> tuple[VectorField, Encoder | None]:
        vector = next((v for v in self.vector_fields if v.name == name), None)
        if vector is None:
            known = [v.name for v in self.vector_fields]
            raise ConfigurationError(
                f"collection {self.name!r} has no vector field {name!r}"
                f"{did_you_mean(name, known)}; it has {known}"
            )
        problem = self._out_of_reach(vector, encoders)
        if problem:
            raise ConfigurationError(problem)
        return vector, self._encoder(vector, encoders)

    @staticmethod
    def _encoder(vector: VectorField, encoders: Encoders) -> Encoder | None:
        if vector.takes_text:
            return None
        return encoders.by_field.get(vector.name) or (
            encoders.sparse if vector.is_sparse else encoders.dense
        )

    @staticmethod
    def _out_of_reach(vector: VectorField, encoders: Encoders) -> str | None:
        if vector.takes_text or vector.name in encoders.by_field:
            return None
        if vector.is_sparse:
            return (
                None
                if encoders.sparse
                else f"sparse field {vector.name!r} is not BM25: pass a sparse encoder for it"
            )
        if not vector.is_dense:
            return f"vector field {vector.name!r} is of a type no text embedding model makes"
        return (
            None
            if encoders.dense
            else f"dense field {vector.name!r} needs query vectors: pass an embedding model"
        )

    def _nothing_searchable(self, encoders: Encoders) -> str:
        reasons = [self._out_of_reach(vector, encoders) or "" for vector in self.vector_fields]
        return f"collection {self.name!r} has no vector field that a query text can reach: " + (
            "; ".join(reasons) or "it has no vector field at all"
        )

    def _not_a_text_field(self, name: str) -> str:
        known = list(self.text_fields)
        if name in self.scalar_fields or name in (v.name for v in self.vector_fields):
            problem = f"field {name!r} of collection {self.name!r} cannot be the text field: "
            problem += "it is the primary key" if name == self.primary_key else "it is not VARCHAR"
        else:
            problem = f"collection {self.name!r} has no field {name!r}{did_you_mean(name, known)}"
        return f"{problem}. Its VARCHAR fields are {known}"

    def output_fields(self, asked: Iterable[str] | None, text_field: str) -> list[str]:
        """Return what a search has to fetch: all but vectors, or what was asked for.

        Raises:
            ConfigurationError: A field is asked for that rows of the collection cannot have.
        """
        if asked is None:
            return [*self.scalar_fields, *(["$meta"] if self.dynamic else [])]
        names = list(dict.fromkeys([*asked, text_field]))
        known = [*self.scalar_fields, *(v.name for v in self.vector_fields)]
        unknown = [n for n in names if n not in known and n != "*"]
        if unknown and not self.dynamic:
            raise ConfigurationError(
                f"collection {self.name!r} has no field {unknown[0]!r}"
                f"{did_you_mean(unknown[0], known)}; it has {known}"
            )
        return names


def _names(value: str | Sequence[str]) -> list[str]:
    """Read a list of names; some pymilvus 2.6 releases give it as the text of a list."""
    if isinstance(value, str):
        parsed = ast.literal_eval(value) if value.startswith("[") else [value]
        return [str(name) for name in parsed]
    return list(value)
