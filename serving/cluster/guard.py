"""What belongs to a local cluster, and its end: `python guard.py FOLDER` waits until `mpt cluster` has gone, however.

Every process of a cluster has its folder in its environment, whoever started it. Ray ends most of them with their
parents, some after a minute, and HAProxy never; what is left keeps ports and memory. Without imports beyond Python's
own: it runs beside each cluster, and is to cost little.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

VARIABLE = "MPT_CLUSTER_FOLDER"


def members(folder: str, proc: Path = Path("/proc")) -> list[int]:
    """The processes of the cluster in this folder, except this one."""
    entry = f"{VARIABLE}={folder}".encode()
    found = []
    for each in proc.iterdir():
        if not each.name.isdigit() or int(each.name) == os.getpid():
            continue
        try:
            environment = (each / "environ").read_bytes()
        except OSError:  # gone meanwhile, or another user's
            continue
        if entry in environment.split(b"\0"):
            found.append(int(each.name))
    return found


def end(folder: str, but: frozenset[int] = frozenset(), within_s: float = 10.0) -> list[int]:
    """Kill what belongs to a cluster until nothing is left; those that would not go. but: pids that stay."""
    until = time.monotonic() + within_s
    n_empty = 0  # looks in a row: one that is just becoming another program has no environment for a moment
    while n_empty < 2:
        left = [pid for pid in members(folder) if pid not in but]
        if left and time.monotonic() > until:
            return left
        n_empty = 0 if left else n_empty + 1
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return []


@contextlib.contextmanager
def watching(folder: str) -> Iterator[int]:
    """The pid of a guard of this folder's cluster, which does its work at the end of this process or of the block."""
    process = subprocess.Popen(
        [sys.executable, __file__, folder],
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C in a terminal goes to the driver alone
        env={**os.environ, VARIABLE: folder},
    )
    try:
        yield process.pid
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


def main() -> None:
    """Wait for the end of stdin, which `mpt cluster` holds open and never writes to; then end what it left."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    end(sys.argv[1])


if __name__ == "__main__":
    main()
