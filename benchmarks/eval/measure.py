"""What is measured: every system on every query, the size of the pool, both ways of reranking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.eval.agreement import Agreement, Ranked, compare
from benchmarks.eval.collection import Collection
from benchmarks.eval.datasets import Dataset
from benchmarks.eval.metrics import METRICS
from benchmarks.eval.progress import say
from benchmarks.eval.servers import Servers
from benchmarks.eval.systems import FETCH_K, SEARCHES, rank

# The dense search's curve is flat with a model that embeds and reranks.
CURVE_SEARCHES = ("BM25", "hybrid (RRF)")
CURVE_FETCH_KS = (5, 10, 20, 50, 100, 200)
CURVE_QUERIES = 200
CURVE_METRIC = "nDCG@10"
_CURVE_K = 10
# For how far vLLM's scores differ from one time to the next, without the memory. Of the first
# search, while the memory is empty, vLLM was asked for every list whole, as it is asked again.
_REPEATED_QUERIES = 100
_REPEATED_SEARCH = next(iter(SEARCHES))

PerQuery = Sequence[float]


@dataclass(frozen=True)
class SystemResult:
    """One system's quality: for each metric, one value for each query."""

    search: str
    reranked: bool
    values: Mapping[str, PerQuery]


@dataclass(frozen=True)
class CurvePoint:
    """A reranked search's quality with one size of the pool; None is the search by itself."""

    search: str
    fetch_k: int | None
    values: PerQuery


@dataclass(frozen=True)
class Measured:
    """All that was measured.

    Attributes:
        systems: Six of them: each search, then the same reranked.
        curve: Points of every search, the search by itself first.
        curve_queries: How many queries the curve rests on.
        modes: Reranked inside Milvus against reranked from here, of all reranked lists.
        repeated: The same with vLLM asked again for every list, for some queries, and the same
            mode twice: how far the model agrees with itself. Empty without a memory.
    """

    systems: Sequence[SystemResult]
    curve: Sequence[CurvePoint]
    curve_queries: int
    modes: Sequence[Agreement]
    repeated: Sequence[Agreement]


@dataclass(frozen=True)
class Evaluation:
    """Measures one set on one pair of servers.

    Args:
        dataset: Queries and judgements.
        collection: Filled with the set's documents.
        servers: Who reranks.
        both_modes: Whether to rerank inside Milvus too, and compare.
    """

    dataset: Dataset
    collection: Collection
    servers: Servers
    both_modes: bool

    def run(self) -> Measured:
        """Measure everything."""
        systems, modes, reranked = self._systems()
        curve_set = self.dataset.limited(CURVE_QUERIES)
        curve, curve_modes = self._curve(curve_set)
        return Measured(
            systems=systems,
            curve=curve,
            curve_queries=len(curve_set.queries),
            modes=[*modes, *curve_modes],
            repeated=(
                self._repeated(reranked[_REPEATED_SEARCH])
                if self.both_modes and self.servers.remembers
                else []
            ),
        )

    def _systems(
        self,
    ) -> tuple[list[SystemResult], list[Agreement], dict[str, Sequence[Ranked]]]:
        """Return the systems' quality, how the modes agree, and each search's reranked lists."""
        systems, agreements, all_reranked = [], [], {}
        queries = list(self.dataset.queries.values())
        for search in SEARCHES:
            say(f"{search}, alone and reranked, {len(queries):,} queries:")
            alone = rank(self.collection, search, queries)
            reranked, agreement = self._reranked(search, queries)
            agreements += agreement
            all_reranked[search] = reranked
            for lists, is_reranked in ((alone, False), (reranked, True)):
                systems.append(SystemResult(search, is_reranked, self._values(self.dataset, lists)))
        return systems, agreements, all_reranked

    def _curve(self, dataset: Dataset) -> tuple[list[CurvePoint], list[Agreement]]:
        points, agreements = [], []
        queries = list(dataset.queries.values())
        sizes = [size for size in CURVE_FETCH_KS if size <= len(dataset.documents)]
        for search in CURVE_SEARCHES:
            say(f"{search} with several fetch_k, {len(queries):,} queries:")
            alone = rank(self.collection, search, queries)
            points.append(CurvePoint(search, None, self._values(dataset, alone)[CURVE_METRIC]))
            for size in sizes:
                k = min(_CURVE_K, size)
                lists, agreement = self._reranked(search, queries, k=k, fetch_k=size)
                agreements += agreement
                values = self._values(dataset, lists)[CURVE_METRIC]
                points.append(CurvePoint(search, size, values))
        return points, agreements

    def _reranked(
        self, search: str, queries: Sequence[str], **sizes: int
    ) -> tuple[list[Ranked], list[Agreement]]:
        """Rerank from here, and inside Milvus for comparison."""
        from_here = rank(self.collection, search, queries, self.servers.ranker("client"), **sizes)
        if not self.both_modes:
            return from_here, []
        in_milvus = rank(self.collection, search, queries, self.servers.ranker("server"), **sizes)
        what = f"{search}, fetch_k {sizes.get('fetch_k', FETCH_K)}"
        return from_here, [compare(what, queries, in_milvus, from_here)]

    def _repeated(self, reranked: Sequence[Ranked]) -> list[Agreement]:
        """Rerank some lists again, both ways, with scores that are not remembered.

        Args:
            reranked: What the first scores made of all queries.
        """
        asked = self.dataset.limited(_REPEATED_QUERIES).queries
        by_query = dict(zip(self.dataset.queries, reranked, strict=True))
        first, queries = [by_query[id_] for id_ in asked], list(asked.values())
        say(f"{_REPEATED_SEARCH} reranked without the memory, {len(queries):,} queries:")
        again, in_milvus = (
            rank(self.collection, _REPEATED_SEARCH, queries, self.servers.ranker(mode, direct=True))
            for mode in ("client", "server")
        )
        return [
            compare(f"{_REPEATED_SEARCH}, client twice", queries, first, again),
            compare(f"{_REPEATED_SEARCH}, client and server", queries, again, in_milvus),
        ]

    def _values(self, dataset: Dataset, lists: Sequence[Ranked]) -> dict[str, list[float]]:
        judged = [dataset.judgements[id_] for id_ in dataset.queries]
        return {
            name: [metric(ranked.ids, grades) for ranked, grades in zip(lists, judged, strict=True)]
            for name, metric in METRICS.items()
        }
