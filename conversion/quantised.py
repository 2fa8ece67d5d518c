"""Matrices in 8 or 4 bits as onnxruntime's `MatMulNBits` reads them: blocks of 32 values with a scale, symmetric.

Stored beside the model's other tensors as `NAME.quantised` and `NAME.scales`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from conversion.source import Source
from conversion.tensors import Lazy

BLOCK = 32  # values that share a scale
_ROWS = 2048  # that are quantised at a time: 16 MB of float32 in the 1B's shape


def quantised(found: Mapping[str, Lazy], source: Source, bits: int) -> dict[str, Lazy]:
    """Every matrix of the blocks, and a head of its own, as `<name>.quantised` and `<name>.scales`."""
    made: dict[str, Lazy] = {}
    for name, tensor in found.items():
        is_matrix = ".blocks." in name and len(tensor.shape) == 2 and tensor.shape[1] % BLOCK == 0
        if name == "lm_head.weight" or is_matrix:
            made |= _pair(name, source.tensors[name], bits)  # as stored: half the memory of float32
        else:
            made[name] = tensor
        if name == "transformer.wte.weight" and source.config.tie_word_embeddings:
            made |= _pair(name, source.tensors[name], bits)  # the head's; rows are looked up in the float one
    return made


def _pair(name: str, tensor: Lazy, bits: int) -> dict[str, Lazy]:
    n_out, n_in = tensor.shape
    packed = (n_out, n_in // BLOCK, BLOCK * bits // 8)
    waiting: list[Tensor] = []  # the scales, between the writing of the levels and theirs

    def levels() -> Tensor:
        found, scales = quantise(tensor.read(), bits)
        waiting[:] = [scales]
        return found

    def scales() -> Tensor:
        return waiting.pop() if waiting else quantise(tensor.read(), bits)[1]

    return {
        f"{name}.quantised": Lazy(torch.uint8, packed, levels, tensor.where),
        f"{name}.scales": Lazy(torch.float32, (n_out, n_in // BLOCK), scales, tensor.where),
    }


def quantise(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(N, K) as `MatMulNBits` reads it: (N, K / 32, 32 bits / 8) uint8 around 2^(bits - 1), and scales (N, K / 32).

    The scale takes a block's largest value, sign included, to the lowest level, which has one more than the highest.
    """
    parts = [_quantise_rows(rows, bits) for rows in values.split(_ROWS)]
    return torch.cat([levels for levels, _ in parts]), torch.cat([scales for _, scales in parts])


def _quantise_rows(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    blocks = values.float().view(values.shape[0], -1, BLOCK)
    low = 2 ** (bits - 1)
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))  # (N, K / 32, 1)
    scales = largest / -low
    inverse = torch.where(scales == 0, 0.0, 1 / scales)
    levels = (blocks * inverse).round_().add_(low).clamp_(0, 2 * low - 1).to(torch.uint8)
    if bits == 4:
        levels = levels[..., 0::2] | levels[..., 1::2] << 4
    return levels, scales.squeeze(-1)


def is_quantised(found: Mapping[str, Lazy]) -> bool:
    return any(name.endswith(".quantised") for name in found)


def read_quantised(found: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """The tensors of a folder, its quantised matrices as float32."""

    def matrix(name: str) -> Lazy:
        levels, scales = found[f"{name}.quantised"], found[f"{name}.scales"]
        n_out, n_blocks, n_bytes = levels.shape
        bits = 8 * n_bytes // BLOCK
        return Lazy(
            torch.float32,
            (n_out, n_blocks * BLOCK),
            lambda: dequantise(levels.read(), scales.read(), bits),
            levels.where,
        )

    whole = {name: tensor for name, tensor in found.items() if not name.endswith((".quantised", ".scales"))}
    pairs = {name.removesuffix(".quantised") for name in found if name.endswith(".quantised")}
    return {**{name: matrix(name) for name in pairs if name not in whole}, **whole}


def dequantise(levels: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The inverse of `quantise`, (N, K) float32."""
    if bits == 4:
        levels = torch.stack([levels & 15, levels >> 4], dim=-1).flatten(-2)
    return ((levels.float() - 2 ** (bits - 1)) * scales[..., None]).flatten(1)
