"""Prometheus metrics: vLLM's names with `mpt_` in place of `vllm:`, so that a dashboard ports by one replacement.

docs/operations.md has the table of them, and of what is ours alone. Labels are the served model's name and, for HTTP,
route, method and status; never a key, an id or text. Times come from the engine's events, which carry when each thing
happened; when an event is read says how busy the reader was.
"""

from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from mpt.backends.compilations import KINDS
from mpt.engine.endpoint import Endpoint
from mpt.engine.engine import EngineStats
from mpt.engine.errors import EngineError
from mpt.engine.request import Delta, Event, Sampling, Started
from mpt.engine.sequence import Answer
from serving.http_metrics import HttpMetrics

# vLLM's buckets. Ours are the lowest of each list, which models of this size need, and 2 and 60 s of the first token:
# the objectives of the alerts (k8s/components/monitoring).
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2, 2.5, 5, 7.5, 10, 20, 40, 60, 80,
                160, 640, 2560)  # fmt: skip
_BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5,
                   10, 20, 40, 80)  # fmt: skip
_TOKENS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))
_SAMPLES = (1, 2, 5, 10, 20)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)  # powers of two, as the engine counts


@dataclass
class _Course:
    """What became of one request so far, by the engine's clock."""

    arrived: float
    begun: float | None = None  # its first step
    n_cached: int = 0
    first: dict[int, float] = field(default_factory=dict)  # of each sample, its first token
    last: dict[int, float] = field(default_factory=dict)
    n_tokens: dict[int, int] = field(default_factory=dict)
    n_finished: int = 0
    ended: float = 0.0


class Metrics(HttpMetrics):
    """What the gate counts, what each request cost, and the engines' own figures."""

    def __init__(self, endpoints: Callable[[], Iterable[Endpoint]]) -> None:
        super().__init__()
        counter, histogram = self.counter, self.histogram
        self.connections = Gauge("mpt_http_connections", "Connections that are open.", registry=self.registry)
        self.ttft = histogram("time_to_first_token_seconds", "From arrival to the first token.", _FIRST_TOKEN)
        self.itl = histogram("inter_token_latency_seconds", "Between two tokens of a sample.", _BETWEEN_TOKENS)
        self.tpot = histogram(
            "request_time_per_output_token_seconds", "Mean time between two tokens of each sample.", _BETWEEN_TOKENS
        )
        self.e2e = histogram("e2e_request_latency_seconds", "From arrival to the last token.")
        self.queue = histogram("request_queue_time_seconds", "From arrival to the beginning of the first step.")
        self.prefill = histogram("request_prefill_time_seconds", "From there to the first token.")
        self.decode = histogram("request_decode_time_seconds", "From the first token to the last.")
        self.inference = histogram("request_inference_time_seconds", "Prefill and decoding.")
        self.prompt_sizes = histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self.computed_sizes = histogram(
            "request_prefill_kv_computed_tokens", "Prompt tokens of a request that were not in the cache.", _TOKENS
        )
        self.answer_sizes = histogram("request_generation_tokens", "Tokens generated for a request.", _TOKENS)
        self.longest = histogram(
            "request_max_num_generation_tokens", "Tokens of the longest sample of a request.", _TOKENS
        )
        self.samples = histogram("request_params_n", "Samples asked for (`best_of` where it is more).", _SAMPLES)
        self.most_tokens = histogram("request_params_max_tokens", "Most tokens that a sample could have had.", _TOKENS)
        self.succeeded = counter("request_success", "Samples that ended.", ["model_name", "finished_reason"])
        self.finished = counter("requests", _deprecated("mpt_request_success_total"), ["model_name", "finish_reason"])
        self.rejected = counter("requests_rejected", "Requests refused before they ran.", ["model_name", "reason"])
        self.cancelled = counter("requests_cancelled", "Requests whose client went away.", ["model_name", "phase"])
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests that began.", ["model_name"])
        self.cached_tokens = counter("prompt_tokens_cached", "Those that were in the cache.", ["model_name"])
        self.by_source = counter("prompt_tokens_by_source", "Where they came from.", ["model_name", "source"])
        self.answer_tokens = counter("generation_tokens", "Tokens generated.", ["model_name"])
        self.registry.register(_EngineCollector(endpoints))

    async def observe(self, model: str, answer: Answer) -> AsyncGenerator[Event, None]:
        """Pass the events of one request through, measuring them."""
        request = answer.request
        course = _Course(request.arrived)
        try:
            async for event in answer:
                self._note(model, course, event)
                yield event
            self._ended(model, course, len(request.prompt), request.sampling)
        except EngineError:
            self._left(model, course, request.sampling, "error")
            raise
        except BaseException:  # the client has gone, which closes this generator
            self._left(model, course, request.sampling, "abort")
            self.cancelled.labels(model, "waiting" if course.begun is None else "running").inc()
            raise
        finally:
            self.answer_tokens.labels(model).inc(sum(course.n_tokens.values()))

    def _note(self, model: str, course: _Course, event: Event) -> None:
        if isinstance(event, Started):
            course.begun, course.n_cached = event.at, event.cached_tokens
            self.queue.labels(model).observe(event.at - course.arrived)
            self._count_prompt(model, event)
        elif isinstance(event, Delta):
            course.ended = event.at
            self._note_tokens(model, course, event)
            if event.finish_reason is not None:
                course.n_finished += 1
                self.finished.labels(model, event.finish_reason).inc()
                self.succeeded.labels(model, event.finish_reason).inc()

    def _count_prompt(self, model: str, event: Started) -> None:
        self.prompt_tokens.labels(model).inc(event.prompt_tokens)
        self.cached_tokens.labels(model).inc(event.cached_tokens)
        self.by_source.labels(model, "local_cache_hit").inc(event.cached_tokens)
        self.by_source.labels(model, "local_compute").inc(event.prompt_tokens - event.cached_tokens)

    def _note_tokens(self, model: str, course: _Course, event: Delta) -> None:
        n, index = len(event.token_ids), event.index
        if not n:
            return
        if not course.first:
            self.ttft.labels(model).observe(event.at - course.arrived)
        if index in course.last:
            itl = self.itl.labels(model)
            for _ in event.token_ids:  # those of one step share its time
                itl.observe((event.at - course.last[index]) / n)
        course.first.setdefault(index, event.at)
        course.last[index] = event.at
        course.n_tokens[index] = course.n_tokens.get(index, 0) + n

    def _ended(self, model: str, course: _Course, n_prompt: int, sampling: Sampling) -> None:
        """Observe a request whose samples have all ended. One that draws nothing is all prefill."""
        begun = course.arrived if course.begun is None else course.begun
        first = min(course.first.values(), default=course.ended)
        self.e2e.labels(model).observe(course.ended - course.arrived)
        self.inference.labels(model).observe(course.ended - begun)
        self.prefill.labels(model).observe(first - begun)
        if course.first:
            self.decode.labels(model).observe(course.ended - first)
        for index, n in course.n_tokens.items():
            if n > 1:
                self.tpot.labels(model).observe((course.last[index] - course.first[index]) / (n - 1))
        self.prompt_sizes.labels(model).observe(n_prompt)
        self.computed_sizes.labels(model).observe(n_prompt - course.n_cached)
        self.answer_sizes.labels(model).observe(sum(course.n_tokens.values()))
        self.longest.labels(model).observe(max(course.n_tokens.values(), default=0))
        self.samples.labels(model).observe(sampling.n)
        self.most_tokens.labels(model).observe(sampling.max_tokens)

    def _left(self, model: str, course: _Course, sampling: Sampling, reason: str) -> None:
        """Count the samples that did not end by themselves."""
        self.succeeded.labels(model, reason).inc(sampling.n - course.n_finished)


class _EngineCollector(Collector):
    """Reads the engines when scraped."""

    def __init__(self, endpoints: Callable[[], Iterable[Endpoint]]) -> None:
        self._endpoints = endpoints

    def collect(self) -> Iterator[Metric]:
        endpoints = list(self._endpoints())
        stats = {endpoint.name: endpoint.engine.stats() for endpoint in endpoints}
        for kind, name, text, read in _FIGURES:
            family = kind(f"mpt_{name}", text, labels=["model_name"])
            for model, each in stats.items():
                family.add_metric([model], read(each))
            yield family
        up = GaugeMetricFamily("mpt_engine_up", "1 while the engine answers.", labels=["model_name"])
        for endpoint in endpoints:
            up.add_metric([endpoint.name], float(endpoint.engine.ready))
        yield up
        yield _step_sizes(stats)
        yield _compilations(stats)
        yield _runs(endpoints)


def _deprecated(instead: str) -> str:
    return f"Deprecated: {instead} is the same. Goes in the next release."


def _kv_use(stats: EngineStats) -> float:
    return stats.kv_used_bytes / max(stats.kv_total_bytes, 1)  # Triton keeps its own


_Figure = tuple[type[GaugeMetricFamily] | type[CounterMetricFamily], str, str, Callable[[EngineStats], float]]
_GAUGE, _COUNTER = GaugeMetricFamily, CounterMetricFamily
_FIGURES: tuple[_Figure, ...] = (
    (_GAUGE, "num_requests_running", "Sequences being computed.", lambda s: s.n_running),
    (_GAUGE, "num_requests_waiting", "Sequences in the queue.", lambda s: s.n_waiting),
    (_GAUGE, "kv_cache_usage_perc", "Share of the KV budget in running rows; 1 is all of it.", _kv_use),
    (_GAUGE, "kv_cache_usage_ratio", _deprecated("mpt_kv_cache_usage_perc"), _kv_use),
    (_COUNTER, "prefix_cache_queries", "Prompt tokens looked up.", lambda s: s.prefix_queries_tokens),
    (_COUNTER, "prefix_cache_hits", "Prompt tokens found in the cache.", lambda s: s.prefix_hits_tokens),
    (_COUNTER, "prefix_disk_hits", "Those of them that came from disk.", lambda s: s.prefix_disk_hits_tokens),
    (_COUNTER, "prefix_disk_written_tokens", "Prompt tokens written to disk.", lambda s: s.prefix_disk_written_tokens),
    (_GAUGE, "prefix_disk_bytes", "Size of the folder of prefixes.", lambda s: s.prefix_disk_bytes),
    (_COUNTER, "num_preemptions", "Sequences sent back to the queue.", lambda s: s.n_preemptions),
    (_COUNTER, "preemptions", _deprecated("mpt_num_preemptions_total"), lambda s: s.n_preemptions),
    (_COUNTER, "model_steps", "Steps of the model.", lambda s: s.n_steps),
    (_COUNTER, "model_step_seconds", "Time spent in the model.", lambda s: s.step_seconds),
    (_COUNTER, "spec_decode_num_drafts", "Times that tokens of a sequence were guessed.", lambda s: s.n_guesses),
    (_COUNTER, "spec_decode_num_draft_tokens", "Tokens guessed ahead.", lambda s: s.n_guessed),
    (_COUNTER, "spec_decode_num_accepted_tokens", "Those that were right.", lambda s: s.n_guessed_right),
    (_COUNTER, "speculation_guessed_tokens", _deprecated("mpt_spec_decode_num_draft_tokens_total"),
     lambda s: s.n_guessed),
    (_COUNTER, "speculation_accepted_tokens", _deprecated("mpt_spec_decode_num_accepted_tokens_total"),
     lambda s: s.n_guessed_right),
)  # fmt: skip


def _step_sizes(stats: Mapping[str, EngineStats]) -> Metric:
    text = "Tokens computed in a step, guesses included."
    family = HistogramMetricFamily("mpt_iteration_tokens_total", text, labels=["model_name"])
    for model, each in stats.items():
        below = [(str(float(most)), sum(n for size, n in each.steps_by_tokens.items() if size <= most))
                 for most in _STEP_TOKENS]  # fmt: skip
        family.add_metric([model], [*below, ("+Inf", sum(each.steps_by_tokens.values()))], sum_value=each.n_step_tokens)
    return family


def _compilations(stats: Mapping[str, EngineStats]) -> Metric:
    text = "Kernels compiled and CUDA graphs captured while requests waited; 0 on a healthy server."
    family = CounterMetricFamily("mpt_compilations_after_ready", text, labels=["model_name", "kind"])
    for model, each in stats.items():
        for kind in KINDS:
            family.add_metric([model, kind], each.n_compiled.get(kind, 0))
    return family


def _runs(endpoints: Iterable[Endpoint]) -> Metric:
    labels = ["model_name", "backend", "device", "precision", "step", "runs", "why_not_faster"]
    family = GaugeMetricFamily("mpt_model_runs_info", "What computes each kind of step.", labels=labels)
    for endpoint in endpoints:
        choice = endpoint.choice
        for step in choice.steps if choice is not None else ():
            assert choice is not None
            how = [choice.backend, choice.device, choice.precision, step.kind, step.runs, step.why_not_faster or ""]
            family.add_metric([endpoint.name, *how], 1)
    return family
