"""A run's folder: which run it belongs to, that one process works in it, and what a resumed run finds there.

A resume may change what changes nothing of what the steps compute (`Setting.changes` in `training/run.py`); a run with
other settings goes on from an old state in a folder of its own (`--from`).
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpt.errors import UserError
from mpt.files import write_whole
from training import checkpoint, flags
from training.checks import check_folder
from training.distributed import World
from training.run import Changes, Run, declarations

Changed = dict[str, tuple[Any, Any]]  # a field's value before and now
_LENGTH = ("steps", "epochs")


@contextlib.contextmanager
def own(run: Run, world: World, resume: bool) -> Iterator[Changed]:
    """Hold the run's folder while it runs; on the first rank, what this start changes of the run it holds.

    Raises UserError when it is another run's, or a process works on it.
    """
    out = Path(run.out)
    if not world.is_first:
        world.barrier()
        yield {}
        return
    with claimed(run, resume) as changed, (out / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another process is training in `{out}`; wait for it, or choose another --out") from None
        world.barrier()
        yield changed  # the file stays: removing it would let two processes lock two files of one name


@contextlib.contextmanager
def claimed(run: Run, resume: bool) -> Iterator[Changed]:
    """Make the run's folder its own, or see that it already is; an error before the first step leaves no new folder.

    Gives what this start changes of the run. Raises UserError when the folder is another run's.
    """
    out = Path(run.out)
    existed = out.is_dir()
    is_new = not (out / "run.json").is_file()
    try:
        yield _claim(run, out, resume)
    except (UserError, OSError):
        is_made = is_new and (not existed or (out / "run.json").is_file())
        if is_made and not (out / "metrics.jsonl").exists():
            shutil.rmtree(out, ignore_errors=True)
            if existed:
                out.mkdir()
        raise


def _claim(run: Run, out: Path, resume: bool) -> Changed:
    path = out / "run.json"
    if not path.is_file():
        check_folder(out)
        if run.start_from is not None:
            _check_state(run, Path(run.start_from))
        out.mkdir(parents=True, exist_ok=True)
        write_whole(path, run.to_json())
        return {}
    if not resume:
        raise UserError(f"`{out}` already holds a run; leave --no-resume out to go on with it, or choose another --out")
    changed = differences(Run.read(path), run)
    if wrong := {key: changed[key] for key in changed if key == "start_from" or _changes(key) != "nothing"}:
        raise UserError(_refusal(run, wrong))
    return changed


def differences(before: Run, now: Run) -> Changed:
    """The fields in which two runs differ, but for where they go."""
    old, new = json.loads(before.to_json()), json.loads(now.to_json())
    return {key: (old[key], new[key]) for key in new if old[key] != new[key] and key != "out"}


def changes_length(changed: Changed) -> bool:
    return any(name in changed for name in _LENGTH)


def _changes(name: str) -> Changes:
    return next(declared.setting.changes for declared in declarations() if declared.name == name)


def _refusal(run: Run, wrong: Changed) -> str:
    """Why settings cannot change here, and the command that takes them."""
    key, (before, now) = next(iter(wrong.items()))
    said = f"`{run.out}` holds a run with {key} {before!r}, now {now!r}"
    if key == "start_from" or any(_changes(name) == "state" for name in wrong):
        return f"{said}; a run with another {key} begins anew, in another --out"
    of_base = "train finetune" if run.preference is None else "train prefer"
    command = of_base if run.base is not None else "train pretrain"
    texts = _flags(run, wrong)
    if None in texts:
        copied = f"put it into a copy of `{run.out}/run.json`, then: {command} --config COPY"
        return f"{said}; to go on from its state with that, {copied} --from {run.out} --out FOLDER"
    asked = " ".join(map(str, texts))
    return f"{said}; to go on from its state with that: {command} --from {run.out} {asked} --out FOLDER"


def _flags(run: Run, changed: Changed) -> list[str | None]:
    """What gives each changed value on the command line, None for a value that no flag gives."""
    now = {name: value for name, (_, value) in changed.items()}
    if "warmup_share" in now or "warmup_steps" in now:  # one flag for the two
        now = {name: value for name, value in now.items() if name != "warmup_share"}
        now["warmup_steps"] = run.warmup_steps or run.warmup_share or 0
    return [flags.text(name, value) for name, value in now.items()]


def whole_run(config: Path | None, changes: dict[str, Any], recipe: str = "") -> tuple[Run, Path] | None:
    """The run that --config or --from holds, changed, and the file it is in; None where a recipe makes the run.

    Sets `start_from` of the changes to the checkpoint that it means. Raises UserError, also for --recipe beside them.
    """
    from training import recipes

    given = changes.get("start_from")
    if config is None and given is None:
        return None
    option = "--config" if config is not None else "--from"
    flags.refuse({"--recipe": recipe}, f"does not go with {option}, which holds a whole run")
    if given is not None:
        changes["start_from"] = start_state(given, changes.get("out"))
        begun = Path(changes["out"]) / "run.json"
        config = config or (begun if begun.is_file() else Path(changes["start_from"]).parent / "run.json")
    assert config is not None
    return recipes.change(Run.read(config), **changes), config


def start_state(given: str, out: str | None) -> str:
    """The checkpoint that `--from` names: a run's newest whole one, or a step-* folder as it is.

    A run that began from it earlier, in `out`, keeps the one that it began from. Raises UserError.
    """
    source = Path(given)
    if out is None:
        raise UserError(f"`--from {given}` needs --out, the folder of the new run")
    if Path(out).absolute() == source.absolute():
        raise UserError(f"`--from` and `--out` are both `{given}`; the new run needs a folder of its own")
    begun = Path(out) / "run.json"
    if begun.is_file() and (before := Run.read(begun).start_from) is not None and Path(before).parent == source:
        return before
    if checkpoint.is_step(source):
        return str(source)
    if not (source / "run.json").is_file():
        raise UserError(f"`{source}` holds no run.json; give a run's folder, or one of its step-* folders")
    if (newest := checkpoint.latest(source)) is None:
        raise UserError(f"`{source}` has no whole checkpoint to go on from; give another run, or start without --from")
    return str(newest)


def _check_state(run: Run, state: Path) -> None:
    """Raises UserError where a run cannot go on from a checkpoint of another one."""
    if not checkpoint.is_step(state):
        raise UserError(f"`{state}` is no whole checkpoint; give --from a run's folder, or one of its step-* folders")
    source = state.parent / "run.json"
    if not source.is_file():
        return  # a copy; its tensors are compared when they are read
    for name, (before, now) in differences(Run.read(source), run).items():
        if _changes(name) == "state":
            raise UserError(
                f"`--from {state}` goes on with its tensors, of a run with {name} {before!r}, now {now!r}; leave that "
                "as it is, or begin anew without --from"
            )


def move_finished(out: Path, step: int) -> None:
    """Make room for another finished checkpoint: the one of `step` stays under that name."""
    kept = out / f"model-step-{step:06d}"
    shutil.rmtree(kept, ignore_errors=True)
    (out / "model").rename(kept)


def write_run(run: Run) -> None:
    """Make the run's configuration the folder's."""
    write_whole(Path(run.out) / "run.json", run.to_json())


def cut_metrics(path: Path, last_step: int) -> tuple[list[float], int]:
    """Drop the lines of steps that will be taken again, and one the kill cut short.

    Returns the losses that stay, and how many whole steps went.
    """
    if not path.is_file():
        return [], 0
    losses, n_lost, size = [], 0, 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            values = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n"):
            break
        if values["step"] > last_step:
            n_lost += 1
            continue
        size += len(line)
        if "loss" in values:
            losses.append(values["loss"])
    os.truncate(path, size)  # in place: a run that rolls back has it open, and a full disk has room for it
    return losses, n_lost


class Skipped:
    """The steps whose data are passed over, counted from 0; on disk, so that a resumed run passes over them too."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._steps: set[int] = set(json.loads(path.read_text())) if path.is_file() else set()

    def __contains__(self, step: int) -> bool:
        return step in self._steps

    def add(self, steps: range, world: World) -> None:
        self._steps |= set(steps)
        if world.is_first:
            write_whole(self._path, json.dumps(sorted(self._steps)))
        world.barrier()
