"""A rerank endpoint in front of vLLM that has it score every pair of query and document once.

vLLM is no pure function: which texts happen to share a batch changes a bfloat16 score in the fourth
digit. Two rerankings of the same candidates then differ now and then in the order of near-equals,
whoever asks. To compare two ways of asking, both are given the same scores: vLLM's, remembered. It
also spares vLLM from scoring a pair again for every size of the candidate pool.

Not for listwise models, where a document's score depends on those that are asked about with it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx

# Not part of what is asked: the documents are remembered one by one, and vLLM serves one model,
# which one way of asking names and the other does not.
_NOT_THE_QUESTION = {"documents", "model"}


@contextmanager
def remembering(vllm: str) -> Iterator[str]:
    """Run the endpoint on a free local port while the block runs, and yield its URL.

    Args:
        vllm: vLLM's base URL.
    """
    with httpx.Client(base_url=vllm, timeout=None) as client:
        server = _Server(("127.0.0.1", 0), _handler(RerankMemory(client)))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # as many may connect at once


class RerankMemory:
    """Answers rerank requests, from memory where it can.

    Args:
        client: Where vLLM is.
    """

    def __init__(self, client: httpx.Client) -> None:
        self._client = client
        self._scores: dict[tuple[str, str], float] = {}
        self._lock = threading.Lock()

    def answer(self, path: str, body: Mapping[str, Any]) -> tuple[int, bytes]:
        """Return the status and the body of the answer; what is no success is passed on.

        Args:
            path: The path that was asked, a rerank route of vLLM.
            body: The request.
        """
        asked = {key: value for key, value in body.items() if key not in _NOT_THE_QUESTION}
        question = json.dumps(asked, sort_keys=True)
        documents = body["documents"]
        with self._lock:
            unknown = [d for d in dict.fromkeys(documents) if (question, d) not in self._scores]
        if unknown:
            response = self._client.post(path, json={**body, "documents": unknown})
            if response.status_code != httpx.codes.OK:
                return response.status_code, response.content
            self._remember(question, unknown, response.json()["results"])
        return int(httpx.codes.OK), self._results(question, documents)

    def _remember(
        self, question: str, documents: Sequence[str], results: Sequence[Mapping[str, Any]]
    ) -> None:
        with self._lock:
            for result in results:
                # Of two requests that asked at the same time, the first to be answered counts.
                key = question, documents[result["index"]]
                self._scores.setdefault(key, result["relevance_score"])

    def _results(self, question: str, documents: Sequence[str]) -> bytes:
        results = [
            {"index": index, "relevance_score": self._scores[question, document]}
            for index, document in enumerate(documents)
        ]
        results.sort(key=lambda result: -result["relevance_score"])
        return json.dumps({"results": results}).encode()


def _handler(memory: RerankMemory) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body in one write: apart, the body waits 40 ms for an ACK

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            status, answer = memory.answer(self.path, body)
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            """Be silent: a line a request says nothing."""

    return Handler
