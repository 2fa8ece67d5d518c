"""What `/metrics` tells of models that come and go. The series of the engines themselves are there while they are."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from serving.lifecycle import Lifecycle


class LifecycleCollector(Collector):
    """Reads the models when scraped: those that the options name, loaded or not."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self._lifecycle = lifecycle

    def collect(self) -> Iterator[Metric]:
        labels = ["model_name"]
        loaded = GaugeMetricFamily("mpt_model_loaded", "1 while the model is in memory.", labels=labels)
        held = GaugeMetricFamily("mpt_model_requests_waiting_for_load", "Until it is in memory.", labels=labels)
        seconds = SummaryMetricFamily(
            "mpt_model_load_seconds", "From reading a model to its first token.", labels=labels
        )
        failures = CounterMetricFamily("mpt_model_load_failures", "Loads that failed.", labels=labels)
        unloads = CounterMetricFamily("mpt_model_unloads", "Models unloaded.", labels=["model_name", "reason"])
        for name, model in self._lifecycle.models.items():
            loaded.add_metric([name], float(self._lifecycle.state(name) == "loaded"))
            held.add_metric([name], model.n_waiting)
            seconds.add_metric([name], model.n_loads, model.load_seconds)
            failures.add_metric([name], model.n_failures)
            for reason in ("idle", "room", "request"):
                unloads.add_metric([name, reason], model.n_unloads[reason])
        yield from (loaded, held, seconds, failures, unloads)
