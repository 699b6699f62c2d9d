"""How a collection is found out, driven by hand."""

from __future__ import annotations

import pytest

from milvus_vllm_retrievers import ConfigurationError, VLLMRanker
from milvus_vllm_retrievers._core.hits import RowReader
from milvus_vllm_retrievers._core.layout import FieldType
from milvus_vllm_retrievers._core.query import Encoders
from milvus_vllm_retrievers._core.route import route
from milvus_vllm_retrievers._core.server import Server
from milvus_vllm_retrievers._core.steps import CallMilvus, Flow
from milvus_vllm_retrievers._core.target import (
    Target,
    TargetSettings,
    describe,
    find_target,
    fingerprint,
)
from tests.unit.builders import DENSE, KEY, SPARSE, TEXT, description, field, layout
from tests.unit.flows import DEADLINE, LITE, URL, finish, target

SETTINGS = TargetSettings(collection_name="docs")
TITLE = field("title", FieldType.VARCHAR, params={"max_length": 100})
FINDINGS = field("findings", FieldType.VARCHAR, params={"max_length": 100})


def found(flow: Flow[Target], version: str = "2.6.4") -> Target:
    result = finish(flow, version)
    assert isinstance(result, Target)
    return result


def test_a_target_is_read_from_the_collection_and_the_server() -> None:
    assert next(describe("docs", DEADLINE)) == CallMilvus(
        "description of collection 'docs'",
        "describe_collection",
        {"collection_name": "docs"},
        DEADLINE,
    )
    flow = find_target(SETTINGS, description(), DEADLINE)

    asked = next(flow)

    assert asked == CallMilvus("version of the Milvus server", "get_server_version", {}, DEADLINE)
    assert found(flow, "v2.6.4-dev") == Target(
        settings=SETTINGS,
        fingerprint=fingerprint(description()),
        layout=layout(),
        server=Server(
            "v2.6.4-dev", known=True, is_lite=False, provider="vllm", reranks_nullable=False
        ),
        text=layout().text_choice(None),  # type: ignore[arg-type]
        output_fields=("pk", "document"),
        rows=RowReader("pk", "document"),
    )


def test_a_text_field_that_does_not_exist_is_refused_before_the_version_is_asked_for() -> None:
    settings = TargetSettings(collection_name="docs", text_field="txt")

    with pytest.raises(ConfigurationError, match="no field 'txt'"):
        next(find_target(settings, description(), DEADLINE))


def test_an_alias_is_searched_by_its_own_name() -> None:
    settings = TargetSettings(collection_name="docs_alias")
    flow = find_target(settings, description(), DEADLINE)
    next(flow)

    assert found(flow).layout.name == "docs_alias"


def test_a_few_rows_are_read_where_the_schema_leaves_open_which_field_has_the_text() -> None:
    flow = find_target(SETTINGS, description(KEY, TITLE, FINDINGS, DENSE), DEADLINE)

    asked = next(flow)
    assert isinstance(asked, CallMilvus)
    assert asked.method == "query"
    assert asked.arguments["output_fields"] == ["title", "findings"]
    assert asked.arguments["limit"] < 100
    assert isinstance(
        asked := flow.send([{"title": "short", "findings": "long " * 99}]), CallMilvus
    )
    assert asked.method == "get_server_version"
    assert found(flow).text.name == "findings"


def test_rows_that_do_not_tell_either_leave_the_choice_to_the_user() -> None:
    flow = find_target(SETTINGS, description(KEY, TITLE, FINDINGS, DENSE), DEADLINE)
    next(flow)

    with pytest.raises(ConfigurationError, match=r"title.*findings.*text_field"):
        flow.send([])


# What tells one state of a collection from another


def test_a_collection_that_has_not_changed_is_told_to_be_the_same() -> None:
    described = {**description(), "collection_id": 7}

    assert fingerprint({**described, "num_partitions": 1, "aliases": []}) == fingerprint(
        {**described, "num_partitions": 2, "aliases": ["docs"]}
    )


@pytest.mark.parametrize(
    "other",
    [
        {**description(), "collection_id": 8},
        {**description(KEY, TEXT, DENSE, functions=[]), "collection_id": 7},
        {**description(KEY, TEXT, DENSE, SPARSE), "collection_id": 7},
        {**description(dynamic=True), "collection_id": 7},
    ],
)
def test_another_collection_and_other_fields_are_told_apart(other: dict[str, object]) -> None:
    assert fingerprint(other) != fingerprint({**description(), "collection_id": 7})


# The fields that are searched


def test_the_fields_to_search_are_chosen_for_queries_with_and_without_a_vector() -> None:
    found = target(fields=None, encoders=Encoders())

    assert [vector.name for vector, _ in found.searched_fields(embedded=False)] == ["sparse"]
    assert [vector.name for vector, _ in found.searched_fields(embedded=True)] == [
        "dense",
        "dense_2",
        "sparse",
    ]


def test_a_field_out_of_reach_that_was_named_is_refused_each_time() -> None:
    found = target(fields=["dense"], encoders=Encoders())

    for _ in range(2):
        with pytest.raises(ConfigurationError, match="pass an embedding model"):
            found.searched_fields(embedded=False)


# The plan


@pytest.mark.parametrize(
    ("ranker", "version", "who"),
    [
        (None, "2.6.4", "not reranked (no ranker was given)"),
        (VLLMRanker(URL), LITE, "reranked from this process (Milvus Lite does not know"),
        (VLLMRanker(URL), "2.6.4", "reranked inside Milvus (Milvus 2.6.4 knows"),
    ],
)
def test_a_plan_reads_as_a_sentence_with_every_choice_and_its_reason(
    ranker: VLLMRanker | None, version: str, who: str
) -> None:
    found = target(version, fields=None)

    told = str(found.plan(route(ranker, found.facts(None)), embedded=False))

    assert told.startswith("collection 'docs': the text is field 'document' (the only VARCHAR")
    assert "'dense' (" in told
    assert "'sparse' (as text (BM25))" in told
    assert who in told


def test_facts_are_what_the_route_depends_on() -> None:
    facts = target("2.6.4", nullable=True).facts(["a-model"])

    assert facts.text_field == "document"
    assert facts.text_may_be_null
    assert facts.served == ["a-model"]
    assert facts.server.version == "2.6.4"
