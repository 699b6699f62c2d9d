"""Labelled sets: queries, documents, and which documents answer which query.

`stdlib_known_items` makes one from the docstrings of the running Python's standard library;
`read_beir` reads a folder in the format of the BEIR benchmark (https://github.com/beir-cellar/beir).
"""

from __future__ import annotations

import ast
import json
import platform
import re
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# Tests, and what is no library: an editor, demos, a frozen grammar tool.
_NOT_LIBRARY = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "antigravity", "this"}
_SENTENCE_END = re.compile(r"[.!?](?=\s+[A-Z])")
_MIN_QUERY_WORDS = 4
_MIN_DOCUMENT_CHARACTERS = 80


class DatasetError(Exception):
    """A folder that is not in BEIR's format; the message says where and what to do."""


@dataclass(frozen=True)
class Dataset:
    """A labelled set.

    Attributes:
        name: Short, for a heading.
        description: What the texts are and how they were judged, in a sentence.
        documents: Text by id.
        queries: Text by id; each has at least one relevant document.
        judgements: For each query's id, the grades of documents by their ids.
    """

    name: str
    description: str
    documents: Mapping[str, str]
    queries: Mapping[str, str]
    judgements: Mapping[str, Mapping[str, int]]

    def limited(self, queries: int) -> Dataset:
        """Return the set with at most so many queries, spread evenly; all documents stay."""
        return replace(self, queries=_spread(self.queries, queries))


def _spread(items: Mapping[str, str], wanted: int) -> dict[str, str]:
    every = list(items.items())
    wanted = min(wanted, len(every))
    return dict(every[i * len(every) // wanted] for i in range(wanted))


# --- Known items of the standard library ----------------------------------------------------------


def stdlib_known_items() -> Dataset:
    """Make a set from docstrings: the first sentence is to find the rest of its docstring.

    Neither has the name of what is documented put before it. Docstrings with a short rest, without
    a sentence, or with a sentence or a rest that another has too, are left out. The set is the same
    on every run of one version of Python.
    """
    documents: dict[str, str] = {}
    queries: dict[str, str] = {}
    seen: set[str] = set()
    for name, docstring in _docstrings(Path(sysconfig.get_path("stdlib"))):
        query, document = _first_sentence_and_rest(docstring)
        fits = _is_sentence(query) and len(document) >= _MIN_DOCUMENT_CHARACTERS
        if fits and name not in documents and not {query, document} & seen:
            seen |= {query, document}
            queries[name], documents[name] = query, document
    return Dataset(
        name=f"standard library of Python {platform.python_version()}",
        description=(
            "known-item search over docstrings: the first sentence is the query, the rest of the "
            "docstring, without name and first sentence, the one relevant document"
        ),
        documents=documents,
        queries=queries,
        judgements={name: {name: 1} for name in queries},
    )


def _docstrings(stdlib: Path) -> Iterator[tuple[str, str]]:
    """Yield name and docstring of every public class and function, in a fixed order."""
    for path in sorted(stdlib.rglob("*.py")):
        parts = path.relative_to(stdlib).with_suffix("").parts
        if parts[0] not in sys.stdlib_module_names or _NOT_LIBRARY & set(parts):
            continue
        module = ".".join(parts).removesuffix(".__init__")
        yield from _documented(ast.parse(path.read_bytes()), module)


def _documented(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if child.name.startswith("_"):
                continue
            qualified = f"{name}.{child.name}"
            if docstring := ast.get_docstring(child):
                yield qualified, docstring
            yield from _documented(child, qualified)


def _first_sentence_and_rest(docstring: str) -> tuple[str, str]:
    paragraph, _, others = docstring.partition("\n\n")
    paragraph = " ".join(paragraph.split())
    end = _SENTENCE_END.search(paragraph)
    cut = end.end() if end else len(paragraph)
    rest = f"{paragraph[cut:]} {' '.join(others.split())}"
    return paragraph[:cut], rest.strip()


def _is_sentence(text: str) -> bool:
    """Tell it from a signature such as ``read(n) -> bytes`` or a heading."""
    return len(text.split()) >= _MIN_QUERY_WORDS and "->" not in text


# --- BEIR -----------------------------------------------------------------------------------------


def read_beir(folder: Path, split: str = "test") -> Dataset:
    """Read a folder in BEIR's format.

    It has ``corpus.jsonl`` (objects with ``_id``, ``text`` and perhaps ``title``, which is put
    before the text), ``queries.jsonl`` (``_id``, ``text``) and ``qrels/{split}.tsv``: a heading,
    then query id, document id and grade, separated by tabs. Queries without a relevant document in
    the split are left out, since no ranking of theirs is better than another.

    Raises:
        DatasetError: A file is missing or malformed, or the files do not fit together.
    """
    if not folder.is_dir():
        raise DatasetError(
            f"{folder} is no folder: give one with corpus.jsonl, queries.jsonl and qrels/"
        )
    documents = dict(_texts(folder / "corpus.jsonl", titled=True))
    every_query = dict(_texts(folder / "queries.jsonl", titled=False))
    qrels = _qrels_file(folder, split)
    judgements = _judgements(qrels)
    judged = {id_ for grades in judgements.values() for id_ in grades}
    _check_known("document", judged, documents, qrels)
    _check_known("query", set(judgements), every_query, qrels)
    relevant = {id_ for id_, grades in judgements.items() if max(grades.values()) > 0}
    queries = {id_: text for id_, text in every_query.items() if id_ in relevant}
    if not queries:
        raise DatasetError(f"{qrels} has no grade above 0: there is nothing to find")
    if empty := next((id_ for id_, text in queries.items() if not text), None):
        raise DatasetError(f"query {empty!r} in {folder / 'queries.jsonl'} has no text")
    return Dataset(
        name=folder.resolve().name,
        description=f"a folder in BEIR's format, split {split}",
        documents=documents,
        queries=queries,
        judgements=judgements,
    )


def _texts(path: Path, *, titled: bool) -> Iterator[tuple[str, str]]:
    seen = set()
    for where, line in _lines(path):
        id_, entry = _entry(where, line)
        if id_ in seen:
            raise DatasetError(f"{where}: a second entry with _id {id_!r}; ids must be unique")
        seen.add(id_)
        title = entry.get("title") if titled else None
        yield id_, f"{title or ''} {entry['text']}".strip()


def _entry(where: str, line: str) -> tuple[str, Mapping[str, Any]]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise DatasetError(f"{where}: not JSON ({error}); one object a line is expected") from error
    if not isinstance(entry, dict) or not {"_id", "text"} <= set(entry):
        raise DatasetError(f'{where}: expected an object such as {{"_id": "1", "text": "..."}}')
    # A number as an id would never equal the text that the tab-separated judgements hold.
    if not isinstance(entry["_id"], str) or not entry["_id"]:
        raise DatasetError(f"{where}: _id must be a text in quotes, not {entry['_id']!r}")
    if not isinstance(entry["text"], str):
        raise DatasetError(f"{where}: text must be a text in quotes")
    return entry["_id"], entry


def _qrels_file(folder: Path, split: str) -> Path:
    path = folder / "qrels" / f"{split}.tsv"
    if not path.is_file():
        there = sorted(file.stem for file in path.parent.glob("*.tsv"))
        hint = f"the splits there are {', '.join(there)}" if there else "there are no splits"
        raise DatasetError(f"{path} is missing: {hint} (choose one with --split)")
    return path


def _judgements(path: Path) -> dict[str, dict[str, int]]:
    judgements: dict[str, dict[str, int]] = {}
    for number, (where, line) in enumerate(_lines(path)):
        columns = line.split("\t")
        try:
            query, document, grade = columns
            grade_number = int(grade)
        except ValueError as error:
            # BEIR's heading is "query-id corpus-id score"; what matters is that it is no judgement.
            if number == 0 and len(columns) == len(("query", "document", "grade")):
                continue
            raise DatasetError(
                f"{where}: expected query id, document id and a whole number, separated by tabs"
            ) from error
        if number == 0:
            raise DatasetError(f"{where}: expected the heading query-id, corpus-id, score")
        judgements.setdefault(query, {})[document] = grade_number
    return judgements


def _check_known(kind: str, ids: set[str], known: Mapping[str, str], qrels: Path) -> None:
    unknown = sorted(ids - set(known))
    if unknown:
        file = "corpus.jsonl" if kind == "document" else "queries.jsonl"
        raise DatasetError(
            f"{qrels} judges {len(unknown)} {kind} ids that {file} does not have, such as "
            f"{', '.join(map(repr, unknown[:3]))}"
        )


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield where each line is, for a message, and the line; blank ones are skipped."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}, line {number}", line.rstrip("\r\n")
    except FileNotFoundError as error:
        raise DatasetError(f"{path} is missing: BEIR's format has it") from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8 text: {error}") from error
