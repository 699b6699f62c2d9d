"""What reranking does to the quality of retrieval. Run it with `make eval`."""
