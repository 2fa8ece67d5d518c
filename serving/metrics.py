"""Prometheus metrics: vLLM's names under the prefix `mpt_`, so that a dashboard ports by one replacement.

Labels are the served model's name and, for HTTP, route, method and status; never a key, an id or text.
"""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

import mpt
from mpt.backends.compilations import KINDS
from mpt.engine.endpoint import Endpoint
from mpt.engine.request import Delta, Event, Started

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
# A book takes minutes. 2 and 60 s are the objectives of the alerts (k8s/components/monitoring).
_SLOW = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 40, 60, 120, 240, 640)
_TOKENS = (1, 8, 32, 128, 512, 2048, 8192, 16384, 32768, 65536, 131072)


class HttpMetrics:
    """What the gate counts. One registry per app, so that several apps can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.http = self.counter("http_requests", "HTTP responses.", ["path", "method", "code"])
        self.rate_limited = self.counter("rate_limited", "Requests over a client's limits.", ["kind"])

    def counter(self, name: str, text: str, labels: list[str]) -> Counter:
        return Counter(f"mpt_{name}", text, labels, registry=self.registry)

    def histogram(self, name: str, text: str, buckets: tuple[float, ...] = _SLOW) -> Histogram:
        return Histogram(f"mpt_{name}", text, ["model_name"], buckets=buckets, registry=self.registry)


class Metrics(HttpMetrics):
    """What the gate counts, what each request cost, and the engines' own figures."""

    def __init__(self, endpoints: Callable[[], Iterable[Endpoint]]) -> None:
        super().__init__()
        counter, histogram = self.counter, self.histogram
        self.ttft = histogram("time_to_first_token_seconds", "From arrival to the first token.", _SLOW)
        self.itl = histogram("inter_token_latency_seconds", "Between two tokens of a sample.", _FAST)
        self.e2e = histogram("e2e_request_latency_seconds", "From arrival to the last token.", _SLOW)
        self.queue = histogram("request_queue_time_seconds", "From arrival to leaving the queue.", _SLOW)
        self.prefill = histogram("request_prefill_time_seconds", "From leaving the queue to the first token.", _SLOW)
        self.decode = histogram("request_decode_time_seconds", "From the first token to the last.", _SLOW)
        self.prompt_sizes = histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self.answer_sizes = histogram("request_generation_tokens", "Tokens generated for a request.", _TOKENS)
        self.finished = counter("requests", "Samples finished.", ["model_name", "finish_reason"])
        self.rejected = counter("requests_rejected", "Requests refused before they ran.", ["model_name", "reason"])
        self.cancelled = counter("requests_cancelled", "Requests whose client went away.", ["model_name", "phase"])
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens taken in.", ["model_name"])
        self.answer_tokens = counter("generation_tokens", "Tokens generated.", ["model_name"])
        self.registry.register(_EngineCollector(endpoints))

    async def observe(self, model: str, n_prompt: int, events: AsyncIterator[Event]) -> AsyncGenerator[Event, None]:
        """Pass the events of one request through, measuring them."""
        arrived = time.perf_counter()
        left_queue = first = arrived
        last: dict[int, float] = {}
        n_tokens, ended = 0, False
        self.prompt_tokens.labels(model).inc(n_prompt)
        itl = self.itl.labels(model)
        phase = "waiting"
        try:
            async for event in events:
                now = time.perf_counter()
                if isinstance(event, Started):
                    phase, left_queue = "running", now
                    self.queue.labels(model).observe(now - arrived)
                elif isinstance(event, Delta):
                    if event.token_ids and not n_tokens:
                        first = now
                        self.ttft.labels(model).observe(now - arrived)
                    elif event.token_ids and event.index in last:
                        for _ in event.token_ids:  # those of one step share its time
                            itl.observe((now - last[event.index]) / len(event.token_ids))
                    last[event.index] = now
                    n_tokens += len(event.token_ids)
                    if event.finish_reason is not None:
                        self.finished.labels(model, event.finish_reason).inc()
                yield event
            ended = True
        finally:
            self.answer_tokens.labels(model).inc(n_tokens)
            if ended:
                now = time.perf_counter()
                self.e2e.labels(model).observe(now - arrived)
                self.prefill.labels(model).observe(first - left_queue)
                self.decode.labels(model).observe(now - first)
                self.prompt_sizes.labels(model).observe(n_prompt)
                self.answer_sizes.labels(model).observe(n_tokens)
            else:
                self.cancelled.labels(model, phase).inc()


class _EngineCollector(Collector):
    """Reads the engines when scraped."""

    def __init__(self, endpoints: Callable[[], Iterable[Endpoint]]) -> None:
        self._endpoints = endpoints

    def collect(self) -> Iterator[Metric]:
        labels = ["model_name"]
        running = GaugeMetricFamily("mpt_num_requests_running", "Sequences being computed.", labels=labels)
        waiting = GaugeMetricFamily("mpt_num_requests_waiting", "Sequences in the queue.", labels=labels)
        usage = GaugeMetricFamily("mpt_kv_cache_usage_ratio", "Share of the KV budget in running rows.", labels=labels)
        up = GaugeMetricFamily("mpt_engine_up", "1 while the engine answers.", labels=labels)
        queries = CounterMetricFamily("mpt_prefix_cache_queries", "Prompt tokens looked up.", labels=labels)
        hits = CounterMetricFamily("mpt_prefix_cache_hits", "Prompt tokens found in the cache.", labels=labels)
        from_disk = CounterMetricFamily("mpt_prefix_disk_hits", "Those of them that came from disk.", labels=labels)
        to_disk = CounterMetricFamily("mpt_prefix_disk_written_tokens", "Prompt tokens written to disk.", labels=labels)
        on_disk = GaugeMetricFamily("mpt_prefix_disk_bytes", "Size of the folder of prefixes.", labels=labels)
        preemptions = CounterMetricFamily("mpt_preemptions", "Sequences sent back to the queue.", labels=labels)
        steps = CounterMetricFamily("mpt_model_steps", "Steps of the model.", labels=labels)
        step_seconds = CounterMetricFamily("mpt_model_step_seconds", "Time spent in the model.", labels=labels)
        guessed = CounterMetricFamily("mpt_speculation_guessed_tokens", "Tokens guessed ahead.", labels=labels)
        right = CounterMetricFamily("mpt_speculation_accepted_tokens", "Those that were right.", labels=labels)
        compiled = CounterMetricFamily(
            "mpt_compilations_after_ready",
            "Kernels compiled and CUDA graphs captured while requests waited; 0 on a healthy server.",
            labels=["model_name", "kind"],
        )
        labels = ["model_name", "backend", "device", "precision", "step", "runs", "why_not_faster"]
        runs = GaugeMetricFamily("mpt_model_runs_info", "What computes each kind of step.", labels=labels)
        for endpoint in self._endpoints():
            stats, name = endpoint.engine.stats(), [endpoint.name]
            running.add_metric(name, stats.n_running)
            waiting.add_metric(name, stats.n_waiting)
            usage.add_metric(name, stats.kv_used_bytes / max(stats.kv_total_bytes, 1))  # Triton keeps its own
            up.add_metric(name, float(endpoint.engine.ready))
            queries.add_metric(name, stats.prefix_queries_tokens)
            hits.add_metric(name, stats.prefix_hits_tokens)
            from_disk.add_metric(name, stats.prefix_disk_hits_tokens)
            to_disk.add_metric(name, stats.prefix_disk_written_tokens)
            on_disk.add_metric(name, stats.prefix_disk_bytes)
            preemptions.add_metric(name, stats.n_preemptions)
            steps.add_metric(name, stats.n_steps)
            guessed.add_metric(name, stats.n_guessed)
            right.add_metric(name, stats.n_guessed_right)
            step_seconds.add_metric(name, stats.step_seconds)
            for kind in KINDS:
                compiled.add_metric([*name, kind], stats.n_compiled.get(kind, 0))
            if endpoint.choice is not None:
                choice = endpoint.choice
                for step in choice.steps:
                    what = [step.kind, step.runs, step.why_not_faster or ""]
                    runs.add_metric([*name, choice.backend, choice.device, choice.precision, *what], 1)
        info = GaugeMetricFamily("mpt_build_info", "The version that runs.", labels=["version"])
        info.add_metric([mpt.__version__], 1)
        yield from (
            running,
            waiting,
            usage,
            up,
            queries,
            hits,
            from_disk,
            to_disk,
            on_disk,
            preemptions,
            steps,
            step_seconds,
            guessed,
            right,
            compiled,
            runs,
            info,
        )
