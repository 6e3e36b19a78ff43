"""The warehouse as a service: pages for people and an API for programs, read-only.

``app`` speaks HTTP and never touches a table. ``worker_pool`` gives each question to a worker process, which answers it
from ``answers`` (the API) or ``views`` (the pages) within limits that the operating system enforces.
"""
