"""Prometheus metrics: a registry for each process and the endpoint that serves it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, start_http_server


def new_registry() -> CollectorRegistry:
    """A registry with the metrics of the process itself: CPU, memory, open files, garbage collection."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


@contextmanager
def metrics_endpoint(registry: CollectorRegistry, host: str, port: int) -> Iterator[int | None]:
    """Serves /metrics from a thread of its own; yields the port, or None when `port` is 0 and none is served.

    Raises:
        OSError: the port is taken.
    """
    if port == 0:
        yield None
        return
    server, thread = start_http_server(port, addr=host, registry=registry)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
