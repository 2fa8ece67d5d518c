"""The story of a run: starts, saves, failures, resumes and what they cost, one line each.

`logbook.jsonl` is for programs, `logbook.txt` says the same for people, as the timeline of the MPT-7B launch blog did.
"""

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
            with (self._folder / name).open("a", encoding="utf-8") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())

    def entries(self) -> list[dict[str, Any]]:
        """What has been written so far; a line that a kill cut short is left out."""
        path = self._folder / "logbook.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("}")]


def where() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"
