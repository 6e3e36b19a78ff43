"""The warehouse as a service: pages for people and an API for programs, read-only.

``app`` handles HTTP and never reads a table. ``worker_pool`` passes each request to a worker process. The worker
computes the answer with ``answers`` (the API) or ``views`` (the pages), within limits that the operating system
enforces.
"""
