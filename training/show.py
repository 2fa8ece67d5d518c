"""Shows a run's steps on stderr: a bar on a terminal, lines of `key value` elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Report = Callable[[dict[str, Any]], None]


@contextmanager
def steps() -> Iterator[Report]:
    """What shows each step: a bar on a terminal, lines of `key value` elsewhere."""
    if not sys.stderr.isatty():
        yield _print
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("train", loss=float("nan"), speed=0.0)

        def show(metrics: dict[str, Any]) -> None:
            progress.update(
                task,
                completed=metrics["step"],
                total=metrics["steps"],
                loss=metrics.get("loss", float("nan")),
                speed=metrics.get("tokens_per_s", 0.0),
            )

        yield show


def _print(metrics: dict[str, Any]) -> None:
    n = int(metrics["step"])
    if n <= 3 or n % 10 == 0 or n == metrics["steps"]:
        keys = (
            "step", "steps", "loss", "accuracy", "reward_margin", "held_out_loss", "held_out_accuracy", "lr",
            "gradient_norm", "tokens", "tokens_per_s", "seconds",
        )  # fmt: skip
        print(" ".join(f"{key} {metrics[key]:.6g}" for key in keys if key in metrics), file=sys.stderr, flush=True)


@contextmanager
def counter(unit: str) -> Iterator[Callable[[int, str], None]]:
    """What takes how much is done of an unknown whole, and a word on it: on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda done, note: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.completed:,.0f} " + unit + "  {task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        bar = bars.add_task(unit, total=None, note="")
        yield lambda done, note: bars.update(bar, completed=done, note=note)


@contextmanager
def progress(name: str, is_shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """What takes how much of how much is done: a bar on a terminal, nothing elsewhere."""
    if not (is_shown and sys.stderr.isatty()):
        yield lambda done, of: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task(name, total=None)
        yield lambda done, of: bars.update(bar, completed=done, total=of)
