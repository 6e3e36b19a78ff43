"""Analysis of stored measurements; it runs no model and never imports `kdb.ingest`."""
