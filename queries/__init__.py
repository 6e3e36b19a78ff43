"""Saved queries as plain SQL, and the small loader that reads their headers."""
