"""Weights packed by AWQ, GPTQ and bitsandbytes, back to their real values: one function per packing.

Every result is a matrix (out, in), as `nn.Linear.weight`. Values are computed in float32 and rounded once, which is
what the packages' own dequantisation gives. In shapes, G counts the groups of inputs that share a scale, n the values.

Not here: what a folder says of its packing (`packing.py`), where its tensors lie (`folder.py`), products with weights
that stay packed (`layers.py`). Sources: AutoAWQ 0.2.9 (`WQLinear_GEMM`, `WQLinear_GEMV`), AutoGPTQ 0.7.1,
GPTQModel 7.7.0 (`QuantLinear`, `dequantize_weight`), bitsandbytes 0.50.2 (`dequantize_4bit` and
`int8_vectorwise_dequant`).
"""

import torch
from torch import Tensor

Codes = tuple[Tensor, Tensor, Tensor]  # codes (in, out) and zeros (G or more, out), uint8; scales (G or more, out)
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the i-th 4 bits of a word, lowest first, are this column of its eight
_INT8_FACTOR = 7.874015718698502e-3  # bitsandbytes multiplies by this instead of dividing by 127
_OUTPUTS = 512  # unpacked at a time, so that what is in between stays below the matrix


def awq_gemm(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """(code - zero) * scale in the scales' dtype.

    qweight: (in, out / 8) int32, eight columns of 4 bits in the order 0 2 4 6 1 3 5 7. qzeros: (G, out / 8), likewise.
    scales: (G, out). Input i belongs to group i // group_size.
    """
    return _scaled(*awq_gemm_codes(qweight, qzeros, scales), group_size)


def awq_gemm_codes(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Codes:
    """What `awq_gemm` computes with."""
    return _codes(qweight.t(), 4, _AWQ_ORDER).t(), _codes(qzeros.t(), 4, _AWQ_ORDER).t(), scales


def awq_gemv(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """(code - zero) * scale in the scales' dtype.

    qweight: (out, in / 8) int32, eight inputs of 4 bits in order. qzeros: (out, W), eight groups in order. scales:
    (out, 8 W). W is large enough for G groups; what lies behind them is padding.
    """
    return _scaled(*awq_gemv_codes(qweight, qzeros, scales), group_size)


def awq_gemv_codes(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Codes:
    """What `awq_gemv` computes with."""
    return _codes(qweight.t(), 4), _codes(qzeros.t(), 4), scales.t()


def gptq(qweight: Tensor, qzeros: Tensor, scales: Tensor, groups: Tensor, bits: int, zero_offset: int) -> Tensor:
    """(code - zero) * scale in the scales' dtype.

    qweight: (in * bits / 32, out) int32: each column is a stream of codes, lowest bit first; 3 bits run across words.
    qzeros: (G, out * bits / 32), a stream along each row. scales: (G, out). groups: (in,), the group of each input:
    `g_idx` of act-order. zero_offset: 1 where zeros are stored minus one, in `bits` bits (`gptq`), else 0 (`gptq_v2`).
    """
    return _scaled(*gptq_codes(qweight, qzeros, scales, bits, zero_offset), groups.long())


def gptq_codes(qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, zero_offset: int) -> Codes:
    """What `gptq` computes with."""
    return _codes(qweight, bits), _codes(qzeros.t(), bits).t() + zero_offset & 2**bits - 1, scales


def bitsandbytes_int8(weight: Tensor, row_scales: Tensor) -> Tensor:
    """code * absmax / 127 in float32. weight: (out, in) int8. row_scales: `SCB`, (out,), each row's largest value."""
    return weight * row_scales.float().view(-1, 1) * _INT8_FACTOR


def bitsandbytes_4bit(packed: Tensor, absmax: Tensor, quant_map: Tensor, block_size: int, n: int) -> Tensor:
    """quant_map[code] * absmax of the block, (n,) float32.

    packed: two codes a byte, the first in the high bits. absmax: (n / block_size,). quant_map: the 16 values of `nf4`
    or `fp4`.
    """
    codes = packed.view(-1).view(torch.uint8)
    values = torch.stack([quant_map[(codes >> 4).int()], quant_map[(codes & 15).int()]], dim=1).view(-1)[:n]
    return _scaled_blocks(values, absmax, block_size)


def nested_absmax(codes: Tensor, absmax: Tensor, quant_map: Tensor, offset: float) -> Tensor:
    """The absmax of double quantisation, float32: quant_map[code] * absmax of its block + offset.

    codes: (n,) uint8, one for each block of weights. absmax: (n,), of the block that each code is in. quant_map: 256
    values.
    """
    return quant_map[codes.int()] * absmax + offset


def _codes(words: Tensor, bits: int, places: tuple[int, ...] | None = None) -> Tensor:
    """The codes of int32 words (W, m), (W * 32 / bits, m) uint8: each column is a stream, lowest bit first.

    places: where in its word's codes each one belongs, where that is not in order.
    """
    period = 3 if bits == 3 else 1  # words after which codes and words begin together again
    n = period * 32 // bits
    words = words.contiguous().unflatten(0, (-1, period))  # (W / period, period, m)
    out = torch.empty(words.shape[0], n, words.shape[2], dtype=torch.uint8, device=words.device)
    for k, place in enumerate(places or range(n)):
        word, shift = divmod(bits * k, 32)
        code = words[:, word] >> shift
        if shift + bits > 32:  # the rest lies in the next word
            code = code & (1 << 32 - shift) - 1 | words[:, word + 1] << 32 - shift
        out[:, place] = code & 2**bits - 1
    return out.flatten(0, 1)


def _scaled(codes: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor | int) -> Tensor:
    """(code - zero) * scale of each input's group, (out, in) in the scales' dtype.

    codes: (in, out). zeros, scales: (G or more, out). groups: (in,), or how many inputs in order each has. Whole rows
    of zeros and scales are taken for each input: picking single values of a matrix (out, G) took several times as long.
    """
    codes = codes.contiguous()
    if isinstance(groups, int):
        groups = torch.arange(len(codes), device=codes.device) // groups
    out = torch.empty(codes.shape[::-1], dtype=scales.dtype, device=scales.device)
    for start in range(0, len(out), _OUTPUTS):
        part = slice(start, start + _OUTPUTS)
        values = codes[:, part].float() - zeros[:, part].float()[groups]
        values *= scales[:, part].float()[groups]
        out[part] = values.to(scales.dtype).t()
    return out


def _scaled_blocks(values: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    """(n,) values, each multiplied by its block's absmax; the last block may be short."""
    n_whole = len(values) // block_size * block_size
    values[:n_whole].view(-1, block_size).mul_(absmax.float()[: n_whole // block_size, None])
    values[n_whole:].mul_(absmax.float()[n_whole // block_size :])
    return values
