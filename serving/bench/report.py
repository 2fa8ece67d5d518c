"""The figures of a load: means and percentiles for people, everything as JSON, distributions as a picture."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from mpt.files import whole_file
from serving.bench.record import Record

PERCENTILES = (50, 90, 95, 99)
TITLES = {
    "ttft": "time to first token",
    "itl": "inter-token latency",
    "tpot": "time per output token",
    "e2e": "end to end",
}


@dataclass(frozen=True)
class Report:
    """seconds: from the first request's sending to the last one's end. Rates count answers that ended well."""

    records: Sequence[Record]
    settings: dict[str, Any]
    interrupted: bool

    @property
    def good(self) -> list[Record]:
        return [record for record in self.records if record.error is None]

    @property
    def seconds(self) -> float:
        ends = [record.ended for record in self.records]
        return max(ends) - min(record.sent for record in self.records) if ends else 0.0

    @property
    def errors(self) -> dict[str, int]:
        """How often each kind happened, the most frequent first."""
        return dict(Counter(record.error for record in self.records if record.error is not None).most_common())

    def latencies(self) -> dict[str, list[float]]:
        """All measured times in seconds, by what they are of."""
        return {
            "ttft": [record.ttft_s for record in self.good],
            "itl": [gap for record in self.good for gap in record.itl_s],
            "tpot": [record.tpot_s for record in self.good if record.tpot_s is not None],
            "e2e": [record.e2e_s for record in self.good],
        }

    def throughput(self) -> dict[str, float]:
        """Per second."""
        seconds = max(self.seconds, 1e-9)
        return {
            "requests_per_s": len(self.good) / seconds,
            "output_tokens_per_s": sum(record.n_tokens for record in self.good) / seconds,
            "prompt_tokens_per_s": sum(record.prompt_tokens or 0 for record in self.good) / seconds,
        }

    def as_json(self) -> dict[str, Any]:
        """Settings, figures, and each request; times in seconds since the load began."""
        return {
            **self.settings,
            "interrupted": self.interrupted,
            "seconds": self.seconds,
            "answered": len(self.good),
            "failed": len(self.records) - len(self.good),
            "errors": self.errors,
            **self.throughput(),
            **{f"{name}_s": figures(times) for name, times in self.latencies().items() if times},
            "requests": [vars(record) for record in self.records],
        }

    def lines(self) -> list[str | Table]:
        """What is printed."""
        n_good, rates = len(self.good), self.throughput()
        ends = " (interrupted)" if self.interrupted else ""
        shown: list[str | Table] = [
            f"{len(self.records)} requests in {self.seconds:.2f} s{ends}: {n_good} answered, "
            f"{len(self.records) - n_good} failed"
        ]
        if n_good:
            prompts = [record.prompt_tokens for record in self.good if record.prompt_tokens is not None]
            outputs = np.mean([record.n_tokens for record in self.good])
            counted = f"prompt {np.mean(prompts):.1f}, " if prompts else "the server counts no tokens: pieces of text "
            shown += [
                f"{rates['requests_per_s']:.2f} requests/s, {rates['output_tokens_per_s']:.1f} output tokens/s, "
                f"{rates['prompt_tokens_per_s']:.1f} prompt tokens/s",
                f"tokens of a request, mean: {counted}output {outputs:.1f}",
                _table(self.latencies()),
            ]
        return [*shown, *(f"{n} x {kind}" for kind, n in self.errors.items())]


def figures(times: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles, between two values in proportion (numpy's default, as vLLM's benchmark)."""
    found = np.percentile(times, PERCENTILES)
    return {"mean": float(np.mean(times)), **{f"p{p}": float(v) for p, v in zip(PERCENTILES, found, strict=True)}}


def _table(latencies: dict[str, list[float]]) -> Table:
    made = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    made.add_column("milliseconds", no_wrap=True)
    for name in ("mean", *(f"p{p}" for p in PERCENTILES)):
        made.add_column(name, justify="right", no_wrap=True)
    for key, times in latencies.items():
        if times:
            made.add_row(TITLES[key], *(f"{1000 * value:,.1f}" for value in figures(times).values()))
    return made


def plot(report: Report, to: Path) -> None:
    """Draw how each latency is distributed: the share of all that took at most so long. Times in milliseconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    for axis, (key, times) in zip(figure.subplots(2, 2).flatten(), report.latencies().items(), strict=True):
        axis.set(title=TITLES[key], xlabel="ms", ylabel="share of all", ylim=(0, 1))
        axis.grid(alpha=0.3)
        if times:
            axis.ecdf([1000 * value for value in times])
            for p, style in ((50, "--"), (99, ":")):
                value = 1000 * float(np.percentile(times, p))
                axis.axvline(value, linewidth=1, linestyle=style, color="grey", label=f"p{p} {value:.1f} ms")
            axis.legend(loc="lower right")
    settings = report.settings
    figure.suptitle(f"{settings['model']}: {len(report.good)} requests, {settings['load']}")
    with whole_file(to) as partial:
        figure.savefig(partial, dpi=110, format=to.suffix.removeprefix("."))
