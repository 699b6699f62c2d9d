"""LangChain: a retriever over Milvus reranked by vLLM, and a document compressor for any documents.

```python
from milvus_vllm_retrievers.langchain import MilvusVLLMRetriever, VLLMRanker

retriever = MilvusVLLMRetriever("docs", ranker=VLLMRanker("http://localhost:8000"))
retriever.invoke("how do I rotate the keys?")
```
"""

from __future__ import annotations

from milvus_vllm_retrievers.errors import MissingDependencyError
from milvus_vllm_retrievers.ranker import VLLMRanker

try:
    import langchain_core  # noqa: F401
except ImportError as error:
    raise MissingDependencyError(
        "milvus_vllm_retrievers.langchain needs langchain-core: "
        "pip install 'milvus-vllm-retrievers[langchain]'"
    ) from error

from milvus_vllm_retrievers.langchain._rerank import MilvusVLLMRerank, VLLMRerank
from milvus_vllm_retrievers.langchain._retriever import MilvusVLLMRetriever

__all__ = ["MilvusVLLMRerank", "MilvusVLLMRetriever", "VLLMRanker", "VLLMRerank"]

for _public in (MilvusVLLMRerank, MilvusVLLMRetriever, VLLMRerank):
    _public.__module__ = __name__  # where it is imported from, not where it is written
