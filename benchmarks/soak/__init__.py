"""A soak: mixed calls by the thousand while the servers fail. Run it with `make soak`.

`questions` says what is asked, `right` what may be answered (what Milvus finds comes from
`reference`), `judge` what counts as wrong. `frameworks` asks LangChain and LlamaIndex, `mix` makes
up the calls, `faults` kills and cuts off, `faulty_vllm` is the vLLM that fails. `watch` looks for
what hangs, strays or piles up. `run` makes all the calls, `report` says what came of them.
"""
