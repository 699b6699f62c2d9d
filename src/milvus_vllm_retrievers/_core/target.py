"""The collection that is searched, found out once: its fields, and what its server can do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from milvus_vllm_retrievers._core.deadline import Deadline
from milvus_vllm_retrievers._core.hits import RowReader
from milvus_vllm_retrievers._core.layout import CollectionLayout, VectorField
from milvus_vllm_retrievers._core.query import Encoder, Encoders
from milvus_vllm_retrievers._core.server import Server
from milvus_vllm_retrievers._core.steps import CallMilvus, Flow

Searched = tuple[tuple[VectorField, Encoder | None], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSettings:
    """What the caller says of the collection; None leaves it to the collection's layout.

    Attributes:
        collection_name: The collection.
        text_field: The VARCHAR field that is reranked.
        vector_field: The vector field or fields to search.
        output_fields: What to fetch of each hit.
        encoders: How queries become vectors.
        where: A filter that can only be written once the layout is known.
    """

    collection_name: str
    text_field: str | None = None
    vector_field: str | Sequence[str] | None = None
    output_fields: Sequence[str] | None = None
    encoders: Encoders = field(default_factory=Encoders)
    where: Callable[[CollectionLayout], str | None] | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """A collection and how it is searched, found out once.

    Attributes:
        settings: What the caller said of it.
        layout: The collection's fields.
        server: What its server can do.
        text_field: The field that is reranked.
        output_fields: What is fetched of each hit.
        expr: What `settings.where` says for this layout.
        searched: The vector fields to search and their encoders, by whether queries come with a
            vector of their own; filled by `searched_fields`.
        rows: Reads the rows of its answers.
    """

    settings: TargetSettings
    layout: CollectionLayout
    server: Server
    text_field: str
    output_fields: tuple[str, ...]
    expr: str | None
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


def find_target(settings: TargetSettings, deadline: Deadline) -> Flow[Target]:
    """Read the collection's layout and the server's version."""
    name = settings.collection_name
    description = yield CallMilvus(
        f"description of collection {name!r}",
        "describe_collection",
        {"collection_name": name},
        deadline,
    )
    # An alias is described by the name of what it stands for now; requests must follow the alias.
    layout = CollectionLayout.from_description({**description, "collection_name": name})
    text_field = layout.text_field(settings.text_field)
    version = yield CallMilvus("version of the Milvus server", "get_server_version", {}, deadline)
    return Target(
        settings=settings,
        layout=layout,
        server=Server.from_version(str(version)),
        text_field=text_field,
        output_fields=tuple(layout.output_fields(settings.output_fields, text_field)),
        expr=settings.where(layout) if settings.where else None,
        rows=RowReader(layout.primary_key, text_field, layout.metadata_field(text_field)),
    )
