"""The values of GGML's tensors, equal bit for bit to those of the `gguf` package.

Source: ggml, `dequantize_row_*` of `ggml-quants.c`. Not here: the types (`ggml_types.py`), files that hold such tensors
(`file.py`, `conversion/formats/ggml_file.py`), and writing blocks, which the `gguf` package does.
"""

from collections.abc import Callable

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
    step, fill = _PART // block.n_values, _FILL[kind]
    for start in range(0, len(blocks), step):
        fill(blocks[start : start + step], values[start : start + step])
    return values.view(*data.shape[:-1], data.shape[-1] // block.n_bytes * block.n_values)


def halves(data: Tensor) -> Tensor:
    """(n, bytes) to (n, 2 * bytes): the low four bits of every byte, then the high four bits of every byte."""
    data = data.contiguous()  # twice as fast as reading it among other bytes
    out = data.new_empty(len(data), 2, data.shape[1])
    out[:, 0] = data & 15
    out[:, 1] = data >> 4
    return out.flatten(1)


def bits(data: Tensor) -> Tensor:
    """(n, bytes) to (n, 8 * bytes): the bits of each byte, the lowest first."""
    eight = _shifted(torch.arange(256, dtype=torch.uint8, device=data.device)[:, None], range(8), 1)  # (256, 8)
    return eight.view(torch.int64)[data.long(), 0].view(torch.uint8)  # eight bytes at a time


# How each type's blocks (n, bytes) fill their values (n, values), float32. Small integers are multiplied by their scale
# as they are: torch widens them on the way, which took a quarter of the time of widening them first.


def _q4_0(blocks: Tensor, out: Tensor) -> None:
    torch.mul(halves(blocks[:, 2:]).view(torch.int8).sub_(8), _float16(blocks, 0), out=out)


def _q4_1(blocks: Tensor, out: Tensor) -> None:
    torch.mul(halves(blocks[:, 4:]), _float16(blocks, 0), out=out).add_(_float16(blocks, 2))


def _q5_0(blocks: Tensor, out: Tensor) -> None:
    five_bits = halves(blocks[:, 6:]) | bits(blocks[:, 2:6]) << 4
    torch.mul(five_bits.view(torch.int8).sub_(16), _float16(blocks, 0), out=out)


def _q5_1(blocks: Tensor, out: Tensor) -> None:
    five_bits = halves(blocks[:, 8:]) | bits(blocks[:, 4:8]) << 4
    torch.mul(five_bits, _float16(blocks, 0), out=out).add_(_float16(blocks, 2))


def _q8_0(blocks: Tensor, out: Tensor) -> None:
    torch.mul(blocks[:, 2:].view(torch.int8), _float16(blocks, 0), out=out)


def _iq4_nl(blocks: Tensor, out: Tensor) -> None:
    meant = torch.tensor(_IQ4_NL, dtype=torch.float32, device=blocks.device)
    torch.mul(meant[halves(blocks[:, 2:]).long()], _float16(blocks, 0), out=out)


def _q2_k(blocks: Tensor, out: Tensor) -> None:
    """Sixteen parts of 16 values, each with a scale and a minimum of four bits."""
    scales = _float16(blocks, 80) * (blocks[:, :16] & 15)  # (n, 16)
    minimums = _float16(blocks, 82) * (blocks[:, :16] >> 4)
    _scale(_pairs_by_32(blocks[:, 16:80]), scales, out, minimums)


def _q3_k(blocks: Tensor, out: Tensor) -> None:
    """Sixteen parts of 16 values of three bits, each with a scale of six bits; a high bit that is set adds nothing."""
    low, high = halves(blocks[:, 96:104]), blocks[:, 104:108]  # low: (n, 16)
    high = _shifted(high[:, None], range(0, 8, 2), 3).flatten(1)
    scales = _float16(blocks, 108) * (low | high << 4).view(torch.int8).sub_(32)
    values = _pairs_by_32(blocks[:, 32:96]) | _bit_planes(blocks[:, :32]) << 2
    _scale(values.view(torch.int8).sub_(4), scales, out)


def _q4_k(blocks: Tensor, out: Tensor) -> None:
    """Eight parts of 32 values of four bits."""
    scales, minimums = _six_bit_scales(blocks)
    _scale(_nibbles_by_32(blocks[:, 16:144]), scales, out, minimums)


def _q5_k(blocks: Tensor, out: Tensor) -> None:
    """Eight parts of 32 values of five bits."""
    scales, minimums = _six_bit_scales(blocks)
    values = _nibbles_by_32(blocks[:, 48:176]) | _bit_planes(blocks[:, 16:48]) << 4
    _scale(values, scales, out, minimums)


def _q6_k(blocks: Tensor, out: Tensor) -> None:
    """Sixteen parts of 16 values of six bits, each with a scale of eight bits."""
    low = _shifted(blocks[:, :128].reshape(len(blocks), 2, 1, 64), range(0, 8, 4), 15).flatten(1)
    values = low | _pairs_by_32(blocks[:, 128:192]) << 4
    scales = _float16(blocks, 208) * blocks[:, 192:208].view(torch.int8)
    _scale(values.view(torch.int8).sub_(32), scales, out)


_FILL: dict[str, Callable[[Tensor, Tensor], None]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "IQ4_NL": _iq4_nl,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip


def _float16(blocks: Tensor, at: int) -> Tensor:
    """The number that lies at a byte of each block, (n, 1) in float32."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _shifted(data: Tensor, shifts: range, mask: int) -> Tensor:
    """data with a last or middle axis of 1, shifted right by each of the shifts along it."""
    axis = data.shape.index(1, 1)
    shape = list(data.shape)
    shape[axis] = len(shifts)
    out = data.new_empty(shape)
    for place, shift in enumerate(shifts):
        torch.bitwise_and(data.select(axis, 0) >> shift, mask, out=out.select(axis, place))
    return out


def _six_bit_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minimums of Q4_K and Q5_K, (n, 8) both, for eight parts of 32 values.

    Twelve bytes hold eight scales and eight minimums of six bits. Those of the first four parts lie in the low six bits
    of bytes 0 to 3 and 4 to 7. Those of the last four have their low four bits in bytes 8 to 11, and their high two in
    what is left of the other bytes.
    """
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([low & 63, high & 15 | low >> 2 & 48], dim=1)  # (n, 8)
    minimums = torch.cat([middle & 63, high >> 4 | middle >> 2 & 48], dim=1)
    return _float16(blocks, 0) * scales, _float16(blocks, 2) * minimums


def _scale(values: Tensor, scales: Tensor, out: Tensor, minimums: Tensor | None = None) -> None:
    """values: (n, 256) small integers, whose equal parts have a scale each, (n, parts), and perhaps a minimum."""
    parts = out.view(*scales.shape, -1)
    torch.mul(values.view(*scales.shape, -1), scales[:, :, None], out=parts)
    if minimums is not None:
        parts.sub_(minimums[:, :, None])


def _nibbles_by_32(data: Tensor) -> Tensor:
    """(n, 128) to (n, 256): of every 32 bytes the low four bits, then their high four bits."""
    return _shifted(data.reshape(len(data), 4, 1, 32), range(0, 8, 4), 15).flatten(1)


def _bit_planes(data: Tensor) -> Tensor:
    """(n, 32) to (n, 256): the lowest bit of every byte, then the next one of every byte."""
    return _shifted(data.reshape(len(data), 1, 32), range(8), 1).flatten(1)


def _pairs_by_32(data: Tensor) -> Tensor:
    """(n, 64) to (n, 256): of every 32 bytes the lowest two bits, then the next two, up to the highest."""
    return _shifted(data.reshape(len(data), 2, 1, 32), range(0, 8, 2), 3).flatten(1)
