"""Attention over keys and values that lie in pages: how the engine stores them on a GPU, and how it reads them back.

A page holds 256 positions of one row, keys and values of all heads. Rows grow page by page out of one pool, so memory
is never moved and prefixes can be shared. Layout (pages, 2, KV heads, 256, D): the keys of one head in one page are
one piece of memory, which is what a program of the decode kernel reads; 256 is what flash-attn's paged kernel needs.

Two implementations of each function: the Triton kernels (`paged_kernels.py`) for CUDA, and plain torch, which is also
what the kernels are read against. The same early termination in both: with ALiBi a page is left out where no
query's bound (|q| times the page's largest |k|, less the bias) lets its keys reach 2^-24 of the weights.

Letters as in `mpt/model.py`, and P pages of a row. Not here: who owns which page (`mpt/backends/paged_backend.py`).
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

PAGE = 256  # positions
DROP = 2.0**-24  # of a query's weights, what pages left out may have together
_MOST_SPLITS = 64
_KEY_BYTES = 128  # keys times bytes of a number that a program reads at once: 16 KiB of keys at D 128
# Queries times heads of a group in one program; more take another, which reads the pages again. More than these spill.
_LINES, _LINES_OF_FLOAT32 = 64, 16
_BLOCK = 128  # queries, and keys, of FlexAttention's masks
_GPU_SPLITS = 4  # programs wanted for each multiprocessor, to have enough reads in flight


@dataclass(frozen=True)
class Pages:
    """The pool of a model: keys and values of every layer, page numbers the same in all of them."""

    kv: Tensor  # (L, pages, 2, KV heads, PAGE, D)
    key_norms: Tensor  # (L, pages, KV heads) float32: no key of the page is longer

    @classmethod
    def empty(
        cls, n_layers: int, n_pages: int, n_kv_heads: int, d_head: int, dtype: torch.dtype, device: torch.device
    ) -> "Pages":
        kv = torch.zeros(n_layers, n_pages, 2, n_kv_heads, PAGE, d_head, dtype=dtype, device=device)
        return cls(kv, torch.zeros(n_layers, n_pages, n_kv_heads, device=device))

    def clear(self, numbers: list[int]) -> None:
        """Make pages ready for another row: bounds that the last one left would only be too large."""
        self.key_norms[:, torch.tensor(numbers, device=self.kv.device)] = 0

    def copy(self, source: int, target: int) -> None:
        self.kv[:, target] = self.kv[:, source]
        self.key_norms[:, target] = self.key_norms[:, source]


def store(kv: Tensor, key_norms: Tensor, k: Tensor, v: Tensor, slots: Tensor, *, triton: bool | None = None) -> None:
    """Write N new keys and values of one layer, each at its slot: page * PAGE + place in it.

    kv: (pages, 2, KV heads, PAGE, D). key_norms: (pages, KV heads), raised where a key is longer. k, v: (N, KV heads,
    D), D contiguous. slots: (N,) int64. triton: None chooses as `uses_triton` does.
    """
    N, n_kv, D = k.shape
    if uses_triton(kv) if triton is None else triton:
        from mpt.backends import paged_kernels

        paged_kernels.store[(N, n_kv)](
            k, v, kv, key_norms.view(torch.int32), slots,
            *k.stride()[:2], *v.stride()[:2], *kv.stride()[:4], key_norms.stride(0),
            D=D, BLOCK_D=_power_of_two(D), PAGE=PAGE, num_warps=1,
        )  # fmt: skip
        return
    page, place = slots // PAGE, slots % PAGE
    kv[page, 0, :, place], kv[page, 1, :, place] = k, v
    norms = k.float().norm(dim=-1) * 1.0001  # (N, KV heads); rounding must not make the bound too small
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
    drop: float = DROP,
    n_splits: int | None = None,
    triton: bool | None = None,
) -> Tensor:
    """Attention of each row's last T positions over all its positions, (B, T, H, D), in q's dtype.

    q: (B, T, H, D), D contiguous; a row with fewer queries has them last, and what comes out before them is finite and
    means nothing. kv, key_norms: one layer of `Pages`, the queries' own keys stored. block_table: (B, P) int32, the
    pages of each row in order; beyond its length anything. lengths: (B,) int32, positions stored. slopes: (H,) float32,
    None without ALiBi. drop: share of the weights that may be left out; 0 reads everything. n_splits: programs that
    share a row's pages, chosen by the size of the batch and the GPU.
    """
    assert q.stride(-1) == 1 and block_table.dtype == lengths.dtype == torch.int32
    if not (uses_triton(q) if triton is None else triton):
        return _decode_torch(q, kv, key_norms, block_table, lengths, slopes, scale, drop)
    from mpt.backends import paged_kernels

    B, T, H, D = q.shape
    n_kv = kv.shape[2]
    G = H // n_kv
    lines = T * G
    # 16 lines are the least a tensor core takes; a single one is multiplied without.
    most_lines = _LINES if q.element_size() == 2 else _LINES_OF_FLOAT32
    block_m = 1 if lines == 1 else min(most_lines, max(16, _power_of_two(lines)))
    n_blocks = -(-lines // block_m)
    if n_splits is None:
        n_splits = min(_splits(B * n_kv * n_blocks, q.device), block_table.shape[1])
    part = torch.empty(B, T, H, n_splits, D, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(B, T, H, n_splits, dtype=torch.float32, device=q.device)
    out = torch.empty(B, T, H, D, dtype=q.dtype, device=q.device)
    block_d = max(16, _power_of_two(D))
    paged_kernels.decode_split[(B, n_kv * n_blocks, n_splits)](
        q, kv, key_norms, block_table, lengths, slopes if slopes is not None else lengths, part, part_lse,
        scale, math.log(drop) if drop else -math.inf, T, n_blocks, H,
        *q.stride()[:3], *kv.stride()[:4], key_norms.stride(0), block_table.stride(0),
        G=G, D=D, BLOCK_M=block_m, BLOCK_N=_KEY_BYTES // q.element_size(), BLOCK_D=block_d, PAGE=PAGE,
        N_SPLITS=n_splits, HAS_ALIBI=slopes is not None, num_warps=4, num_stages=2,
    )  # fmt: skip
    paged_kernels.merge[(B * T * H,)](
        part, part_lse, out, D=D, BLOCK_D=block_d, N_SPLITS=n_splits, BLOCK_S=_power_of_two(n_splits), num_warps=4
    )
    return out


class Chunk:
    """Part of a prompt, T tokens behind what is stored of it: FlexAttention and its mask, made once for all layers.

    The mask is told block by block, so nothing of size T x S is made. What differs between chunks is in tensors, and
    sizes are multiples of a block: Triton code that was compiled for one chunk serves the others.
    """

    def __init__(self, T: int, stored: int, slopes: Tensor | None, scale: float, device: torch.device) -> None:
        """stored: positions the row has with these T."""
        self._n_extra, self._scale = -T % _BLOCK, scale
        past = torch.full((), stored - T, device=device)

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return j <= i + past

        def add_alibi(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score if slopes is None else score + slopes[h] * (j - i - past)  # anchored at the query itself

        self._add_alibi = add_alibi
        n_blocks = -(-stored // PAGE) * (PAGE // _BLOCK)
        key_blocks = torch.arange(n_blocks, device=device)
        first = torch.arange(stored - T, stored + self._n_extra, _BLOCK, device=device)  # of each block of queries
        n_whole = ((first + 1) // _BLOCK).clamp(max=n_blocks)  # blocks of keys that all its queries see
        n_all = ((first + _BLOCK - 1) // _BLOCK + 1).clamp(max=n_blocks)
        whole = key_blocks.expand(len(first), -1)
        partly = (n_whole[:, None] + key_blocks).clamp(max=n_blocks - 1)
        tables = (n_all - n_whole, partly, n_whole, whole)
        n_partly, partly, n_whole, whole = (table.to(torch.int32)[None, None] for table in tables)
        lengths = (T + self._n_extra, n_blocks * _BLOCK)
        self.mask = BlockMask.from_kv_blocks(
            n_partly, partly, n_whole, whole, BLOCK_SIZE=_BLOCK, mask_mod=visible, seq_lengths=lengths
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(1, H, T, D) of q (1, H, T, D) over k and v as `gather` gives them."""
        T = q.shape[2]
        q = F.pad(q, (0, 0, 0, self._n_extra))
        kernel = _flex(q.is_cuda)
        is_grouped = q.shape[1] != k.shape[1]
        out = kernel(q, k, v, score_mod=self._add_alibi, block_mask=self.mask, scale=self._scale, enable_gqa=is_grouped)
        assert isinstance(out, Tensor)
        return out[:, :, :T]


@functools.cache
def _flex(is_compiled: bool) -> Callable[..., Tensor]:
    flex: Callable[..., Tensor] = flex_attention
    if not is_compiled:
        return flex
    # A model takes three compilations (one block or more, of queries and of keys). Torch stops at 8 and goes on without
    # any, holding S x S scores; and several models share a process.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(flex, dynamic=True)


def gather(kv: Tensor, pages: Tensor, stored: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one row in one piece, (1, KV heads, P * PAGE, D) each, zero from `stored` on.

    kv: one layer. pages: (P,) int64. What others left behind a row's end may be NaN, which no mask hides in a product.
    """
    both = kv[pages].permute(1, 2, 0, 3, 4).flatten(2, 3)
    both[:, :, stored:] = 0
    k, v = both.split(1)
    return k, v


def uses_triton(tensor: Tensor) -> bool:
    """Whether the kernels are for this tensor: on CUDA, where Triton is installed."""
    return tensor.is_cuda and has_triton()


def why_no_flash(device: str, dtype: torch.dtype) -> str | None:
    """Why flash-attn cannot read prompts here, None where it can. It is imported only where all else fits."""
    if device != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn is for bfloat16 and float16 on CUDA, and this model is {str(dtype)[6:]} on {device}"
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    try:
        import flash_attn  # noqa: F401
    except ImportError as error:
        return f"flash-attn does not load, perhaps it was built for another torch ({error})"
    return None


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _splits(n_programs: int, device: torch.device) -> int:
    n_processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return max(1, min(_MOST_SPLITS, -(-_GPU_SPLITS * n_processors // n_programs)))


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
    k, v = kv[numbers].to(wide).permute(2, 0, 3, 1, 4, 5).flatten(3, 4)  # (B, KV heads, S, D) each, S = P * PAGE
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
    """Which pages some query of a group must read, (B, KV heads, P).

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
    most = most + (1 / (1 - torch.exp(-slope))).clamp(max=PAGE).log()
    limit = math.log(drop) - ((at[:, -1] // PAGE) + 1).log() if drop else torch.full((B,), -torch.inf, device=k.device)
    needed = (most >= limit[:, None, None, None, None]) & (at >= 0)[:, :, None, None, None]
    return needed.any(3).any(1)  # (B, KV heads, P)
