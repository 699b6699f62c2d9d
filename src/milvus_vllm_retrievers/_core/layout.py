"""What a collection looks like, read from `describe_collection`, and how a query reaches it."""

from __future__ import annotations

import ast
import enum
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from milvus_vllm_retrievers._core.expressions import dynamic_field, json_path
from milvus_vllm_retrievers._core.query import Encoder, Encoders, Item
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

_SECRET_PARAM = re.compile(r"key|token(?!iz)|secret|passw|credential", re.IGNORECASE)
_LONGEST_VARCHAR = 65_535
# How the ecosystem's tools name the field that holds the text.
_USUAL_NAMES = {"text", "page_content", "document", "content", "chunk", "passage", "body"}
_CLEARLY_LONGER = 2


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

    def reached(self, encoder: Encoder | None) -> str:
        """Say how a query reaches the field, given what `searched_fields` encodes it with."""
        if encoder is not None:
            return "by the sparse encoder" if self.is_sparse else "by the embedding model"
        if not self.takes_text:
            return "by the query's own embedding"
        return "as text (BM25)" if self.is_sparse else "as text (Milvus embeds it)"


@dataclass(frozen=True, slots=True)
class TextField:
    """The field whose text is reranked.

    Attributes:
        name: The field's name.
        why: What it was chosen by, such as ``the input of its BM25 function``.
        nullable: Whether rows may lack a text.
    """

    name: str
    why: str
    nullable: bool


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
class FieldRef:
    """A field as a filter expression names it; its `str()` is that name.

    Attributes:
        expr: The name, such as ``color``, ``$meta["any key"]`` or ``metadata["color"]``.
        field: The schema field, None for a value inside JSON, which rows may lack.
    """

    expr: str
    field: ScalarField | None

    def __str__(self) -> str:
        return self.expr

    @property
    def nullable(self) -> bool:
        """Whether rows may lack a value."""
        return self.field is None or self.field.nullable


@dataclass(frozen=True, slots=True)
class CollectionLayout:
    """A collection's fields, by the part they play in a search.

    Attributes:
        name: The collection's name.
        primary_key: The primary key field's name.
        text_fields: VARCHAR fields that are not the primary key.
        vector_fields: Every vector field.
        scalars: Every other field, the primary key and the text included.
        text_inputs: Fields that feed a BM25 or TEXT_EMBEDDING function, and which of the two.
        store: Where the fields are laid out as a framework's store does it, the field in its
            text's place, and the store.
        dynamic: Whether rows may hold fields that the schema does not name.
        secrets: What its functions log in to their services with, by the names of their params.
    """

    name: str
    primary_key: str
    text_fields: tuple[str, ...]
    vector_fields: tuple[VectorField, ...]
    scalars: tuple[ScalarField, ...]
    text_inputs: Mapping[str, str]
    store: tuple[str, str] | None
    dynamic: bool
    secrets: tuple[str, ...] = field(default=(), repr=False)

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> CollectionLayout:
        """Read what pymilvus's ``describe_collection`` answers."""
        fields = description["fields"]
        functions = [f for f in description.get("functions", ()) if f["type"] in _TEXT_FUNCTIONS]
        outputs = {name for f in functions for name in _names(f["output_field_names"])}
        inputs = {
            name: _TEXT_FUNCTIONS[f["type"]]
            for f in functions
            for name in _names(f["input_field_names"])
        }
        dynamic = bool(description.get("enable_dynamic_field"))
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
            text_inputs=inputs,
            store=_store(fields, dynamic=dynamic),
            dynamic=dynamic,
            secrets=tuple(_secrets(description.get("functions", ()))),
        )

    @property
    def scalar_fields(self) -> tuple[str, ...]:
        """The names of `scalars`."""
        return tuple(field.name for field in self.scalars)

    @property
    def json_fields(self) -> tuple[str, ...]:
        """The names of the JSON fields; the one of dynamic fields is not among them."""
        return tuple(field.name for field in self.scalars if field.type == FieldType.JSON)

    def metadata_field(self, text_field: str) -> str | None:
        """Return the JSON field that holds the whole metadata of a row, if there is one.

        It is there where the rows can hold nothing else (langchain-milvus's `metadata_field`).
        """
        known = {self.primary_key, text_field}
        others = [field for field in self.scalars if field.name not in known]
        if self.dynamic or [field.type for field in others] != [FieldType.JSON]:
            return None
        return others[0].name

    def text_choice(self, name: str | None) -> TextField | tuple[str, ...]:
        """Return the field whose text is reranked, or those among which the schema cannot tell.

        Without a name it is the only VARCHAR field, or the one that most speaks for: a usual name
        (``text``, ``page_content``, ``document``, ...), a BM25 or TEXT_EMBEDDING function that
        reads it, the place in which langchain-milvus or LlamaIndex writes it. The place alone
        proves nothing, since a schema of another origin may look the same.

        Raises:
            ConfigurationError: The field is missing or not VARCHAR, or there is none.
        """
        if not self.text_fields:
            raise ConfigurationError(
                f"Only a VARCHAR field of the schema can be reranked, and collection {self.name!r} "
                "has none (neither its primary key nor a dynamic field can be): add one"
            )
        if name is not None:
            if name in self.text_fields:
                return self._text_field(name, "named by text_field=")
            raise ConfigurationError(self._not_a_text_field(name))
        if len(self.text_fields) == 1:
            return self._text_field(self.text_fields[0], "the only VARCHAR field")
        evidence = {name: self._evidence(name) for name in self.text_fields}
        most = max(map(len, evidence.values()))
        candidates = tuple(name for name in evidence if evidence[name])
        best = [name for name in candidates if len(evidence[name]) == most]
        if most == 1 and self.store and candidates == (self.store[0],):
            return self.text_fields  # its place is all that speaks for it
        if len(best) == 1 and (most > 1 or len(candidates) == 1):
            return self._text_field(best[0], ", ".join(evidence[best[0]]))
        return candidates or self.text_fields

    def text_field_by_length(
        self, candidates: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> TextField:
        """Return the candidate whose values are clearly the longest in a few rows.

        Raises:
            ConfigurationError: None is, or a candidate has no value in these rows.
        """
        values = {name: [row[name] for row in rows if row.get(name)] for name in candidates}
        if all(values.values()):
            lengths = {name: median(map(len, values[name])) for name in candidates}
            second, longest = sorted(candidates, key=lengths.__getitem__)[-2:]
            if lengths[longest] >= _CLEARLY_LONGER * lengths[second]:
                return self._text_field(longest, f"the longest texts among {list(candidates)}")
        raise ConfigurationError(
            f"collection {self.name!r}: which field holds the text to rerank? It could be any of "
            f"{list(candidates)}, and its rows do not tell; pass text_field="
        )

    def _evidence(self, name: str) -> list[str]:
        """Say what speaks for a field as the one with the text."""
        evidence = ["a usual name"] if name in _USUAL_NAMES else []
        if name in self.text_inputs:
            evidence.append(f"the input of its {self.text_inputs[name]} function")
        if self.store and name == self.store[0]:
            evidence.append(f"where {self.store[1]} writes it")
        return evidence

    def _text_field(self, name: str, why: str) -> TextField:
        nullable = next(field.nullable for field in self.scalars if field.name == name)
        return TextField(name, why, nullable)

    def keys_of(self, item: Item) -> list[int | str]:
        """Return what may be an item's primary key: its id, and what its metadata says."""
        values = (item.id, item.metadata.get(self.primary_key))
        keys = [self._as_key(value) for value in values]
        return list(dict.fromkeys(key for key in keys if key is not None))

    def _as_key(self, value: object) -> int | str | None:
        type_ = next(field.type for field in self.scalars if field.name == self.primary_key)
        if type_ == FieldType.VARCHAR:
            return value if isinstance(value, str) else None
        if isinstance(value, str) and value.removeprefix("-").isdecimal():
            return int(value)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def vector_for_keys(self) -> VectorField:
        """Return a vector field by which rows can be searched whatever their vectors are.

        Raises:
            ConfigurationError: There is no dense field; a sparse search finds only overlaps.
        """
        for vector in self.vector_fields:
            if vector.is_dense:
                return vector
        raise ConfigurationError(
            f"collection {self.name!r} has no dense vector field, by which alone rows can be "
            "reranked by their keys; use VLLMRerank, which sends their texts to vLLM itself"
        )

    def field_ref(self, name: str) -> FieldRef:
        """Return how a filter expression names a field.

        The name stands for the schema field of that name, else for a dynamic field where the
        collection has them, else for a key of its JSON field where it has exactly one.

        Raises:
            ConfigurationError: There is no such field, or no filter can reach it.
        """
        scalar = next((field for field in self.scalars if field.name == name), None)
        if scalar is not None:
            return FieldRef(name, scalar)
        if name in (vector.name for vector in self.vector_fields):
            raise ConfigurationError(f"field {name!r} holds vectors, which Milvus cannot filter by")
        if self.dynamic:
            return FieldRef(dynamic_field(name), None)
        if len(self.json_fields) == 1:
            return FieldRef(json_path(self.json_fields[0], name), None)
        known = list(self.scalar_fields)
        raise ConfigurationError(
            f"collection {self.name!r} has no field {name!r}{did_you_mean(name, known)}; "
            f"it has {known} and no dynamic fields"
            + (", and more than one JSON field" if self.json_fields else "")
        )

    def searched_fields(
        self, names: str | Sequence[str] | None, encoders: Encoders, *, embedded: bool = False
    ) -> tuple[tuple[VectorField, Encoder | None], ...]:
        """Return the vector fields to search, each with what encodes a query for it.

        Args:
            names: One field, several, or None for every field that a query can reach.
            encoders: What the caller can encode with.
            embedded: Whether the queries come with a dense vector of their own.

        Returns:
            Fields and their encoders; None where a query goes as it comes, as its text or its
            own dense vector.

        Raises:
            ConfigurationError: A field is missing, not a vector, named twice or out of reach.
        """
        chosen = [names] if isinstance(names, str) else names
        if chosen is not None and (not chosen or len(set(chosen)) != len(chosen)):
            raise ConfigurationError("vector_field must name at least one field, each only once")
        vectors = self.vector_fields if chosen is None else [self._vector(n) for n in chosen]
        problems = {v.name: _out_of_reach(v, encoders, embedded=embedded) for v in vectors}
        unreachable = [problem for problem in problems.values() if problem]
        if unreachable and chosen is not None:
            raise ConfigurationError("; ".join(unreachable))
        if len(unreachable) == len(problems):
            raise ConfigurationError(
                f"collection {self.name!r} has no vector field that a query text can reach: "
                + ("; ".join(unreachable) or "it has no vector field at all")
            )
        return tuple(
            (vector, _encoder(vector, encoders, embedded=embedded))
            for vector in vectors
            if not problems[vector.name]
        )

    def out_of_reach(self, encoders: Encoders) -> list[str]:
        """Say of each vector field that no query text can reach why it cannot."""
        problems = [_out_of_reach(v, encoders, embedded=False) for v in self.vector_fields]
        return [problem for problem in problems if problem]

    def _vector(self, name: str) -> VectorField:
        known = {vector.name: vector for vector in self.vector_fields}
        if name not in known:
            raise ConfigurationError(
                f"collection {self.name!r} has no vector field {name!r}"
                f"{did_you_mean(name, list(known))}; it has {list(known)}"
            )
        return known[name]

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
        if isinstance(asked, str):
            raise ConfigurationError(f"output_fields must be a list of names, such as [{asked!r}]")
        names = list(dict.fromkeys([*asked, text_field]))
        known = [*self.scalar_fields, *(v.name for v in self.vector_fields)]
        unknown = [n for n in names if n not in known and n != "*"]
        if unknown and not self.dynamic:
            raise ConfigurationError(
                f"collection {self.name!r} has no field {unknown[0]!r}"
                f"{did_you_mean(unknown[0], known)}; it has {known}"
            )
        return names


def _encoder(vector: VectorField, encoders: Encoders, *, embedded: bool) -> Encoder | None:
    if vector.takes_text or (vector.is_dense and embedded):
        return None
    common = encoders.sparse if vector.is_sparse else encoders.dense
    return encoders.by_field.get(vector.name, common)


def _out_of_reach(vector: VectorField, encoders: Encoders, *, embedded: bool) -> str | None:
    """Say why no query can be sent to the field, or nothing if one can."""
    as_it_comes = vector.takes_text or (vector.is_dense and embedded)
    if as_it_comes or vector.name in encoders.by_field:
        return None
    if vector.is_sparse:
        problem = f"sparse field {vector.name!r} is not BM25: pass a sparse encoder for it"
        return None if encoders.sparse else problem
    if not vector.is_dense:
        return f"vector field {vector.name!r} is of a type no text embedding model makes"
    problem = f"dense field {vector.name!r} needs query vectors: pass an embedding model (in "
    problem += "LangChain as embedding=, in LlamaIndex as embed_model=)"
    return None if encoders.dense else problem


def _store(fields: Sequence[Mapping[str, Any]], *, dynamic: bool) -> tuple[str, str] | None:
    """Tell whether a framework's store may have made these fields, by all that it always makes.

    langchain-milvus: the text, the key, the vectors, then the metadata: dynamic, with at most a
    partition key beside it, or one field each. LlamaIndex: ``id``, the document's id, the text,
    further fields, then the vectors; always dynamic. All text has Milvus's greatest length. A text
    of LlamaIndex with an unusual name is not looked for: only nodes of a class with a field of
    that name can be written so.
    """
    names = [str(field["name"]) for field in fields]
    shape = "".join(map(_letter, fields))
    if re.fullmatch("T[AK]V+P?" if dynamic else "T[AK]V+[TPO]*", shape):
        return names[0], "langchain-milvus"
    if dynamic and names[:2] == ["id", "doc_id"] and re.fullmatch("KTT[TO]*V+", shape):
        return (names[2], "LlamaIndex") if names[2] in _USUAL_NAMES else None
    return None


def _letter(field: Mapping[str, Any]) -> str:
    """Vector, Text, Partition key, text Key, Auto key, Other: a field as `_store` looks at it."""
    if field["type"] in _VECTORS:
        return "V"
    if field.get("auto_id"):
        return "A" if field["type"] == FieldType.INT64 else "O"
    if field.get("nullable") or not _is_longest(field):
        return "O"
    return "K" if field.get("is_primary") else "P" if field.get("is_partition_key") else "T"


def _is_longest(field: Mapping[str, Any]) -> bool:
    length = int(field.get("params", {}).get("max_length", 0))
    return bool(field["type"] == FieldType.VARCHAR and length == _LONGEST_VARCHAR)


def _secrets(functions: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for function in functions:
        for name, value in (function.get("params") or {}).items():
            # A number is a limit, such as max_tokens.
            if _SECRET_PARAM.search(str(name)) and not str(value).isdecimal():
                yield str(value)


def _names(value: str | Sequence[str]) -> list[str]:
    """Read a list of names; some pymilvus 2.6 releases give it as the text of a list."""
    if isinstance(value, str):
        parsed = ast.literal_eval(value) if value.startswith("[") else [value]
        return [str(name) for name in parsed]
    return list(value)
