"""Prefixes on disk: a folder of files, each with the keys and values of a block of 128 tokens.

A block's name is a hash over its tokens and the name of the block before it, as in vLLM's prefix cache; the name before
the first is a hash over all else that the numbers depend on: weights, what computes them, adapter, and whose they are.
So texts that begin alike share files, a conversation that goes on adds files only, and a prefix of other weights or of
another client has names that nobody asks for. They are evicted by age, as everything else is.

What is read is what was written, or nothing: a file has its name once it is whole, and says the checksum of what is in
it. Several processes may use a folder. Not here: when a row is written or read (`prefix_transfers.py`).
"""

import hashlib
import json
import logging
import os
import secrets
import struct
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mpt.errors import UserError

log = logging.getLogger(__name__)

BLOCK = 128  # tokens of a file: 0.5 MiB of mpt-tiny, 64 MiB of a 7B
_FORMAT = b"MPTKV001"  # another number for another layout of file or block
_HEADER = struct.Struct("<8sQI")  # format, bytes of the block, CRC-32 of name and block
_SLACK = 20  # a twentieth of the limit is made free at once, and may be written between two looks at the folder
_ABANDONED_S = 3600  # after which a file that never became whole is removed


class PrefixFiles:
    """The blocks of one model in a folder that others, of whatever model, may use too."""

    def __init__(self, folder: Path, limit: int, identity: str = "") -> None:
        """limit: bytes that all files of the folder may have together. identity: all that a row's bits depend on beside
        its tokens, its adapter and its client. Raises UserError for a folder that cannot be used, or that is not ours
        alone.
        """
        self._folder, self.limit, self.identity = folder.expanduser().absolute() / "mpt-prefixes", limit, identity
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _require_private(self._folder)
            self._partial = self._folder / "partial"
            self._partial.mkdir(mode=0o700, exist_ok=True)
            self._secret = _secret(self._folder)
        except OSError as error:
            raise UserError(
                f"prefixes cannot be kept in `{folder}`: {error.strerror}; choose another folder"
            ) from error
        self._n_bytes = 0  # of the folder, as last looked at, and what was written since
        self._n_unseen = limit  # bytes written since: at first, nobody has looked

    @property
    def n_bytes(self) -> int:
        """Bytes of all files."""
        return self._n_bytes

    @property
    def folder(self) -> Path:
        """What lies in it is this class's, and readable by this user alone."""
        return self._folder

    # -- names ------------------------------------------------------------------------------------------------------

    def root(self, salt: str, adapter: str) -> bytes:
        """The name before the first block. Keyed with the folder's secret, so a name tells nothing where only names
        are known. salt: whose the rows are. adapter: a hash of its weights, empty without one."""
        text = json.dumps([self.identity, adapter, salt]).encode()
        return hashlib.blake2b(text, key=self._secret, digest_size=32).digest()

    @staticmethod
    def names(before: bytes, tokens: Sequence[int] | np.ndarray) -> Iterator[bytes]:
        """The names of the whole blocks of tokens that follow the block of a name."""
        numbers = np.asarray(tokens, dtype="<i8")
        for start in range(0, len(numbers) - BLOCK + 1, BLOCK):
            before = hashlib.blake2b(before + numbers[start : start + BLOCK].tobytes(), digest_size=32).digest()
            yield before

    # -- blocks -----------------------------------------------------------------------------------------------------

    def touch(self, name: bytes, used_ns: int) -> bool:
        """Whether a block is there; then it counts as used at this time, for eviction."""
        try:
            os.utime(self._path(name), ns=(used_ns, used_ns))
        except OSError:
            return False
        return True

    def write(self, name: bytes, block: np.ndarray, used_ns: int) -> None:
        """Keep a block, bytes, and evict what is too much then. Raises OSError; nothing is half-written then."""
        path = self._path(name)
        partial = self._partial / secrets.token_hex(16)
        n_bytes = _HEADER.size + len(block)
        self._make_room(n_bytes)
        try:
            with _create(partial) as file:
                file.write(_HEADER.pack(_FORMAT, len(block), _checksum(name, block)))
                file.write(block.data)
            os.utime(partial, ns=(used_ns, used_ns))
            path.parent.mkdir(mode=0o700, exist_ok=True)
            partial.replace(path)
        except OSError:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        self._n_bytes += n_bytes
        self._n_unseen += n_bytes

    def read(self, name: bytes, block: np.ndarray) -> bool:
        """Fill a block with what was written under a name; False where it is gone, or damaged and now removed."""
        path = self._path(name)
        try:
            with path.open("rb", buffering=0) as file:
                fits = file.read(_HEADER.size)
                n_read, n = 0, 1
                while n_read < len(block) and n:
                    n = file.readinto(block.data[n_read:]) or 0
                    n_read += n
                is_whole = n_read == len(block) and not file.read(1)
        except FileNotFoundError:  # evicted by another process
            return False
        except OSError as error:
            log.warning("a prefix on disk cannot be read and is removed: `%s`: %s", path, error)
            self._remove(path)
            return False
        if is_whole and fits == _HEADER.pack(_FORMAT, len(block), _checksum(name, block)):
            return True
        log.warning("a prefix on disk is damaged and is removed: `%s`", path)
        self._remove(path)
        return False

    def remove(self, names: Iterable[bytes]) -> None:
        for name in names:
            self._remove(self._path(name))

    # -- room -------------------------------------------------------------------------------------------------------

    def _make_room(self, n_bytes: int) -> None:
        """Look at the folder where that was long ago or it is full, and remove the files used longest ago."""
        slack = self.limit // _SLACK
        if self._n_unseen <= slack and self._n_bytes + n_bytes <= self.limit:
            return
        files = sorted(self._files())
        self._n_bytes, self._n_unseen = sum(size for _, size, _ in files), 0
        if self._n_bytes + n_bytes <= self.limit:
            return
        for _, size, path in files:
            if self._n_bytes + n_bytes <= self.limit - slack:
                break
            self._remove(Path(path))
            self._n_bytes -= size

    def look(self) -> None:
        """Count what is there, evict what is too much, and remove what processes that died have left."""
        now = time.time()
        for path in self._partial.iterdir():
            with suppress(OSError):
                if now - path.stat().st_mtime > _ABANDONED_S:
                    path.unlink()
        self._n_unseen = self.limit
        self._make_room(0)

    def _files(self) -> Iterator[tuple[int, int, str]]:
        """When each block was used last, in ns, its size and its path."""
        for part in os.scandir(self._folder):
            if len(part.name) == 2:
                with suppress(OSError):
                    for entry in os.scandir(part.path):
                        with suppress(FileNotFoundError):
                            found = entry.stat()
                            yield found.st_mtime_ns, found.st_size, entry.path

    def _path(self, name: bytes) -> Path:
        text = name.hex()
        return self._folder / text[:2] / text[2:]

    @staticmethod
    def _remove(path: Path) -> None:
        with suppress(OSError):  # gone already, or it stays: then it is tried again when room is needed
            path.unlink()


def used_at(start_ns: int, place: int) -> int:
    """When the block at a place of a text counts as used, if the text was at a time: later blocks are evicted first,
    since without those before them nobody finds them."""
    return start_ns - place


def _checksum(name: bytes, block: np.ndarray) -> int:
    """CRC-32: 3 GB/s on one core of an EPYC while it reads, where sha256 has 1.7 and blake2b 1.0."""
    return zlib.crc32(block.data, zlib.crc32(name))


def _require_private(folder: Path) -> None:
    """Raises UserError for a folder that another user owns, or can look into."""
    found = folder.stat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise UserError(
            f"`{folder}` belongs to another user or is open to others (mode {found.st_mode & 0o777:o}), and would hold "
            "what prompts say; make it mode 700, or choose another folder"
        )


def _secret(folder: Path) -> bytes:
    """32 random bytes that stay with the folder. Raises OSError."""
    path = folder / "secret"
    if not path.exists():
        partial = folder / "partial" / secrets.token_hex(16)
        with _create(partial) as file:
            file.write(secrets.token_bytes(32))
        with suppress(FileExistsError):  # another process was first
            os.link(partial, path)
        partial.unlink()
    return path.read_bytes()


def _create(path: Path) -> BinaryIO:
    """A new file that this user alone can read. Raises OSError."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
