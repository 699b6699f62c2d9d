"""Measures what reranking does to the quality of retrieval.

    python -m benchmarks.eval                       documentation of Python's standard library
    python -m benchmarks.eval --beir FOLDER         your own documents, queries and judgements
    python -m benchmarks.eval --limit 50            fewer queries, to see that everything runs

BM25, dense and hybrid search (RRF), each alone and reranked by vLLM: nDCG@10, MRR@10 and recall@50
with bootstrap intervals; the effect of fetch_k; whether Milvus and the client rerank alike. vLLM is
at VLLM_ENDPOINT (VLLM_MODEL), embeddings may come from another (VLLM_EMBEDDING_ENDPOINT,
VLLM_EMBEDDING_MODEL). Milvus is at MILVUS_URI (MILVUS_TOKEN; VLLM_SERVER_ENDPOINT is vLLM as it
reaches it), or else a stand-in is started. `make eval` starts a vLLM too.

A folder in BEIR's format has corpus.jsonl (_id, title, text), queries.jsonl (_id, text) and
qrels/test.tsv (query-id, corpus-id, score, with a heading). The exit code is 1 if Milvus and the
client, given the same scores, made different lists.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from benchmarks.eval.collection import RememberedEmbeddings, filled_collection
from benchmarks.eval.datasets import Dataset, DatasetError, read_beir, stdlib_known_items
from benchmarks.eval.measure import Evaluation, Measured
from benchmarks.eval.progress import say
from benchmarks.eval.report import as_json, draw, report_of, show
from benchmarks.eval.servers import MissingServerError, Servers, describe_servers, serving
from milvus_vllm_retrievers import MilvusVLLMError

_HERE = Path(__file__).parent
_DEFAULT_QUERIES = 500


def main() -> int:
    """Do what the command line asks and return the exit code."""
    arguments = _arguments()
    try:
        dataset = _dataset(arguments)
        with serving() as servers:
            return _evaluate(dataset, servers, arguments)
    except (DatasetError, MissingServerError, MilvusVLLMError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("Stopped; the collection is removed.")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.eval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--beir", type=Path, metavar="FOLDER", help="a set in BEIR's format")
    parser.add_argument("--split", default="test", help="of the BEIR set: qrels/SPLIT.tsv")
    parser.add_argument("--limit", type=_positive, metavar="N", help="ask at most so many queries")
    parser.add_argument(
        "--client-only", action="store_true", help="do not rerank inside Milvus, for comparison"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to write the figures")
    parser.add_argument("--picture", type=Path, metavar="PATH", help="draw the effect of fetch_k")
    arguments = parser.parse_args()
    if arguments.picture and not find_spec("matplotlib"):
        parser.error("--picture needs matplotlib: pip install matplotlib")
    return arguments


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def _dataset(arguments: argparse.Namespace) -> Dataset:
    if arguments.beir:
        dataset = read_beir(arguments.beir, arguments.split)
        return dataset.limited(arguments.limit) if arguments.limit else dataset
    return stdlib_known_items().limited(arguments.limit or _DEFAULT_QUERIES)


def _evaluate(dataset: Dataset, servers: Servers, arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    say(f"{dataset.name}: {len(dataset.queries):,} queries, {len(dataset.documents):,} documents")
    say(f"Milvus at {servers.milvus}, vLLM at {servers.vllm}")
    setup = describe_servers(servers)
    measured = _measured(dataset, servers, both_modes=not arguments.client_only)
    report = report_of(measured)
    show(report, dataset)
    seconds = time.monotonic() - started
    figures = as_json(report, dataset, setup, seconds)
    path = arguments.json or _default_json(dataset, arguments)
    path.write_text(json.dumps(figures, indent=2) + "\n")
    say(f"figures written to {path}, after {seconds:.0f} s")
    if arguments.picture:
        draw(report, dataset, arguments.picture)
        say(f"picture written to {arguments.picture}")
    return _exit_code(measured, servers)


def _measured(dataset: Dataset, servers: Servers, *, both_modes: bool) -> Measured:
    embedding = RememberedEmbeddings(servers.embedding, servers.embedding_model)
    with filled_collection(dataset, servers.milvus, servers.token, embedding) as collection:
        return Evaluation(dataset, collection, servers, both_modes).run()


def _default_json(dataset: Dataset, arguments: argparse.Namespace) -> Path:
    return _HERE / (f"results-{dataset.name}.json" if arguments.beir else "results.json")


def _exit_code(measured: Measured, servers: Servers) -> int:
    wrong = [agreement for agreement in measured.modes if not agreement.complete]
    for agreement in wrong:
        examples = "; ".join(repr(query) for query in agreement.differing)
        say(f"modes server and client differ, {agreement.what}: {examples}")
    # Without the memory, the modes were given scores that the model itself does not repeat.
    return 1 if wrong and servers.remembers else 0


if __name__ == "__main__":
    sys.exit(main())
