"""A stand-in for flash-attn 2 where there is no GPU: its attention over rows laid end to end, by the formula."""

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
    deterministic: bool,
) -> Tensor:
    """As flash-attn 2.8 documents it, with gradients. q: (tokens, H, D). k, v: (tokens, KV heads, D)."""
    assert causal and deterministic and q.dtype == k.dtype == v.dtype
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert all(x.stride(-1) == 1 for x in (q, k, v)) and len(q) == len(k) == len(v) == cu_seqlens_q[-1]
    assert max_seqlen_q == max_seqlen_k >= cu_seqlens_q.diff().max() and cu_seqlens_q.diff().min() > 0
    rows = []
    for start, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True):
        queries, keys, values = (x[start:end].transpose(0, 1) for x in (q, k, v))
        keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 0) for x in (keys, values))  # (H, S, D)
        scores = (queries @ keys.transpose(-1, -2)).float() * softmax_scale
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
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
