"""A side's process seen from the ladder: started, asked cell by cell, and ended when it takes too long or too much."""

import json
import os
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.cells import MARK

START_LIMIT_S = 600.0  # to load a model
_POLL_S = 0.2
_ROOT = Path(__file__).parents[2]
LEAST_FREE_BYTES = 1_500_000_000  # below it the process is ended, before Linux chooses one to end


class Over(Exception):
    """A cell took longer than its limit; the process has been ended."""


class Failed(Exception):
    """A side could not answer, and why; the process has ended."""


class Refused(Exception):
    """A side cannot run this model at all, and why."""


class Worker:
    """One side's process. `about` is what it said of itself; leaving the `with` ends it."""

    def __init__(self, command: Sequence[str], threads: int) -> None:
        """Raises Refused, Failed."""
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": str(_ROOT),  # this tree's code, wherever the interpreter has one installed
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        # Where memory runs out, this process goes first, not whatever else the machine does.
        sacrificed = ["sh", "-c", 'echo 1000 > /proc/self/oom_score_adj; exec "$0" "$@"', *command]
        self._process = subprocess.Popen(
            sacrificed, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment
        )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.about: dict[str, Any] = self._next(START_LIMIT_S)
            if "refused" in self.about:
                raise Refused(self.about["refused"])
        except BaseException:
            self.close()
            raise

    def ask(self, prompts: list[list[int]], n_tokens: int, limit_s: float) -> dict[str, Any]:
        """Times and tokens of one cell. Raises Over, Failed."""
        assert self._process.stdin is not None
        try:
            print(json.dumps({"prompts": prompts, "n_tokens": n_tokens}), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise Failed(self._last_words()) from None
        return self._next(limit_s)

    @property
    def pid(self) -> int:
        return self._process.pid

    def peak_bytes(self) -> int:
        """The most memory that the process has had resident, pages of mapped files among it."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                self._lines.put(line.removeprefix(MARK))
        self._lines.put(None)

    def _next(self, limit_s: float) -> dict[str, Any]:
        until = time.monotonic() + limit_s
        while True:
            try:
                line = self._lines.get(timeout=_POLL_S)
            except queue.Empty:
                if available_bytes() < LEAST_FREE_BYTES:
                    self._process.kill()
                    raise Failed("out of memory") from None
                if time.monotonic() > until:
                    self._process.kill()
                    raise Over(f"over {limit_s:.0f} s") from None
                continue
            if line is None:
                raise Failed(self._last_words())
            answer: dict[str, Any] = json.loads(line)
            return answer

    def _last_words(self) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        errors = [line.strip() for line in lines if "rror" in line]
        return (errors or [f"ended with status {status}"])[-1][:200]


def available_bytes() -> int:
    """Linux' own estimate of what can be taken without swapping."""
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024
