"""The story of a run: starts, saves, failures, resumes and what they cost, one line each.

`logbook.jsonl` is for programs, `logbook.txt` says the same for people, as the timeline of the MPT-7B launch blog did.
"""

import contextlib
import datetime
import json
import os
import socket
from pathlib import Path
from typing import Any


class Logbook:
    """Appends to <folder>/logbook.jsonl and logbook.txt; silent on all ranks but the first."""

    def __init__(self, folder: Path, is_writer: bool = True) -> None:
        self._folder, self._is_writer = folder, is_writer

    def write(self, event: str, **facts: Any) -> None:
        """Add a line; it is on disk when this returns, since what comes next may be a crash."""
        if not self._is_writer:
            return
        now = datetime.datetime.now(datetime.UTC)
        line = {"time": now.isoformat(timespec="seconds"), "event": event, **facts}
        story = "  ".join(f"{key} {value}" for key, value in facts.items())
        for name, text in (
            ("logbook.jsonl", json.dumps(line, ensure_ascii=False)),
            ("logbook.txt", f"{now:%Y-%m-%d %H:%M:%S} UTC  {event:<10}  {story}"),
        ):
            path = self._folder / name
            with path.open("ab") as file:
                file.write(_ending(path) + text.encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())

    def entries(self) -> list[dict[str, Any]]:
        """What has been written so far; a line that a kill cut short is left out."""
        path = self._folder / "logbook.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found


def _ending(path: Path) -> bytes:
    """What ends the last line of a file whose writer was cut short; nothing where it is whole."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return b""
        file.seek(-1, os.SEEK_END)
        return b"" if file.read(1) == b"\n" else b"\n"


def where() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"
