"""Metrics for Prometheus at ``/metrics``."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

REGISTRY = CollectorRegistry()

REQUESTS = Counter("kdb_requests", "Requests answered", ["method", "route", "status"], registry=REGISTRY)
SECONDS = Histogram(
    "kdb_request_seconds",
    "Time until the last byte was sent",
    ["route"],
    registry=REGISTRY,
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
BUSY = Gauge("kdb_workers_busy", "Busy workers", registry=REGISTRY)
WAITING = Gauge("kdb_questions_waiting", "Requests waiting for a worker", registry=REGISTRY)
TURNED_AWAY = Counter("kdb_questions_turned_away", "Requests refused with status 503", registry=REGISTRY)
FROM_MEMORY = Counter("kdb_answers_from_memory", "Answers from the cache", registry=REGISTRY)
REPLACED = Counter(
    "kdb_workers_replaced", "Workers killed because of a limit or a disconnected client", registry=REGISTRY
)
RUNS = Gauge("kdb_runs", "Runs in the warehouse", registry=REGISTRY)
