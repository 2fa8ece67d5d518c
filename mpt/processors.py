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

from mpt.errors import UserError

_SYSTEM = Path("/")


@dataclass(frozen=True)
class Threads:
    n: int
    why: str  # as a sentence fragment


def choose_threads(asked: int | None = None, system: Path = _SYSTEM) -> Threads:
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


def allowed_threads(system: Path = _SYSTEM) -> Threads:
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
    capacities = {cpu: int(line) for cpu, file in files.items() for line in _lines(file)[:1] if line.isdecimal()}
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
    """CPUs' worth of time that the container may use, of cgroup v2 or v1; None where nothing limits it."""
    found = []
    for line in _lines(system / "proc/self/cgroup"):
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        is_v2 = number == "0" and not controllers
        if not is_v2 and "cpu" not in controllers.split(","):
            continue
        root = system / "sys/fs/cgroup" / ("" if is_v2 else controllers)
        own = root / path.strip("/")
        for folder in [own, *own.parents] if own.is_dir() else [root]:  # in a container the own path is not there
            limit = _limit(folder)
            if limit is not None:
                found.append(limit)
            if folder == root:
                break
    return min(found, default=None)


def _limit(folder: Path) -> float | None:
    line = _lines(folder / "cpu.max")  # v2: "150000 100000", or "max 100000"
    both = line[0].split() if line else []
    if not both:
        both = [*_lines(folder / "cpu.cfs_quota_us"), *_lines(folder / "cpu.cfs_period_us")]  # v1; -1: none
    try:
        quota, period = int(both[0]), int(both[1])
    except (ValueError, IndexError):
        return None
    return quota / period if quota > 0 and period > 0 else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
