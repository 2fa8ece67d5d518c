"""What clients ask, written to a file of its own where the operator wants that: `--log-requests FILE`. Off by default.

A line of JSON for each request, its body redacted (`redaction.py`); answers are not written. A thread writes, so that
no request waits for the disk. Several routers of a machine may share the file. It is rotated; its user alone reads it.
"""

import contextlib
import fcntl
import itertools
import logging
import os
import queue
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from mpt.errors import UserError
from serving.redaction import redacted_json

if TYPE_CHECKING:
    from fastapi import Request

log = logging.getLogger(__name__)

MAX_FILE_BYTES = 100_000_000
N_OLD_FILES = 5
_LONGEST_TEXT = 16_384  # characters of one text in a body
_LONGEST_BODY = 1 << 20  # bytes; of a longer body its size is written
_MOST_WAITING = 64 << 20  # bytes of bodies that wait to be written; more requests are left out
_COMPLAIN_S = 60.0  # between two warnings about requests that are left out


def check_writable(path: Path) -> None:
    """Raises UserError where the file cannot be written; makes it, for its user alone."""
    try:
        os.close(_open(Path(f"{path}.lock")))
        os.close(_open(path))
    except OSError as error:
        raise UserError(
            f"the request log `{path}` (log_requests) cannot be written: {error.strerror}; give another file"
        ) from error


class RequestLog:
    """The file. Raises UserError where it cannot be written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._queue: queue.SimpleQueue[tuple[dict[str, Any], bytes]] = queue.SimpleQueue()
        self._n_waiting, self._complained, self._lock = 0, float("-inf"), threading.Lock()
        check_writable(path)
        log.warning(
            "WHAT CLIENTS ASK IS WRITTEN to %s (log_requests): prompts, without addresses, phone numbers and keys of "
            "known forms; tell your users",
            path,
        )
        threading.Thread(target=self._write_all, name="request log", daemon=True).start()

    def note(self, request: "Request", body: bytes) -> None:
        """Write a request's line, soon."""
        with self._lock:
            if self._n_waiting + len(body) > _MOST_WAITING:
                self._complain("more is asked than the disk takes")
                return
            self._n_waiting += len(body)
        state = request.state
        about = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": state.request_id,
            "client": getattr(state, "client", "-"),
            "path": request.scope["path"],
            "n_bytes": len(body),
        }
        self._queue.put((about, body))

    def flush(self) -> None:
        """Wait until everything that was noted is written."""
        while self._n_waiting:
            time.sleep(0.01)

    def _write_all(self) -> None:
        while True:
            about, body = self._queue.get()
            try:
                self._write(orjson.dumps({**about, "body": _readable(body)}, default=str) + b"\n")
            except OSError as error:
                self._complain(f"`{self._path}` cannot be written: {error.strerror}")
            finally:
                with self._lock:
                    self._n_waiting -= len(body)

    def _write(self, line: bytes) -> None:
        with self._alone() as file:
            if os.fstat(file).st_size + len(line) <= MAX_FILE_BYTES:
                os.write(file, line)
                return
            names = [self._path, *(Path(f"{self._path}.{n}") for n in range(1, N_OLD_FILES + 1))]
            for newer, older in reversed(list(itertools.pairwise(names))):
                with contextlib.suppress(FileNotFoundError):
                    newer.replace(older)
            fresh = _open(self._path)
            try:
                os.write(fresh, line)
            finally:
                os.close(fresh)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[int]:
        """The file, while no other process writes it or moves it away."""
        lock = _open(Path(f"{self._path}.lock"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            file = _open(self._path)
            try:
                yield file
            finally:
                os.close(file)
        finally:
            os.close(lock)

    def _complain(self, why: str) -> None:
        if time.monotonic() - self._complained > _COMPLAIN_S:
            self._complained = time.monotonic()
            log.warning("requests are missing in the request log: %s", why)


def _open(path: Path) -> int:
    """For its user alone, also where it was there before with another mode."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    os.fchmod(file, 0o600)
    return file


def _readable(body: bytes) -> Any:
    """A body's JSON, redacted; None where it is too long or none."""
    if len(body) > _LONGEST_BODY:
        return None
    try:
        return redacted_json(orjson.loads(body), _LONGEST_TEXT)
    except (orjson.JSONDecodeError, RecursionError):
        return None


def note_request(request: "Request", body: bytes) -> None:
    """Write a request to the log of its app, if that has one."""
    found: RequestLog | None = request.app.state.request_log
    if found is not None:
        found.note(request, body)


def request_log(path: Path | None) -> RequestLog | None:
    """The log at a path. Raises UserError where it cannot be written."""
    return None if path is None else RequestLog(path)
