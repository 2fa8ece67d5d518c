"""Which sample of which source comes j-th: a pure function of the seed and j.

Every block of 16,384 samples holds each source as often as its weight says, shuffled; within a source, each epoch
visits every sample once, in an order of its own. Nothing is stored and nothing replayed: any number of ranks takes its
slice of j, and a run resumes at any j.
"""

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass

_BLOCK = 16_384
_ROUNDS = 4  # of a Feistel network: three make a permutation that looks random (Luby and Rackoff 1988), one to spare


@dataclass(frozen=True)
class Place:
    """One sample: its source, which pass over it this is, and the sample's number there."""

    source: str
    epoch: int
    number: int


class Order:
    """The order of a mixture. sizes: samples of each source; weights: positive, in any unit."""

    def __init__(self, sizes: Mapping[str, int], weights: Mapping[str, float], seed: int) -> None:
        assert sizes.keys() == weights.keys() and all(n > 0 for n in sizes.values()), (sizes, weights)
        self._names = list(sizes)
        self._sizes, self._seed = dict(sizes), seed
        self.quotas = quotas(weights)
        self._held: tuple[int, list[tuple[str, int]]] = (-1, [])

    def place(self, j: int) -> Place:
        """The j-th sample of the run."""
        block, offset = divmod(j, _BLOCK)
        name, rank = self._block(block)[offset]
        epoch, place = divmod(block * self.quotas[name] + rank, self._sizes[name])
        return Place(name, epoch, permuted(place, self._sizes[name], f"{self._seed}/{name}/{epoch}"))

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
