"""Measures what a rank's machine does and whether it does it right: the check in front of a run.

MosaicML's NodeDoctor did so for MPT-7B's nodes. Each rank multiplies matrices of small whole numbers, whose product is
known exactly, copies memory, writes and reads a file, and exchanges a block with every other rank. Its figures are held
against the median of all ranks; a wrong result needs no comparison.
"""

import hashlib
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from mpt.errors import MachineRefused
from training import distributed
from training.distributed import World

_SLOW = 0.7  # of the median; below it a rank holds all others up
_REPEATS = 5
_MATRIX = {"cuda": 8192, "cpu": 1024}  # columns
_COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}
_FILE_BYTES = 2**24
_EXCHANGE_BYTES = {"cuda": 2**26, "cpu": 2**22}
_MOST_ROUNDS = 15  # of exchanges: with more ranks each meets so many of the others


@dataclass(frozen=True)
class Measured:
    """One rank's figures, each the best of several tries, and what it got wrong."""

    rank: int
    on: str
    matmul_tflops: float
    memory_gb_s: float
    disk_mb_s: float
    exchange_gb_s: float | None  # the slowest partner's; None for a rank alone
    slowest_partner: int | None
    wrong: tuple[str, ...] = ()


_FIGURES = ("matmul_tflops", "memory_gb_s", "disk_mb_s", "exchange_gb_s")


def measure(world: World, folder: Path) -> list[Measured]:
    """Every rank's figures, on every rank. folder: on the disk that checkpoints go to."""
    wrong: list[str] = []
    kind = world.device.type
    exchanges = _exchange(world, _EXCHANGE_BYTES[kind], wrong)
    slowest = min(exchanges, key=lambda partner: exchanges[partner]) if exchanges else None
    mine = Measured(
        world.rank,
        f"{socket.gethostname()}:{os.getpid()} {world.device}",
        _matmul(world.device, _MATRIX[kind], wrong),
        _copy(world.device, _COPY_BYTES[kind]),
        _disk(folder / f"check-{world.rank:05d}.partial", _FILE_BYTES, wrong),
        None if slowest is None else statistics.median(exchanges.values()),
        slowest,
        tuple(wrong),
    )
    if world.size == 1:
        return [mine]
    found: list[Measured | None] = [None] * world.size
    dist.all_gather_object(found, mine, group=world.background)
    return [one for one in found if one is not None]


def verdicts(found: Sequence[Measured]) -> list[tuple[int, str]]:
    """The ranks that are wrong or slow, each with the reason."""
    said = [(one.rank, f"wrong {what}") for one in found for what in one.wrong]
    for name in _FIGURES:
        values = {one.rank: value for one in found if (value := getattr(one, name)) is not None}
        if len(values) < 2:
            continue
        median = statistics.median(values.values())
        for rank, value in values.items():
            if value < _SLOW * median:
                said.append((rank, f"slow {name}: {value:.3g}, the median is {median:.3g}"))
    return said


def preflight(world: World, folder: Path, write: Callable[..., None]) -> None:
    """Measure every rank, have the logbook say it, and refuse a rank that computes wrongly. Raises MachineRefused."""
    found = measure(world, folder)
    said = verdicts(found)
    medians = {
        name: round(statistics.median(values), 3)
        for name in _FIGURES
        if (values := [value for one in found if (value := getattr(one, name)) is not None])
    }
    write("preflight", ranks=len(found), **medians, found=len(said))
    for rank, what in said:
        write("rank", rank=rank, on=found[rank].on, what=what)
    wrong = [(rank, what) for rank, what in said if what.startswith("wrong")]
    if wrong:
        rank, what = wrong[0]
        raise MachineRefused(f"rank {rank} ({found[rank].on}) computes {what}; take its machine out, then start again")


def render(found: Sequence[Measured]) -> str:
    """The figures as a table, then what is wrong or slow."""
    rows = [["rank", "on", "matmul TFLOP/s", "memory GB/s", "disk MB/s", "exchange GB/s", "slowest with"]]
    for one in found:
        figures = [getattr(one, name) for name in _FIGURES]
        partner = "-" if one.slowest_partner is None else str(one.slowest_partner)
        rows.append([str(one.rank), one.on, *("-" if f is None else f"{f:.3g}" for f in figures), partner])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *(f"rank {rank}: {what}" for rank, what in verdicts(found))])


def _best(device: torch.device, action: Callable[[], object]) -> float:
    """The seconds of the fastest of several tries, after one that is not counted."""
    seconds = []
    for _ in range(_REPEATS + 1):
        _wait(device)
        began = time.perf_counter()
        action()
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _matmul(device: torch.device, n: int, wrong: list[str]) -> float:
    """TFLOP/s of a product in bfloat16, whose result is checked (Freivalds 1979): A (B x) must be (A B) x.

    Of numbers -1, 0 and 1, three of four of them 0, the sums are whole and below 256, exact in bfloat16 in any order.
    """
    numbers = torch.Generator().manual_seed(17)
    dice = (torch.randint(0, 8, (n, n), generator=numbers) for _ in range(2))
    a, b = ((die == 0).double() - (die == 1).double() for die in dice)
    x = torch.randint(0, 2, (n, 1), generator=numbers).double()
    left, right = a.to(device, torch.bfloat16), b.to(device, torch.bfloat16)
    first = product(left, right)
    last = first.clone()

    def again() -> None:
        last.copy_(product(left, right))

    seconds = _best(device, again)
    if not torch.equal(first, last):
        wrong.append("product of matrices, another one each time")
    elif not torch.equal(first.cpu().double() @ x, a @ (b @ x)):
        wrong.append("product of matrices")
    return 2 * n**3 / seconds / 1e12


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """What is measured."""
    return left @ right


def probe(device: torch.device) -> float:
    """Seconds of a fixed piece of work that takes a GPU some milliseconds, without any other rank."""
    square = torch.ones(4096, 4096, device=device, dtype=torch.bfloat16)
    return _best(device, lambda: square @ square)


def _copy(device: torch.device, n_bytes: int) -> float:
    """GB/s of a copy in memory, read and written bytes counted."""
    source = torch.ones(n_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * n_bytes / _best(device, lambda: target.copy_(source)) / 1e9


def _disk(path: Path, n_bytes: int, wrong: list[str]) -> float:
    """MB/s of writing a file to the disk itself; what is read back must be what was written."""
    block = os.urandom(n_bytes)
    try:
        began = time.perf_counter()
        with path.open("wb") as file:
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - began
        if hashlib.sha256(path.read_bytes()).digest() != hashlib.sha256(block).digest():
            wrong.append("bytes of a file")
    finally:
        path.unlink(missing_ok=True)
    return n_bytes / seconds / 1e6


def _exchange(world: World, n_bytes: int, wrong: list[str]) -> dict[int, float]:
    """GB/s with each other rank, both directions at once counted as one; in pairs, as a round-robin tournament."""
    found = {}
    n = world.size + world.size % 2
    for turn in range(min(n - 1, _MOST_ROUNDS)):
        partner = _partner(world.rank, turn, n)
        world.barrier()
        if partner >= world.size:  # an odd number of ranks: this one sits out
            continue
        mine = torch.full((n_bytes // 4,), float(world.rank), device=world.device)
        theirs = torch.empty_like(mine)
        seconds = []
        for _ in range(3):
            _wait(world.device)
            began = time.perf_counter()
            calls = [dist.P2POp(dist.isend, mine, partner), dist.P2POp(dist.irecv, theirs, partner)]
            for work in dist.batch_isend_irecv(calls):
                work.wait()
            _wait(world.device)
            seconds.append(time.perf_counter() - began)
        if not bool((theirs == partner).all()):
            wrong.append(f"block from rank {partner}")
        found[partner] = n_bytes / min(seconds) / 1e9
    return found


def _partner(rank: int, turn: int, n: int) -> int:
    """Whom a rank of an even n meets in a turn of n - 1: the circle method."""
    last = n - 1
    if rank == last:
        return turn
    if rank == turn:
        return last
    return (2 * turn - rank) % last


def main() -> None:
    """One rank of `train check --gpus N`: python -m training.machine FOLDER:RESULT.JSON."""
    folder, _, result = sys.argv[1].rpartition(":")
    with distributed.join() as world:
        found = measure(world, Path(folder))
        if world.is_first:
            Path(result).write_text(json.dumps([asdict(one) for one in found]), encoding="utf-8")


if __name__ == "__main__":
    main()
