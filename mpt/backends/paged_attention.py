"""Attention over keys and values that lie in pages: how the engine stores them on a GPU, and how it reads them back.

A page holds 256 positions of one row, keys and values of all heads. Rows grow page by page out of one pool, so memory
is never moved and prefixes can be shared. Layout (pages, 2, KV heads, 256, D): the keys of one head in one page are
one piece of memory, which is what a program of the decode kernel reads; 256 is what flash-attn's paged kernel needs.
They are in the model's dtype, or in int8 with a scale for each head and position (`int8_cache.py`): what has just been
stored is read as it is stored too, so the result does not depend on how a prompt is cut into chunks.

Two implementations of each function: the Triton kernels (`paged_kernels.py`) for CUDA, and plain torch, which is also
what the kernels are read against. Both, and `Prompts`, leave out the same pages: with ALiBi those before the first
whose keys can reach 2^-24 of a query's weights, by the bound |q| times the page's largest |k|, less the bias.

Letters as in `mpt/model.py`, and P pages of a row. Not here: who owns which page (`mpt/backends/paged_backend.py`).
"""

import functools
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from mpt.backends.int8_cache import LEAST, head_bytes, quantize_heads
from mpt.transfer import to_device

PAGE = 256  # positions
DROP = 2.0**-24  # of a query's weights, what pages left out may have together
# A key's bound over its length: rounding must not make it too small, and prompts read int8 keys rounded to 16 bits.
_MORE, _MORE_OF_INT8 = 1.0001, 1 + 2.0**-8
MOST_KEYS = 1 << 15  # that prompts which share a call of FlexAttention gather: 0.5 GB at the 7B shape
_MOST_SPLITS = 64
_KEY_BYTES = 128  # keys times bytes of a number that a program reads at once: 16 KiB of keys at D 128
# Queries times heads of a group in one program; more take another, which reads the pages again. More than these spill.
_LINES, _LINES_OF_FLOAT32 = 64, 16
_BLOCK = 128  # queries, and keys, of FlexAttention's masks
_AT_ONCE = 4096  # queries that are widened to float32 for their bounds: 67 MB at the 7B shape
_GPU_SPLITS = 4  # programs wanted for each multiprocessor, to have enough reads in flight
# The same where ALiBi keeps most heads near their queries: the few that reach far have all the work.
_GPU_SPLITS_FAR, _FAR = 16, 128  # from so many pages on
# Of the decode kernel's loop. Triton shares them between the look-up of a page and what lies in it: 5 is the least with
# which two blocks of keys and values are on their way, 64 KiB; it compiles the same code for 3 and 4. More lines take
# tensor cores that want more: with 5 they would pass the 99 KiB of shared memory that some GPUs have.
_STAGES, _STAGES_OF_MANY_LINES = 5, 3
_PAGES_AT_ONCE = 64  # whose bounds it looks at together
# What FlexAttention's kernel may take for granted of `Prompts`. IS_DIVISIBLE: queries and keys come in whole blocks.
# BLOCKS_ARE_CONTIGUOUS: blocks in a list follow each other, so only the first of them is looked up.
# ROWS_GUARANTEED_SAFE: in the first block that is read every query sees a key: blocks read in part come first, and the
# first of those has the first query's own key, which all its queries see. One that saw none would become NaN.
KERNEL_OPTIONS = {"IS_DIVISIBLE": True, "BLOCKS_ARE_CONTIGUOUS": True, "ROWS_GUARANTEED_SAFE": True}


@dataclass(frozen=True)
class Pages:
    """The pool of a model: keys and values of every layer, page numbers the same in all of them."""

    kv: Tensor  # (L, pages, 2, KV heads, PAGE, D)
    key_norms: Tensor  # (L, pages, KV heads) float32: no key of the page is longer
    scales: Tensor | None = None  # (L, pages, 2, KV heads, PAGE) float32, what int8 numbers are multiplied with

    @classmethod
    def empty(
        cls, n_layers: int, n_pages: int, n_kv_heads: int, d_head: int, dtype: torch.dtype, device: torch.device
    ) -> "Pages":
        """dtype: of the numbers; torch.int8 has scales beside them."""
        kv = torch.zeros(n_layers, n_pages, 2, n_kv_heads, PAGE, d_head, dtype=dtype, device=device)
        scales = torch.zeros(kv.shape[:-1], device=device) if dtype == torch.int8 else None
        return cls(kv, torch.zeros(n_layers, n_pages, n_kv_heads, device=device), scales)

    @staticmethod
    def position_bytes(n_kv_heads: int, d_head: int, dtype: torch.dtype) -> int:
        """What keys and values of a position take in one layer, with their scales."""
        return 2 * n_kv_heads * (head_bytes(d_head) if dtype == torch.int8 else d_head * dtype.itemsize)

    def scales_of(self, layer: int) -> Tensor | None:
        return None if self.scales is None else self.scales[layer]

    def clear(self, numbers: list[int]) -> None:
        """Make pages ready for another row: bounds that the last one left would only be too large."""
        self.key_norms[:, to_device(torch.tensor(numbers), self.kv.device)] = 0

    def copy(self, source: int, target: int) -> None:
        self.kv[:, target] = self.kv[:, source]
        self.key_norms[:, target] = self.key_norms[:, source]
        if self.scales is not None:
            self.scales[:, target] = self.scales[:, source]


def store(
    kv: Tensor,
    key_norms: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    *,
    scales: Tensor | None = None,
    triton: bool | None = None,
) -> None:
    """Write N new keys and values of one layer, each at its slot: page * PAGE + place in it.

    kv: (pages, 2, KV heads, PAGE, D). key_norms: (pages, KV heads), raised where a key is longer. k, v: (N, KV heads,
    D), D contiguous. slots: (N,) int64. scales: (pages, 2, KV heads, PAGE) where kv is int8. triton: None chooses as
    `uses_triton` does.
    """
    assert (scales is not None) == (kv.dtype == torch.int8), kv.dtype
    N, n_kv, D = k.shape
    more = _MORE if scales is None else _MORE_OF_INT8
    if uses_triton(kv) if triton is None else triton:
        from mpt.backends import paged_kernels

        paged_kernels.store[(N, n_kv)](
            k, v, kv, key_norms if scales is None else scales, key_norms.view(torch.int32), slots,
            *k.stride()[:2], *v.stride()[:2], *kv.stride()[:4], *_strides(scales), key_norms.stride(0),
            D=D, BLOCK_D=_power_of_two(D), PAGE=PAGE, IS_INT8=scales is not None, LEAST=LEAST, MORE=more, num_warps=1,
        )  # fmt: skip
        return
    page, place = slots // PAGE, slots % PAGE
    wide = k.float()
    if scales is not None:
        (k, key_scales), (v, value_scales) = quantize_heads(k), quantize_heads(v)
        scales[page, 0, :, place], scales[page, 1, :, place] = key_scales, value_scales
        wide = k * key_scales[..., None]
    kv[page, 0, :, place], kv[page, 1, :, place] = k, v
    norms = wide.norm(dim=-1) * more  # (N, KV heads)
    key_norms.scatter_reduce_(0, page[:, None].expand(-1, n_kv), norms, "amax")


def paged_decode(
    q: Tensor,
    kv: Tensor,
    key_norms: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    slopes: Tensor | None,
    scale: float,
    *,
    scales: Tensor | None = None,
    drop: float = DROP,
    n_splits: int | None = None,
    triton: bool | None = None,
) -> Tensor:
    """Attention of each row's last T positions over all its positions, (B, T, H, D), in q's dtype.

    q: (B, T, H, D), D contiguous; a row with fewer queries has them last, and what comes out before them is finite and
    means nothing. kv, key_norms: one layer of `Pages`, the queries' own keys stored. block_table: (B, P) int32, the
    pages of each row in order; beyond its length anything. lengths: (B,) int32, positions stored. slopes: (H,) float32,
    None without ALiBi. scales: (pages, 2, KV heads, PAGE) where kv is int8. drop: share of the weights that may be left
    out; 0 reads everything. n_splits: programs that share a row's keys, a power of two chosen by the size of the batch
    and the GPU.
    """
    assert q.stride(-1) == 1 and block_table.dtype == lengths.dtype == torch.int32
    assert (scales is not None) == (kv.dtype == torch.int8), kv.dtype
    if not (uses_triton(q) if triton is None else triton):
        return _decode_torch(q, kv, key_norms, block_table, lengths, slopes, scale, drop, scales)
    from mpt.backends import paged_kernels

    B, T, H, D = q.shape
    n_kv = kv.shape[2]
    G = H // n_kv
    lines = T * G
    # 16 lines are the least a tensor core takes, and Triton fetches ahead only what goes into one.
    most_lines = _LINES if q.element_size() == 2 else _LINES_OF_FLOAT32
    block_m = min(most_lines, max(16, _power_of_two(lines)))
    n_blocks = -(-lines // block_m)
    block_n = _KEY_BYTES // q.element_size()
    if n_splits is None:
        n_pages = block_table.shape[1]
        is_far = slopes is not None and drop > 0 and n_pages >= _FAR
        n_splits = _splits(B * n_kv * n_blocks, n_pages * PAGE // block_n, is_far, q.device)
    out = torch.empty(B, T, H, D, dtype=q.dtype, device=q.device)
    part = part_lse = out  # one split's part is all of it; there is nothing to weigh it against
    if n_splits > 1:
        part = torch.empty(B, T, H, n_splits, D, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(B, T, H, n_splits, dtype=torch.float32, device=q.device)
    block_d = max(16, _power_of_two(D))
    paged_kernels.decode_split[(B, n_kv * n_blocks, n_splits)](
        q, kv, key_norms if scales is None else scales, key_norms, block_table, lengths,
        slopes if slopes is not None else lengths, part, part_lse,
        scale, math.log(drop) if drop else -math.inf, T, n_blocks, H,
        *q.stride()[:3], *kv.stride()[:4], *_strides(scales), key_norms.stride(0), block_table.stride(0),
        G=G, D=D, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d, BLOCK_P=_PAGES_AT_ONCE, PAGE=PAGE,
        N_SPLITS=n_splits, HAS_ALIBI=slopes is not None, IS_INT8=scales is not None, num_warps=4,
        num_stages=_STAGES if block_m == 16 else _STAGES_OF_MANY_LINES,
    )  # fmt: skip
    if n_splits > 1:
        paged_kernels.merge[(B * T * H,)](
            part, part_lse, out, D=D, BLOCK_D=block_d, N_SPLITS=n_splits, BLOCK_S=_power_of_two(n_splits), num_warps=4
        )
    return out


@dataclass(frozen=True)
class Part:
    """The part of one prompt that a step reads."""

    start: int  # of its tokens among those of the step
    n_tokens: int
    stored: int  # positions the row has with these
    pages: Sequence[int]  # of the row, those that hold `stored` positions


def together(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Parts in groups that may share a call: one part each, or several with no more than MOST_KEYS positions."""
    group: list[Part] = []
    for part in parts:
        if group and sum(len(one.pages) for one in [*group, part]) * PAGE > MOST_KEYS:
            yield group
            group = []
        group.append(part)
    if group:
        yield group


class Prompts:
    """Parts of several rows' prompts through one call of FlexAttention: its mask, made once for all layers.

    Each part's queries are padded to whole blocks by copies of its last, its keys are its pages, and parts lie end to
    end. The mask is told block by block, so nothing of size T x S is made. What differs between steps is in tensors,
    and there are two blocks of queries and of keys at least: Triton code that was compiled for one step serves the
    others.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        slopes: Tensor | None,
        scale: float,
        device: torch.device,
        *,
        drop: float = DROP,
        options: dict[str, Any] = KERNEL_OPTIONS,
    ) -> None:
        """drop: as for `paged_decode`. options: of FlexAttention's kernel."""
        self._slopes, self._scale, self._drop, self._options = slopes, scale, drop, options
        places, own, real, unused, row_pages = [], [], [], [], []
        n_queries = n_keys = 0
        for part in parts:
            T, n_pages = part.n_tokens, len(part.pages)
            padded = np.arange(T + -T % _BLOCK).clip(max=T - 1)
            places.append(part.start + padded)
            own.append(n_keys + part.stored - T + padded)
            real.append(n_queries + np.arange(T))
            unused.append(n_keys + np.arange(part.stored, n_pages * PAGE))
            row_pages.append(np.full((len(padded) // _BLOCK, 2), (n_keys // PAGE, n_pages)))
            n_queries, n_keys = n_queries + len(padded), n_keys + n_pages * PAGE
        if n_queries == _BLOCK:
            places.append(np.full(_BLOCK, places[-1][-1]))
            own.append(np.full(_BLOCK, own[-1][-1]))
            row_pages.append(row_pages[-1])
        self.lengths = (len(np.concatenate(own)), n_keys)

        def tensor(numbers: list[np.ndarray], dtype: torch.dtype = torch.int64) -> Tensor:
            return to_device(torch.from_numpy(np.concatenate(numbers)).to(dtype), device)

        self._pages = tensor([np.array(part.pages) for part in parts])
        self._places, self._real, self._unused = tensor(places), tensor(real), tensor(unused)
        self.tokens = self._places[self._real]  # those of the step that this is for
        self._own = tensor(own, torch.int32)  # each query's own key; int32, as are Triton's indices: int64 costs more
        rows = tensor(row_pages, torch.int32)
        self._first_page, self._n_pages = rows[:, 0], rows[:, 1]  # of the row of each block of queries
        blocks = self._own.view(-1, _BLOCK)
        self._first_own = blocks[:, 0]
        # The block that has the first query's own key is never whole, though all queries may see all of it: see
        # ROWS_GUARANTEED_SAFE.
        self._n_before = self._first_own // _BLOCK
        n_partly = blocks[:, -1] // _BLOCK + 1 - self._n_before
        # Both pairs of tables in one shape and layout: the kernel finds its place in the second by that in the first.
        n_heads = 1 if slopes is None or not drop else len(slopes)
        alike = self._n_before.expand(n_heads, -1)
        self._partly = n_partly.expand(n_heads, -1).contiguous()[None], self._run_of(alike)[None]
        own_of = self._own
        first_key = (self._first_page * PAGE).repeat_interleave(_BLOCK)

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j <= own_of[i]) & (j >= first_key[i])  # the second is in the lists of blocks already, for CUDA

        def add_alibi(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score if slopes is None else score + slopes[h] * (j - own_of[i])  # anchored at the query itself

        self._visible, self._add_alibi = visible, add_alibi
        self._mask = self._mask_from((self._first_page * (PAGE // _BLOCK)).expand(n_heads, -1))

    def attend(self, q: Tensor, kv: Tensor, key_norms: Tensor, scales: Tensor | None = None) -> Tensor:
        """(n, H, D) for the n `tokens`, of q (H, N, D), all queries of the step, over one layer of `Pages`."""
        k, v = gather(kv, self._pages, self._unused, scales, q.dtype)
        q = q[:, self._places][None]
        mask = self._mask
        if self._slopes is not None and self._drop:
            mask = self._mask_from(self._first_blocks(q[0], k[0], key_norms[self._pages]))
        is_grouped = q.shape[1] != k.shape[1]
        out = flex(q)(
            q, k, v, score_mod=self._add_alibi, block_mask=mask, scale=self._scale, enable_gqa=is_grouped,
            kernel_options=self._options,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out[0].transpose(0, 1)[self._real]

    def _first_blocks(self, q: Tensor, k: Tensor, page_norms: Tensor) -> Tensor:
        """The first block of keys that each head must read for each block of queries, (H, blocks).

        q: (H, N, D). k: (KV heads, S, D). page_norms: (P, KV heads). As `_needed`, with the worst of a block's queries
        for each term of the bound.
        """
        assert self._slopes is not None
        H, P, n_kv = len(q), len(page_norms), len(k)
        floors, sizes = [], []
        for queries, own in zip(q.split(_AT_ONCE, 1), self._own.split(_AT_ONCE), strict=True):
            wide = queries.float()
            floors.append((wide * k[:, own].repeat_interleave(H // n_kv, 0)).sum(-1))
            sizes.append(wide.norm(dim=-1))
        floor = torch.cat(floors, 1) * self._scale  # (H, N)
        size = torch.cat(sizes, 1).view(H, -1, _BLOCK).amax(-1) * self._scale  # (H, blocks)
        slope = self._slopes[:, None]
        behind = (self._own.view(-1, _BLOCK) - self._first_own[:, None]).flatten()  # in its block
        rest = (-slope * behind - floor).view(H, -1, _BLOCK).amax(-1) + _log_tail(slope)
        pages = torch.arange(P, device=q.device, dtype=torch.int32)
        away = self._first_own[:, None] - (pages + 1) * PAGE + 1  # (blocks, P)
        norms = page_norms.t().repeat_interleave(H // n_kv, 0)[:, None]  # (H, 1, P)
        most = size[..., None] * norms - slope[..., None] * away + rest[..., None]
        limit = math.log(self._drop) - self._n_pages.log()
        needed = (most >= limit[:, None]) & (pages >= self._first_page[:, None])
        return torch.where(needed, pages, P).amin(-1) * (PAGE // _BLOCK)

    def _mask_from(self, first: Tensor) -> BlockMask:
        """first: (H or 1, blocks), the block of keys before which none is read."""
        first = torch.minimum(first, self._n_before)
        return BlockMask.from_kv_blocks(
            *self._partly, (self._n_before - first).contiguous()[None], self._run_of(first)[None],
            BLOCK_SIZE=_BLOCK, mask_mod=self._visible, seq_lengths=self.lengths, compute_q_blocks=False,
        )  # fmt: skip

    def _run_of(self, first: Tensor) -> Tensor:
        """Blocks of keys from `first` on, as long as there are some: (..., blocks) to (..., blocks, all of keys)."""
        n = self.lengths[1] // _BLOCK
        run = first[..., None] + torch.arange(n, device=first.device, dtype=torch.int32)
        return run.clamp(max=n - 1).contiguous()


def flex(q: Tensor) -> Callable[..., Tensor]:
    """torch's flex_attention where these queries are: compiled on CUDA; elsewhere as it is, with all scores."""
    plain: Callable[..., Any] = flex_attention
    return _compiled_flex() if q.is_cuda else plain


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    # A model takes two compilations, several models share a process, and so do tests. Torch stops at 8 and goes on
    # without any, holding S x S scores; `fullgraph` makes that an error.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=True, fullgraph=True)
    return compiled


def gather(
    kv: Tensor,
    pages: Tensor,
    unused: Tensor | slice,
    scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Keys and values of pages in one piece, (1, KV heads, P * PAGE, D) each, zero at the positions `unused`.

    kv: one layer. pages: (P,) int64. scales: of int8 pages, whose values are rounded to this dtype. What others left
    behind a row's end may be NaN, which no mask hides in a product.
    """
    assert (scales is not None) == (kv.dtype == torch.int8), kv.dtype
    both = kv[pages].permute(1, 2, 0, 3, 4)  # (2, KV heads, P, PAGE, D)
    if scales is not None:  # rounded by the product itself: a float32 copy of the prompt would take twice its memory
        factors = scales[pages].permute(1, 2, 0, 3)[..., None]
        both = torch.mul(both, factors, out=torch.empty(both.shape, dtype=dtype, device=kv.device))
    both = both.flatten(2, 3)
    both[:, :, unused] = 0
    k, v = both.split(1)
    return k, v


def uses_triton(tensor: Tensor) -> bool:
    """Whether the kernels are for this tensor: on CUDA, where Triton is installed."""
    return tensor.is_cuda and has_triton()


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _splits(n_programs: int, n_most: int, is_far: bool, device: torch.device) -> int:
    """A power of two, so that few kernels are compiled; n_most: blocks of keys that the longest row can have."""
    n_processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    wanted = -(-(_GPU_SPLITS_FAR if is_far else _GPU_SPLITS) * n_processors // n_programs)
    return min(_MOST_SPLITS, _power_of_two(wanted), _power_of_two(n_most))


def _strides(scales: Tensor | None) -> tuple[int, int, int]:
    """Of page, half and head, as the kernels take them; zeros where there are no scales."""
    return (0, 0, 0) if scales is None else (scales.stride(0), scales.stride(1), scales.stride(2))


def _power_of_two(n: int) -> int:
    """The next one from n on."""
    return 1 << (n - 1).bit_length()


def _decode_torch(
    q: Tensor,
    kv: Tensor,
    key_norms: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    slopes: Tensor | None,
    scale: float,
    drop: float,
    scales: Tensor | None,
) -> Tensor:
    """`paged_decode` in plain torch, in float32 (float64 for float64 inputs), holding copies of all pages."""
    B, T, H, D = q.shape
    n_kv, P, device = kv.shape[2], block_table.shape[1], q.device
    wide = torch.promote_types(q.dtype, torch.float32)
    queries = q.to(wide).view(B, T, n_kv, H // n_kv, D)
    at = lengths[:, None] - T + torch.arange(T, device=device)  # (B, T)
    j = torch.arange(P * PAGE, device=device)
    used = torch.arange(P, device=device) * PAGE < lengths[:, None]  # (B, P); what is beyond is no page number
    numbers = torch.where(used, block_table, 0).long()
    both = kv[numbers].to(wide)
    if scales is not None:
        both = both * scales[numbers][..., None]
    k, v = both.permute(2, 0, 3, 1, 4, 5).flatten(3, 4)  # (B, KV heads, S, D) each, S = P * PAGE
    readable = (j < lengths[:, None])[:, None].expand(B, n_kv, P * PAGE)
    if slopes is not None:
        needed = _needed(queries, k, key_norms[numbers], at, slopes, scale, drop)
        readable = readable & (needed & used[:, None]).repeat_interleave(PAGE, dim=-1)
    k, v = (torch.where(readable[..., None], x, 0) for x in (k, v))
    scores = torch.einsum("btkgd,bksd->btkgs", queries, k) * scale
    if slopes is not None:
        distance = (at[..., None] - j).to(wide)  # (B, T, S)
        scores = scores - slopes.view(n_kv, -1, 1) * distance[:, :, None, None]
    allowed = readable[:, None, :, None] & (j <= at[..., None])[:, :, None, None]
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)  # NaN: a query that sees nothing
    return torch.einsum("btkgs,bksd->btkgd", weights, v).reshape(B, T, H, D).to(q.dtype)


def _needed(
    queries: Tensor, k: Tensor, page_norms: Tensor, at: Tensor, slopes: Tensor, scale: float, drop: float
) -> Tensor:
    """Which pages a group must read, (B, KV heads, P): from the first that some query of it needs.

    queries: (B, T, KV heads, G, D). k: (B, KV heads, S, D). page_norms: (B, P, KV heads). at: (B, T). A query's own key
    scores scale q.k without bias, and the keys of a page that ends at distance d at most e^(scale |q||k| - slope d)
    times the number of them, or 1 / (1 - e^-slope) if that is less.
    """
    B, P = page_norms.shape[:2]
    rows = torch.arange(B, device=k.device)[:, None]
    own = k[rows, :, at.clamp(min=0)]  # (B, T, KV heads, D)
    floor = torch.einsum("btkgd,btkd->btkg", queries, own) * scale
    slope = slopes.view(*queries.shape[2:4], 1)
    ends = torch.arange(1, P + 1, device=k.device) * PAGE - 1
    away = (at[..., None] - ends).clamp(min=0)[:, :, None, None]  # (B, T, 1, 1, P)
    sizes = queries.norm(dim=-1)[..., None] * scale
    most = sizes * page_norms.transpose(1, 2)[:, None, :, None] - slope * away - floor[..., None]
    most = most + _log_tail(slope)
    limit = math.log(drop) - ((at[:, -1] // PAGE) + 1).log() if drop else torch.full((B,), -torch.inf, device=k.device)
    needed = (most >= limit[:, None, None, None, None]) & (at >= 0)[:, :, None, None, None]
    return needed.any(3).any(1).int().cummax(-1).values.bool()  # (B, KV heads, P)


def _log_tail(slope: Tensor) -> Tensor:
    """Of how many times the weight of its last key all keys of a page have at most, as far as ALiBi goes."""
    return (1 / (1 - torch.exp(-slope))).clamp(max=PAGE).log()
