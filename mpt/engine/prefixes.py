"""Finished rows kept for the next request that begins the same way, the least recently used given up first.

ALiBi stores no positions in the cache, so any common prefix can be reused at any length, token by token.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mpt.backends.backend import Row
from mpt.engine.prefix_transfers import Trail


@dataclass(eq=False)
class Kept:
    """A row nobody is writing, and the tokens it holds."""

    tokens: np.ndarray  # (row.length,) int64
    row: Row
    salt: str  # whose it is: prefixes are shared only within one salt
    trail: Trail | None = None  # how far it is on disk, None where that is not its place


class Prefixes:
    """The rows kept, in order of last use."""

    def __init__(self) -> None:
        self._kept: OrderedDict[int, Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def n_tokens(self) -> int:
        """Tokens of capacity held."""
        return sum(kept.row.capacity for kept in self._kept.values())

    def add(self, tokens: list[int], row: Row, salt: str, trail: Trail | None = None) -> None:
        """Keep a row; one that another begins with is redundant and goes."""
        kept = Kept(np.asarray(tokens[: row.length], dtype=np.int64), row, salt, trail)
        for other in list(self._kept.values()):
            if other.salt == salt and common_length(other.tokens, kept.tokens) == len(other.tokens):
                self.take(other)
        self._kept[id(kept)] = kept

    def newest_first(self) -> Iterator[Kept]:
        return reversed(self._kept.values())

    def find(self, tokens: np.ndarray, salt: str) -> tuple[Kept | None, int]:
        """The kept row that shares the longest prefix with tokens, and how long that is; (None, 0) if none."""
        best, length = None, 0
        for kept in self._kept.values():
            if kept.salt == salt and (n := common_length(kept.tokens, tokens)) > length:
                best, length = kept, n
        return best, length

    def touch(self, kept: Kept) -> None:
        self._kept.move_to_end(id(kept))

    def take(self, kept: Kept) -> Row:
        """Remove and return it, to be written on."""
        return self._kept.pop(id(kept)).row

    def evict_oldest(self, keep: Kept | None) -> bool:
        """Free the least recently used row other than `keep`; False if there is none."""
        for kept in self._kept.values():
            if kept is not keep:
                self.take(kept)
                return True
        return False


def common_length(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens of prefix two sequences share."""
    n = min(len(a), len(b))
    if n and a[0] != b[0]:
        return 0
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n
