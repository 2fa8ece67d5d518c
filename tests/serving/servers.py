"""`mpt serve` and `mpt cluster` as processes, for tests that treat them alike."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


@dataclass
class Server:
    kind: str  # serve or cluster
    url: str
    process: subprocess.Popen[str]
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=2000))  # of its stderr

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextmanager
def running(kind: str, *options: str) -> Iterator[Server]:
    """`mpt KIND OPTIONS`, ready; killed at the end if it still runs."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "mpt", kind, *options], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        env=environment, start_new_session=True,
    )  # fmt: skip
    lines: deque[str] = deque(maxlen=2000)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if url := re.search(r"ready after .* on (http://[^\s,]+)", line):
                break
        else:
            raise AssertionError(f"left with {process.wait()} before it was ready: {''.join(lines)}")
        server = Server(kind, url[1], process, lines)
        threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True).start()  # a full pipe would block it
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def serve_config(folder: Path, models: dict[str, dict[str, Any]], **args: Any) -> Path:
    """A Ray Serve config of these models."""
    path = folder / "cluster.yaml"
    application = {
        "name": "mpt",
        "route_prefix": "/",
        "import_path": "serving.deployment:app",
        "args": {"models": models, **args},
    }
    config = {"applications": [application], "logging_config": {"enable_access_log": False}}
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
