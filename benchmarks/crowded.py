"""How a stream slows down where its process does not have the machine to itself, beside llama.cpp.

    python -m benchmarks.crowded --models FOLDER

Three situations, in turn within a round: alone; in a container that may use 1.5 CPUs (a cgroup of v1 or v2, which takes
root); and beside a neighbour that computes on one of two CPUs without end. The 125M shape in bfloat16 and Q4_0, one
stream, 2 threads; ours with 1 thread too, the other choice within such a quota. Medians over rounds of milliseconds a
token, first ones left out, and how many times as long as alone. `make llama` installs the peer.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import engine
from benchmarks.peers.worker import Worker

CPUS = 1.5
PERIOD_US = 100_000
SITUATIONS = ("alone", "1.5 CPUs", "a neighbour")
SIDES = {  # name: the ladder's side, threads
    "ours bfloat16": ("ours bfloat16", 2),
    "ours bfloat16, 1 thread": ("ours bfloat16", 1),
    "llama.cpp BF16": ("llama.cpp BF16", 2),
    "ours Q4_0 file": ("ours Q4_0 file", 2),
    "ours Q4_0 file, 1 thread": ("ours Q4_0 file", 1),
    "llama.cpp Q4_0": ("llama.cpp Q4_0", 2),
}


@contextmanager
def container(pid: int) -> Iterator[None]:
    """A process may use CPUS for a while. Raises OSError where this process may not make a cgroup."""
    v1, root = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
    folder = (v1 if v1.is_dir() else root) / f"mpt-crowded-{os.getpid()}"
    folder.mkdir()
    try:
        quota = int(CPUS * PERIOD_US)
        if v1.is_dir():
            (folder / "cpu.cfs_quota_us").write_text(str(quota))
        else:
            (folder / "cpu.max").write_text(f"{quota} {PERIOD_US}")
        (folder / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        (folder.parent / "cgroup.procs").write_text(str(pid))
        folder.rmdir()


@contextmanager
def neighbour(cpu: int) -> Iterator[None]:
    """A process that computes on one CPU."""
    code = f"import os; os.sched_setaffinity(0, {{{cpu}}})\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def ms_a_token(worker: Worker, n_tokens: int) -> float:
    """Of one stream, without what comes before the second token."""
    prompt = engine.prompts_of(engine.Cell("125m", 0, 128, "", 1))
    times = worker.ask(prompt, n_tokens, 120.0)["times"][0]
    return 1e3 * (times[-1] - times[0]) / (len(times) - 1)


def measure(worker: Worker, situation: str, n_tokens: int) -> float:
    if situation == "1.5 CPUs":
        with container(worker.pid):
            return ms_a_token(worker, n_tokens)
    if situation == "a neighbour":
        with neighbour(min(os.sched_getaffinity(0))):
            return ms_a_token(worker, n_tokens)
    return ms_a_token(worker, n_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--models", type=Path, metavar="FOLDER", help="keep the random models here for another run")
    asked = parser.parse_args()
    known = {side.name: side for side in engine.sides()}
    found = {(side, situation): list[float]() for side in SIDES for situation in SITUATIONS}
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: engine.THREADS])
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.models or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for round_ in range(asked.rounds):
            for name, (side_name, threads) in SIDES.items():
                side = known[side_name]
                if side.absent:
                    continue
                print(f"round {round_ + 1} of {asked.rounds}: {name}", file=sys.stderr)
                model = engine.make_model("125m", side.model, folder, 1024)
                command = [word.format(model=model) for word in side.command]
                with Worker(command, threads) as worker:
                    ms_a_token(worker, 16)
                    for situation in SITUATIONS:
                        ms = measure(worker, situation, asked.tokens)
                        print(f"  {situation}: {ms:.1f} ms a token", file=sys.stderr)
                        found[name, situation].append(ms)
    print(f"| side | {' | '.join(f'{situation}, ms a token' for situation in SITUATIONS)} |")
    print("|---|---:|---:|---:|")
    for name in SIDES:
        if not found[name, "alone"]:
            continue
        medians = [statistics.median(found[name, situation]) for situation in SITUATIONS]
        cells = [f"{medians[0]:.1f}", *(f"{ms:.1f} ({ms / medians[0]:.2f} times)" for ms in medians[1:])]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
