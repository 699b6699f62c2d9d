"""Target 7: how the client's cost grows with what is asked, beside the bare clients.

    python -m benchmarks growth

10 to 1,000 candidates, 1 to 8 vector fields, 1 to 256 queries of a batch, texts of 100 B to 32 KB.
Where Milvus reranks (mode server), bare is one call of `MilvusClient.hybrid_search`; where this
process reranks (mode client), it is one `MilvusClient.search` and one `httpx` request for all its
hits. Milvus's answers are replayed. For each size: CPU time of a call, and the bytes this process
sent and received, as the kernel counts them for each of its TCP connections.

The claim is that no cost grows faster than linearly: fitted over the upper half of the sizes, the
exponent of cost = a * size ** exponent stays below 1.1. The picture is docs/growth.png.
"""

from __future__ import annotations

import math
import os
import socket
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
from pymilvus import AnnSearchRequest, MilvusClient

from benchmarks.corpus import QUERIES, dense_names, make_collection, query_vector
from benchmarks.harness import (
    ROOT,
    NotRunError,
    Result,
    behind,
    interleaved,
    milvus_process,
    replaying,
    rerank_process,
    say,
)
from benchmarks.overhead import ReadyMade
from milvus_vllm_retrievers.langchain import MilvusVLLMRetriever
from milvus_vllm_retrievers.ranker import Mode, VLLMRanker

LIMIT = 1.1
K = 5
FETCH_K = 50
PICTURE = ROOT / "docs" / "growth.png"
_TURN_SECONDS = 0.1
_MOST_CALLS = 50
_COUNTED_CALLS = 5
_TCP_INFO_BYTES = 232
_TCP_INFO_COUNTERS = 120  # where bytes_acked and bytes_received stand in it (linux/tcp.h)


# --- What is asked --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """One call: how much of everything it has.

    Attributes:
        fetch_k: Candidates per vector field.
        legs: Vector fields.
        queries: Queries in one batch.
        text_bytes: Length of every text.
    """

    fetch_k: int = FETCH_K
    legs: int = 1
    queries: int = 1
    text_bytes: int = 200

    @property
    def collection(self) -> str:
        """The name of the collection it needs."""
        return f"growth_{self.legs}_{self.rows}_{self.text_bytes}"

    @property
    def rows(self) -> int:
        """How many rows that has: some more than there are candidates."""
        return self.fetch_k + 10

    @property
    def texts(self) -> list[str]:
        """The queries' texts."""
        return [f"{QUERIES[i % len(QUERIES)]} ({i})" for i in range(self.queries)]


@dataclass(frozen=True)
class Sweep:
    """One thing that grows while the rest stays.

    Attributes:
        name: What grows, with its unit.
        mode: Who reranks.
        sizes: Its sizes.
        shape: What is asked at one size.
    """

    name: str
    mode: Mode
    sizes: Sequence[int]
    shape: Callable[[int], Shape]


CANDIDATES = (10, 32, 100, 320, 1_000)
LEGS = (1, 2, 4, 8)
BATCH = (1, 4, 16, 64, 256)
TEXT_BYTES = (100, 400, 1_600, 6_400, 32_000)
SWEEPS = (
    Sweep("candidates", "server", CANDIDATES, lambda size: Shape(fetch_k=size)),
    Sweep("candidates", "client", CANDIDATES, lambda size: Shape(fetch_k=size)),
    Sweep("vector fields", "server", LEGS, lambda size: Shape(legs=size)),
    Sweep("queries", "server", BATCH, lambda size: Shape(queries=size)),
    Sweep("queries", "client", BATCH, lambda size: Shape(queries=size, fetch_k=10)),
    Sweep("bytes of text", "server", TEXT_BYTES, lambda size: Shape(text_bytes=size)),
    Sweep("bytes of text", "client", TEXT_BYTES, lambda size: Shape(text_bytes=size)),
)


# --- Who asks -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clients:
    """The servers, and the clients that both sides share.

    Attributes:
        milvus: Milvus, its answers replayed.
        http: A client of vLLM's URL.
        vllm: That URL.
    """

    milvus: MilvusClient
    http: httpx.Client
    vllm: str

    def ours(self, shape: Shape, mode: Mode) -> Callable[[], Any]:
        """Return one call of our retriever."""
        retriever = MilvusVLLMRetriever(
            collection_name=shape.collection,
            ranker=VLLMRanker(self.vllm, mode=mode),
            client=self.milvus,
            embedding=ReadyMade(),
            k=K,
            fetch_k=shape.fetch_k,
        )
        texts = shape.texts
        if shape.queries == 1:
            return lambda: [retriever.invoke(texts[0])]
        return lambda: retriever.batch(texts)

    def bare(self, shape: Shape, mode: Mode) -> Callable[[], Any]:
        """Return the same call of the bare clients."""
        if mode == "server":
            return lambda: self._reranked_by_milvus(shape)
        return lambda: self._reranked_by_client(shape)

    def _reranked_by_milvus(self, shape: Shape) -> list[Any]:
        texts = shape.texts
        vectors = [query_vector(text) for text in texts]
        return self.milvus.hybrid_search(
            shape.collection,
            [AnnSearchRequest(vectors, leg, {}, shape.fetch_k) for leg in dense_names(shape.legs)],
            VLLMRanker(self.vllm).to_function(texts, "text"),
            limit=K,
            output_fields=["pk", "text", "source", "page"],
        )

    def _reranked_by_client(self, shape: Shape) -> list[Any]:
        texts = shape.texts
        pools = self.milvus.search(
            shape.collection,
            [query_vector(text) for text in texts],
            anns_field=dense_names(1)[0],
            limit=shape.fetch_k,
            output_fields=["pk", "text", "source", "page"],
        )
        return [self._best(text, pool) for text, pool in zip(texts, pools, strict=True)]

    def _best(self, query: str, pool: Sequence[Any]) -> list[Any]:
        documents = [hit["text"] for hit in pool]
        body = {"query": query, "documents": documents, "truncate_prompt_tokens": -1}
        results = self.http.post("/v1/rerank", json=body).json()["results"]
        return [pool[result["index"]] for result in results[:K]]


# --- Measuring ------------------------------------------------------------------------------------


UNITS = {"cpu": "ms", "sent": "B", "received": "B"}


@dataclass
class Costs:
    """What calls cost, one value for each size.

    Attributes:
        cpu_ms: CPU time of this process.
        sent: Bytes sent.
        received: Bytes received.
    """

    cpu_ms: list[float] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)
    received: list[float] = field(default_factory=list)

    def exponents(self, sizes: Sequence[int]) -> dict[str, float]:
        """Return the exponent of each cost's growth."""
        return {name: exponent(sizes, self.of(name)) for name in UNITS}

    def of(self, name: str) -> list[float]:
        """Return one of the costs by its name in `UNITS`."""
        return {"cpu": self.cpu_ms, "sent": self.sent, "received": self.received}[name]


def exponent(sizes: Sequence[int], costs: Sequence[float]) -> float:
    """Fit cost = a * size ** exponent over the upper half of the sizes, by least squares."""
    middle = math.sqrt(sizes[0] * sizes[-1])
    points = [
        (math.log(size), math.log(cost))
        for size, cost in zip(sizes, costs, strict=True)
        if size >= middle * 0.99
    ]
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    above = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return above / sum((x - mean_x) ** 2 for x, _ in points)


def traffic() -> dict[str, tuple[int, int]]:
    """Return the bytes sent (and acknowledged) and received of each TCP connection we have."""
    counted = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            name = str(entry.readlink())
            if not name.startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
            counted[name] = struct.unpack_from("QQ", info, _TCP_INFO_COUNTERS)
        except OSError:  # closed by now, or no TCP connection
            continue
    return counted


def bytes_of(call: Callable[[], Any]) -> tuple[float, float]:
    """Return the bytes sent and received by one call, as the mean of some."""
    call()
    before = traffic()
    for _ in range(_COUNTED_CALLS):
        call()
    sent = received = 0
    for name, (now_sent, now_received) in traffic().items():
        was_sent, was_received = before.get(name, (0, 0))
        sent += now_sent - was_sent
        received += now_received - was_received
    return sent / _COUNTED_CALLS, received / _COUNTED_CALLS


def measured(sweep: Sweep, clients: Clients, rounds: int) -> dict[str, Costs]:
    """Measure both sides at every size of a sweep, all in turn."""
    calls: dict[tuple[str, int], Callable[[], Any]] = {}
    turns: dict[tuple[str, int], Callable[[], None]] = {}
    calls_in: dict[tuple[str, int], int] = {}
    for size in sweep.sizes:
        shape = sweep.shape(size)
        fill(clients.milvus, shape)
        calls["ours", size] = clients.ours(shape, sweep.mode)
        calls["bare", size] = clients.bare(shape, sweep.mode)
        check_same(calls["ours", size], calls["bare", size])
        for name in ("ours", "bare"):
            calls_in[name, size] = calls_in_a_turn(calls["bare", size])
            turns[name, size] = repeated(calls[name, size], calls_in[name, size])
    costs = {"ours": Costs(), "bare": Costs()}
    for (name, size), timing in interleaved(turns, rounds, 1).items():
        costs[name].cpu_ms.append(timing.cpu_ms / calls_in[name, size])
        sent, received = bytes_of(calls[name, size])
        costs[name].sent.append(sent)
        costs[name].received.append(received)
    return costs


def fill(milvus: MilvusClient, shape: Shape) -> None:
    """Make the collection that a shape needs, if it is not there."""
    if not milvus.has_collection(shape.collection):
        make_collection(
            milvus,
            shape.collection,
            rows=shape.rows,
            dense=shape.legs,
            bm25=False,
            text_bytes=shape.text_bytes,
        )


def repeated(call: Callable[[], Any], times: int) -> Callable[[], None]:
    """Return what calls so many times."""

    def turn() -> None:
        for _ in range(times):
            call()

    return turn


def check_same(ours: Callable[[], Any], bare: Callable[[], Any]) -> None:
    """Check that both sides find the same rows in the same order."""
    found = [[document.metadata["pk"] for document in documents] for documents in ours()]
    expected = [[hit["pk"] for hit in hits] for hits in bare()]
    assert found == expected, "ours and the bare clients do not find the same"


def calls_in_a_turn(call: Callable[[], Any]) -> int:
    """Return how many calls fill one turn."""
    seconds = interleaved({"": call}, 1, 2)[""].wall[0]
    return max(1, min(_MOST_CALLS, round(_TURN_SECONDS / seconds)))


# --- Reporting ------------------------------------------------------------------------------------


def result(sweep: Sweep, costs: Mapping[str, Costs]) -> Result:
    """Return the worst exponent of one sweep, with the whole table in its details."""
    ours, bare = (costs[name].exponents(sweep.sizes) for name in ("ours", "bare"))
    worst = max(ours, key=lambda name: ours[name])
    most = {side: cost.of(worst)[-1] for side, cost in costs.items()}
    return Result(
        what=(
            f"{sweep.sizes[0]:,} to {sweep.sizes[-1]:,} {sweep.name}, mode {sweep.mode}: worst "
            f"exponent ({worst}; bare client {bare[worst]:.2f})"
        ),
        figure=ours[worst],
        limit=LIMIT,
        unit="",
        behind=behind(most["ours"], most["bare"], f"{UNITS[worst]} at {short(sweep.sizes[-1])}"),
        details={
            "sizes": list(sweep.sizes),
            "exponents": {"ours": ours, "bare": bare},
            "costs": {name: vars(cost) for name, cost in costs.items()},
        },
    )


def draw(sweeps: Sequence[tuple[Sweep, Mapping[str, Costs]]], picture: Path) -> None:
    """Draw CPU time and bytes over the size of everything that grows."""
    import matplotlib as mpl  # noqa: PLC0415 - run() checks that it is there

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 - only once the backend is chosen

    figure, axes = plt.subplots(
        2, len(sweeps), figsize=(2.6 * len(sweeps), 5.6), sharey="row", layout="constrained"
    )
    for column, (sweep, costs) in enumerate(sweeps):
        draw_sweep(axes[0][column], axes[1][column], sweep, costs)
    axes[0][0].set_ylabel("client CPU per call (ms)")
    axes[1][0].set_ylabel("bytes per call")
    axes[0][0].legend(fontsize=8)
    axes[1][0].legend(fontsize=8)
    figure.suptitle("What one call costs the client; dotted: linear growth")
    picture.parent.mkdir(exist_ok=True)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def draw_sweep(cpu: Any, traffic_: Any, sweep: Sweep, costs: Mapping[str, Costs]) -> None:
    """Draw one sweep: the bare clients broad and pale, ours thin on top."""
    styles: dict[str, dict[str, Any]] = {
        "bare": {"linewidth": 5, "alpha": 0.35},
        "ours": {"linewidth": 1.2, "marker": "o", "markersize": 4},
    }
    for name, style in styles.items():
        cost = costs[name]
        cpu.plot(sweep.sizes, cost.cpu_ms, color="tab:blue", label=name, **style)
        received, sent = (f"{name}, {what}" for what in ("received", "sent"))
        traffic_.plot(sweep.sizes, cost.received, color="tab:green", label=received, **style)
        traffic_.plot(sweep.sizes, cost.sent, color="tab:orange", label=sent, **style)
    for axis, last in ((cpu, costs["ours"].cpu_ms[-1]), (traffic_, costs["ours"].received[-1])):
        axis.set(xscale="log", yscale="log")
        end = sweep.sizes[-1]
        axis.axline((end / 2, last / 2), (end, last), linestyle=":", color="grey", linewidth=1)
        axis.set_xticks(sweep.sizes, [short(size) for size in sweep.sizes], minor=False)
        axis.set_xticks([], minor=True)
        axis.grid(visible=True, which="major", alpha=0.3)
    cpu.set_title(f"{sweep.name}, mode {sweep.mode}", fontsize=10)
    traffic_.set_xlabel(sweep.name)


def short(size: int) -> str:
    """Write 6400 as 6.4k."""
    thousand = 1_000
    return str(size) if size < thousand else f"{size / thousand:g}k"


def run(quick: bool) -> list[Result]:
    """Return the figures of target 7, and draw the picture."""
    if find_spec("matplotlib") is None:
        raise NotRunError("it needs matplotlib (pip install --group bench)")
    if not hasattr(socket, "TCP_INFO") or not Path("/proc/self/fd").exists():
        raise NotRunError("it counts bytes by what only Linux tells of a connection")
    found = []
    with ExitStack() as open_:
        folder = open_.enter_context(tempfile.TemporaryDirectory())
        milvus = open_.enter_context(milvus_process(folder))
        vllm = open_.enter_context(rerank_process())
        clients = Clients(
            milvus=MilvusClient(open_.enter_context(replaying(milvus))),
            http=open_.enter_context(httpx.Client(base_url=vllm)),
            vllm=vllm,
        )
        open_.callback(clients.milvus.close)
        for sweep in SWEEPS:
            say(f"  {sweep.name}, mode {sweep.mode}: {', '.join(map(str, sweep.sizes))}")
            found.append((sweep, measured(sweep, clients, 2 if quick else 7)))
        # A look whether everything runs leaves the picture of the last whole run.
        picture = Path(folder) / PICTURE.name if quick else PICTURE
        draw(found, picture)
        say(f"  drawn: {picture}")
    return [result(sweep, costs) for sweep, costs in found]
