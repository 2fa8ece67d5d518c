"""Runs over a few values of some settings, each in a folder of its own, the clearly worse ones stopped early.

The median rule (Golovin et al. 2017, Google Vizier): at a quarter and at half of its steps a run stops whose loss is
over the median of all runs at that point; here it must be over the best by a margin too, so that equals all go on. What
has been decided follows from the folders, so a sweep that was stopped goes on by the same command.
"""

import itertools
import json
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_origin

from mpt.errors import Interrupted, TrainingDiverged, UserError
from mpt.files import read_json, write_whole
from training import curves, loop
from training.logbook import Logbook
from training.run import Declaration, Lora, Run, declarations

log = logging.getLogger(__name__)

_LOOKS = (0.25, 0.5)  # of the steps
_MARGIN = 1.02  # over the best loss: below it no difference is clear
_WINDOW = 0.1  # of the steps so far, whose mean is the loss where nothing is held out
_MOST = 64
_FIXED = ("out", "name", "start_from", "model")


@dataclass(frozen=True)
class Outcome:
    """How one run of a sweep ended."""

    run: Run
    values: Mapping[str, Any]
    steps: int
    loss: float | None  # held out where the run has that, else of its last steps
    state: str  # finished, worse at a step, or diverged


def grid(settings: Sequence[str]) -> list[dict[str, Any]]:
    """Every combination of `name=value,value` texts. Raises UserError."""
    axes: dict[str, list[Any]] = {}
    known = {declared.name: declared for declared in declarations() if declared.name not in _FIXED}
    for text in settings:
        name, _, values = text.partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        if name not in known:
            close = get_close_matches(name, known, 1)
            hint = f"; did you mean `{close[0]}`?" if close else f"; known: {', '.join(known)}"
            raise UserError(f"`--set {text}`: no setting `{name}`{hint}")
        if name in axes or not values:
            raise UserError(f"`--set {text}`: give each setting once, as `--set {name}=1,2`")
        axes[name] = [_value(known[name], value.strip(), text) for value in values.split(",")]
    found = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    if not axes or len(found) > _MOST:
        raise UserError(f"the sweep has {len(found) if axes else 0} runs; 1 to {_MOST} are possible, by --set NAME=A,B")
    return found


def _value(declared: Declaration, text: str, given: str) -> Any:
    if declared.kind is Lora:
        return Lora(rank=int(text)) if text.isdecimal() else _refuse(given, "a rank")
    if declared.kind in (int, float):
        try:
            return declared.kind(text)
        except ValueError:
            _refuse(given, "a whole number" if declared.kind is int else "a number")
    if get_origin(declared.kind) is tuple or declared.kind is dict:
        _refuse(given, f"one value, and {declared.name} has several")
    if declared.kind is bool:
        return (
            {"true": True, "false": False}.get(text) if text in ("true", "false") else _refuse(given, "true or false")
        )
    if get_args(declared.kind) and text not in get_args(declared.kind):
        _refuse(given, f"one of {', '.join(get_args(declared.kind))}")
    return text


def _refuse(given: str, what: str) -> None:
    raise UserError(f"`--set {given}`: each value must be {what}")


def sweep(
    base: Run, settings: Sequence[str], out: Path, *, stops_early: bool = True,
    report: Callable[[dict[str, Any]], None] = lambda _: None,
) -> list[Outcome]:  # fmt: skip
    """Run every combination below `out`, and write table.json and curves.png there; the best first.

    Raises UserError for settings that no run can have, and Interrupted when a signal stopped it.
    """
    runs = {_name(values): (values, _run(base, values, out)) for values in grid(settings)}
    _claim(out, base, settings, stops_early)
    ended: dict[str, str] = {}
    for look in (*_LOOKS, 1.0) if stops_early and len(runs) > 1 else (1.0,):
        going = {name: run for name, (_, run) in runs.items() if name not in ended}
        for name, run in going.items():
            if _has_diverged(run):
                ended[name] = "diverged"
                continue
            if _is_at(run, look):
                continue
            log.info("%s: to %.0f %% of its steps", name, 100 * look)
            try:
                _train(run, look, report)
            except TrainingDiverged as error:
                log.warning("%s: %s", name, error)
                ended[name] = "diverged"
        if look < 1.0:
            losses = {name: _loss(run, look) for name, (_, run) in runs.items() if name not in ended}
            for name in _worse({name: loss for name, loss in losses.items() if loss is not None}):
                ended[name] = f"worse at {look:.0%}"
                log.info("%s stops: loss %.4g, best %.4g", name, losses[name], min(filter(None, losses.values())))
    outcomes = [_outcome(run, values, ended.get(name, "finished")) for name, (values, run) in runs.items()]
    outcomes.sort(key=lambda o: (o.state != "finished", o.loss is None, o.loss))
    table = [
        {"run": o.run.out, **_plain(o.values), "steps": o.steps, "loss": o.loss, "state": o.state} for o in outcomes
    ]
    write_whole(out / "table.json", json.dumps(table, indent=2) + "\n")
    begun = [Path(o.run.out) for o in outcomes if o.steps]
    if begun:
        curves.plot(*begun, to=out / "curves.png")
    return outcomes


def _train(run: Run, look: float, report: Callable[[dict[str, Any]], None]) -> None:
    try:
        loop.fit(run, report, share=look)
    except Interrupted as error:
        if not error.is_planned:
            raise


def _has_diverged(run: Run) -> bool:
    """Whether an earlier start of the sweep found that."""
    ends = [entry for entry in Logbook(Path(run.out)).entries() if "exit_code" in entry]
    return bool(ends) and ends[-1]["exit_code"] == TrainingDiverged.exit_code


def _is_at(run: Run, look: float) -> bool:
    """Whether a run has come as far as a share of its steps, short of its end."""
    try:
        last = curves.read(Path(run.out))[-1]
    except UserError:
        return False
    return look < 1.0 and last["step"] >= max(1, round(look * last["steps"]))


def _worse(losses: Mapping[str, float]) -> list[str]:
    """Whose loss is over the median, and clearly over the best."""
    if len(losses) < 2:
        return []
    median, best = statistics.median(losses.values()), min(losses.values())
    return [name for name, loss in losses.items() if loss > median and loss > _MARGIN * best]


def _loss(run: Run, look: float = 1.0) -> float | None:
    """The loss at a share of the steps, from what the folder holds; None where there is none."""
    try:
        steps = curves.read(Path(run.out))
    except UserError:
        return None
    last = max(1, round(look * steps[-1]["steps"]))
    steps = [step for step in steps if step["step"] <= last]
    held_out = [step["held_out_loss"] for step in steps if "held_out_loss" in step]
    if held_out:
        return float(held_out[-1])
    losses = [step["loss"] for step in steps if "loss" in step]
    return statistics.fmean(losses[-max(1, round(_WINDOW * len(losses))) :]) if losses else None


def _outcome(run: Run, values: Mapping[str, Any], state: str) -> Outcome:
    try:
        n = int(curves.read(Path(run.out))[-1]["step"])
    except UserError:
        n = 0
    return Outcome(run, values, n, _loss(run), state)


def _run(base: Run, values: Mapping[str, Any], out: Path) -> Run:
    changes = dict(values)
    for one, other in (("steps", "epochs"), ("epochs", "steps")):  # they replace each other
        if one in changes and other not in changes:
            changes[other] = None
            break
    name = _name(values)
    return replace(base, name=f"{base.name}-{name}", out=str(out / name), **changes)


def _name(values: Mapping[str, Any]) -> str:
    """Of a run's folder: `lr=0.0001,schedule=linear`."""
    return ",".join(f"{name}={value}" for name, value in _plain(values).items()).replace("/", "_")


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.rank if isinstance(value, Lora) else value for name, value in values.items()}


def _claim(out: Path, base: Run, settings: Sequence[str], stops_early: bool) -> None:
    """Make the folder this sweep's, or see that it already is. Raises UserError."""
    path = out / "sweep.json"
    asked = {"settings": list(settings), "stops_early": stops_early, "run": json.loads(base.to_json())}
    if path.is_file():
        if read_json(path) != asked:
            raise UserError(f"`{out}` holds another sweep; choose another --out")
        return
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"`{out}` is not empty and holds no sweep; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(asked, indent=2) + "\n")


def render(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as a table, the best first."""
    names = list(outcomes[0].values)
    rows = [[*names, "steps", "loss", "state"]]
    for outcome in outcomes:
        loss = "-" if outcome.loss is None else f"{outcome.loss:.4f}"
        rows.append([*(str(v) for v in _plain(outcome.values).values()), str(outcome.steps), loss, outcome.state])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
