"""Runs programs that a model has written, with their tests, where they can do no harm.

Each runs in bubblewrap: it sees Python, an empty folder, no network and no other process, and its time, memory and
files are limited. Without bubblewrap nothing runs. Not here: which programs (`tasks.py`).
"""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from mpt.errors import UserError
from mpt.processors import n_cpus

_SECONDS = 10
_BYTES = 2 << 30  # of address space
_WRITTEN = 1 << 20  # of any file, what it prints included


def check(task: str, may_run: bool) -> None:
    """Raises UserError where programs may not run, or have nowhere to."""
    if not may_run:
        raise UserError(f"`{task}` runs programs that the model writes, in a sandbox; allow it with --run-programs")
    if shutil.which("bwrap") is None:
        raise UserError(
            f"`{task}` runs programs in bubblewrap, which is not here; install it (`apt install bubblewrap`)"
        )
    if not run(["pass"])[0]:
        raise UserError(
            f"`{task}` runs programs in bubblewrap, which may not make namespaces here; use another machine"
        )


def run(programs: Sequence[str]) -> list[bool]:
    """Of each program, whether it ended by itself, without an error, in time."""
    with ThreadPoolExecutor(n_cpus()) as pool:
        return list(pool.map(_passes, programs))


def _passes(program: str) -> bool:
    # As nobody, in an empty folder, with Python itself to read and nothing else of this machine.
    box = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    box += ["--uid", "65534", "--gid", "65534", "--dev", "/dev", "--proc", "/proc"]
    box += ["--tmpfs", "/tmp", "--chdir", "/tmp"]
    for folder in ("/usr", "/lib", "/lib64", "/bin", sys.base_prefix):
        box += ["--ro-bind-try", folder, folder]
    python = [os.path.realpath(sys.executable), "-I", "-S", "-B", "-"]
    try:
        done = subprocess.run(
            [*box, *python],
            input=program.encode(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=_SECONDS,
            preexec_fn=_limit,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def _limit() -> None:
    for what, most in (
        (resource.RLIMIT_AS, _BYTES),
        (resource.RLIMIT_CPU, _SECONDS),
        (resource.RLIMIT_FSIZE, _WRITTEN),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))
