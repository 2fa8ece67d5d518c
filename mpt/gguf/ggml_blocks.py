"""The values of GGML's tensors, equal bit for bit to those of the `gguf` package.

Source: ggml, `dequantize_row_*` of `ggml-quants.c`. Not here: the types (`ggml_types.py`), files that hold such tensors
(`file.py`, `conversion/formats/ggml_file.py`), and writing blocks, which the `gguf` package does.
"""

import torch
from torch import Tensor

from mpt.gguf.ggml_types import BLOCK_TYPES

PLAIN_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_PART = 1 << 18  # values computed at a time: they stay in the cache, and a matrix takes little more than its own
_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # what its four bits stand for


def values(kind: str, shape: tuple[int, ...], data: bytes) -> Tensor:
    """A stored tensor: a plain one in its dtype, one in blocks in float32."""
    stored = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    if kind in PLAIN_DTYPES:
        return stored.view(PLAIN_DTYPES[kind]).view(shape)
    return dequantise(kind, stored.view(*shape[:-1], -1))


def dequantise(kind: str, data: Tensor) -> Tensor:
    """The values of rows of blocks, float32. data: (..., bytes of a row), uint8; returns (..., values of a row)."""
    block = BLOCK_TYPES[kind]
    assert data.dtype == torch.uint8 and data.shape[-1] % block.n_bytes == 0, (kind, data.dtype, data.shape)
    blocks = data.reshape(-1, block.n_bytes)
    values = torch.empty(len(blocks), block.n_values, device=data.device)
    step = _PART // block.n_values
    for start in range(0, len(blocks), step):
        values[start : start + step] = _values(kind, blocks[start : start + step])
    return values.view(*data.shape[:-1], data.shape[-1] // block.n_bytes * block.n_values)


def _values(kind: str, blocks: Tensor) -> Tensor:
    """(blocks, bytes) to (blocks, values)."""
    if kind == "Q4_0":
        return _float16(blocks, 0) * (halves(blocks[:, 2:]).float() - 8)
    if kind == "Q4_1":
        return _float16(blocks, 0) * halves(blocks[:, 4:]).float() + _float16(blocks, 2)
    if kind == "Q5_0":
        five_bits = halves(blocks[:, 6:]) + 16 * bits(blocks[:, 2:6])
        return _float16(blocks, 0) * (five_bits.float() - 16)
    if kind == "Q5_1":
        five_bits = halves(blocks[:, 8:]) + 16 * bits(blocks[:, 4:8])
        return _float16(blocks, 0) * five_bits.float() + _float16(blocks, 2)
    if kind == "Q8_0":
        return _float16(blocks, 0) * blocks[:, 2:].view(torch.int8).float()
    if kind == "IQ4_NL":
        meant = torch.tensor(_IQ4_NL, dtype=torch.float32, device=blocks.device)
        return _float16(blocks, 0) * meant[halves(blocks[:, 2:]).long()]
    if kind == "Q2_K":
        return _q2_k(blocks)
    if kind == "Q3_K":
        return _q3_k(blocks)
    if kind == "Q4_K":
        scales, minimums = _six_bit_scales(blocks)
        return _scaled(_nibbles_by_32(blocks[:, 16:]), scales, minimums)
    if kind == "Q5_K":
        scales, minimums = _six_bit_scales(blocks)
        five_bits = _nibbles_by_32(blocks[:, 48:]) + 16 * _bit_planes(blocks[:, 16:48])
        return _scaled(five_bits, scales, minimums)
    assert kind == "Q6_K", kind
    return _q6_k(blocks)


def halves(data: Tensor) -> Tensor:
    """(n, bytes) to (n, 2 * bytes): the low four bits of every byte, then the high four bits of every byte."""
    return torch.cat([data & 15, data >> 4], dim=1)


def bits(data: Tensor) -> Tensor:
    """(n, bytes) to (n, 8 * bytes): the bits of each byte, the lowest first."""
    return _shifted(data[:, :, None], range(8), 1).flatten(1)


def _float16(blocks: Tensor, at: int) -> Tensor:
    """The number that lies at a byte of each block, (blocks, 1) in float32."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _shifted(data: Tensor, shifts: range, mask: int) -> Tensor:
    """data with a last or middle axis of 1, shifted right by each of the shifts along it."""
    axis = data.shape.index(1, 1)
    shape = [1] * data.dim()
    shape[axis] = len(shifts)
    return data >> torch.tensor(list(shifts), dtype=torch.uint8, device=data.device).view(shape) & mask


def _six_bit_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minimums of Q4_K and Q5_K, (blocks, 8) both, for eight parts of 32 values.

    Twelve bytes hold eight scales and eight minimums of six bits. Those of the first four parts lie in the low six bits
    of bytes 0 to 3 and 4 to 7. Those of the last four have their low four bits in bytes 8 to 11, and their high two in
    what is left of the other bytes.
    """
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([low & 63, high & 15 | low >> 2 & 48], dim=1).float()  # (blocks, 8)
    minimums = torch.cat([middle & 63, high >> 4 | middle >> 2 & 48], dim=1).float()
    return _float16(blocks, 0) * scales, _float16(blocks, 2) * minimums


def _scaled(values: Tensor, scales: Tensor, minimums: Tensor | None = None) -> Tensor:
    """values: (n, 256), whose equal parts have a scale each, (n, parts), and a minimum that is taken off."""
    found = values.view(*scales.shape, -1) * scales[:, :, None]
    return (found if minimums is None else found.sub_(minimums[:, :, None])).flatten(1)


def _nibbles_by_32(data: Tensor) -> Tensor:
    """(n, 128) to (n, 256): of every 32 bytes the low four bits, then their high four bits."""
    return _shifted(data.reshape(len(data), 4, 1, 32), range(0, 8, 4), 15).flatten(1).float()


def _bit_planes(data: Tensor) -> Tensor:
    """(n, 32) to (n, 256): the lowest bit of every byte, then the next one of every byte."""
    return _shifted(data.reshape(len(data), 1, 32), range(8), 1).flatten(1).float()


def _pairs_by_32(data: Tensor) -> Tensor:
    """(n, 64) to (n, 256): of every 32 bytes the lowest two bits, then the next two, up to the highest."""
    return _shifted(data.reshape(len(data), 2, 1, 32), range(0, 8, 2), 3).flatten(1)


def _q2_k(blocks: Tensor) -> Tensor:
    """Sixteen parts of 16 values, each with a scale and a minimum of four bits."""
    scales = _float16(blocks, 80) * (blocks[:, :16] & 15).float()  # (blocks, 16)
    minimums = _float16(blocks, 82) * (blocks[:, :16] >> 4).float()
    values = _pairs_by_32(blocks[:, 16:80]).float()
    return _scaled(values, scales, minimums)


def _q3_k(blocks: Tensor) -> Tensor:
    """Sixteen parts of 16 values of three bits, each with a scale of six bits; a high bit that is set adds nothing."""
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    low = halves(low)  # (blocks, 16)
    high = _shifted(high[:, None], range(0, 8, 2), 3).flatten(1)
    scales = _float16(blocks, 108) * ((low | high << 4).float() - 32)
    values = _pairs_by_32(blocks[:, 32:96]).float() - 4 * (1 - _bit_planes(blocks[:, :32]))
    return _scaled(values, scales)


def _q6_k(blocks: Tensor) -> Tensor:
    """Sixteen parts of 16 values of six bits, each with a scale of eight bits."""
    low = _shifted(blocks[:, :128].reshape(len(blocks), 2, 1, 64), range(0, 8, 4), 15).flatten(1)
    high = _pairs_by_32(blocks[:, 128:192])
    scales = _float16(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    return _scaled((low | high << 4).float() - 32, scales)
