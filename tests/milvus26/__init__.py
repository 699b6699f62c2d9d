"""A stand-in for a Milvus 2.6 server: Milvus Lite with Milvus's own model reranker. Test code.

No Milvus 2.6 server can be run where these tests run. Milvus Lite stores and searches well
enough; what it lacks is the rerank provider ``vllm``. This package adds that to Lite's gRPC
service, in a process of its own, so that the Milvus Lite inside a test's process stays as it is.

What is imitated, from section 2 of the contract ("Milvus >= 2.6, provider vllm"):

- ``vllm_provider``: the Function's params, the HTTP call, its tries and its error texts.
- ``servicer``: which hits are candidates, the nq check, the order, the score that replaces the
  distance; a server before 2.6, which drops the ranker in silence; one before 3.0, which refuses
  an input field that is nullable; ``get_server_version()``; and, from section 3, BM25 scores that
  are positive.

What is not imitated: every provider but ``vllm``; a Boost ranker next to a model ranker;
``round_decimal`` and search iterators with a model ranker; filter templates, consistency levels,
authentication, and whatever else Lite lacks or answers in its own words; the random order in
which the server sends the documents (here: the order of the hits); the jitter of its back-off;
function chains of Milvus 3.0 (Lite answers). The rerankers rrf, weighted, decay and boost are
Lite's. Releases of Milvus differ in the wording and the codes of their errors: the texts here are
the contract's, the codes Milvus's general ones (1100 a bad parameter, 65535 anything else).

By hand: ``python -m tests.milvus26 --data-dir D --port P``. In a fixture: ``running_milvus26``.
"""

from .process import running_milvus26

__all__ = ["running_milvus26"]
