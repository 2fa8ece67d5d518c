"""A real Triton server on this machine, from `make triton`'s environment: started on free ports, stopped at the end."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from serving.ports import free_port

VENV = Path(__file__).parents[2] / ".triton"


def is_there() -> bool:
    return (VENV / "bin" / "python").exists() and any(VENV.glob("lib/python*/site-packages/pytriton"))


@dataclass(frozen=True)
class Server:
    http: str
    grpc: str


@contextlib.contextmanager
def running(repository: Path, work: Path) -> Iterator[Server]:
    """Serve a model repository. work: an empty folder for the backend and the log."""
    packages = next(VENV.glob("lib/python*/site-packages"))
    version = packages.parent.name.removeprefix("python")
    backend = work / "backends" / "python"
    backend.mkdir(parents=True)
    for path in (packages / "pytriton/tritonserver/backends/python").iterdir():
        if path.is_file():
            shutil.copy(path, backend)
    shutil.copy(
        packages / "pytriton/tritonserver/python_backend_stubs" / version / "triton_python_backend_stub", backend
    )
    http, grpc, metrics = free_port(), free_port(), free_port()
    # The stub links libpython and finds its packages by the first python3 of PATH.
    libraries = [
        f"{sys.base_prefix}/lib",
        str(sysconfig.get_config_var("LIBDIR")),
        str(packages / "nvidia_pytriton.libs"),
    ]
    env = {**os.environ, "LD_LIBRARY_PATH": ":".join(libraries), "PATH": f"{VENV / 'bin'}:{os.environ['PATH']}"}
    log = (work / "log").open("w")
    process = subprocess.Popen(
        [
            str(packages / "pytriton/tritonserver/bin/tritonserver"), f"--model-repository={repository}",
            f"--backend-directory={work / 'backends'}", "--http-address=127.0.0.1", f"--http-port={http}",
            "--grpc-address=127.0.0.1", f"--grpc-port={grpc}", "--metrics-address=127.0.0.1",
            f"--metrics-port={metrics}", "--allow-gpu-metrics=false", "--exit-timeout-secs=3",
        ],
        env=env, stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        _wait(f"http://127.0.0.1:{http}/v2/health/ready", process, work / "log")
        yield Server(f"127.0.0.1:{http}", f"127.0.0.1:{grpc}")
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
        process.kill()
        log.close()


def _wait(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    until = time.monotonic() + 100
    while time.monotonic() < until:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=1) as response:
            if response.status == 200:
                return
        time.sleep(0.1)
    raise AssertionError(f"Triton is not ready: {log.read_text()[-3000:]}")
