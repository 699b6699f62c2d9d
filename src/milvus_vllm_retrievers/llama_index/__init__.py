"""LlamaIndex: a retriever over Milvus reranked by vLLM, and a postprocessor for any nodes.

```python
from milvus_vllm_retrievers.llama_index import MilvusVLLMRetriever, VLLMRanker

retriever = MilvusVLLMRetriever("docs", ranker=VLLMRanker("http://localhost:8000"))
engine = RetrieverQueryEngine.from_args(retriever)
```
"""

from __future__ import annotations

from milvus_vllm_retrievers.errors import MissingDependencyError
from milvus_vllm_retrievers.ranker import VLLMRanker

try:
    import llama_index.core  # noqa: F401
except ImportError as error:
    raise MissingDependencyError(
        "milvus_vllm_retrievers.llama_index needs llama-index-core: "
        "pip install 'milvus-vllm-retrievers[llama-index]'"
    ) from error

from milvus_vllm_retrievers.llama_index._rerank import MilvusVLLMRerank, VLLMRerank
from milvus_vllm_retrievers.llama_index._retriever import MilvusVLLMRetriever

__all__ = ["MilvusVLLMRerank", "MilvusVLLMRetriever", "VLLMRanker", "VLLMRerank"]

for _public in (MilvusVLLMRerank, MilvusVLLMRetriever, VLLMRerank):
    _public.__module__ = __name__  # where it is imported from, not where it is written
