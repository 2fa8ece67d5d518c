"""A KV cache in int8, each head's numbers at a position with a scale of their own: half the bytes.

value = int8 * scale, scale = max|x| / 127 over the head's D numbers; `quantize_head` of native/common.h and `_to_int8`
of paged_kernels.py do the same, to the bit. On CPU a row has an `Int8Layer` for each layer, which the C step reads as
it lies (native/step.c); torch, for prompts, reads bfloat16 copies of it. On CUDA the numbers lie in pages
(paged_attention.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LEAST = 1e-30  # taken for the largest number where all are smaller: zeros need a scale too


def quantize_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 numbers, of the shape of x, and scales, float32 without its last dimension. x: (..., D)."""
    wide = x.float()
    scales = wide.abs().amax(-1).clamp(min=LEAST) / 127
    return (wide / scales[..., None]).round().to(torch.int8), scales


def head_bytes(d_head: int) -> int:
    """What the keys, or the values, of one head take at a position: the numbers and a float32 scale."""
    return d_head + 4


@dataclass(frozen=True)
class Int8Layer:
    """Keys and values of one layer of one row; what nobody has written means nothing."""

    numbers: Tensor  # (2, KV heads, capacity, D) int8
    scales: Tensor  # (2, KV heads, capacity) float32

    @classmethod
    def empty(cls, shape: tuple[int, int, int, int]) -> "Int8Layer":
        """shape: (2, KV heads, capacity, D)."""
        return cls(torch.empty(shape, dtype=torch.int8), torch.empty(shape[:3]))

    @property
    def shape(self) -> torch.Size:
        return self.numbers.shape

    def copy_from(self, other: "Int8Layer", n_tokens: int) -> None:
        """Begin with the first n_tokens of another."""
        self.numbers[:, :, :n_tokens] = other.numbers[:, :, :n_tokens]
        self.scales[:, :, :n_tokens] = other.scales[:, :, :n_tokens]

    def write(self, start: int, fresh: Tensor) -> None:
        """Store (2, KV heads, n, D) at positions start and on."""
        end = start + fresh.shape[2]
        self.numbers[:, :, start:end], self.scales[:, :, start:end] = quantize_heads(fresh)

    def read(self, start: int, end: int) -> Tensor:
        """What these positions hold, (2, KV heads, end - start, D) float32."""
        return self.numbers[:, :, start:end] * self.scales[:, :, start:end, None]
