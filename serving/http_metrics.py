"""What every HTTP app here counts, a model's and a cluster's router's."""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)

import mpt
from mpt.build import commit

_REQUEST = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60,
            120, 240, 480, 960, 1920, 7680)  # fmt: skip


class HttpMetrics:
    """What the gate counts, and what the process takes. One registry per app, so that several can live in a process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        info = Gauge(
            "mpt_build_info", "The version and commit that run.", ["version", "commit"], registry=self.registry
        )
        info.labels(mpt.__version__, commit()).set(1)
        self.http = self.counter("http_requests", "HTTP responses.", ["path", "method", "code"])
        self.cut = self.counter("stream_errors", "Answers that had begun and did not end well.", ["path", "error"])
        self.rate_limited = self.counter("rate_limited", "Requests over a client's limits.", ["kind"])

    def counter(self, name: str, text: str, labels: list[str]) -> Counter:
        return Counter(f"mpt_{name}", text, labels, registry=self.registry)

    def histogram(self, name: str, text: str, buckets: tuple[float, ...] = _REQUEST) -> Histogram:
        return Histogram(f"mpt_{name}", text, ["model_name"], buckets=buckets, registry=self.registry)
