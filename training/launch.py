"""Starts a run on several GPUs (or, without any, several processes) of this machine by torchrun.

Everything a user can get wrong is found before this: torchrun turns every exit code into 1, so what ended the run comes
back through its logbook, and only what a restart may cure ends a rank with an error.
"""

import contextlib
import json
import logging
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

from mpt.errors import DamagedFile, Interrupted, MachineRefused, MPTError, TrainingDiverged, UserError
from training.logbook import Logbook
from training.run import Run

_RESTARTS = 3  # of all ranks, after one has died
_FINAL: tuple[type[MPTError], ...] = (UserError, DamagedFile, TrainingDiverged, Interrupted)


def start(run: Run, n_processes: int) -> Path:
    """Train on so many processes and return the finished checkpoint's folder.

    Raises what ended the run, and UserError for more processes than there are GPUs.
    """
    _check_gpus(n_processes)
    out = Path(run.out)
    out.mkdir(parents=True, exist_ok=True)
    logbook = Logbook(out)
    n_before = len(logbook.entries())
    description = out.with_name(out.name + ".launch.json")
    description.write_text(run.to_json(), encoding="utf-8")
    process = subprocess.Popen(_torchrun(n_processes, "training.launch", str(description), _RESTARTS))

    def pass_on(number: int, _: FrameType | None) -> None:
        process.send_signal(signal.SIGTERM)  # also for Ctrl-C: torchrun would kill ranks that save

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        description.unlink(missing_ok=True)
    ended = [e for e in logbook.entries()[n_before:] if "exit_code" in e or e["event"] == "finished"]
    if ended and "exit_code" in ended[-1]:  # not what a restart has cured
        kinds: list[type[MPTError]] = [*_FINAL, MachineRefused]
        kind = next(kind for kind in kinds if kind.exit_code == ended[-1]["exit_code"])
        raise kind(ended[-1]["error"])
    if code:
        raise MachineRefused(f"the ranks ended with code {code}; their messages are above; the same command goes on")
    return out / "model"


def measure(n_processes: int, folder: Path) -> list[dict[str, Any]]:
    """What `training/machine.py` measures on so many processes. Raises MachineRefused where one does not come back."""
    _check_gpus(n_processes)
    with tempfile.TemporaryDirectory() as place:
        result = Path(place) / "measured.json"
        done = subprocess.run(_torchrun(n_processes, "training.machine", f"{folder}:{result}", 0), check=False)
        if done.returncode or not result.is_file():
            raise MachineRefused(f"the ranks ended with code {done.returncode}; their messages are above")
        found: list[dict[str, Any]] = json.loads(result.read_text(encoding="utf-8"))
        return found


def _check_gpus(n_processes: int) -> None:
    import torch

    if torch.cuda.is_available() and n_processes > torch.cuda.device_count():
        raise UserError(f"`--gpus` is {n_processes}; this machine has {torch.cuda.device_count()}")


def _torchrun(n_processes: int, module: str, argument: str, restarts: int) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_processes}",
        f"--max-restarts={restarts}", "-m", module, argument,
    ]  # fmt: skip


def main() -> None:
    """One rank of `start`: python -m training.launch RUN.JSON."""
    from training import loop, show

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with contextlib.suppress(*_FINAL), show.steps() as report:
        loop.fit(Run.read(Path(sys.argv[1])), report)


if __name__ == "__main__":
    main()
