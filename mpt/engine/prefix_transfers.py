"""Rows on their way to disk and back, beside the engine's steps: a block of 128 tokens at a time.

Looking for a prompt's prefix, reading one and writing blocks have threads of their own. A row that is being filled is
nobody else's; of a row that is to be kept the engine's thread copies one block after another, for as small a share of
the time of its steps that nobody notices, so rows are never read while they may change, move or go.

A full or failing disk costs one warning, and nothing is written for a minute. Not here: names, files and eviction
(`prefix_files.py`), which rows there are (`scheduler.py`).
"""

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from mpt.backends.backend import Row, RowCopies
from mpt.engine.prefix_files import BLOCK, PrefixFiles, used_at
from mpt.lora import Adapter

log = logging.getLogger(__name__)

LEAST = 1024  # tokens of a prompt that is worth files: a shorter one is read in about the time of a few steps
_SHARE = 0.03  # of the time of steps, for copying blocks
_MOST_CREDIT_S = 0.02  # of it at once
_QUEUE_BYTES = 64 << 20  # blocks copied and not written yet; one at least, however large
_PAUSE_S = 60.0  # after a failure to write


@dataclass(eq=False)
class Trail:
    """How far a row is on disk: its first n_blocks blocks."""

    root: bytes  # the name before its first block
    used_ns: int  # when it was asked for
    n_blocks: int = 0
    name: bytes = b""  # of the last of them
    n_failures: int = 0  # those there had been; after another one it is not known what is on disk

    def go_back(self) -> None:
        self.n_blocks, self.name = 0, self.root

    def step(self, name: bytes) -> None:
        self.n_blocks, self.name = self.n_blocks + 1, name


@dataclass(eq=False)
class Lookup:
    """What the disk holds of a prompt; `done` once it has been looked for."""

    names: list[bytes] = field(default_factory=list)  # of its first blocks
    trail: Trail | None = None  # None: nothing of it is to be written
    done: bool = False

    @property
    def n_tokens(self) -> int:
        return len(self.names) * BLOCK


@dataclass(eq=False)
class Loading:
    """A row on its way from disk: its first n_tokens are there, and no more will come once it is `done`."""

    row: Row
    names: list[bytes]
    n_tokens: int = 0
    done: bool = False
    cancelled: bool = False


class Owner(Protocol):
    """A row whose tokens before row.length do not change, and how far it is on disk."""

    @property
    def row(self) -> Row | None: ...
    @property
    def trail(self) -> Trail | None: ...
    @property
    def tokens(self) -> "list[int] | np.ndarray": ...


class PrefixTransfers:
    """Between the rows of one engine and files. Everything but the jobs themselves runs on the engine's thread."""

    def __init__(self, files: PrefixFiles, rows: RowCopies, wake: Callable[[], None]) -> None:
        """wake: called, from any thread, when something is done that the engine may wait for."""
        self.n_loaded_tokens = self.n_written_tokens = 0
        self._files, self._rows, self._wake = files, rows, wake
        self._block_bytes = rows.block_bytes(BLOCK)
        self._lookups, self._loads, self._writes = (
            ThreadPoolExecutor(1, f"prefix-{what}") for what in ("lookup", "load", "write")
        )
        self._n_queued = self._n_done = 0  # blocks: by the engine's thread, and by the one that writes
        self._n_failures, self._off_until = 0, 0.0
        self._credit_s = 0.0
        self._is_behind = False
        self._closing = False
        self._writes.submit(self._guarded, files.look)

    @property
    def n_bytes(self) -> int:
        """Bytes of the folder."""
        return self._files.n_bytes

    @property
    def wants_turn(self) -> bool:
        """Whether there is a block to copy, and room for it."""
        return self._is_behind and self._has_room

    # -- from disk --------------------------------------------------------------------------------------------------

    def look_up(self, tokens: list[int], salt: str, adapter: Adapter | None) -> Lookup | None:
        """Look for a prompt's prefix; None for a prompt that is too short to be kept."""
        if len(tokens) < LEAST:
            return None
        lookup = Lookup()
        self._lookups.submit(self._look, lookup, list(tokens), salt, adapter)
        return lookup

    def load(self, row: Row, names: list[bytes]) -> Loading:
        """Fill a fresh row, which nobody else may touch until it is done, or cancelled and let go of."""
        loading = Loading(row, names)
        self._loads.submit(self._load, loading)
        return loading

    def loaded(self, loading: Loading, trail: Trail, n_tokens: int) -> None:
        """A row has come, n_tokens of which are used; what of it was damaged is written again."""
        self.n_loaded_tokens += n_tokens
        n_blocks = loading.n_tokens // BLOCK
        trail.n_blocks, trail.name = n_blocks, loading.names[n_blocks - 1] if n_blocks else trail.root

    def _look(self, lookup: Lookup, tokens: list[int], salt: str, adapter: Adapter | None) -> None:
        try:
            root = self._files.root(salt, "" if adapter is None else adapter.digest)
            trail = Trail(root, time.time_ns(), name=root, n_failures=self._n_failures)
            for place, name in enumerate(self._files.names(root, tokens)):
                if not self._files.touch(name, used_at(trail.used_ns, place)):
                    break
                lookup.names.append(name)
                trail.step(name)
            lookup.trail = trail
        except Exception:
            log.exception("a prompt's prefix cannot be looked for on disk; it is read as usual")
            lookup.names.clear()
        lookup.done = True
        self._wake()

    def _load(self, loading: Loading) -> None:
        try:
            block = np.empty(self._block_bytes, dtype=np.uint8)
            for name in loading.names:
                if loading.cancelled or self._closing or not self._files.read(name, block):
                    break
                self._rows.put_in(loading.row, loading.n_tokens, BLOCK, block)
                loading.n_tokens += BLOCK
        except Exception:
            log.exception("a prefix cannot be loaded; the prompt is read as usual from there on")
        loading.done = True
        self._wake()

    # -- to disk ----------------------------------------------------------------------------------------------------

    def keep(self, owners: Iterable[Owner], step_s: float | None) -> None:
        """Copy blocks that are whole and not on disk yet, as many as may be. step_s: what the last step took, whose
        share this must not pass; None where nobody waits."""
        if step_s is not None:
            self._credit_s = min(self._credit_s + _SHARE * step_s, _MOST_CREDIT_S)
        self._is_behind = False
        if self._closing or time.monotonic() < self._off_until:
            return
        for owner in owners:
            row, trail = owner.row, owner.trail
            if row is None or trail is None:
                continue
            while (
                row.length // BLOCK > trail.n_blocks and (trail.n_blocks + 1) * self._block_bytes <= self._files.limit
            ):
                if not self._has_room or (step_s is not None and self._credit_s <= 0):
                    self._is_behind = True
                    return
                started = time.perf_counter()
                self._keep_next(row, trail, owner.tokens)
                self._credit_s -= time.perf_counter() - started

    def forget(self, trail: Trail, tokens: list[int], n_tokens: int) -> None:
        """Remove the blocks of a row that turned out to be worth nothing."""
        names = list(self._files.names(trail.root, tokens[:n_tokens]))
        self._writes.submit(self._guarded, lambda: self._files.remove(names))  # behind those that are queued

    @staticmethod
    def _guarded(job: Callable[[], object]) -> None:
        """Nobody waits for what a job may raise."""
        try:
            job()
        except Exception:
            log.exception("the folder of prefixes cannot be looked after")

    def close(self) -> None:
        """Write what is queued, and stop."""
        self._closing = True
        for pool in (self._lookups, self._loads, self._writes):
            pool.shutdown()

    @property
    def _has_room(self) -> bool:
        n_waiting = self._n_queued - self._n_done
        return n_waiting == 0 or (n_waiting + 1) * self._block_bytes <= _QUEUE_BYTES

    def _keep_next(self, row: Row, trail: Trail, tokens: "list[int] | np.ndarray") -> None:
        """Queue a row's next block, if it is not on disk."""
        if trail.n_failures != self._n_failures:
            trail.go_back()
            trail.n_failures = self._n_failures
        place = trail.n_blocks
        [name] = self._files.names(trail.name, tokens[place * BLOCK : (place + 1) * BLOCK])
        used_ns = used_at(trail.used_ns, place)
        if not self._files.touch(name, used_ns):
            block = self._rows.take_out(row, place * BLOCK, BLOCK)
            self._n_queued += 1
            self._writes.submit(self._write, name, block, used_ns)
        trail.step(name)

    def _write(self, name: bytes, block: np.ndarray, used_ns: int) -> None:
        try:
            if time.monotonic() < self._off_until:
                self._n_failures += 1
                return
            self._files.write(name, block, used_ns)
            self.n_written_tokens += BLOCK
        except OSError as error:
            self._n_failures += 1
            self._off_until = time.monotonic() + _PAUSE_S
            log.warning("prefixes are not kept on disk for %.0f s: %s", _PAUSE_S, error)
        except Exception:
            self._n_failures += 1
            log.exception("a prefix cannot be kept on disk")
        finally:
            self._n_done += 1
            self._wake()
