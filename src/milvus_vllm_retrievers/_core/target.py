"""The collection that is searched, found out once and looked at again: its fields, its server."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from milvus_vllm_retrievers._core.cool_down import Health
from milvus_vllm_retrievers._core.deadline import Deadline
from milvus_vllm_retrievers._core.expressions import for_milvus
from milvus_vllm_retrievers._core.hits import RerankedBy, RowReader
from milvus_vllm_retrievers._core.layout import CollectionLayout, TextField, VectorField
from milvus_vllm_retrievers._core.milvus_calls import call, loaded
from milvus_vllm_retrievers._core.query import Encoder, Encoders, Query
from milvus_vllm_retrievers._core.route import Facts, Route
from milvus_vllm_retrievers._core.server import Server
from milvus_vllm_retrievers._core.steps import CallMilvus, Flow
from milvus_vllm_retrievers.ranker import VLLMRanker

if TYPE_CHECKING:
    from pymilvus import Function

Searched = tuple[tuple[VectorField, Encoder | None], ...]

# What of a description tells one collection, or one state of it, from another.
_TELLING = ("collection_id", "fields", "functions", "enable_dynamic_field")
_ROWS_LOOKED_AT = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSettings:
    """What the caller says of the collection; None leaves it to the collection's layout.

    Attributes:
        collection_name: The collection.
        text_field: The VARCHAR field that is reranked.
        vector_field: The vector field or fields to search.
        output_fields: What to fetch of each hit.
        encoders: How queries become vectors.
    """

    collection_name: str
    text_field: str | None = None
    vector_field: str | Sequence[str] | None = None
    output_fields: Sequence[str] | None = None
    encoders: Encoders = field(default_factory=Encoders)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A collection and how it is searched.

    Attributes:
        settings: What the caller said of it.
        fingerprint: What tells it from what it may be later.
        layout: The collection's fields.
        server: What its server can do.
        text: The field that is reranked.
        output_fields: What is fetched of each hit.
        rows: Reads the rows of its answers.
        searched: The vector fields to search and their encoders, by whether queries come with a
            vector of their own; filled by `searched_fields`.
    """

    settings: TargetSettings
    fingerprint: str
    layout: CollectionLayout
    server: Server
    text: TextField
    output_fields: tuple[str, ...]
    rows: RowReader
    searched: dict[bool, Searched] = field(default_factory=dict, compare=False, repr=False)

    def searched_fields(self, *, embedded: bool) -> Searched:
        """Return the vector fields to search, each with what encodes a query for it.

        Raises:
            ConfigurationError: A field that was named is missing or out of reach, or all are.
        """
        if embedded not in self.searched:
            self.searched[embedded] = self.layout.searched_fields(
                self.settings.vector_field, self.settings.encoders, embedded=embedded
            )
        return self.searched[embedded]

    def spelled(self, expr: str) -> str:
        """Return an expression as the server reads it right."""
        return expr if self.server.is_lite else for_milvus(expr)

    def facts(self, served: Sequence[str] | None) -> Facts:
        """Return what the route depends on, given the models that are served."""
        return Facts(self.server, self.text.name, self.text.nullable, served)

    def plan(self, route: Route, *, embedded: bool) -> Plan:
        """Return what is done with a query, for people."""
        return Plan(
            collection=self.layout.name,
            text_field=self.text.name,
            text_field_why=self.text.why,
            vector_fields=tuple(
                (vector.name, vector.reached(encoder))
                for vector, encoder in self.searched_fields(embedded=embedded)
            ),
            reranked_by=route.reranked_by,
            why=route.why,
        )


class Plan(NamedTuple):
    """How queries are served: what was chosen for the user, and why.

    Attributes:
        collection: The collection's name.
        text_field: The field that is reranked and returned as the text.
        text_field_why: Why that field.
        vector_fields: The vector fields that are searched, each with how a query reaches it.
        reranked_by: Who reranks: ``"milvus"``, ``"client"`` or None.
        why: Why it is they.
    """

    collection: str
    text_field: str
    text_field_why: str
    vector_fields: tuple[tuple[str, str], ...]
    reranked_by: RerankedBy | None
    why: str

    def __str__(self) -> str:
        searched = ", ".join(f"{name!r} ({how})" for name, how in self.vector_fields)
        who = {"milvus": "reranked inside Milvus", "client": "reranked from this process"}
        return (
            f"collection {self.collection!r}: the text is field {self.text_field!r} "
            f"({self.text_field_why}); searched: {searched}; "
            f"{who.get(self.reranked_by or '', 'not reranked')} ({self.why})"
        )


class Reranking(NamedTuple):
    """How one query's candidates are reranked.

    Attributes:
        ranker: The model and how it is asked.
        route: Who asks it.
        health: How that has been going.
    """

    ranker: VLLMRanker
    route: Route
    health: Health

    def function(self, query: Query, target: Target) -> Function:
        """Bind the query in the Function by which Milvus reranks."""
        assert self.route.provider is not None
        return self.ranker.to_function([query.text], target.text.name, provider=self.route.provider)


def describe(name: str, deadline: Deadline) -> Flow[Mapping[str, Any]]:
    """Read what Milvus says of a collection."""
    what, arguments = f"description of collection {name!r}", {"collection_name": name}
    return (yield from call(CallMilvus(what, "describe_collection", arguments, deadline)))  # type: ignore[no-any-return]


def find_target(
    settings: TargetSettings, description: Mapping[str, Any], deadline: Deadline
) -> Flow[Target]:
    """Read the collection's layout and the server's version.

    Raises:
        ConfigurationError: It does not fit the settings, or leaves a choice that is the user's.
    """
    # An alias is described by the name of what it stands for now; requests must follow the alias.
    name = settings.collection_name
    layout = CollectionLayout.from_description({**description, "collection_name": name})
    text = layout.text_choice(settings.text_field)
    if isinstance(text, tuple):
        rows = yield from _some_rows(layout, text, deadline)
        text = layout.text_field_by_length(text, rows)
    asked = CallMilvus("version of the Milvus server", "get_server_version", {}, deadline)
    version = yield from call(asked)
    return Target(
        settings=settings,
        fingerprint=fingerprint(description),
        layout=layout,
        server=Server.from_version(str(version)),
        text=text,
        output_fields=tuple(layout.output_fields(settings.output_fields, text.name)),
        rows=RowReader(layout.primary_key, text.name, layout.metadata_field(text.name)),
    )


def fingerprint(description: Mapping[str, Any]) -> str:
    """Return what tells whether a collection is still the same; functions may hold keys."""
    telling = repr([description.get(key) for key in _TELLING])
    return hashlib.sha256(telling.encode()).hexdigest()


def _some_rows(
    layout: CollectionLayout, fields: Sequence[str], deadline: Deadline
) -> Flow[Sequence[Mapping[str, Any]]]:
    arguments = {
        "collection_name": layout.name,
        "filter": "",
        "limit": _ROWS_LOOKED_AT,
        "output_fields": list(fields),
    }
    step = CallMilvus(f"query of collection {layout.name!r}", "query", arguments, deadline)
    return (yield from loaded(layout.name, step))  # type: ignore[no-any-return]
