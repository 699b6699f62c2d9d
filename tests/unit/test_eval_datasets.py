"""The evaluation's labelled sets: known items of the standard library, and BEIR's format."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.eval.datasets import Dataset, DatasetError, read_beir, stdlib_known_items

DOCUMENTS = [
    {"_id": "1", "title": "Keys", "text": "They are rotated."},
    {"_id": "2", "title": "", "text": "Mattresses."},
    {"_id": "3", "text": "No title at all."},
]
QUERIES = [{"_id": "q1", "text": "rotate a key"}, {"_id": "q2", "text": "sleep"}]
HEADING = "query-id\tcorpus-id\tscore"
QRELS = f"{HEADING}\nq1\t1\t2\nq1\t2\t0\nq2\t2\t1\n"


def beir(folder: Path, **changed: Any) -> Path:
    """Write a folder in BEIR's format; None leaves a file out."""
    files = {"corpus": DOCUMENTS, "queries": QUERIES, "qrels": QRELS, **changed}
    for name in ("corpus", "queries"):
        content = files[name]
        if isinstance(content, list):
            content = "".join(f"{json.dumps(entry)}\n" for entry in content)
        if content is not None:
            (folder / f"{name}.jsonl").write_text(content, encoding="utf-8")
    (folder / "qrels").mkdir()
    if files["qrels"] is not None:
        (folder / "qrels" / "test.tsv").write_text(files["qrels"], encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def known_items() -> Dataset:
    return stdlib_known_items()


def test_the_standard_library_gives_enough_queries(known_items: Dataset) -> None:
    assert len(known_items.queries) >= 1000


def test_every_known_item_has_one_query_and_one_document(known_items: Dataset) -> None:
    assert known_items.queries.keys() == known_items.documents.keys()
    assert all(known_items.judgements[id_] == {id_: 1} for id_ in known_items.queries)


def test_no_two_known_items_have_the_same_text(known_items: Dataset) -> None:
    texts = [*known_items.queries.values(), *known_items.documents.values()]

    assert len(set(texts)) == len(texts)


def test_a_docstring_is_cut_after_its_first_sentence(known_items: Dataset) -> None:
    name = "threading.Thread.is_alive"

    assert known_items.queries[name] == "Return whether the thread is alive."
    assert known_items.documents[name].startswith("This method returns True just before")


def test_the_known_items_are_the_same_on_every_run(known_items: Dataset) -> None:
    assert list(stdlib_known_items().queries.items()) == list(known_items.queries.items())


def test_a_limited_set_has_fewer_queries_spread_evenly_and_all_documents(
    known_items: Dataset,
) -> None:
    limited = known_items.limited(10)

    assert len(limited.queries) == 10
    assert limited.documents == known_items.documents
    every = list(known_items.queries)
    places = [every.index(id_) for id_ in limited.queries]
    distances = {later - place for place, later in itertools.pairwise(places)}
    assert distances <= {len(every) // 10, len(every) // 10 + 1}


def test_a_limit_above_the_queries_leaves_them_all(known_items: Dataset) -> None:
    assert known_items.limited(10**6) == known_items


def test_a_beir_folder_is_read(tmp_path: Path) -> None:
    dataset = read_beir(beir(tmp_path))

    assert dataset.documents == {
        "1": "Keys They are rotated.",
        "2": "Mattresses.",
        "3": "No title at all.",
    }
    assert dataset.queries == {"q1": "rotate a key", "q2": "sleep"}
    assert dataset.judgements == {"q1": {"1": 2, "2": 0}, "q2": {"2": 1}}


def test_another_split_is_read_by_name(tmp_path: Path) -> None:
    folder = beir(tmp_path)
    (folder / "qrels" / "dev.tsv").write_text(f"{HEADING}\nq2\t3\t1\n")

    assert read_beir(folder, "dev").judgements == {"q2": {"3": 1}}


def test_queries_without_a_relevant_document_are_left_out(tmp_path: Path) -> None:
    dataset = read_beir(beir(tmp_path, qrels=f"{HEADING}\nq1\t1\t0\nq2\t2\t1\n"))

    assert list(dataset.queries) == ["q2"]


def test_a_byte_order_mark_windows_line_ends_and_blank_lines_do_no_harm(tmp_path: Path) -> None:
    qrels = "\ufeff" + QRELS.replace("\n", "\r\n") + "\r\n"

    assert read_beir(beir(tmp_path, qrels=qrels)).judgements["q2"] == {"2": 1}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"corpus": None}, r"corpus\.jsonl is missing"),
        ({"queries": None}, r"queries\.jsonl is missing"),
        ({"qrels": None}, r"test\.tsv is missing: there are no splits"),
        ({"corpus": "{}\n"}, r"corpus\.jsonl, line 1: expected an object"),
        ({"corpus": "[1]\n"}, r"line 1: expected an object"),
        ({"corpus": '{"_id": "1", "text": "a"}\n{"_id": \n'}, r"line 2: not JSON"),
        ({"corpus": '{"_id": 1, "text": "a"}\n'}, "_id must be a text in quotes, not 1"),
        ({"corpus": '{"_id": "1", "text": null}\n'}, "text must be a text"),
        ({"corpus": [*DOCUMENTS, DOCUMENTS[0]]}, "line 4: a second entry with _id '1'"),
        ({"queries": [{"_id": "q1", "text": " "}, QUERIES[1]]}, "query 'q1' .* has no text"),
        ({"qrels": "q1\t1\t1\n"}, "line 1: expected the heading"),
        ({"qrels": f"{HEADING}\nq1 1 1\n"}, "line 2: expected query id, document id"),
        ({"qrels": f"{HEADING}\nq1\t1\t0.5\n"}, "a whole number"),
        ({"qrels": f"{HEADING}\nq1\t9\t1\n"}, r"1 document ids that corpus\.jsonl .* '9'"),
        ({"qrels": f"{HEADING}\nq9\t1\t1\n"}, r"1 query ids that queries\.jsonl .* 'q9'"),
        ({"qrels": f"{HEADING}\nq1\t1\t0\n"}, "no grade above 0"),
        ({"qrels": HEADING}, "no grade above 0"),
    ],
)
def test_a_malformed_beir_folder_is_refused_with_the_place(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    folder = beir(tmp_path, **changed)

    with pytest.raises(DatasetError, match=message):
        read_beir(folder)


def test_a_missing_split_names_those_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"dev\.tsv is missing: the splits there are test"):
        read_beir(beir(tmp_path), "dev")


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="is no folder"):
        read_beir(tmp_path / "nowhere")


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    folder = beir(tmp_path)
    (folder / "corpus.jsonl").write_bytes(b'{"_id": "1", "text": "caf\xe9"}\n')

    with pytest.raises(DatasetError, match="not UTF-8"):
        read_beir(folder)
