"""Helpers that tests and benchmarks share: tiny models, stored rows, servers, writers that are killed."""
