"""A run as a page of text, from what lies in its folder: how far it is, its curve, its speed and its events.

It reads and never locks, so it works on a run of another machine, on a finished one and on one that has failed.
"""

import datetime
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpt.errors import UserError
from training import curves
from training.logbook import Logbook
from training.run import Run

_BLOCKS = " ▁▂▃▄▅▆▇█"
_SILENT_STEPS = 10  # of the usual length, and a minute: then a run that has not ended is called silent
_EVENTS = 8
_RESTART_S = 120.0  # in which ranks of which one has failed are started again


@dataclass(frozen=True)
class View:
    """What is known of a run at one moment."""

    run: Run
    folder: Path
    state: str  # running, restarting, silent, finished, stopped, failed, or not begun
    steps: list[dict[str, Any]]  # of metrics.jsonl
    events: list[dict[str, Any]]
    silent_s: float  # since the last step
    left_s: float | None  # None where it is not known

    @property
    def is_over(self) -> bool:
        return self.state in ("finished", "stopped", "failed")


def look(folder: Path, now: float | None = None) -> View:
    """A run as it is now. now: seconds since 1970. Raises UserError for a folder without a run."""
    if not (folder / "run.json").is_file():
        raise UserError(f"`{folder}` holds no run.json; give the folder of a run")
    run = Run.read(folder / "run.json")
    try:
        steps = curves.read(folder)
    except UserError:
        steps = []
    events = Logbook(folder).entries()
    metrics = folder / "metrics.jsonl"
    now = now or time.time()
    silent = now - metrics.stat().st_mtime if steps else 0.0
    usual = _usual_seconds(steps)
    last = next((entry for entry in reversed(events) if entry["event"] in _STATES), None)
    state = "not begun" if last is None else _STATES[last["event"]]
    if state == "failed" and last is not None and "rank" in last and _age(last, now) < _RESTART_S:
        state = "restarting"
    if state == "running" and steps and silent > max(60.0, _SILENT_STEPS * usual):
        state = "silent"
    left = usual * (steps[-1]["steps"] - steps[-1]["step"]) if steps and usual else None
    return View(run, folder, state, steps, events, silent, left)


_STATES = {
    "start": "running", "resume": "running", "finished": "finished", "stopped": "stopped", "failed": "failed",
}  # fmt: skip


def _age(entry: dict[str, Any], now: float) -> float:
    return now - datetime.datetime.fromisoformat(entry["time"]).timestamp()


def _usual_seconds(steps: Sequence[dict[str, Any]]) -> float:
    """The median time of the last steps, saving and evaluating included."""
    ends = [step["seconds"] for step in steps[-51:]]
    return statistics.median(b - a for a, b in itertools.pairwise(ends)) if len(ends) > 1 else 0.0


def page(view: View, width: int = 100, height: int = 8) -> str:
    """The view as text. height: lines of the curve."""
    lines = [f"{view.run.name}  {view.folder}", _progress(view)]
    if view.steps:
        lines += [_numbers(view), "", *_curve(view, width, height)]
    told = [e for e in view.events if e["event"] not in ("sample", "task")][-_EVENTS:]
    lines += ["", *(_event(entry, width) for entry in told)]
    samples = [e for e in view.events if e["event"] == "sample"]
    if samples:
        newest = [e for e in samples if e["step"] == samples[-1]["step"]][:2]
        lines += ["", *(_event(entry, width) for entry in newest)]
    return "\n".join(lines)


def _progress(view: View) -> str:
    if not view.steps:
        return view.state
    last = view.steps[-1]
    said = f"{view.state}  step {last['step']:,} of {last['steps']:,} ({last['step'] / last['steps']:.0%})"
    said += f"  taken {_time(last['seconds'])}"
    if view.state == "running" and view.left_s is not None:
        said += f"  left {_time(view.left_s)}"
    if view.state == "silent":
        said += f"  no step for {_time(view.silent_s)}"
    return said


def _numbers(view: View) -> str:
    last = view.steps[-1]
    speeds = [step["tokens_per_s"] for step in view.steps[-20:] if "tokens_per_s" in step]
    held_out = next((s for s in reversed(view.steps) if "held_out_loss" in s), None)
    found = [f"loss {last['loss']:.4g}"] if "loss" in last else []
    if held_out is not None:
        found.append(f"held out {held_out['held_out_loss']:.4g} (step {held_out['step']})")
    examined = [step for step in view.steps if any(key.startswith("task_") for key in step)]
    tasks = examined[-1] if examined else {}
    found += [f"{key.removeprefix('task_')} {value:.3f}" for key, value in tasks.items() if key.startswith("task_")]
    if speeds:
        found.append(f"{statistics.median(speeds):,.0f} tokens/s")
    found += [f"{label} {last[key]:{form}}" for key, label, form in _SHOWN if key in last]
    return "  ".join(found)


_SHOWN = (
    ("lr", "lr", ".3g"), ("tokens", "tokens", ",.0f"), ("useful", "useful", ".0%"), ("mfu", "MFU", ".0%"),
    ("memory_gb", "GB", ".2f"), ("slowest_over_median", "slowest rank", ".2f"),
)  # fmt: skip


def _curve(view: View, width: int, height: int) -> list[str]:
    losses = [step["loss"] for step in view.steps if "loss" in step]
    if not losses:
        return []
    low, high = min(losses), max(losses)
    labels = {0: f"{high:.3g}", height - 1: f"{low:.3g}"}
    rows = chart(losses, max(10, width - 10), height)
    return [f"{labels.get(number, ''):>8} {row}" for number, row in enumerate(rows)]


def chart(values: Sequence[float], width: int, height: int) -> list[str]:
    """Values as columns of blocks, lines from the top; each column is the mean of its share of the values."""
    n = min(width, len(values))
    columns = [statistics.fmean(values[i * len(values) // n : (i + 1) * len(values) // n]) for i in range(n)]
    low, high = min(columns), max(columns)
    eighths = [1 + round((8 * height - 1) * ((c - low) / (high - low) if high > low else 0.0)) for c in columns]
    return [
        "".join(_BLOCKS[max(0, min(8, filled - 8 * row))] for filled in eighths) for row in range(height - 1, -1, -1)
    ]


def _event(entry: dict[str, Any], width: int) -> str:
    facts = "  ".join(f"{key} {value}" for key, value in entry.items() if key not in ("time", "event"))
    line = f"{entry['time'][:19].replace('T', ' ')}  {entry['event']:<9} {facts}".replace("\n", "⏎")
    return line if len(line) <= width else line[: width - 1] + "…"


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
