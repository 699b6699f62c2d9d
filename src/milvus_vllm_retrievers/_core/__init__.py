"""The shared adapter: knows Milvus and vLLM, and no framework."""
