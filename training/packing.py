"""Packs samples of different lengths into sequences of one length, each sample hidden from the others.

First fit, longest first, over the samples of a whole step: the step still sees exactly the recipe's rows, on a fraction
of the positions that padding each row would take. A sequence may be longer than a sample may: one sample nearly as long
as it may be would else give every sequence of a small step its length. That packing changes nothing is tested
(`test_packing.py`).
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from training.datasets import Sample

_ENOUGH = 0.95  # of a step's positions hold tokens: then no other number of rows is tried
_WIDTHS = 128  # a step's sequences are tried from the shortest that could do, each longer by such a part of it
IGNORED = -100  # the label of a position that is not learned: cross_entropy's own default


class Batch(NamedTuple):
    """Packed sequences, (rows, T) int64 but for `row`; labels belong to the position that predicts them."""

    ids: Tensor
    labels: Tensor  # the next token, or IGNORED
    sequence_id: Tensor  # which sample a position belongs to, -1 for padding
    row: Tensor  # (rows,): the number of each in its step, whichever microbatch of whichever rank it came to

    @property
    def n_learned(self) -> int:
        return int((self.labels != IGNORED).sum())


class Positions(Protocol):
    """Which positions of a step's rows hold samples, as `Batch` has it."""

    @property
    def ids(self) -> Tensor: ...

    @property
    def sequence_id(self) -> Tensor: ...


def pack(samples: Sequence[Sample], max_seq_len: int, widest: int = 0) -> Batch:
    """The samples in few sequences, as short as hold them.

    A sample over max_seq_len is cut on the right. widest: the longest a sequence may be where it is more than that; a
    run's `microbatch_tokens`.
    """
    by_length = sorted(samples, key=lambda sample: -min(len(sample.ids), max_seq_len))  # stable
    places = _places([min(len(sample.ids), max_seq_len) for sample in by_length], max_seq_len, widest)
    n_rows = max(places) + 1
    rows: list[list[Sample]] = [[] for _ in range(n_rows)]
    for place, sample in zip(places, by_length, strict=True):
        rows[place].append(sample)
    width = max(sum(min(len(sample.ids), max_seq_len) for sample in row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    sequence_id = torch.full_like(ids, -1)
    for r, row in enumerate(rows):
        start = 0
        for d, sample in enumerate(row):
            sample_ids = torch.tensor(sample.ids[:max_seq_len])
            learned = torch.tensor(sample.learned[:max_seq_len])
            end = start + len(sample_ids)
            ids[r, start:end] = sample_ids
            labels[r, start : end - 1] = torch.where(learned[1:], sample_ids[1:], IGNORED)
            sequence_id[r, start:end] = d
            start = end
    return Batch(ids, labels, sequence_id, torch.arange(len(rows)))


def _places(lengths: Sequence[int], max_seq_len: int, widest: int) -> list[int]:
    """Which row each length goes to, the longest first: into as many rows as first fit needs, or into one less.

    The fewer rows are wider than max_seq_len, so that the longest sample no longer decides how wide all of them are.
    """
    places = _first_fit(lengths, max_seq_len)
    n_rows = max(places) + 1
    places = _narrowest(lengths, n_rows, max_seq_len) or places
    if n_rows > 1 and _useful(lengths, places) < _ENOUGH:
        fewer = _narrowest(lengths, n_rows - 1, max(widest, max_seq_len) + 1)
        if fewer is not None and _useful(lengths, fewer) > _useful(lengths, places):
            return fewer
    return places


def _narrowest(lengths: Sequence[int], n_rows: int, below: int) -> list[int] | None:
    """The lengths' places in at most so many rows of the least width that is tried and does; None where none does."""
    least = max(lengths[0], -(-sum(lengths) // n_rows))
    for width in range(least, below, max(1, least // _WIDTHS)):
        places = _first_fit(lengths, width)
        if max(places) < n_rows:
            return places
    return None


def _useful(lengths: Sequence[int], places: Sequence[int]) -> float:
    """The share of positions that hold tokens."""
    filled = [0] * (max(places) + 1)
    for n, place in zip(lengths, places, strict=True):
        filled[place] += n
    return sum(filled) / (max(filled) * len(filled))


def _first_fit(lengths: Sequence[int], capacity: int) -> list[int]:
    """Which row each length goes to: the first with room for it."""
    free: list[int] = []
    places = []
    for n in lengths:
        place = next((row for row, room in enumerate(free) if room >= n), len(free))
        if place == len(free):
            free.append(capacity)
        free[place] -= n
        places.append(place)
    return places


def microbatches(batch: Batch, max_tokens: int) -> list[Batch]:
    """The batch cut into groups of rows of at most max_tokens positions, at least one row each."""
    rows = max(1, max_tokens // batch.ids.shape[1])
    return [Batch(*(x[i : i + rows] for x in batch)) for i in range(0, len(batch.ids), rows)]


def squared_lengths(batch: Positions) -> int:
    """The sum of each sample's length squared: what attention's work goes by."""
    rows = torch.arange(len(batch.ids))[:, None].expand_as(batch.sequence_id)
    pairs = torch.stack([rows, batch.sequence_id])[:, batch.sequence_id >= 0]
    counts = pairs.unique(dim=1, return_counts=True)[1]
    return int((counts**2).sum())


def deal(batch: Batch, rank: int, n_ranks: int, max_tokens: int) -> list[Batch]:
    """The microbatches of one rank: every n_ranks-th row. All ranks get equally many, so that they gather together.

    Where rows run out, the first is repeated with nothing to learn.
    """
    missing = -len(batch.ids) % n_ranks
    if missing:
        first = Batch(*(x[:1] for x in batch))
        filler = first._replace(labels=torch.full_like(first.labels, IGNORED))
        batch = Batch(*(torch.cat([x, *[y] * missing]) for x, y in zip(batch, filler, strict=True)))
    return microbatches(Batch(*(x[rank::n_ranks] for x in batch)), max_tokens)
