"""`mpt top`: a table of a running server, made from two looks at its /metrics.

up: replicas. run, wait: sequences. in/s, out/s: prompt and answer tokens per second. cached: of the prompt tokens.
Below the table: what computes each model, and why nothing faster does.
"""

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mpt.errors import UserError

Samples = Mapping[tuple[str, str], float]  # by the metric's name and the model's, summed over replicas
_RUNS = "mpt_model_runs_info"


@dataclass(frozen=True)
class Look:
    """One answer of /metrics. runs: a line for each kind of step, of each model."""

    samples: Samples
    runs: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Row:
    """One model over one interval. Rates are per second, times in seconds; None where nothing happened."""

    model: str
    replicas: int
    running: int
    waiting: int
    kv_use: float  # mean of the replicas
    prompt_tokens: float
    answer_tokens: float
    ttft_s: float | None
    itl_s: float | None
    cache_hits: float | None
    step_s: float | None


def run(url: str, api_key: str | None, every_s: float, once: bool) -> None:
    """Look again and again until interrupted. Raises UserError when the server does not answer."""
    before, at = look(url, api_key), time.monotonic()
    console = Console()
    if once:
        time.sleep(every_s)
        after = look(url, api_key)
        console.print(shown(before, after, time.monotonic() - at, url))
        return
    try:
        with Live(shown(before, before, every_s, url), console=console, screen=console.is_terminal) as live:
            while True:
                time.sleep(every_s)
                now, seen = time.monotonic(), look(url, api_key)
                live.update(shown(before, seen, now - at, url))
                before, at = seen, now
    except KeyboardInterrupt:
        pass


def look(url: str, api_key: str | None) -> Look:
    """Everything in /metrics that belongs to a model. Raises UserError where there is no server of ours."""
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        answer = httpx.get(f"{url}/metrics", headers=headers, timeout=10)
    except httpx.HTTPError as error:
        raise UserError(f"`{url}` does not answer ({error}); start a server with `mpt serve` or give --url") from error
    if answer.status_code == 401:
        raise UserError(f"`{url}` wants a key; give --api-key or set MPT_API_KEY")
    if answer.status_code != 200 or "mpt_" not in answer.text:
        raise UserError(f"`{url}/metrics` is not a server of ours (status {answer.status_code}); give --url")
    return Look(read(answer.text), read_runs(answer.text))


def read(exposition: str) -> Samples:
    """Samples of an exposition, those of several replicas added; buckets are left out."""
    samples: dict[tuple[str, str], float] = defaultdict(float)
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            model = sample.labels.get("model_name")
            if model is not None and "le" not in sample.labels and sample.name != _RUNS:
                samples[sample.name, model] += sample.value
    return samples


def read_runs(exposition: str) -> dict[str, tuple[str, ...]]:
    """What computes each model, one text for the kinds of steps that run alike, whatever the replica."""
    found: dict[str, dict[tuple[str, str], list[str]]] = defaultdict(lambda: defaultdict(list))
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            if sample.name == _RUNS:
                steps = found[sample.labels["model_name"]][sample.labels["runs"], sample.labels["why_not_faster"]]
                if sample.labels["step"] not in steps:
                    steps.append(sample.labels["step"])
    return {
        model: tuple(f"{', '.join(steps)}: {runs}{why and f' ({why})'}" for (runs, why), steps in ways.items())
        for model, ways in found.items()
    }


def rows(before: Samples, after: Samples, seconds: float) -> list[Row]:
    """What happened to each model between two looks."""

    def one(model: str) -> Row:
        def now(name: str) -> float:
            return after.get((f"mpt_{name}", model), 0.0)

        def grown(name: str) -> float:
            change = now(name) - before.get((f"mpt_{name}", model), 0.0)
            return change if change >= 0 else now(name)  # a replica was replaced and counts from 0

        def mean(name: str) -> float | None:
            count = grown(f"{name}_count")
            return grown(f"{name}_sum") / count if count else None

        replicas = round(now("engine_up"))
        looked_up, steps = grown("prefix_cache_queries_total"), grown("model_steps_total")
        return Row(
            model=model,
            replicas=replicas,
            running=round(now("num_requests_running")),
            waiting=round(now("num_requests_waiting")),
            kv_use=now("kv_cache_usage_perc") / max(replicas, 1),
            prompt_tokens=grown("prompt_tokens_total") / seconds,
            answer_tokens=grown("generation_tokens_total") / seconds,
            ttft_s=mean("time_to_first_token_seconds"),
            itl_s=mean("inter_token_latency_seconds"),
            cache_hits=grown("prefix_cache_hits_total") / looked_up if looked_up else None,
            step_s=grown("model_step_seconds_total") / steps if steps else None,
        )

    return [one(model) for model in dict.fromkeys(model for name, model in after if name == "mpt_engine_up")]


def shown(before: Look, after: Look, seconds: float, url: str) -> Group:
    """The table of an interval, and below it what computes each model."""
    alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for model, ways in after.runs.items():
        alike[ways].append(model)
    lines = [f"{', '.join(models)}: {'; '.join(ways)}" for ways, models in alike.items()]
    return Group(table(rows(before.samples, after.samples, seconds), url), *(Text(line) for line in lines))


def table(found: list[Row], url: str) -> Table:
    made = Table(
        title=f"{url}  {time.strftime('%H:%M:%S')}", title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0)
    )
    made.add_column("model", no_wrap=True)
    for name in ("up", "run", "wait", "KV", "in/s", "out/s", "TTFT", "ITL", "cached", "step"):
        made.add_column(name, justify="right", no_wrap=True)
    for row in found:
        made.add_row(
            row.model,
            str(row.replicas),
            str(row.running),
            str(row.waiting),
            f"{row.kv_use:.0%}",
            f"{row.prompt_tokens:,.0f}",
            f"{row.answer_tokens:,.0f}",
            _milliseconds(row.ttft_s),
            _milliseconds(row.itl_s),
            "-" if row.cache_hits is None else f"{row.cache_hits:.0%}",
            _milliseconds(row.step_s),
        )
    return made


def _milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
