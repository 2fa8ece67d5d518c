"""The Triton kernels of `mpt/backends/quantized.py`: products with weights in 4 or 8 bits, and those weights unpacked.

Importing this file needs Triton, which comes with torch for CUDA. They also run on CPU, slowly, under Triton's
interpreter (TRITON_INTERPRET=1), which is how they are tested where there is no GPU.

BITS 4: codes are int32 words, four for each 32 weights of a row; the i-th 4 bits of word j are weight 4 i + j of the
32. BITS 8: codes are int8. HAS_GROUPS: every 32 weights of a row have a scale of their own, else the row has one.
"""

import triton
import triton.language as tl


@triton.jit
def one_row(
    x, codes, scales, bias, out, n_out, n_in, magic,
    BITS: tl.constexpr, HAS_GROUPS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One row of inputs times the rows of weights, in float32. Grid (n_out / BLOCK_N).

    It reads chunks of 16 bytes, which are 32 weights or 16: what one thread loads at once.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row, total = n.to(tl.int64), tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    if BITS == 4:
        j = tl.arange(0, 4)
        n_groups = n_in // 32
        for first in range(0, n_groups, BLOCK_C):
            g = first + tl.arange(0, BLOCK_C)
            there = (n < n_out)[:, None] & (g < n_groups)[None, :]
            place = (row * (n_groups * 4))[:, None, None] + (g * 4)[None, :, None] + j[None, None, :]
            words = tl.load(codes + place, mask=there[:, :, None], other=0)  # (N, C, 4)
            k = (g * 32)[None, :, None] + j[None, None, :]
            part = tl.zeros([BLOCK_N, BLOCK_C, 4], tl.float32)
            for i in tl.static_range(8):
                wide = tl.load(x + k + 4 * i, mask=(g < n_groups)[None, :, None], other=0.0).to(tl.float32)
                part += _levels(words, i, magic) * (wide / (1 << i % 5 * 4))
            scale = tl.load(scales + (row * n_groups)[:, None] + g[None, :], mask=there, other=0.0)
            total += tl.sum(part, 2) * scale.to(tl.float32)
    else:
        j = tl.arange(0, 16)
        for first in range(0, n_in, BLOCK_C * 16):
            c = first // 16 + tl.arange(0, BLOCK_C)
            k = (c * 16)[:, None] + j[None, :]
            there = (n < n_out)[:, None, None] & (k < n_in)[None, :, :]
            part = tl.load(codes + (row * n_in)[:, None, None] + k[None, :, :], mask=there, other=0)  # (N, C, 16)
            wide = tl.load(x + k, mask=k < n_in, other=0.0).to(tl.float32)
            found = tl.sum(part.to(tl.float32) * wide[None, :, :], 2)
            if HAS_GROUPS:
                place = (row * (n_in // 32))[:, None] + (c // 2)[None, :]
                there_too = (n < n_out)[:, None] & (c * 16 < n_in)[None, :]
                found *= tl.load(scales + place, mask=there_too, other=0.0).to(tl.float32)
            total += found
    sums = tl.sum(total, 1)
    if not HAS_GROUPS:
        sums *= tl.load(scales + n, mask=n < n_out, other=0.0).to(tl.float32)
    if HAS_BIAS:
        sums += tl.load(bias + n, mask=n < n_out, other=0.0).to(tl.float32)
    tl.store(out + n, sums.to(out.dtype.element_ty), mask=n < n_out)


@triton.jit(do_not_specialize=["n_rows"])
def few_rows(
    x, codes, scales, bias, out, n_rows, n_out, n_in, x_row,
    BITS: tl.constexpr, HAS_GROUPS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Up to BLOCK_M rows of inputs times the rows of weights, on tensor cores. Grid (n_out / BLOCK_N, splits).

    A split takes every n-th block of inputs, and has its own sums (n_rows, n_out) in `out`. Weights are rounded to the
    inputs' dtype when they have their scale, as `unpack` rounds them; sums are float32.
    """
    m, n = tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row, from_row = n.to(tl.int64), m.to(tl.int64) * x_row
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    GROUPS: tl.constexpr = BLOCK_K // 32
    split, n_splits = tl.program_id(1), tl.num_programs(1)
    for first in range(split * BLOCK_K, n_in, n_splits * BLOCK_K):
        if HAS_GROUPS:
            g = first // 32 + tl.arange(0, GROUPS)
            there = (g < n_in // 32)[:, None] & (n < n_out)[None, :]
            of_group = tl.load(scales + (row * (n_in // 32))[None, :] + g[:, None], mask=there, other=0.0)
            of_group = of_group.to(tl.float32)[:, None, :]  # (groups, 1, N)
        if BITS == 4:
            w = first // 8 + tl.arange(0, BLOCK_K // 8)
            there = (w < n_in // 8)[:, None] & (n < n_out)[None, :]
            words = tl.load(codes + (row * (n_in // 32 * 4))[None, :] + w[:, None], mask=there, other=0)  # (K / 8, N)
            scale = tl.broadcast_to(of_group, [GROUPS, 4, BLOCK_N]).reshape([BLOCK_K // 8, BLOCK_N])
            k = w // 4 * 32 + w % 4
            seen = (m < n_rows)[:, None] & (w < n_in // 8)[None, :]
            for i in tl.static_range(8):
                inputs = tl.load(x + from_row[:, None] + (k + 4 * i)[None, :], mask=seen, other=0.0)
                values = _levels(words, i, 0x4B000000) * (scale / (1 << i % 5 * 4))
                total = tl.dot(inputs, values.to(inputs.dtype), total, input_precision="ieee")
        else:
            k = first + tl.arange(0, BLOCK_K)
            there = (k < n_in)[:, None] & (n < n_out)[None, :]
            whole = tl.load(codes + (row * n_in)[None, :] + k[:, None], mask=there, other=0)  # (K, N)
            seen = (m < n_rows)[:, None] & (k < n_in)[None, :]
            inputs = tl.load(x + from_row[:, None] + k[None, :], mask=seen, other=0.0)
            if HAS_GROUPS:
                scale = tl.broadcast_to(of_group, [GROUPS, 32, BLOCK_N]).reshape([BLOCK_K, BLOCK_N])
                values = (whole.to(tl.float32) * scale).to(inputs.dtype)
            else:
                values = whole.to(inputs.dtype)  # every int8 number is one of 16 bits, too
            total = tl.dot(inputs, values, total, input_precision="ieee")
    if not HAS_GROUPS:
        total *= tl.load(scales + n, mask=n < n_out, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < n_out, other=0.0).to(tl.float32)[None, :]
    place = ((split * n_rows + m).to(tl.int64) * n_out)[:, None] + n[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(m < n_rows)[:, None] & (n < n_out)[None, :])


@triton.jit(do_not_specialize=["n_splits", "n_sums"])
def add_up(part, bias, out, n_splits, n_sums, n_out, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """The sums of all splits, (n_splits, n_sums) float32. Grid (n_sums / BLOCK)."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(n_splits):
        total += tl.load(part + split * n_sums + place, mask=place < n_sums, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + place % n_out, mask=place < n_sums, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=place < n_sums)


@triton.jit
def unpack(
    codes, scales, out, n_in,
    BITS: tl.constexpr, HAS_GROUPS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The real values of a row of weights. Grid (n_out, n_in / BLOCK_K)."""
    row, k = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    if BITS == 4:
        words = tl.load(codes + row * (n_in // 8) + k // 32 * 4 + k % 4, mask=k < n_in, other=0)
        levels = ((words >> (k % 32 // 4 * 4)) & 15) - 8
    else:
        levels = tl.load(codes + row * n_in + k, mask=k < n_in, other=0)
    if HAS_GROUPS:
        scale = tl.load(scales + row * (n_in // 32) + k // 32, mask=k < n_in, other=0.0).to(tl.float32)
    else:
        scale = tl.load(scales + row).to(tl.float32)
    tl.store(out + row * n_in + k, (levels.to(tl.float32) * scale).to(out.dtype.element_ty), mask=k < n_in)


@triton.jit
def _levels(words, i: tl.constexpr, magic):
    """The i-th 4 bits of words less 8, in float32, times 16 to the power of i modulo 5.

    Put into the lowest bits of 2^23, a number is a float that is larger by 2^23: one instruction makes it and one takes
    2^23 away, where shifting, masking and converting take twice the time. The mantissa has room for five numbers.
    """
    shifted = words if i < 5 else words >> 20
    as_float = ((shifted & (15 << i % 5 * 4)) | magic).to(tl.float32, bitcast=True)
    return as_float - (8388608.0 + (8 << i % 5 * 4))
