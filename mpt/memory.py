"""How much memory this process may still take, by which limit, and how it gives back what it has freed.

The machine's memory is one limit, a container's (a control group of version 1 or 2, and each around it) and `ulimit`'s
are others; the one that leaves the least decides. A process that goes over a container's is killed without a word. Not
here: a GPU's memory, and what a model gets of it (`mpt/engine/room.py`).
"""

import contextlib
import ctypes
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mpt import cgroups

_NO_LIMIT = 1 << 60  # version 1 writes the largest multiple of a page where there is none
# Which limit of the process, the line of /proc/self/status that counts against it, and how a shell calls it.
_OF_PROCESS = ((resource.RLIMIT_AS, "VmSize", "ulimit -v"), (resource.RLIMIT_DATA, "VmData", "ulimit -d"))


@dataclass(frozen=True)
class Memory:
    """Bytes that can still be had, caches that the system would drop included, of so many. whose: the limit's owner."""

    free: int
    total: int
    whose: str = "the machine's"

    def __str__(self) -> str:
        return f"{self.free / 1e9:.2f} GB that are free of {self.whose} {self.total / 1e9:.2f} GB"


def memory(system: Path = cgroups.SYSTEM) -> Memory:
    """What the limit that leaves the least leaves. system: where /proc and /sys are."""
    return min((_machine(system), *_groups(system), *_process(system)), key=lambda each: each.free)


def _machine(system: Path) -> Memory:
    """All of it; half counts as free where the system does not say."""
    found = _numbers(system / "proc/meminfo")
    try:
        return Memory(found["MemAvailable:"] * 1024, found["MemTotal:"] * 1024)
    except KeyError:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Memory(total // 2, total)


def _groups(system: Path) -> Iterator[Memory]:
    """What each control group leaves that has a limit. Pages of files are given up before a process is killed."""
    for folder in cgroups.folders("memory", system):
        v2 = [_number(folder / name) for name in ("memory.max", "memory.high")]
        limits = [each for each in (*v2, _number(folder / "memory.limit_in_bytes")) if each is not None]
        limits = [each for each in limits if each < _NO_LIMIT]
        used = _number(folder / "memory.current")
        used = _number(folder / "memory.usage_in_bytes") if used is None else used
        if not limits or used is None:
            continue
        stat = _numbers(folder / "memory.stat")  # version 1 counts the groups inside under `total_` alone
        cached = sum(stat.get(f"total_{name}", stat.get(name, 0)) for name in ("inactive_file", "active_file"))
        yield Memory(max(0, min(limits) - max(0, used - cached)), min(limits), "the container's")


def _process(system: Path) -> Iterator[Memory]:
    """What `ulimit` leaves this process."""
    used = _numbers(system / "proc/self/status")
    for which, line, name in _OF_PROCESS:
        limit, _ = resource.getrlimit(which)
        if limit != resource.RLIM_INFINITY:
            yield Memory(max(0, limit - used.get(f"{line}:", 0) * 1024), limit, f"`{name}`'s")


def _number(path: Path) -> int | None:
    line = cgroups.lines(path)[:1]
    return int(line[0]) if line and line[0].strip().isdecimal() else None


def _numbers(path: Path) -> dict[str, int]:
    """The first number behind each name of a file of such lines."""
    pairs = (line.split() for line in cgroups.lines(path))
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) > 1 and pair[1].isdecimal()}


def give_back_freed() -> None:
    """Return to the system what is free in this process's heap; glibc keeps it otherwise. Takes about 20 ms."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
