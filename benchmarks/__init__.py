"""Benchmarks: what the project promises to cost, measured. Run them with `make bench`."""
