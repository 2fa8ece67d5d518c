"""Which sample of which source comes j-th: a pure function of the seed and j.

Every block of 16,384 samples holds each source as often as its weight says, shuffled. Within a source, each epoch
visits every sample once: its shards in an order of the epoch's own, then the samples of each window of shards shuffled
together, so that a set far away is fetched a window at a time. Nothing is stored and nothing replayed: any number of
ranks takes its slice of j, and a run resumes at any j.
"""

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_BLOCK = 16_384
_WINDOW = 131_072  # samples shuffled together, at least: 1 GB of sequences of 2,048 tokens
_ROUNDS = 4  # of a Feistel network: three make a permutation that looks random (Luby and Rackoff 1988), one to spare


@dataclass(frozen=True)
class Place:
    """One sample: its source, which pass over it this is, the window of shards, and the sample's number there."""

    source: str
    epoch: int
    window: int
    number: int


class Shuffled:
    """Which of n rows, all at hand, stands at a place of an endless walk over them, each epoch in its own order."""

    def __init__(self, n: int, seed: int) -> None:
        self._n, self._seed = n, seed
        self._epoch, self._rows = -1, list(range(n))

    def row(self, number: int) -> int:
        epoch, place = divmod(number, self._n)
        if epoch != self._epoch:
            self._epoch, self._rows = epoch, list(range(self._n))
            random.Random(f"{self._seed}/{epoch}").shuffle(self._rows)
        return self._rows[place]


class Order:
    """The order of a mixture. shards: the samples of each shard of each source; weights: positive, in any unit."""

    def __init__(self, shards: Mapping[str, Sequence[int]], weights: Mapping[str, float], seed: int) -> None:
        self._sizes = {name: sum(sizes) for name, sizes in shards.items()}
        assert shards.keys() == weights.keys() and all(self._sizes.values()), (self._sizes, weights)
        self._names, self._shards, self._seed = list(shards), dict(shards), seed
        self.quotas = quotas(weights)
        self._held: tuple[int, list[tuple[str, int]]] = (-1, [])
        self._epochs: dict[str, tuple[int, _Epoch]] = {}

    def place(self, j: int) -> Place:
        """The j-th sample of the run."""
        block, offset = divmod(j, _BLOCK)
        name, rank = self._block(block)[offset]
        epoch, place = divmod(block * self.quotas[name] + rank, self._sizes[name])
        return Place(name, epoch, *self._epoch(name, epoch).sample(place))

    def shards(self, place: Place, ahead: int = 1) -> list[int]:
        """The shards of a place's window and of so many after it in its epoch."""
        return self._epoch(place.source, place.epoch).shards(place.window, place.window + 1 + ahead)

    def _epoch(self, name: str, epoch: int) -> "_Epoch":
        held, found = self._epochs.get(name, (-1, None))
        if found is None or held != epoch:
            found = _Epoch(self._shards[name], f"{self._seed}/{name}/{epoch}")
            self._epochs[name] = epoch, found
        return found

    def _block(self, block: int) -> list[tuple[str, int]]:
        """Of each place in a block its source, and how many of the block's places before it are that source's."""
        if self._held[0] != block:  # the next 16,383 samples are of the same one
            names = [name for name in self._names for _ in range(self.quotas[name])]
            random.Random(f"{self._seed}/{block}").shuffle(names)
            counts = dict.fromkeys(self._names, 0)
            table = []
            for name in names:
                table.append((name, counts[name]))
                counts[name] += 1
            self._held = (block, table)
        return self._held[1]

    def epochs(self, n_samples: int) -> dict[str, float]:
        """How often each source is passed over by the first n_samples."""
        return {name: n_samples * self.quotas[name] / _BLOCK / self._sizes[name] for name in self._names}


class _Epoch:
    """One pass over a source: its shards in another order, cut into windows."""

    def __init__(self, sizes: Sequence[int], key: str) -> None:
        self._key = key
        self._order = [permuted(place, len(sizes), f"{key}/shards") for place in range(len(sizes))]
        self._firsts = np.cumsum([0, *sizes])  # of each shard, among the source's samples
        self._ends = np.cumsum([sizes[shard] for shard in self._order])  # of each shard, in this pass
        self._windows = [0]  # where each begins: the place among the shards
        self._starts = [0]  # and among the samples
        for place, end in enumerate(self._ends[:-1].tolist()):
            if end - self._starts[-1] >= _WINDOW:
                self._windows.append(place + 1)
                self._starts.append(end)

    def sample(self, place: int) -> tuple[int, int]:
        """The window and the number among the source's samples of the place-th sample of the pass."""
        window = int(np.searchsorted(self._starts, place, side="right")) - 1
        start = self._starts[window]
        end = self._starts[window + 1] if window + 1 < len(self._starts) else int(self._ends[-1])
        place = start + permuted(place - start, end - start, f"{self._key}/{window}")
        at = int(np.searchsorted(self._ends, place, side="right"))
        from_the_end = place - int(self._ends[at])
        return window, int(self._firsts[self._order[at] + 1]) + from_the_end

    def shards(self, first_window: int, end_window: int) -> list[int]:
        """The shards of some windows, those that are there."""
        bounds = [*self._windows, len(self._order)]
        return self._order[bounds[first_window] : bounds[min(end_window, len(bounds) - 1)]]


def quotas(weights: Mapping[str, float]) -> dict[str, int]:
    """Each source's samples in a block, at least one: shares rounded down, the rest to the largest remainders."""
    total = sum(weights.values())
    shares = {name: weight / total * _BLOCK for name, weight in weights.items()}
    found = {name: max(1, int(share)) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: int(shares[name]) - shares[name])
    for name in by_remainder[: max(0, _BLOCK - sum(found.values()))]:
        found[name] += 1
    while sum(found.values()) > _BLOCK:  # sources so small that one each was too many
        found[max(found, key=lambda name: found[name])] -= 1
    return found


def permuted(place: int, n: int, key: str) -> int:
    """Where a permutation of range(n), one for each key, sends `place`: a Feistel network, walked until within n."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    digest = hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest()
    keys = [int.from_bytes(digest[8 * r : 8 * r + 8], "little") for r in range(_ROUNDS)]
    while True:
        left, right = place >> half, place & mask
        for round_key in keys:
            left, right = right, left ^ (_mixed(right ^ round_key) & mask)
        place = left << half | right
        if place < n:
            return place


def _mixed(value: int) -> int:
    """splitmix64's finalizer (Steele et al. 2014): every bit of the input changes about half of the output's."""
    value &= 0xFFFFFFFFFFFFFFFF
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ value >> 31
