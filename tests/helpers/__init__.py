"""What several test modules and benchmarks share: tiny models, stored rows, servers, writers that are killed."""
