"""The warehouse: schema, folders and DuckDB. The only package that imports duckdb."""
