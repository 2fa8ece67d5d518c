"""How many threads a model's steps take: what the machine, the container and the user allow.

By default the physical cores that this process may run on, no more than its container's quota of CPU time: threads
that wait for each other spin, so a thread over the quota would use up the time of those that compute. On a processor
with several kinds of cores the fast ones are taken, since all threads wait for the slowest.
"""

import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from mpt import cgroups
from mpt.errors import UserError


@dataclass(frozen=True)
class Threads:
    n: int
    why: str  # as a sentence fragment


def choose_threads(asked: int | None = None, system: Path = cgroups.SYSTEM) -> Threads:
    """asked: by the user. system: where /proc and /sys are. Raises UserError for more threads than CPUs."""
    allowed = _affinity()
    if asked is not None:
        if asked > len(allowed):
            raise UserError(f"`--threads {asked}` is more than the {len(allowed)} CPUs that this process may use")
        return Threads(asked, "--threads")
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if given.isdecimal() and int(given) > 0:
        return Threads(int(given), "OMP_NUM_THREADS")
    return allowed_threads(system)


def allowed_threads(system: Path = cgroups.SYSTEM) -> Threads:
    """What machine and container allow, whatever was asked for."""
    allowed = _affinity()
    fast = _fast(allowed, system)
    n, has_slow = len({_siblings(cpu, system) for cpu in fast}), fast < allowed
    if sys.platform == "darwin":  # where no file tells one core from another
        n = macos("hw.perflevel0.physicalcpu") or n
        has_slow = n < len(allowed)
    why = f"{n} {'fast' if has_slow else 'physical'} core{'s' * (n != 1)}"
    quota = _quota(system)
    if quota is not None and quota < n:
        return Threads(max(1, int(quota)), f"the container's quota is {quota:g} CPUs")
    nodes = (system / "sys/devices/system/node").glob("node[0-9]*/cpulist")
    n_nodes = sum(bool(_cpus(node) & fast) for node in nodes)
    if n_nodes > 1:  # memory of another node is slower to read
        why += f" of {n_nodes} NUMA nodes; for a process on one of them: `numactl --cpunodebind=0 --membind=0 COMMAND`"
    return Threads(n, why)


def obey_quota() -> None:
    """Have torch compute with no more threads in this process than `choose_threads` says."""
    import torch  # by those who have it already

    torch.set_num_threads(min(torch.get_num_threads(), choose_threads().n))


def n_cpus(system: Path = cgroups.SYSTEM) -> int:
    """How many processes of their own can compute at a time: the CPUs of the affinity mask, at most the quota."""
    quota = _quota(system)
    return len(_affinity()) if quota is None else max(1, min(len(_affinity()), int(quota)))


def macos(name: str) -> int | None:
    """A number that macOS has under this name of `sysctl`; None where it has none."""
    value, size = ctypes.c_int64(0), ctypes.c_size_t(8)  # of four bytes or eight, the lowest first
    failed = ctypes.CDLL(None).sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, 0)
    return None if failed else value.value


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _fast(allowed: set[int], system: Path) -> set[int]:
    """Those that are no slower than others: of Intel's processors with two kinds of cores, of ARM's with several."""
    intel = _cpus(system / "sys/devices/cpu_core/cpus") & allowed
    if intel:
        return intel
    files = {cpu: system / f"sys/devices/system/cpu/cpu{cpu}/cpu_capacity" for cpu in allowed}
    found = {cpu: line for cpu, file in files.items() for line in cgroups.lines(file)[:1]}
    capacities = {cpu: int(line) for cpu, line in found.items() if line.isdecimal()}
    most = max(capacities.values(), default=0)
    return {cpu for cpu in allowed if capacities.get(cpu, most) >= 0.9 * most}


def _siblings(cpu: int, system: Path) -> frozenset[int]:
    """The CPUs of one core; the CPU alone where the system does not say."""
    found = _cpus(system / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    return frozenset(found or {cpu})


def _cpus(path: Path) -> set[int]:
    """The numbers of a list such as `0-3,8`; none where there is no such file."""
    try:
        parts = [part.partition("-") for part in path.read_text().strip().split(",") if part]
        return {n for first, _, last in parts for n in range(int(first), int(last or first) + 1)}
    except (OSError, ValueError):
        return set()


def _quota(system: Path) -> float | None:
    """CPUs' worth of time that the container may use; None where nothing limits it."""
    found = (_limit(folder) for folder in cgroups.folders("cpu", system))
    return min((each for each in found if each is not None), default=None)


def _limit(folder: Path) -> float | None:
    line = cgroups.lines(folder / "cpu.max")  # v2: "150000 100000", or "max 100000"
    both = line[0].split() if line else []
    if not both:
        v1 = (folder / f"cpu.cfs_{what}_us" for what in ("quota", "period"))  # a quota of -1: none
        both = [line for file in v1 for line in cgroups.lines(file)]
    try:
        quota, period = int(both[0]), int(both[1])
    except (ValueError, IndexError):
        return None
    return quota / period if quota > 0 and period > 0 else None
