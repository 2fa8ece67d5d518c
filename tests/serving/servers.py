"""`mpt serve` and `mpt cluster` as processes, for tests that treat them alike."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from serving.cluster.local import NOT_IN_TIME


@dataclass
class Server:
    kind: str  # serve or cluster
    url: str
    process: subprocess.Popen[str]
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=2000))  # of its stderr
    reader: threading.Thread | None = None  # of what comes once it is ready

    def stop(self, with_signal: int = signal.SIGTERM) -> int:
        """Its exit status; it is killed, with what it started, if it does not leave within a minute."""
        if self.process.poll() is None:
            self.process.send_signal(with_signal)
        try:
            return self.process.wait(100)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            return self.process.wait()


def start(kind: str, *options: str, program: tuple[str, ...] = ("-m", "mpt"), within: Sequence[str] = ()) -> Server:
    """`mpt KIND OPTIONS`, ready. Its stderr is read on: a full pipe would block it. program: in place of `mpt`.

    within: words that start it in a container (`Container.command`). A machine that tests is busy, and Ray waits for
    its own processes for 30 s, so a cluster is started once more.
    """
    try:
        return _start(kind, options, program, within)
    except AssertionError as error:
        if NOT_IN_TIME not in str(error):
            raise
    return _start(kind, options, program, within)


def _start(kind: str, options: Sequence[str], program: tuple[str, ...], within: Sequence[str]) -> Server:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [*within, sys.executable, *program, kind, *options], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        text=True, env=environment, start_new_session=True,
    )  # fmt: skip
    server = Server(kind, "", process)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            server.lines.append(line)
            if url := re.search(r"ready after .* on (http://[^\s,]+)", line):
                server.url = url[1]
                server.reader = threading.Thread(target=lambda: server.lines.extend(process.stderr), daemon=True)
                server.reader.start()
                return server
    except BaseException as error:  # the time of the test is over
        error.add_note(f"it said so far: {''.join(server.lines)}")
        server.stop(signal.SIGKILL)
        raise
    raise AssertionError(f"left with {process.wait()} before it was ready: {''.join(server.lines)}")


@contextmanager
def running(kind: str, *options: str) -> Iterator[Server]:
    """`mpt KIND OPTIONS`, ready; stopped at the end if it still runs."""
    server = start(kind, *options)
    try:
        yield server
    finally:
        server.stop()


def serve_config(folder: Path, models: dict[str, dict[str, Any]], **args: Any) -> Path:
    """A Ray Serve config of these models."""
    path = folder / "cluster.yaml"
    application = {
        "name": "mpt",
        "route_prefix": "/",
        "import_path": "serving.cluster.deployment:app",
        "args": {"models": models, **args},
    }
    config = {"applications": [application], "logging_config": {"enable_access_log": False}}
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path
