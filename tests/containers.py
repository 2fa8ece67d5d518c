"""Containers of the kernel's own: a control group whose limit kills, where this process may make one."""

import itertools
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

_ROOT = Path("/sys/fs/cgroup")
_numbers = itertools.count()


@dataclass(frozen=True)
class Container:
    """A control group. Processes that `command` starts are in it, and so are theirs."""

    folders: tuple[Path, ...]

    def command(self, *words: str | Path) -> list[str]:
        """What starts such a command inside."""
        enter = " && ".join(f"echo $$ > {folder}/cgroup.procs" for folder in self.folders)
        return ["sh", "-c", f'{enter} && exec "$@"', "sh", *map(str, words)]

    def kills(self) -> int:
        """How often the kernel has killed a process of it because memory was short."""
        v1, v2 = self.folders[0] / "memory.oom_control", self.folders[0] / "memory.events"
        pairs = (line.split() for line in (v1 if v1.exists() else v2).read_text().splitlines())
        return next(int(value) for name, value in pairs if name == "oom_kill")


@contextmanager
def container(*, memory: int | None = None, cpus: float | None = None) -> Iterator[Container]:
    """One with these limits. Skips the test where this process may not make it."""
    name = f"mpt-test-{os.getpid()}-{next(_numbers)}"
    limits = {
        "memory": {"memory.limit_in_bytes": str(memory)} if memory else {},
        "cpu": {"cpu.cfs_quota_us": f"{int(100_000 * cpus)}"} if cpus else {},
    }
    if not (_ROOT / "memory").is_dir():
        v2 = {"memory.max": str(memory)} if memory else {}
        limits = {"": v2 | ({"cpu.max": f"{int(100_000 * cpus)} 100000"} if cpus else {})}
    folders = tuple(_ROOT / controller / name for controller, files in limits.items() if files)
    try:
        for folder, files in zip(folders, filter(None, limits.values()), strict=True):
            folder.mkdir()
            for file, value in files.items():
                (folder / file).write_text(value)
    except OSError as error:
        _remove(folders)
        pytest.skip(f"no control group can be made here: {error}")
    try:
        yield Container(folders)
    finally:
        _remove(folders)


def _remove(folders: Sequence[Path]) -> None:
    """What is left in them is killed; a group can be removed once its last process is gone."""
    for folder in folders:
        until = time.monotonic() + 100
        while folder.is_dir() and time.monotonic() < until:
            for pid in (folder / "cgroup.procs").read_text().split():
                os.kill(int(pid), signal.SIGKILL)
            try:
                folder.rmdir()
            except OSError:
                time.sleep(0.05)
