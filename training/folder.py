"""A run's folder: which run it belongs to, that one process works in it, and what a resumed run finds there."""

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from mpt.errors import UserError
from training.distributed import World
from training.run import Run


@contextlib.contextmanager
def own(run: Run, world: World, resume: bool) -> Iterator[None]:
    """Hold the run's folder while it runs. Raises UserError when it is another run's, or a process works on it."""
    out = Path(run.out)
    if not world.is_first:
        world.barrier()
        yield
        return
    with claimed(run, resume), (out / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another process is training in `{out}`; wait for it, or choose another --out") from None
        world.barrier()
        yield  # the file stays: removing it would let two processes lock two files of one name


@contextlib.contextmanager
def claimed(run: Run, resume: bool) -> Iterator[None]:
    """Make the run's folder its own, or see that it already is; a user's mistake leaves no new folder behind.

    Raises UserError when it is another run's.
    """
    out = Path(run.out)
    existed = out.is_dir()
    is_new = _claim(run, out, resume)
    try:
        yield
    except UserError:
        if is_new and not (out / "metrics.jsonl").exists():
            shutil.rmtree(out)
            if existed:
                out.mkdir()
        raise


def _claim(run: Run, out: Path, resume: bool) -> bool:
    """Whether the folder became the run's just now."""
    path = out / "run.json"
    if not path.is_file():
        if out.is_dir() and any(out.iterdir()):
            raise UserError(f"`{out}` is not empty and holds no run; choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(run.to_json(), encoding="utf-8")
        partial.rename(path)
        return True
    if not resume:
        raise UserError(f"`{out}` already holds a run; leave --no-resume out to go on with it, or choose another --out")
    old, new = json.loads(Run.read(path).to_json()), json.loads(run.to_json())
    changed = [key for key in new if old[key] != new[key] and key != "out"]
    if changed:
        key = changed[0]
        raise UserError(
            f"`{out}` holds a run with {key} {old[key]!r}, now {new[key]!r}; a changed run needs another --out"
        )
    return False


def cut_metrics(path: Path, last_step: int) -> tuple[list[float], int]:
    """Drop the lines of steps that will be taken again, and one the kill cut short.

    Returns the losses that stay, and how many whole steps went.
    """
    if not path.is_file():
        return [], 0
    kept, losses, n_lost = [], [], 0
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            values = json.loads(line)
            if values["step"] > last_step:
                n_lost += 1
                continue
            kept.append(line)
            if "loss" in values:
                losses.append(values["loss"])
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
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
            partial = self._path.with_suffix(".partial")
            partial.write_text(json.dumps(sorted(self._steps)))
            partial.rename(self._path)
        world.barrier()
