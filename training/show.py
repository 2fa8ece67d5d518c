"""Shows on stderr how far a command is: a bar on a terminal, lines elsewhere."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress

Report = Callable[[dict[str, Any]], None]

_FIRST_STEPS, _EVERY_STEPS = 3, 10
_BETWEEN_LINES_S = 10.0
_SHORT_S = 1.0  # what takes less is over before anybody asks
_SHOWN = (
    "step", "steps", "loss", "accuracy", "reward_margin", "held_out_loss", "held_out_accuracy", "lr",
    "gradient_norm", "tokens", "tokens_per_s", "seconds",
)  # fmt: skip


@contextmanager
def steps() -> Iterator[Report]:
    """What shows each step of a run: a bar on a terminal, which comes with the first; elsewhere lines of `key value`.

    Several runs may follow each other.
    """
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(),
        TextColumn("{task.fields[told]}"),
        TimeRemainingColumn(),
    )
    bars = Progress(*columns, console=Console(stderr=True))
    try:
        yield _bar(bars)
    finally:
        bars.stop()


def _lines() -> Report:
    """Prints the first steps of a start, then every tenth, and the last."""
    n_seen = last = 0

    def show(metrics: dict[str, Any]) -> None:
        nonlocal n_seen, last
        step = int(metrics["step"])
        n_seen = 1 if step <= last else n_seen + 1  # another run, or the same gone back
        last = step
        if n_seen <= _FIRST_STEPS or step % _EVERY_STEPS == 0 or step == metrics["steps"]:
            told = " ".join(f"{key} {metrics[key]:.6g}" for key in _SHOWN if key in metrics)
            print(told, file=sys.stderr, flush=True)

    return show


def _bar(bars: "Progress") -> Report:
    last = math.inf  # so the first step begins a bar

    def show(metrics: dict[str, Any]) -> None:
        nonlocal last
        step, n_steps = int(metrics["step"]), int(metrics["steps"])
        if step <= last:  # another run, or the same gone back: its speed begins anew
            for before in bars.task_ids:
                bars.remove_task(before)
            bars.add_task("train", completed=step - 1, total=n_steps, told="")
            bars.start()
        last = step
        (bar,) = bars.task_ids
        if "loss" in metrics:  # not in a step that is passed over
            told = f"loss {metrics['loss']:.3f}  {metrics.get('tokens_per_s', 0.0):,.0f} tokens/s"
            bars.update(bar, told=told)
        bars.update(bar, completed=step, total=n_steps)

    return show


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
    """What takes how much of how much is done: a bar on a terminal; elsewhere a line every ten seconds, and at the
    end of what takes a second or more.

    is_shown: elsewhere than on the first of several ranks nothing is.
    """
    if not is_shown:
        yield lambda done, of: None
        return
    if not sys.stderr.isatty():
        yield _counted(name)
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task(name, total=None)
        yield lambda done, of: bars.update(bar, completed=done, total=of)


def _counted(name: str) -> Callable[[int, int], None]:
    began = said = time.monotonic()

    def show(done: int, of: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= _BETWEEN_LINES_S or (done == of and now - began >= _SHORT_S):
            said = now
            print(f"{name} {done} of {of} in {now - began:.0f} s", file=sys.stderr, flush=True)

    return show
