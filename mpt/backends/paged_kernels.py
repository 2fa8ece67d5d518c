"""The Triton kernels of `mpt/backends/paged_attention.py` (store keys and values, attend in splits, merge the splits)
and of `mpt/backends/fused.py` (add and normalise).

Importing this file needs Triton, which comes with torch for CUDA. They also run on CPU, slowly, under Triton's
interpreter (TRITON_INTERPRET=1), which is how they are tested where there is no GPU.
"""

import triton
import triton.language as tl


@triton.jit
def store(
    k, v, kv, scales, norms, slots,
    k_token, k_head, v_token, v_head, kv_page, kv_half, kv_head, kv_slot, scales_page, scales_half, scales_head,
    norms_page,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, IS_INT8: tl.constexpr, LEAST: tl.constexpr,
    MORE: tl.constexpr,
):  # fmt: skip
    """One key and value of one head into its slot, and the page's largest |k| raised to it. Grid (N, KV heads)."""
    token, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + token).to(tl.int64)
    page = slot // PAGE
    d = tl.arange(0, BLOCK_D)
    to = kv + page * kv_page + head * kv_head + slot % PAGE * kv_slot + d
    key = tl.load(k + token.to(tl.int64) * k_token + head * k_head + d, mask=d < D, other=0.0)
    value = tl.load(v + token.to(tl.int64) * v_token + head * v_head + d, mask=d < D, other=0.0)
    wide = key.to(tl.float32)
    if IS_INT8:
        key, key_scale = _to_int8(key, LEAST)
        value, value_scale = _to_int8(value, LEAST)
        at = scales + page * scales_page + head * scales_head + slot % PAGE
        tl.store(at, key_scale)
        tl.store(at + scales_half, value_scale)
        wide = key.to(tl.float32) * key_scale
    tl.store(to, key, mask=d < D)
    tl.store(to + kv_half, value, mask=d < D)
    norm = tl.sqrt(tl.sum(wide * wide, 0)) * MORE
    # As integers: positive floats have the order of their bits, and Triton takes two atomics for floats of any sign.
    tl.atomic_max(norms + page * norms_page + head, norm.to(tl.int32, bitcast=True))


@triton.jit
def _to_int8(x, LEAST: tl.constexpr):
    """`quantize_heads` of `int8_cache.py` for one head, to the bit."""
    wide = x.to(tl.float32)
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(wide), 0), LEAST), 127.0)  # `/` may be off by a bit on a GPU
    # In this sum a float32 has no digits behind the point: it rounds as torch does, halves to the even number.
    return (tl.div_rn(wide, scale) + 12582912.0 - 12582912.0).to(tl.int8), scale


@triton.jit
def _keep_split(
    part, part_lse, out, lines, best, total, sums, D: tl.constexpr, BLOCK_D: tl.constexpr, N_SPLITS: tl.constexpr
):  # fmt: skip
    """Store what a split found for each query, at `out` (M): its mean value, and its log-sum-exp where `merge` asks."""
    d = tl.arange(0, BLOCK_D)
    nothing = total == 0.0
    mean = sums / tl.where(nothing, 1.0, total)[:, None]
    to = part + out[:, None] * D + d[None, :]
    if N_SPLITS == 1:
        mean = tl.where(nothing[:, None], 0.0, mean).to(part.dtype.element_ty)
        tl.store(to, mean, mask=lines[:, None] & (d < D)[None, :])
    else:
        lse = tl.where(nothing, -float("inf"), best + tl.log(tl.where(nothing, 1.0, total)))
        tl.store(part_lse + out, lse, mask=lines)
        tl.store(to, mean, mask=(lines & (total != 0.0))[:, None] & (d < D)[None, :])


@triton.jit
def decode_split(
    q, kv, scales, norms, table, lengths, slopes, part, part_lse,
    scale, log_drop, n_queries, n_blocks, n_heads,
    q_row, q_token, q_head, kv_page, kv_half, kv_head, kv_slot, scales_page, scales_half, scales_head, norms_page,
    table_row,
    G: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr, PAGE: tl.constexpr, N_SPLITS: tl.constexpr, HAS_ALIBI: tl.constexpr,
    IS_INT8: tl.constexpr,
):  # fmt: skip
    """A row's queries of one key head against every N_SPLITS-th block of its keys.

    Grid (B, KV heads * n_blocks, N_SPLITS).
    Line m of a program is query m // G of the row and head m % G of the group: a page is read once for all of them.
    The scale of an int8 key multiplies its score, the scale of a value its weight.
    Which pages are read is settled before the first of them is, so that the loop over blocks can fetch ahead.
    Where there is one split, `part` is the output, in its dtype: a query that sees nothing gets zeros, as from `merge`.
    """
    row, split = tl.program_id(0), tl.program_id(2)
    head, block = tl.program_id(1) // n_blocks, tl.program_id(1) % n_blocks
    length = tl.load(lengths + row)
    n_pages = (length + PAGE - 1) // PAGE
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    t, h = m // G, head * G + m % G
    at = length - n_queries + t  # the position of each query
    seen = (m < n_queries * G) & (at >= 0)  # before position 0 there is padding only
    d = tl.arange(0, BLOCK_D)
    place = row.to(tl.int64) * q_row + t[:, None] * q_token + h[:, None] * q_head + d[None, :]
    query = tl.load(q + place, mask=seen[:, None] & (d < D)[None, :], other=0.0)  # (M, D)
    first_page = 0
    if HAS_ALIBI:
        slope = tl.load(slopes + h, mask=seen, other=1.0)
        # What is known of each query's best score beforehand: that of its own key, which has no bias.
        own_page = tl.load(table + row * table_row + tl.maximum(at, 0) // PAGE, mask=seen, other=0).to(tl.int64)
        own = own_page * kv_page + head * kv_head + tl.maximum(at, 0) % PAGE * kv_slot
        own_key = tl.load(kv + own[:, None] + d[None, :], mask=seen[:, None] & (d < D)[None, :], other=0.0)
        wide = query.to(tl.float32)
        floor = tl.sum(wide * own_key.to(tl.float32), 1) * scale
        if IS_INT8:
            own_scale = scales + own_page * scales_page + head * scales_head + tl.maximum(at, 0) % PAGE
            floor *= tl.load(own_scale, mask=seen, other=0.0)
        size = tl.sqrt(tl.sum(wide * wide, 1)) * scale
        # All keys of a page weigh at most e^(size |k| - slope d) (1 + e^-slope + ...), d the distance of its last.
        tail = tl.log(tl.minimum(1.0 / (1.0 - tl.exp(-slope)), PAGE * 1.0))
        limit = log_drop - tl.log(n_pages.to(tl.float32))
        first_page = n_pages
        for start in range(0, n_pages, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            number = tl.load(table + row * table_row + p, mask=p < n_pages, other=0).to(tl.int64)
            norm = tl.load(norms + number * norms_page + head, mask=p < n_pages, other=0.0)
            away = tl.maximum(at[:, None] - (p * PAGE + PAGE - 1)[None, :], 0).to(tl.float32)
            most = size[:, None] * norm[None, :] - slope[:, None] * away + (tail - floor)[:, None]
            needed = seen[:, None] & (p < n_pages)[None, :] & (most >= limit)
            first_page = tl.minimum(first_page, tl.min(tl.min(tl.where(needed, p[None, :], n_pages), 1), 0))
    best = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(first_page * PAGE + split * BLOCK_N, length, N_SPLITS * BLOCK_N):
        j = first + tl.arange(0, BLOCK_N)
        number = tl.load(table + row * table_row + first // PAGE).to(tl.int64)
        n = first % PAGE + tl.arange(0, BLOCK_N)
        base = kv + number * kv_page + head * kv_head + n[:, None] * kv_slot + d[None, :]
        here = (j < length)[:, None] & (d < D)[None, :]  # behind the row's end lies what others left
        key = tl.load(base, mask=here, other=0.0)  # (N, D)
        value = tl.load(base + kv_half, mask=here, other=0.0)
        if IS_INT8:
            key, value = key.to(query.dtype), value.to(query.dtype)  # no digit is lost
            to_scale = scales + number * scales_page + head * scales_head + n
            key_scale = tl.load(to_scale, mask=j < length, other=0.0)
            value_scale = tl.load(to_scale + scales_half, mask=j < length, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale  # (M, N) float32
        if IS_INT8:
            scores *= key_scale[None, :]
        if HAS_ALIBI:
            scores -= slope[:, None] * (at[:, None] - j[None, :]).to(tl.float32)
        scores = tl.where(seen[:, None] & (j[None, :] <= at[:, None]), scores, -float("inf"))
        better = tl.maximum(best, tl.max(scores, 1))
        against = tl.where(better == -float("inf"), 0.0, better)  # nothing seen yet: no inf - inf
        weights = tl.exp(scores - against[:, None])
        fade = tl.exp(best - against)
        total = total * fade + tl.sum(weights, 1)
        if IS_INT8:
            weights *= value_scale[None, :]
        sums = sums * fade[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        best = better
    out = ((row.to(tl.int64) * n_queries + t) * n_heads + h) * N_SPLITS + split
    _keep_split(part, part_lse, out, m < n_queries * G, best, total, sums, D, BLOCK_D, N_SPLITS)


@triton.jit
def merge(
    part, part_lse, out,
    D: tl.constexpr, BLOCK_D: tl.constexpr, N_SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One head of one query, from what its splits found. Grid (B * T * H)."""
    line = tl.program_id(0).to(tl.int64)
    s, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    lse = tl.load(part_lse + line * N_SPLITS + s, mask=s < N_SPLITS, other=-float("inf"))
    top = tl.max(lse, 0)
    weights = tl.exp(lse - tl.where(top == -float("inf"), 0.0, top))
    total = tl.sum(weights, 0)
    place = (line * N_SPLITS + s)[:, None] * D + d[None, :]
    found = (s < N_SPLITS) & (lse != -float("inf"))  # a split that found nothing has stored nothing
    sums = tl.load(part + place, mask=found[:, None] & (d < D)[None, :], other=0.0)
    mean = tl.sum(sums * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + line * D + d, mean.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def add_norm(
    x, y, weight, bias, out, x_row, y_row, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, HAS_Y: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """x + y into x, rounded as torch rounds it, and its LayerNorm into out. Grid (rows)."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    wide = tl.load(x + row * x_row + c, mask=c < C, other=0.0).to(tl.float32)
    if HAS_Y:
        added = wide + tl.load(y + row * y_row + c, mask=c < C, other=0.0).to(tl.float32)
        rounded = added.to(x.dtype.element_ty)
        tl.store(x + row * x_row + c, rounded, mask=c < C)
        wide = rounded.to(tl.float32)
    away = tl.where(c < C, wide - tl.sum(wide, 0) / C, 0.0)
    normed = away * (1.0 / tl.sqrt(tl.sum(away * away, 0) / C + eps))
    normed *= tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    if HAS_BIAS:
        normed += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(out + row * C + c, normed.to(out.dtype.element_ty), mask=c < C)
