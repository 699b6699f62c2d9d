"""LangChain's own suite for retrievers, on Milvus Lite with the real vLLM."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_tests.integration_tests import RetrieversIntegrationTests
from pymilvus import MilvusClient

from milvus_vllm_retrievers.langchain import MilvusVLLMRetriever, VLLMRanker
from tests.corpus import create_collection


@pytest.mark.real_vllm
class TestMilvusVLLMRetriever(RetrieversIntegrationTests):
    @pytest.fixture(autouse=True)
    def _collection(self, lite: MilvusClient, lite_uri: str, vllm: str) -> Any:
        create_collection(lite, "standard")
        TestMilvusVLLMRetriever.arguments = {
            "collection_name": "standard",
            "uri": lite_uri,
            "ranker": VLLMRanker(vllm),
        }

    @property
    def retriever_constructor(self) -> type[MilvusVLLMRetriever]:
        return MilvusVLLMRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return self.arguments

    @property
    def retriever_query_example(self) -> str:
        return "the cat and the dog"
