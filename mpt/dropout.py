"""Dropout that depends on where it falls, not on which process computes it or what was computed before.

Inside `drawn_for`, each row of a batch has a generator of its own, seeded by torch's seed (`torch.manual_seed`), the
row's number in the training step, and the place in the model. So a step drops the same elements on any number of ranks,
however it is cut into microbatches, after a resume, and when activation checkpointing computes a block again. Outside
`drawn_for` it is `F.dropout`, for whoever trains the model with tools of their own.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Of the batch at hand. Not thread-local: on CUDA backward has a thread of its own.
_rows: Sequence[int] | None = None
_part = (0, 1)


@contextlib.contextmanager
def drawn_for(rows: Sequence[int], part: tuple[int, int] = (0, 1)) -> Iterator[None]:
    """Until the end, forward and backward, batches have these rows of a step, one number each.

    part: (k, n) where this process holds the k-th of n equal parts of each row's positions.
    """
    global _rows, _part
    before, (_rows, _part) = (_rows, _part), (rows, part)
    try:
        yield
    finally:
        _rows, _part = before


def dropout(x: Tensor, p: float, training: bool, place: str) -> Tensor:
    """x with a share p of its elements zero and the others divided by 1 - p; x itself where it is not training.

    x: (B, T, ...), a row of the batch each. place: where in the model this is; no two places may share a name.
    """
    if not training or p == 0.0:
        return x
    if _rows is None or p == 1.0:
        return F.dropout(x, p)
    return x * _kept(x, p, place) * (1 / (1 - p))


class Dropout(nn.Module):
    """`dropout` as a module."""

    def __init__(self, p: float, place: str) -> None:
        super().__init__()
        self.p, self.place = p, place

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, self.training, self.place)


# An operator, for `torch.compile`: traced, the rows would be constants and every step would be compiled anew.
@torch.library.custom_op("mpt::kept", mutates_args=())
def _kept(x: Tensor, p: float, place: str) -> Tensor:
    """Which elements of x stay, bool."""
    assert _rows is not None and len(_rows) == len(x), (_rows, x.shape)
    k, n = _part
    kept = torch.empty(len(x), n * x.shape[1], *x.shape[2:], dtype=torch.bool, device=x.device)
    generator = torch.Generator(x.device)
    for row, drawn in zip(_rows, kept, strict=True):
        key = hashlib.blake2b(f"{torch.initial_seed()} {row} {place}".encode(), digest_size=4)  # all that CPUs take
        drawn.bernoulli_(1 - p, generator=generator.manual_seed(int.from_bytes(key.digest())))
    return kept.chunk(n, dim=1)[k].contiguous()


@_kept.register_fake
def _(x: Tensor, p: float, place: str) -> Tensor:
    return torch.empty_like(x, dtype=torch.bool, memory_format=torch.contiguous_format)
