"""Causal attention with ALiBi that never holds S x S scores, and the plain formula it is tested against.

ALiBi here is one float32 vector per head, slope * (j - (S - 1)) for key j of S: softmax ignores what is constant along
a row, so the query's own position drops out. The vector is anchored at the last key and stays float32: at 65,536 keys a
bfloat16 bias is wrong by 0.15 in the output, float32 anchored at key 0 by 4.5e-3, this by 2e-6.

`AttentionSpec` is what a config says of attention, made once; nothing else derives slopes or scales from a config.

Letters as in `mpt/model.py`. Sources: Press et al. 2021 (ALiBi); llm-foundry `attention.py` for MPT's use of it.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mpt import native_attention
from mpt.flash_2 import flash_2, why_no_flash_2

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from mpt.config import MPTConfig

# What the CPU's flash kernel is called with directly: it also returns the log-sum-exp, which `F.scaled_dot_product_
# attention` keeps to itself and two-part attention needs. Private in torch; test_attention compares it with float64.
_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

_BLOCK = 1024  # queries that share an anchor of the bias
_GROUPS = 4  # runs of heads that may reach back differently far
_TILE = 128  # queries, and keys, that FlexAttention's mask decides about at once


@dataclass(frozen=True)
class AttentionSpec:
    """What a model does to queries, keys and values: every option of attention that a config can ask for.

    A backend claims or refuses each field by name (`mpt/backends/capabilities.py`). A new option, such as a window of
    keys that a query may look back on, begins as a field here and is refused by every backend that does not claim it.
    """

    n_heads: int
    n_kv_heads: int  # fewer than n_heads: each serves a group of heads
    d_head: int
    scale: float  # of q.k before the softmax
    alibi_bias_max: float | None = None  # None: no ALiBi
    clip_qkv: float | None = None  # queries, keys and values are clamped to plus and minus this, before qk_ln
    qk_ln: bool = False  # LayerNorm over all queries and over all keys of a token

    @classmethod
    def of(cls, config: "MPTConfig") -> "AttentionSpec":
        given = config.attention
        return cls(
            n_heads=config.n_heads,
            n_kv_heads=config.n_kv_heads,
            d_head=config.d_head,
            scale=config.softmax_scale,
            alibi_bias_max=given["alibi_bias_max"] if given["alibi"] else None,
            clip_qkv=given["clip_qkv"] or None,
            qk_ln=bool(given["qk_ln"]),
        )

    def slopes(self) -> Tensor | None:
        """ALiBi's slope of each head, (H,) float32; None without ALiBi."""
        return None if self.alibi_bias_max is None else alibi_slopes(self.n_heads, self.alibi_bias_max)


def alibi_slopes(n_heads: int, bias_max: float = 8.0) -> Tensor:
    """ALiBi's slope for each head, (H,) float32: 2^(-bias_max * (h + 1) / H) for head h.

    When H is not a power of two, the slopes of the next one, P, are taken, every second of them first, then the
    others, and H of these kept. Source: Press et al. 2021, get_slopes.
    """
    P = 1 << (n_heads - 1).bit_length()  # next power of two
    slopes = 2.0 ** (-bias_max * torch.arange(1, P + 1, dtype=torch.float64) / P)  # (P,)
    slopes = slopes if n_heads == P else torch.cat([slopes[1::2], slopes[::2]])[:n_heads]
    return slopes.float()


def alibi_bias(slopes: Tensor, n_keys: int) -> Tensor:
    """The bias of each key, (1, H, 1, S) float32, anchored at the last key: zero there, falling to the left.

    A bias for fewer keys is its tail: `bias[..., -S:]`.
    """
    distance = torch.arange(1 - n_keys, 1, dtype=torch.float32, device=slopes.device)  # (S,), exact to 2^24
    return (slopes[:, None] * distance)[None, :, None, :]


def alibi_reach(slopes: Tensor, bound: Tensor, drop: float = 2.0**-24) -> Tensor:
    """How many keys, its own included, each head must look at for its output to miss less than `drop` of its weights.

    (H,) int64. bound: (H,), no |q.k| * scale is larger. A query's own key scores at least -bound, one at distance d at
    most bound - slope d: those from distance W on have at most e^(2 bound - slope W) / (1 - e^-slope) of the weights.
    """
    slopes = slopes.double()
    reach = (2 * bound.double() - math.log(drop) - torch.log1p(-torch.exp(-slopes))) / slopes
    return reach.ceil().clamp(min=1).long()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    reach: Tensor | None = None,
    sight: "Sight | None" = None,
) -> Tensor:
    """Attention of the last T of S positions, (B, H, T, D), in q's dtype.

    q: (B, H, T, D); k, v: (B, H or fewer, S, D) with S >= T, the queries' own keys last. bias: (1, H, 1, >= S)
    float32 as `alibi_bias` gives it. key_mask: (B, S) bool, False for keys nobody may see (padding); the output of a
    query that sees no key is finite and means nothing. reach: (H,) int64, keys that each head must look back on; on CPU
    others are not read (`alibi_reach`). sight: `see` of these lengths and this key_mask, where layers share one; on CPU
    it is not needed. Memory beyond the inputs is O(H * S) on CPU and CUDA, except for gradients through a past on CPU,
    O(H * T * S).
    """
    H, T = q.shape[1:3]
    S = k.shape[2]
    if takes_flex(q.device) and T > 1:
        slopes = None if bias is None else -bias[0, :, 0, -2]  # what a key loses that is one further away
        return _flex(q, k, v, scale, slopes, sight or see(T, S, q.device, key_mask))
    if k.shape[1] != H:  # grouped heads: each key head serves H / KV query heads in a row
        k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
    if bias is not None:
        bias = bias[..., -S:]
    if 1 < T < S and _needs_grad(q, k, v):
        # Training through a past (prefix tuning): the kernel's log-sum-exp, needed to merge, carries no gradient.
        allowed = causal_mask(T, S, q.device)
        allowed = allowed if key_mask is None else allowed & key_mask[:, None, None, :]
        return eager(q, k, v, scale=scale, bias=bias, allowed=allowed)
    if key_mask is not None:
        hidden = torch.zeros(key_mask.shape, device=q.device).masked_fill_(~key_mask, -torch.inf)[:, None, None, :]
        bias = hidden if bias is None else bias + hidden  # (B, 1 or H, 1, S)
    is_long = T > _BLOCK or (reach is not None and 1 < T < S)
    if is_long and key_mask is None and q.device.type == "cpu" and not _needs_grad(q, k, v):
        return _attend_in_blocks(q, k, v, scale, bias, reach)
    if q.is_cuda:  # one token: a matrix-vector product per head, the scores are only (B, H, 1, S)
        return eager(q, k, v, scale=scale, bias=bias)
    if T == 1:
        return _sdpa(q, k, v, scale, bias, causal=False)
    if T == S:
        return _sdpa(q, k, v, scale, bias, causal=True)  # no `T > 1`, which is a symbol where torch compiles
    return _attend_past(q, k, v, scale, bias, key_mask)


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _attend_in_blocks(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, reach: Tensor | None
) -> Tensor:
    """Queries a block at a time, the bias anchored at each block's end, over the keys that its heads reach.

    One anchor for 65,536 queries would leave the first ones float32's digits of a bias of 46,000: 1.2e-3 off.
    """
    H, T = q.shape[1:3]
    past = k.shape[2] - T
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for start in range(0, T, _BLOCK):
        end = min(start + _BLOCK, T)
        stored = past + end
        for heads, first in _head_groups(H, past + start, reach):
            own_bias = None if bias is None else bias[:, heads, :, first - stored :]
            keys, values = k[:, heads, first:stored], v[:, heads, first:stored]
            if first == past + start:
                out[:, heads, start:end] = _sdpa(q[:, heads, start:end], keys, values, scale, own_bias, causal=True)
            else:
                out[:, heads, start:end] = _attend_past(q[:, heads, start:end], keys, values, scale, own_bias, None)
    return out


def _head_groups(H: int, n_before: int, reach: Tensor | None) -> list[tuple[slice, int]]:
    """Heads in runs, each with the first key it must read for queries that n_before keys lie before."""
    size = H if reach is None else -(-H // _GROUPS)
    groups: list[tuple[slice, int]] = []
    for at in range(0, H, size):
        heads = slice(at, min(at + size, H))
        first = 0 if reach is None else max(0, n_before + 1 - int(reach[heads].max()))
        if groups and groups[-1][1] == first:
            heads = slice(groups.pop()[0].start, heads.stop)
        groups.append((heads, first))
    return groups


def _attend_past(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, key_mask: Tensor | None) -> Tensor:
    """The last T of S positions on CPU, 1 < T < S: over the past and over their own keys, then merged."""
    T, S = q.shape[2], k.shape[2]
    past = S - T
    left, left_lse = _flash_cpu(
        q, k[:, :, :past], v[:, :, :past], 0.0, False, attn_mask=_part(bias, 0, past, q), scale=scale
    )
    own, own_lse = _flash_cpu(
        q, k[:, :, past:], v[:, :, past:], 0.0, True, attn_mask=_part(bias, past, S, q), scale=scale
    )
    if key_mask is not None:  # to a query that sees no key of its part the kernel gives 0, which is a weight of 1
        nothing = torch.finfo(left_lse.dtype).min  # finite: two of them must not make NaN
        left_lse = left_lse.masked_fill(~key_mask[:, None, None, :past].any(-1), nothing)
        own_lse = own_lse.masked_fill(key_mask[:, None, past:].cumsum(-1) == 0, nothing)
    return _merge(left, left_lse, own, own_lse)


DocumentsKernel = Literal["torch", "C", "FlexAttention", "flash-attn 2"]


def documents_kernel(device: torch.device, dtype: torch.dtype, d_head: int) -> tuple[DocumentsKernel, str | None]:
    """What attends within packed documents there, and why nothing faster does. dtype: of queries, keys and values.

    The wish for speed is C on CPU, flash-attn 2 on Ampere and Ada (compute capability 8), FlexAttention on every other
    GPU.
    """
    if not takes_flex(device):
        if device.type != "cpu":
            return "torch", None
        why_not = native_attention.why_not_native(dtype, d_head)
        return ("torch", why_not) if why_not else ("C", None)
    if dtype not in (torch.float16, torch.bfloat16):
        return "FlexAttention", f"flash-attn is for bfloat16 and float16, and attention is in {str(dtype)[6:]} here"
    if torch.cuda.get_device_capability(device)[0] != 8:
        return "FlexAttention", None
    why_not = why_no_flash_2(d_head)
    return ("FlexAttention", why_not) if why_not else ("flash-attn 2", None)


class Documents:
    """Packed rows in which no document sees another: what all layers of a step share, made once.

    Equal to attending each document alone: ALiBi sees distances only, so positions need no reset.
    """

    def __init__(
        self, sequence_id: Tensor, *, scale: float, slopes: Tensor | None = None, kernel: DocumentsKernel | None = None
    ) -> None:
        """sequence_id: (B, T), the document each position belongs to, each document in one piece; -1 is padding, whose
        output is zero. slopes: (H,) float32. kernel: as `documents_kernel` has it; None for one that takes any dtype.
        """
        self._scale, self._slopes = scale, slopes
        self._kernel = kernel or ("FlexAttention" if takes_flex(sequence_id.device) else "torch")
        T = sequence_id.shape[1]
        if self._kernel == "flash-attn 2":
            self._flash, self._longest, self._padding = flash_2(), T, (sequence_id < 0).flatten()
            self._ends = _ends(sequence_id)
        elif self._kernel == "FlexAttention":
            self._sight = see(T, T, sequence_id.device, first_key=_first_keys(sequence_id))
        elif self._kernel == "C":
            self._pieces = native_attention.pieces(*_documents(sequence_id))
        else:
            _, lengths, is_padding = _documents(sequence_id)
            self._lengths, self._is_padding = lengths.tolist(), is_padding.tolist()
            self._bias = None if slopes is None else alibi_bias(slopes, max(self._lengths))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention within each document, (B, H, T, D)."""
        if self._kernel == "flash-attn 2":
            return self._attend_by_flash(q, k, v)
        if self._kernel == "FlexAttention":
            return _flex(q, k, v, self._scale, self._slopes, self._sight)
        if self._kernel == "C":
            if k.shape[1] != q.shape[1]:
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
            return native_attention.attend(q, k, v, self._pieces, self._slopes, self._scale)
        # Rows are laid end to end and split at the borders once: a slice per document would cost each backward a
        # zero-filled copy of the whole batch (measured: 14 times slower for 64 documents).
        B, H, T, D = q.shape
        q, k, v = (x.transpose(0, 1).reshape(1, x.shape[1], B * T, D) for x in (q, k, v))
        parts = (x.split(self._lengths, 2) for x in (q, k, v))
        pieces = [
            torch.zeros_like(qs) if padding else attend(qs, ks, vs, scale=self._scale, bias=self._bias)
            for qs, ks, vs, padding in zip(*parts, self._is_padding, strict=True)
        ]
        return torch.cat(pieces, dim=2).view(H, B, T, D).transpose(0, 1)

    def _attend_by_flash(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rows laid end to end, (B * T, H, D), which is how the projection has left them.

        Two backward passes over the same numbers must give the same: a resumed run is equal to the bit.
        """
        B, H, T, D = q.shape
        laid = (x.to(v.dtype).transpose(1, 2).reshape(B * T, x.shape[1], D) for x in (q, k, v))  # `qk_ln` widens two
        out = self._flash(
            *laid, self._ends, self._ends, self._longest, self._longest,
            softmax_scale=self._scale, causal=True, alibi_slopes=self._slopes, deterministic=True,
        )  # fmt: skip
        return out.masked_fill(self._padding[:, None, None], 0).view(B, T, H, D).transpose(1, 2)


def eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    allowed: Tensor | None = None,
    drop: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The formula as written, holding all scores: softmax(q k^T * scale + bias) v, (B, H, T, D).

    allowed: bool, broadcastable to (B, H, T, S). drop: dropout of the probabilities.
    Scores and softmax are float32, or float64 for float64 inputs.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.transpose(-1, -2)).to(wide) * scale  # (B, H, T, S)
    if bias is not None:
        scores = scores + bias
    if allowed is not None:
        scores = scores.masked_fill(~allowed, torch.finfo(wide).min)
    probabilities = scores.softmax(-1)
    return (probabilities if drop is None else drop(probabilities)).to(v.dtype) @ v


def causal_mask(T: int, S: int, device: torch.device | None = None) -> Tensor:
    """Which of S keys each of the last T positions may see, (T, S) bool."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, causal: bool) -> Tensor:
    if bias is not None and q.dtype == torch.float64:
        bias = bias.double()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, scale=scale)


def _part(bias: Tensor | None, start: int, end: int, q: Tensor) -> Tensor | None:
    if bias is None:
        return None
    part = bias[..., start:end]
    return part.double() if q.dtype == torch.float64 else part


def _merge(left: Tensor, left_lse: Tensor, right: Tensor, right_lse: Tensor) -> Tensor:
    """Attention over two sets of keys from the attention over each and its log-sum-exp, (B, H, T, D)."""
    total = torch.logaddexp(left_lse, right_lse)
    return (left * (left_lse - total).exp()[..., None] + right * (right_lse - total).exp()[..., None]).to(left.dtype)


def _documents(sequence_id: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First position and length of each run of one document, rows end to end, and whether it is padding (-1)."""
    first = _begins(sequence_id).flatten().nonzero().flatten()  # (runs,)
    lengths = torch.diff(first, append=first.new_tensor([sequence_id.numel()]))
    return first, lengths, sequence_id.flatten()[first] < 0


def _begins(sequence_id: Tensor) -> Tensor:
    """Where a document, or padding, begins, (B, T) bool."""
    begins = torch.ones_like(sequence_id, dtype=torch.bool)
    begins[:, 1:] = sequence_id[:, 1:] != sequence_id[:, :-1]
    return begins


def _ends(sequence_id: Tensor) -> Tensor:
    """0 and the end of each document, rows end to end, int32: flash-attn's `cu_seqlens`. Its length waits for the GPU.

    Padding is cut every 128 positions, so that its attention, of which nothing is used, costs next to nothing.
    """
    cut = torch.arange(sequence_id.shape[1], device=sequence_id.device) % _TILE == 0
    first = (_begins(sequence_id) | ((sequence_id < 0) & cut)).flatten().nonzero().flatten()
    return F.pad(first, (0, 1), value=sequence_id.numel()).int()


# -- FlexAttention: on CUDA one fused kernel, forward and backward, whatever the mask ---------------------------------


def takes_flex(device: torch.device) -> bool:
    """Whether attention of several queries is FlexAttention's; on CPU it would hold all scores."""
    return device.type == "cuda"


@dataclass(frozen=True)
class Sight:
    """Which keys each query sees, for FlexAttention. It is the same for all layers, so a step makes it once."""

    mask: "BlockMask"
    past: Tensor | None  # how many keys lie before the first query, (); None for none


def see(T: int, S: int, device: torch.device, key_mask: Tensor | None = None, first_key: Tensor | None = None) -> Sight:
    """What the last T of S positions see: keys up to their own, from first_key on, that key_mask does not hide.

    key_mask: (B, S) bool. first_key: (B, T) int32; from S on, the query sees nothing. Nothing of T x S is made, only
    tables of tiles of 128 x 128, by arithmetic: 16 bytes a tile, so one in a thousand of a byte a pair.
    """
    from torch.nn.attention.flex_attention import BlockMask

    past = torch.full((), S - T, dtype=torch.int32, device=device) if S > T else None

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = j <= (i if past is None else i + past)
        if first_key is not None:
            seen = seen & (j >= first_key[b, i])
        if key_mask is not None:
            seen = seen & key_mask[b, j]
        return seen

    queries = torch.arange(0, T, _TILE, device=device)[:, None]  # the first of each tile
    keys = torch.arange(0, S, _TILE, device=device)
    seen = keys < (S - T) + (queries + _TILE).clamp(max=T)  # some query sees some key, (1 or B, query tiles, key tiles)
    whole = (keys + _TILE <= S - T + queries + 1) & (queries + _TILE <= T)  # every query sees every key
    if first_key is not None:
        nothing = len(keys) * _TILE
        firsts = F.pad(first_key.masked_fill(first_key >= S, nothing), (0, -T % _TILE), value=nothing)
        firsts = firsts.unflatten(1, (-1, _TILE))
        seen = seen & (keys + _TILE > firsts.amin(-1)[..., None])
        whole = whole & (keys >= firsts.amax(-1)[..., None])
    if key_mask is not None:
        readable = F.pad(key_mask, (0, -S % _TILE)).unflatten(1, (-1, _TILE))
        seen = seen & readable.any(-1)[:, None]
        whole = whole & readable.all(-1)[:, None]
    tables = (*_tiles(seen & ~whole), *_tiles(whole))
    return Sight(BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=_TILE, mask_mod=visible, seq_lengths=(T, S)), past)


def _tiles(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles of keys each tile of queries takes, and which come first, as BlockMask has them."""
    chosen = chosen.view(-1, 1, *chosen.shape[-2:]).int()
    return chosen.sum(-1, dtype=torch.int32), chosen.argsort(dim=-1, descending=True, stable=True).int()


def _first_keys(sequence_id: Tensor) -> Tensor:
    """Where the document of each position begins, (B, T) int32; T for padding."""
    T = sequence_id.shape[1]
    first = torch.where(_begins(sequence_id), torch.arange(T, device=sequence_id.device), 0).cummax(-1).values
    return first.masked_fill(sequence_id < 0, T).int()


def _flex(q: Tensor, k: Tensor, v: Tensor, scale: float, slopes: Tensor | None, sight: Sight) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    past = sight.past

    def add_alibi(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if slopes is None:
            return score
        return score + slopes[h] * (j - i if past is None else j - i - past)  # anchored at the query itself

    kernel: Callable[..., Tensor] = flex_attention
    if q.is_cuda and not torch.compiler.is_compiling():  # else whoever compiles does it
        kernel = _compiled_flex()
    is_grouped = k.shape[1] != q.shape[1]
    return kernel(q, k, v, score_mod=add_alibi, block_mask=sight.mask, scale=scale, enable_gqa=is_grouped)


def allow_variants() -> None:
    """Let torch compile code of attention more than 8 times.

    With and without gradients, documents, a key mask, a past, one row or more, whole tiles or not: each is compiled for
    itself, and several models share a process.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    allow_variants()
    # Past the limit torch would go on without compiling, holding all scores; `fullgraph` makes that an error.
    # The option lets selective activation checkpointing see the compiled code and keep its result (training/memory.py).
    options: dict[str, str | int | bool | Callable[..., object]] = {"wrap_inductor_compiled_regions": True}
    return torch.compile(flex_attention, dynamic=True, fullgraph=True, options=options)
