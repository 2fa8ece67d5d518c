"""Starts a run on several GPUs (or, without any, several processes) of this machine by torchrun.

Everything a user can get wrong is found before this: torchrun turns every exit code into 1, so what ended the run comes
back through its logbook, and only what a restart may cure ends a rank with an error.
"""

import contextlib
import logging
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from mpt.errors import DamagedFile, Interrupted, MachineRefused, MPTError, TrainingDiverged, UserError
from training.logbook import Logbook
from training.run import Run

_RESTARTS = 3  # of all ranks, after one has died
_FINAL: tuple[type[MPTError], ...] = (UserError, DamagedFile, TrainingDiverged, Interrupted)


def start(run: Run, n_processes: int) -> Path:
    """Train on so many processes and return the finished checkpoint's folder.

    Raises what ended the run, and UserError for more processes than there are GPUs.
    """
    import torch

    if torch.cuda.is_available() and n_processes > torch.cuda.device_count():
        raise UserError(f"`--gpus` is {n_processes}; this machine has {torch.cuda.device_count()}")
    out = Path(run.out)
    out.mkdir(parents=True, exist_ok=True)
    logbook = Logbook(out)
    n_before = len(logbook.entries())
    description = out.with_name(out.name + ".launch.json")
    description.write_text(run.to_json(), encoding="utf-8")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_processes}",
        f"--max-restarts={_RESTARTS}", "-m", "training.launch", str(description),
    ]  # fmt: skip
    process = subprocess.Popen(command)

    def pass_on(number: int, _: FrameType | None) -> None:
        process.send_signal(signal.SIGTERM)  # also for Ctrl-C: torchrun would kill ranks that save

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        description.unlink(missing_ok=True)
    ended = [entry for entry in logbook.entries()[n_before:] if "exit_code" in entry]
    if ended:
        kinds: list[type[MPTError]] = [*_FINAL, MachineRefused]
        kind = next(kind for kind in kinds if kind.exit_code == ended[-1]["exit_code"])
        raise kind(ended[-1]["error"])
    if code:
        raise MachineRefused(f"the ranks ended with code {code}; their messages are above; the same command goes on")
    return out / "model"


def main() -> None:
    """One rank of `start`: python -m training.launch RUN.JSON."""
    from training import loop, show

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with contextlib.suppress(*_FINAL), show.steps() as report:
        loop.fit(Run.read(Path(sys.argv[1])), report)


if __name__ == "__main__":
    main()
