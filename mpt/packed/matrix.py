"""A matrix packed in small integers: where it lies in a file, and in memory, where it gives rows of its real values.

In memory it takes what it takes in the file, and it is mapped where the file allows, so that the system reads a page
when it is needed and drops it when memory is short. Not here: the formulas (`formulas.py`, `mpt/gguf/ggml_blocks.py`),
which tensors of a folder make up a matrix (`folder.py`), products with it (`layers.py`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mpt.packed.formulas import Codes
from mpt.stored import StoredTensor

Rows = slice | Tensor  # which rows of a matrix; a tensor of row numbers where every row can be had alone
Formula = Callable[[tuple[Tensor, ...], Rows], Tensor]
_PIECE = 1 << 20  # values that are unpacked at a time: what is in between stays in the processor's cache


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix (out, in) in memory, packed. formula: parts and rows to real values (rows, in)."""

    kind: str  # in a word or two: "Q4_0", "AWQ 4-bit"
    parts: tuple[Tensor, ...]
    shape: tuple[int, int]
    dtype: torch.dtype  # of its real values
    step: int  # a slice of rows begins at a multiple of it; 1 where single rows can be had
    formula: Formula

    @property
    def n_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """All rows in order, some at a time, with their real values."""
        n_rows, n_columns = self.shape
        size = max(1, _PIECE // n_columns // self.step) * self.step
        for start in range(0, n_rows, size):
            rows = slice(start, min(start + size, n_rows))
            yield rows, self.formula(self.parts, rows)

    def pick(self, numbers: Tensor) -> Tensor:
        """Rows by their numbers, (n,) to (n, in); only where `step` is 1."""
        assert self.step == 1, self.step
        return self.formula(self.parts, numbers)

    def values(self) -> Tensor:
        """All of it, (out, in)."""
        found = torch.empty(self.shape, dtype=self.dtype, device=self.parts[0].device)
        for rows, values in self.pieces():
            found[rows] = values
        return found

    def to(self, device: torch.device | str) -> "PackedMatrix":
        return replace(self, parts=tuple(part.to(device) for part in self.parts))


@dataclass(frozen=True)
class PackedTensor:
    """A packed matrix of a file; dtype and shape are those of its real values."""

    file: Path  # of its integers
    dtype: torch.dtype
    shape: tuple[int, ...]
    packed_bytes: int  # 0 for one that is plain and only scaled
    kind: str
    packing: str  # in words
    parts: tuple[StoredTensor | Tensor, ...]
    step: int
    formula: Formula
    codes: Callable[[tuple[Tensor, ...], Rows], Codes] | None = None  # of rows, where they may be packed anew as Q4_1
    group_size: int = 0  # inputs of those that share a scale, a multiple of 32

    @property
    def runs_as(self) -> str:
        """The kind that C multiplies with, where it does: its own, or the one it is packed anew as."""
        return self.kind if self.codes is None else "Q4_1"

    @property
    def run_bytes(self) -> int:
        """What it takes in memory while it is served: Q4_1 has 20 bytes for 32 values."""
        return self.packed_bytes if self.codes is None else torch.Size(self.shape).numel() // 32 * 20

    @property
    def n_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def open(self, *, mapped: bool) -> PackedMatrix:
        """It in memory, still packed. mapped: leave what can be mapped in the file. Raises DamagedFile."""
        parts = tuple(_opened(part, mapped) if isinstance(part, StoredTensor) else part for part in self.parts)
        n_out, n_in = self.shape
        return PackedMatrix(self.kind, parts, (n_out, n_in), self.dtype, self.step, self.formula)

    def read(self) -> Tensor:
        """Its real values."""
        return self.open(mapped=False).values()

    def read_into(self, target: Tensor) -> None:
        """Fill `target` of the same shape, converting dtype and device where they differ."""
        for rows, values in self.open(mapped=False).pieces():
            target[rows] = values.to(target.device)


Weight = StoredTensor | PackedTensor


def _opened(part: StoredTensor, mapped: bool) -> Tensor:
    found = part.map() if mapped else None
    return part.read() if found is None else found
