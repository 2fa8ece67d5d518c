"""A stand-in for flash-attn 2 where there is no GPU: its attention over rows or pages, by the formula."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from torch import Tensor


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float,
    causal: bool,
    alibi_slopes: Tensor | None,
    deterministic: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """As flash-attn 2.8 documents it, with gradients. q: (tokens, H, D).

    k, v: (tokens, KV heads, D); with a block table (pages, page size, KV heads, D).
    """
    n_q, n_k = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    assert causal and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert k.stride(-1) == v.stride(-1) == 1
    if block_table is None:  # documents of training, each attends to itself
        assert deterministic and q.dtype == k.dtype == v.dtype and q.stride(-1) == 1
        assert len(q) == len(k) == len(v) == cu_seqlens_q[-1] and torch.equal(n_q, n_k) and n_q.min() > 0
        assert max_seqlen_q == max_seqlen_k >= n_q.max()
    else:
        assert block_table.dtype == torch.int32 and k.shape[1] % 256 == 0
        assert max_seqlen_q == n_q.max() and max_seqlen_k == n_k.max()
    rows = []
    for row, (T, S) in enumerate(zip(n_q.tolist(), n_k.tolist(), strict=True)):
        at = int(cu_seqlens_q[row])
        if block_table is None:
            keys, values = k[at : at + T], v[at : at + T]
        else:
            keys, values = (x[block_table[row].long()].flatten(0, 1)[:S] for x in (k, v))
        keys, values = (x.transpose(0, 1).repeat_interleave(q.shape[1] // x.shape[1], 0) for x in (keys, values))
        scores = (q[at : at + T].transpose(0, 1) @ keys.transpose(-1, -2)).float() * softmax_scale  # (H, T, S)
        distance = torch.arange(S - T, S)[:, None] - torch.arange(S)
        if alibi_slopes is not None:
            scores = scores - alibi_slopes[:, None, None] * distance.abs()
        weights = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
        rows.append((weights.to(v.dtype) @ values).transpose(0, 1))
    return torch.cat(rows)


def install(monkeypatch: pytest.MonkeyPatch, kernel: object = flash_attn_varlen_func) -> None:
    """Be `flash_attn` for one test."""
    module = ModuleType("flash_attn")
    module.__spec__ = ModuleSpec("flash_attn", None)
    module.flash_attn_varlen_func = kernel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
