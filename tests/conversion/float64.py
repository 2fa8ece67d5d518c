"""MPT in float64, straight from the published description, for logits that no code of ours computes.

Weights are under the checkpoint's names; a tied head is the embedding.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def slopes(n_heads: int, bias_max: float) -> Tensor:
    """ALiBi's, for a power of two of heads."""
    assert n_heads & (n_heads - 1) == 0
    return 2.0 ** (-bias_max * torch.arange(1, n_heads + 1, dtype=torch.float64) / n_heads)


def logits(
    weights: Mapping[str, Tensor],
    ids: list[int],
    n_heads: int,
    bias_max: float | None = 8.0,
    clip: float | None = None,
    n_kv_heads: int | None = None,
) -> Tensor:
    """(T, V) of one row. bias_max: None for learned positions."""
    w = {name: values.double() for name, values in weights.items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w.get(f"{name}.bias", 0.0)

    T, n_kv_heads = len(ids), n_kv_heads or n_heads
    x = w["transformer.wte.weight"][ids]
    if bias_max is None:
        x = x + w["transformer.wpe.weight"][:T]
    size = x.shape[1] // n_heads
    positions = torch.arange(T)
    bias = torch.zeros(n_heads, T, T, dtype=torch.float64)
    if bias_max is not None:
        bias = slopes(n_heads, bias_max)[:, None, None] * (positions[None, :] - positions[:, None])
    bias = bias.masked_fill(positions[None, :] > positions[:, None], -math.inf)
    for n in range(sum(name.endswith("norm_1.weight") for name in w)):
        block = f"transformer.blocks.{n}"
        qkv = linear(norm(x, f"{block}.norm_1"), f"{block}.attn.Wqkv")
        qkv = qkv if clip is None else qkv.clamp(-clip, clip)
        q, k, v = qkv.split([n_heads * size, n_kv_heads * size, n_kv_heads * size], -1)
        q = q.view(T, n_heads, size).transpose(0, 1)
        k, v = (y.view(T, n_kv_heads, size).transpose(0, 1).repeat_interleave(n_heads // n_kv_heads, 0) for y in (k, v))
        attended = (q @ k.transpose(1, 2) / math.sqrt(size) + bias).softmax(-1) @ v
        x = x + linear(attended.transpose(0, 1).reshape(T, -1), f"{block}.attn.out_proj")
        up = linear(norm(x, f"{block}.norm_2"), f"{block}.ffn.up_proj")
        x = x + linear(up * (1 + torch.erf(up / math.sqrt(2))) / 2, f"{block}.ffn.down_proj")
    return norm(x, "transformer.norm_f") @ w.get("lm_head.weight", w["transformer.wte.weight"]).T
