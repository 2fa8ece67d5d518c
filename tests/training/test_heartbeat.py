"""A rank that dies, hangs or is slow is named, and the run goes on. Two gloo ranks on the CPU, really stopped."""

import dataclasses
import json
from pathlib import Path

import pytest

from tests.training.test_distributed import losses, torchrun
from tests.warm_ranks import Ranks
from training import loop
from training.heartbeat import Sign, ended_without_a_word, hanging, slowest_over_median
from training.logbook import Logbook
from training.run import Run

_STOPS = """
import os, signal, sys, time
from pathlib import Path
from training import checkpoint, loop, step
from training.run import Run

run = Run.read(Path(sys.argv[1]))
real, calls = step.backward, []
def backward(*args):
    calls.append(1)
    if os.environ["RANK"] == "1":
        time.sleep(0.1)
    saved = (Path(run.out) / "step-000005" / "manifest.json").is_file()
    if os.environ["RANK"] == "1" and len(calls) > 12 and saved and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGSTOP)
    return real(*args)

step.backward = backward
loop.fit(run)
"""


def sign(rank: int, **changes: object) -> Sign:
    return dataclasses.replace(Sign(rank, "host", 100 + rank, 7, "step", 1000.0, True), **changes)  # type: ignore[arg-type]


def test_whom_the_others_wait_for() -> None:
    """By hand: a rank without a sign, else one of the earliest step that waits for nobody, else nobody is known."""
    assert hanging([sign(0), sign(1, alive_at=900.0), sign(2)], 1001.0, 30) == [sign(1, alive_at=900.0)]
    assert hanging([sign(0), sign(1, waits=False), sign(2)], 1001.0, 30) == [sign(1, waits=False)]
    assert hanging([sign(0, waits=False, step=8), sign(1, waits=False)], 1001.0, 30) == [sign(1, waits=False)]
    assert hanging([sign(0), sign(1)], 1001.0, 30) == [sign(0), sign(1)]
    assert ended_without_a_word([sign(0, has_ended=True), sign(1)]) == [sign(1)]


def test_the_slowest_is_held_against_the_median() -> None:
    assert slowest_over_median([1.0, 1.0, 3.0, 1.5]) == (3.0 / 1.25, 2)


def test_a_slow_rank_shows_and_a_stopped_one_is_named_and_the_run_goes_on(ranks: Ranks, small_run: Run) -> None:
    run = dataclasses.replace(small_run, global_batch=6, microbatch_tokens=512, hang_timeout=3)
    whole = dataclasses.replace(run, out=run.out + "-whole")
    loop.fit(whole)
    torchrun(ranks, run, _STOPS)
    assert losses(run) == pytest.approx(losses(whole), rel=2e-5)
    entries = Logbook(Path(run.out)).entries()
    (hang,) = [entry for entry in entries if entry["event"] == "hang"]
    assert hang["rank"] == 1 and 6 <= hang["step"] <= 12 and 3 <= hang["others_waited_s"] < 30
    names = [entry["event"] for entry in entries]
    assert names.index("hang") < names.index("preflight") < names.index("resume")
    assert names[0] == "start" and names[-1] == "finished"
    lost = [entry["rank"] for entry in entries if entry["event"] == "lost"]
    assert lost == [1]  # killed where it stood
    assert "training/step.py" in (Path(run.out) / "ranks" / "rank-00000.stacks.txt").read_text()

    # Of two ranks the median is their mean: one that works while the other waits comes to nearly twice of it.
    lines = [json.loads(line) for line in (Path(run.out) / "metrics.jsonl").read_text().splitlines()]
    slow = [line["slowest_over_median"] for line in lines[1:] if line["slowest_rank"] == 1]
    assert len(slow) > len(lines) / 2 and 1.1 < sorted(slow)[len(slow) // 2] <= 2
