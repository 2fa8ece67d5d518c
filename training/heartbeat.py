"""Signs of life of the ranks: who died without a word, who hangs while the others wait, who is slower than the others.

Each rank of several writes `<out>/ranks/rank-00001.json` about once a second, from a thread of its own: the step it is
in, what it does, and whether its main thread waits inside torch.distributed. Where a rank makes no progress for
`hang_timeout` seconds, those that live name the one that the others wait for, write every thread's stack, and end, so
that torchrun starts all ranks again from the last checkpoint; a collective's own time-out would come much later.
"""

import faulthandler
import json
import os
import signal
import socket
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType

from mpt.files import write_whole
from training.distributed import World
from training.logbook import Logbook

_WRITES_EVERY_S = 1.0
_LOOKS_EVERY_S = 0.02  # at the main thread's stack
_SLOWEST_STEPS = 10  # this many times the slowest step so far is no hang either
_UNJUDGED = ("saving", "restoring", "finishing")  # as long as the disk takes
_EXIT_CODE = 70


@dataclass(frozen=True)
class Sign:
    """A rank's last word."""

    rank: int
    host: str
    pid: int
    step: int
    doing: str
    alive_at: float  # seconds since 1970
    waits: bool  # for the other ranks
    has_ended: bool = False


def signs(out: Path) -> list[Sign]:
    """The last words of a run's ranks, by rank; one that is just being written is left out."""
    found = []
    for path in sorted((out / "ranks").glob("rank-*.json")):
        try:
            found.append(Sign(**json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, TypeError, OSError):
            continue
    return found


def ended_without_a_word(found: Sequence[Sign]) -> list[Sign]:
    """The ranks of a start that ended with neither an error nor its end: they were killed, or their machine is gone."""
    return [sign for sign in found if not sign.has_ended]


def hanging(found: Sequence[Sign], now: float, timeout_s: float) -> list[Sign]:
    """Whom the others wait for: ranks that give no sign, else those of the earliest step that wait for nobody."""
    silent = [sign for sign in found if now - sign.alive_at > timeout_s and not sign.has_ended]
    if silent:
        return silent
    earliest = min(sign.step for sign in found)
    return [sign for sign in found if sign.step == earliest and not sign.waits] or list(found)


class Heartbeat:
    """This rank's signs, as a context; does nothing in a world of one."""

    def __init__(self, out: Path, world: World, timeout_s: float) -> None:
        self._out, self._world, self._timeout_s = out, world, timeout_s
        self._path = out / "ranks" / f"rank-{world.rank:05d}.json"
        self._step, self._doing, self._beat_at, self._slowest = 0, "loading", time.monotonic(), 0.0
        self._n_looks = self._n_waits = 0
        self._main = threading.get_ident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        if self._world.size > 1:
            self._path.parent.mkdir(exist_ok=True)
            self._write()
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._world.size > 1:
            self._stop.set()
            self._thread.join()
            self._write(has_ended=True)

    def beat(self, doing: str, step: int | None = None) -> None:
        """Say that something goes on, a `step` or another thing. step: its number, counted from 0."""
        now = time.monotonic()
        if self._doing == "step":
            self._slowest = max(self._slowest, now - self._beat_at)
        if step is not None:
            self._step = step
        self._doing, self._beat_at = doing, now

    def own_share(self) -> float:
        """The share of the time since the last call in which the main thread did not wait for other ranks."""
        n, waits = self._n_looks, self._n_waits
        self._n_looks = self._n_waits = 0
        return 1 - waits / n if n else 1.0

    def _watch(self) -> None:
        written = time.monotonic()
        while not self._stop.wait(_LOOKS_EVERY_S):
            self._n_looks += 1
            self._n_waits += self._waits()
            now = time.monotonic()
            if now - written >= _WRITES_EVERY_S:
                written = now
                self._write()
            limit = max(self._timeout_s, _SLOWEST_STEPS * self._slowest)
            # What comes before the end of a first step takes what it takes.
            if self._slowest and self._doing not in _UNJUDGED and now - self._beat_at > limit:
                self._end(now - self._beat_at)

    def _waits(self) -> bool:
        """Whether the main thread is inside torch.distributed, in a call that waits for other ranks."""
        frame: FrameType | None = sys._current_frames().get(self._main)
        path = "" if frame is None else frame.f_code.co_filename
        return f"{os.sep}torch{os.sep}distributed{os.sep}" in path and f"{os.sep}tensor{os.sep}" not in path

    def _write(self, has_ended: bool = False) -> None:
        sign = Sign(
            self._world.rank, socket.gethostname(), os.getpid(), self._step, self._doing, time.time(), self._waits(),
            has_ended,
        )  # fmt: skip
        try:
            write_whole(self._path, json.dumps(asdict(sign)))
        except OSError:  # a full disk ends the run where it saves, not here
            return

    def _end(self, waited_s: float) -> None:
        """Name who hangs, and end this rank; its launcher starts all of them again."""
        for _ in range(2):  # time for the others to give a sign, if they can
            self._write()
            time.sleep(_WRITES_EVERY_S)
        self._write(has_ended=True)
        found, now = signs(self._out), time.time()
        guilty = hanging(found, now, max(self._timeout_s / 2, 3 * _WRITES_EVERY_S))
        living = [sign.rank for sign in found if sign not in guilty] or [sign.rank for sign in found]
        with (self._path.with_suffix(".stacks.txt")).open("w") as file:
            faulthandler.dump_traceback(file)
        if self._world.rank == min(living):
            logbook = Logbook(self._out)
            for sign in guilty:
                logbook.write(
                    "hang", rank=sign.rank, step=self._step + 1, doing=self._doing, on=f"{sign.host}:{sign.pid}",
                    last_sign_s=round(now - sign.alive_at, 1), others_waited_s=round(waited_s, 1),
                )  # fmt: skip
            for sign in guilty:
                if sign.host == socket.gethostname() and sign.pid != os.getpid():
                    os.kill(sign.pid, signal.SIGKILL)  # a stopped one would hold the restart up until it is killed
        os._exit(_EXIT_CODE)


def slowest_over_median(seconds: Sequence[float]) -> tuple[float, int]:
    """Of each rank's own seconds: the largest over the median, and whose it is."""
    largest = max(seconds)
    return largest / max(statistics.median(seconds), 1e-9), list(seconds).index(largest)
