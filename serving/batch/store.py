"""The files and batches of `/v1/files` and `/v1/batches`, in a folder that outlives the server.

    FOLDER/files/ID.jsonl    a file's content; ID.json  what is known of it
    FOLDER/batches/ID.json   a batch, as clients see it and what else must be known to go on with it

Each belongs to an owner, the salt of a key; another owner is told that there is no such thing. What is known of a file
is written behind its content, so content without it is of a batch that runs, or of an upload that broke off. One server
at a time has the folder.
"""

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from mpt.errors import DamagedFile, MachineRefused, UserError
from mpt.files import read_json
from serving.batch.lines import new_id
from serving.errors import InvalidRequest, NotFound

MAX_FILE_BYTES = 100 << 20
MAX_REQUESTS = 50_000  # of one batch, as OpenAI has it
_MAX_OWNER_BYTES = 1 << 30  # of all files of one owner, results too
_MAX_OWNER_FILES = 1000
_MAX_UNFINISHED = 16  # batches of one owner
_MAX_OWNER_BATCHES = 1000  # the oldest that are over are forgotten
_ID = re.compile(r"[a-z]+[-_][0-9a-f]{32}")
FINISHED = frozenset({"completed", "failed", "expired", "cancelled"})


@dataclass
class StoredFile:
    """One file. shown: OpenAI's `file` object."""

    owner: str
    shown: dict[str, Any]

    @property
    def id(self) -> str:
        return str(self.shown["id"])


@dataclass
class StoredBatch:
    """One batch. shown: OpenAI's `batch` object. client: the name of its key in logs.

    limits: requests and tokens a minute. models, quotas: what else its key's line said. results: the ids that its files
    of answers and of failures have, or will have once it is over.
    """

    owner: str
    client: str
    limits: tuple[int | None, int | None]
    shown: dict[str, Any]
    models: list[str] | None = None
    quotas: dict[str, int | None] = field(default_factory=dict)
    results: tuple[str, str] = field(default_factory=lambda: (new_id("file-"), new_id("file-")))

    @property
    def id(self) -> str:
        return str(self.shown["id"])

    @property
    def is_over(self) -> bool:
        return self.shown["status"] in FINISHED


class Store:
    """The folder. Raises UserError where it cannot be used, DamagedFile for a file in it that cannot be read."""

    def __init__(self, folder: Path) -> None:
        self._files_folder, self._batches_folder = folder / "files", folder / "batches"
        try:
            for each in (self._files_folder, self._batches_folder):
                each.mkdir(mode=0o700, parents=True, exist_ok=True)  # prompts and answers lie there
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise UserError(f"`--batch-dir {folder}` cannot be written to: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise UserError(f"`--batch-dir {folder}` is another server's; give each its own") from error
        self._files = {row.id: row for row in map(_file, sorted(self._files_folder.glob("*.json")))}
        self._batches = {row.id: row for row in map(_batch, sorted(self._batches_folder.glob("*.json")))}
        self._drop_leftovers()

    def close(self) -> None:
        """Let another server have the folder."""
        os.close(self._lock)

    def _drop_leftovers(self) -> None:
        """Remove what uploads that broke off and batches that are over have left."""
        kept = set(self._files)
        for batch in self._batches.values():
            kept |= set() if batch.is_over else set(batch.results)
        for path in self._files_folder.iterdir():
            if path.stem not in kept or path.suffix == ".partial":
                path.unlink()

    # -- files ---------------------------------------------------------------------------------------------------

    def content(self, file_id: str) -> Path:
        """Where a file's content is, or will be."""
        assert _ID.fullmatch(file_id), file_id
        return self._files_folder / f"{file_id}.jsonl"

    def files(self, owner: str) -> list[StoredFile]:
        """An owner's, the newest first."""
        return _newest_first(file for file in self._files.values() if file.owner == owner)

    def file(self, owner: str, file_id: str) -> StoredFile:
        """Raises NotFound."""
        found = self._files.get(file_id)
        if found is None or found.owner != owner:
            raise NotFound(f"there is no file `{file_id[:60]}`", code="file_not_found", param="file_id")
        return found

    def check_room(self, owner: str, n_bytes: int) -> None:
        """Raises InvalidRequest where an owner has no room for one more file."""
        files = self.files(owner)
        total = sum(file.shown["bytes"] for file in files)
        if len(files) >= _MAX_OWNER_FILES or total + n_bytes > _MAX_OWNER_BYTES:
            raise InvalidRequest(
                f"you have {len(files)} files of {total} bytes; at most {_MAX_OWNER_FILES} of {_MAX_OWNER_BYTES} bytes "
                "are kept for one key; delete some",
                code="storage_limit_exceeded",
                param="file",
            )

    def keep(self, source: IO[bytes]) -> str:
        """The id of a file that gets this content, from any thread; nobody sees it yet. Raises MachineRefused."""
        file_id = new_id("file-")
        partial = self.content(file_id).with_suffix(".partial")
        try:
            with partial.open("wb") as to:
                shutil.copyfileobj(source, to)
            partial.rename(self.content(file_id))
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise MachineRefused(f"an upload cannot be kept: {error.strerror}") from error
        return file_id

    def show_file(self, owner: str, file_id: str, name: str, purpose: str) -> StoredFile:
        """Make a file that has its content one that its owner sees."""
        shown = {
            "id": file_id, "object": "file", "bytes": self.content(file_id).stat().st_size,
            "created_at": int(time.time()), "filename": name, "purpose": purpose, "status": "processed",
            "expires_at": None, "status_details": None,
        }  # fmt: skip
        file = StoredFile(owner, shown)
        _write(self._files_folder / f"{file_id}.json", asdict(file))
        self._files[file_id] = file
        return file

    def delete_file(self, owner: str, file_id: str) -> None:
        """Raises NotFound, and InvalidRequest for one that a batch is reading."""
        self.file(owner, file_id)
        for batch in self._batches.values():
            if not batch.is_over and batch.shown["input_file_id"] == file_id:
                message = f"`{batch.id}` reads this file; cancel it first, or wait for its end"
                raise InvalidRequest(message, code="file_in_use", param="file_id")
        (self._files_folder / f"{file_id}.json").unlink()
        self.content(file_id).unlink()
        del self._files[file_id]

    # -- batches -------------------------------------------------------------------------------------------------

    def batches(self, owner: str | None = None) -> list[StoredBatch]:
        """An owner's, or all, the newest first."""
        return _newest_first(batch for batch in self._batches.values() if owner in (None, batch.owner))

    def batch(self, owner: str, batch_id: str) -> StoredBatch:
        """Raises NotFound."""
        found = self._batches.get(batch_id)
        if found is None or found.owner != owner:
            raise NotFound(f"there is no batch `{batch_id[:60]}`", code="batch_not_found", param="batch_id")
        return found

    def add_batch(self, batch: StoredBatch) -> None:
        """Raises InvalidRequest where its owner has too many unfinished ones."""
        others = self.batches(batch.owner)
        unfinished = [each for each in others if not each.is_over]
        if len(unfinished) >= _MAX_UNFINISHED:
            raise InvalidRequest(
                f"{len(unfinished)} of your batches are not over, and at most {_MAX_UNFINISHED} may be; wait or cancel",
                code="batch_limit_exceeded",
            )
        self.save(batch)
        self._batches[batch.id] = batch
        for old in [each for each in others if each.is_over][_MAX_OWNER_BATCHES - len(unfinished) - 1 :]:
            (self._batches_folder / f"{old.id}.json").unlink()
            del self._batches[old.id]

    def save(self, batch: StoredBatch) -> None:
        """Write a batch as it is now. Raises MachineRefused."""
        _write(self._batches_folder / f"{batch.id}.json", asdict(batch))


def _newest_first(rows: Iterable[Any]) -> list[Any]:
    return sorted(rows, key=lambda row: (row.shown["created_at"], row.id), reverse=True)


def _file(path: Path) -> StoredFile:
    try:
        return StoredFile(**read_json(path))
    except TypeError as error:
        raise DamagedFile(f"`{path}` is not what this server writes: {error}") from error


def _batch(path: Path) -> StoredBatch:
    try:
        row = StoredBatch(**read_json(path))
    except TypeError as error:
        raise DamagedFile(f"`{path}` is not what this server writes: {error}") from error
    (requests, tokens), (good, bad) = row.limits, row.results  # lists, in JSON
    row.limits, row.results = (requests, tokens), (good, bad)
    return row


def _write(path: Path, row: dict[str, Any]) -> None:
    """Whole or not at all, also where the machine goes down."""
    partial = path.with_suffix(".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            json.dump(row, file)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except OSError as error:
        raise MachineRefused(f"`{path}` cannot be written: {error.strerror}") from error
