# What a developer types. The first run of a target sets up what it needs, in folders that git
# ignores; later runs find it there.

PYTHON ?= python3
BESIDE_VLLM := .venv/bin/python tools/vllm_server.py run

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast lint clean eval bench soak

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12
	@echo
	@echo "Set PYTHON to use another Python than $(PYTHON), and VLLM_ENDPOINT to use a vLLM that"
	@echo "already runs (tools/vllm_server.py tells more)."

demo: .venv/installed.txt ## Search and rerank with a real vLLM, in and beside Milvus
	$(BESIDE_VLLM) -- .venv/bin/python examples/quickstart.py

eval: .venv/installed-bench.txt ## Measure what reranking does to the quality of retrieval
	GRPC_VERBOSITY=ERROR $(BESIDE_VLLM) -- \
		.venv/bin/python -m benchmarks.eval --picture docs/quality.png

bench: .venv/installed-bench.txt ## Measure what the package costs, beside others and bare clients
	$(BESIDE_VLLM) -- .venv/bin/python -m benchmarks

soak: .venv/installed.txt ## Make 5,000 calls while the servers fail; look for wrong answers and leaks
	$(BESIDE_VLLM) -- .venv/bin/python -m benchmarks.soak

test: .venv/installed.txt ## Run all tests with real vLLM servers, then on old and new versions
	$(BESIDE_VLLM) --cross-encoder -- sh -c '.venv/bin/python -m pytest && .venv/bin/nox'

test-fast: .venv/installed.txt ## Run the tests that need no vLLM
	.venv/bin/python -m pytest -m "not real_vllm"

lint: .venv/installed.txt ## Check style, formatting, types and the direction of imports
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy --strict src
	.venv/bin/lint-imports

clean: ## Remove everything that these targets have made
	rm -rf .venv .venv-vllm .venv-old-milvus .venv-peers-* .nox build dist
	rm -rf .benchmarks .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find src tests tools examples -name __pycache__ -prune -exec rm -rf {} +

.venv/installed.txt: pyproject.toml
	@echo "Setting up .venv, once and after changes of pyproject.toml: usually 1 to 2 minutes."
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or later is needed: make PYTHON=..." if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -qq --upgrade 'pip>=25.1'
	.venv/bin/python -m pip install -qq --editable '.[all]' --group dev
	@touch $@

.venv/installed-bench.txt: .venv/installed.txt
	.venv/bin/python -m pip install -qq --group bench
	@touch $@
