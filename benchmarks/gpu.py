"""One GPU, in one command: is everything right on it, how fast is it, and which goals are met.

    python benchmarks/gpu.py --budget 540                      # nine minutes of it: docs/gpu/<card>-<date>.json
    python benchmarks/gpu.py --budget 540 --out h200.json      # and h200.md beside it
    python benchmarks/gpu.py --resume --out h200.json          # only what is missing or failed there
    python benchmarks/gpu.py --only training_right sampling    # these two parts
    python benchmarks/gpu.py --rehearse                        # every part on this CPU with toy sizes, in a few minutes

The parts come in order of value. Each runs in a process of its own, which is ended when its time or the budget is up; a
part that breaks, hangs or loses the GPU leaves the others alone. The limits of all parts are more than 540 seconds:
below, + marks parts whose whole limit fits, and the others run in the time that these leave. `--resume` runs what had
none, on the same commit; with `--budget 900` all fit. What was found is written after each part, so an ended run keeps
what it had. Rehearse before time on a GPU is spent. Where torch sees no GPU, the command says so.

It needs this checkout, torch with CUDA, transformers, and the packages that serving, training and the tests import. The
product asks for torch 2.12 or later (pyproject.toml). This command installs nothing, and torch 2.11.0 has all that it
calls, by its source; it has been run on 2.13.0, on a CPU. onnx and onnxruntime-gpu are only for their part. Weights are
random, in MPT-7B's shape on a card of 80 GB or more, in the 1B shape on a smaller one. Nothing is downloaded.

Exit code: 0 all was measured, 1 something failed, is wrong, had no time or cannot be run here, 5 no GPU. Progress goes
to stderr, the page with the tables to stdout and beside the JSON.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a checkout that is not installed

from benchmarks.gpu_parts import report  # noqa: E402
from benchmarks.gpu_parts.child import NO_CUDA  # noqa: E402
from benchmarks.gpu_parts.parts import CACHES, NAMES, PARTS, Part, certain  # noqa: E402

GRACE_S = 4.0  # between the time that a part is told and the time that it is ended at
BUDGET_S, REHEARSAL_S = 540.0, 1800.0
SLOWER = 4.0  # how much more time a part has on a CPU, which may be busy
LEAST_S = 15.0  # torch alone takes seconds to import
SAME = ("commit", "shape", "rehearsal")  # what a run that is resumed must have in common with this one
NO_GPU = "no CUDA device is available to torch; `--rehearse` tries every part on the CPU with toy sizes"


class Run:
    """What has been found so far, and where it is kept."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.began, self.budget, self.seconds_before = time.monotonic(), asked.budget, 0.0
        self.file: Path | None = asked.out
        self.scale: str = "toy" if asked.rehearse else asked.shape
        commit = _git("rev-parse", "--short=12", "HEAD") or "unknown"
        self.found: dict[str, Any] = {
            "command": shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
            "date": date.today().isoformat(),
            "commit": commit,
            "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
            "shape": self.scale,
            "rehearsal": asked.rehearse,
            "budget_s": asked.budget,
            "seconds": 0.0,
            "parts": {},
        }
        if asked.resume and self.file is not None and self.file.is_file():
            self._go_on(json.loads(self.file.read_text()))

    def _go_on(self, before: Mapping[str, Any]) -> None:
        """Keep what an earlier run of the same thing found."""
        for key in SAME:
            if before[key] != self.found[key] and (key, self.found[key]) != ("shape", "auto"):
                sys.exit(
                    f"`{self.file}` has {key} {before[key]!r}, this run has {self.found[key]!r}; give another --out"
                )
        self.found["parts"], self.scale = dict(before["parts"]), before["shape"]
        self.seconds_before = before["seconds"]
        self.found["shape"] = self.scale

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def say(self, words: str) -> None:
        print(f"{self.seconds:6.1f} s  {words}", file=sys.stderr, flush=True)

    def keep(self) -> None:
        """Write the JSON and the page beside it, each whole or not at all."""
        self.found["seconds"] = round(self.seconds_before + self.seconds, 1)
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        for path, text in (
            (self.file, json.dumps(self.found, indent=1) + "\n"),
            (self.file.with_suffix(".md"), report.page(self.found)),
        ):
            partial = path.with_name(path.name + ".partial")
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)

    def take(self, part: Part, folder: Path) -> dict[str, Any]:
        """Run one part, and what came of it."""
        left = self.budget - self.seconds
        if left < LEAST_S:
            return {"outcome": "not started", "reason": f"{max(0.0, left):.0f} s were left", "seconds": 0.0}
        if part.needs_right and (wrong := self.found["parts"].get("right", {}).get("found", {}).get("wrong")):
            return {"outcome": "not started", "reason": f"it would measure what is wrong: {wrong}", "seconds": 0.0}
        limit = min(part.limit_s * (SLOWER if self.found["rehearsal"] else 1), left)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        if self.found["rehearsal"]:
            environment["OMP_NUM_THREADS"] = "1"  # also of the processes that a part starts
        if part.fresh_caches:
            environment |= {name: str(folder / name.lower()) for name in CACHES}
        file = folder / f"{part.name}.json"
        told = [part.name, self.scale, str(file), f"{limit - GRACE_S:.1f}", f"{time.time():.3f}"]
        command = [sys.executable, "-m", "benchmarks.gpu_parts.child", *told]
        ceilings = {"card": self.found["parts"].get("card", {})}
        try:
            self.say(f"{part.name}: {part.what} (at most {limit:.0f} s)")
            return run_child(command, file, limit, environment, json.dumps(ceilings))
        except (SystemExit, KeyboardInterrupt):  # keep what the part had
            had = json.loads(file.read_text()) if file.is_file() else {}
            stopped = {"outcome": "stopped", "reason": "from outside", "seconds": 0.0}
            self.found["parts"][part.name] = stopped | had
            raise


def run_child(
    command: Sequence[str], file: Path, limit_s: float, environment: Mapping[str, str] | None = None, told: str = ""
) -> dict[str, Any]:
    """Run a part's process and all that it starts, to its end or to the limit; what its file has, and how it ended.

    outcome: `done`, `failed` (a measurement, or the process), `out of time`, `not run` (this machine lacks
    something), or `no GPU`.
    """
    began = time.monotonic()
    child = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    last: deque[str] = deque(maxlen=20)
    assert child.stdin is not None and child.stdout is not None
    reader = threading.Thread(target=_pass_on, args=(child.stdout, last), daemon=True)
    reader.start()
    is_late = False
    try:
        with contextlib.suppress(BrokenPipeError):  # it has ended already, and its exit code says how
            child.stdin.write(told)
            child.stdin.close()
        try:
            child.wait(timeout=max(0.1, limit_s - (time.monotonic() - began)))
        except subprocess.TimeoutExpired:
            is_late = True
    finally:
        _end(child)
    reader.join(timeout=2)
    part: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    outcome, reason = _outcome(part, child.returncode, is_late, limit_s, last)
    return {"outcome": outcome, "reason": reason, "seconds": round(time.monotonic() - began, 1), **part}


def _outcome(part: Mapping[str, Any], code: int, is_late: bool, limit_s: float, last: Sequence[str]) -> tuple[str, str]:
    if is_late:
        return "out of time", f"ended after {limit_s:.0f} s"
    if code == NO_CUDA:
        return "no GPU", NO_GPU
    if failures := part.get("failures"):
        return "failed", "; ".join(f"{name}: {why.splitlines()[0]}" for name, why in failures.items())
    if code:
        said = next((line for line in reversed(last) if line.strip()), "nothing was said")
        return "failed", f"the process ended with {code}: {said.strip()[:300]}"
    if part.get("not_run"):
        return "not run", part["not_run"]
    if "no time was left" in part.get("left_out", {}).values():
        return "out of time", "some measurements had no time"
    return "done", "; ".join(f"{name}: {why}" for name, why in part.get("left_out", {}).items())


def _end(child: "subprocess.Popen[str]") -> None:
    """End what is left of a child and of all that it started, which are a process group of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in the GPU's driver ends when that lets go
        child.wait(timeout=20)


def _pass_on(lines: Any, last: deque[str]) -> None:
    for line in lines:
        last.append(line)
        sys.stderr.write(line)
        sys.stderr.flush()


def _git(*arguments: str) -> str:
    try:
        said = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return said.stdout.strip()


def _stop(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)  # through `finally`, which ends the part and keeps what was found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    sure = certain(PARTS, BUDGET_S)
    listed = "\n".join(
        f"{'+' if part.name in sure else ' '} {part.name:15} at most {part.limit_s:3.0f} s  {part.what}"
        for part in PARTS
    )
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu.py", description=__doc__, epilog=f"parts, in order:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="for everything; 540 if not given")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the JSON; docs/gpu/<card>-<date>.json if not given")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="PART", help="these parts, in their order")
    parser.add_argument("--resume", action="store_true", help="keep what is done in --out, run what is not")
    parser.add_argument("--shape", choices=("auto", "7b", "1b"), default="auto", help="auto: what the card holds")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, toy sizes; the figures mean nothing")
    asked = parser.parse_args(arguments)
    if asked.resume and asked.out is None:
        parser.error("--resume needs --out, the file that it goes on with")
    if asked.out is not None and asked.out.suffix != ".json":
        parser.error(f"--out is `{asked.out}`; it must end in .json")
    if asked.budget is None:
        asked.budget = REHEARSAL_S if asked.rehearse else BUDGET_S
    if not asked.budget >= LEAST_S:
        parser.error(f"--budget is {asked.budget:g}; at least {LEAST_S:g} seconds are needed")
    return asked


def main() -> int:
    asked = parse()
    signal.signal(signal.SIGTERM, _stop)
    run = Run(asked)
    done = {name for name, part in run.found["parts"].items() if part["outcome"] == "done"}
    chosen = [part for part in PARTS if part.name in (asked.only or [name for name in NAMES if name not in done])]
    sure = certain(chosen, asked.budget, SLOWER if asked.rehearse else 1.0)
    if rest := [part.name for part in chosen if part.name not in sure]:
        held = ", ".join(sure) or "no part"
        run.say(f"{asked.budget:.0f} s hold the limits of {held}; what they leave is for {', '.join(rest)}")
    try:
        with tempfile.TemporaryDirectory(prefix="mpt-gpu-") as folder:
            for part in chosen:
                taken = run.take(part, Path(folder))
                if taken["outcome"] == "no GPU":
                    print(NO_GPU, file=sys.stderr)
                    return NO_CUDA
                run.found["parts"][part.name] = taken
                note_shape(run, taken, asked.rehearse)
                run.keep()
                run.say(f"{part.name}: {report.ended(taken)}")
    finally:
        if run.found["parts"]:
            run.keep()
            print(report.page(run.found), flush=True)
            run.say(f"kept in `{run.file}`" if run.file else "kept nowhere, since no --out was given")
    return 0 if all(part["outcome"] == "done" for part in run.found["parts"].values()) else 1


def note_shape(run: Run, taken: Mapping[str, Any], is_rehearsal: bool) -> None:
    """Of the first part: which shape `auto` was, and under which name the results are kept where none was given."""
    found = taken.get("found", {})
    if run.scale == "auto" and "shape" in found:
        run.scale = run.found["shape"] = found["shape"]
    if run.file is None and not is_rehearsal and "device" in found:
        card = re.sub(r"[^a-z0-9]+", "-", found["device"].lower()).strip("-")
        names = (f"{card}-{run.found['date']}{more}.json" for more in ("", *(f"-{n}" for n in range(2, 100))))
        folder = ROOT / "docs" / "gpu"
        run.file = next(folder / name for name in names if not (folder / name).exists())


if __name__ == "__main__":
    sys.exit(main())
