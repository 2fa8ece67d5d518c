"""The model's blocks with one Triton kernel for each residual sum and the norm behind it, instead of two of torch's.

In a step of few tokens a kernel that does little takes 2 to 3 us, whatever it does: two fewer in each layer. Other
candidates stay torch's: GELU is one kernel and has nothing left beside it to take in (MPT's up_proj has no bias, and
where it has one, cuBLAS adds it), and `store` reads keys and values where Wqkv leaves them, so nothing is copied.
"""

import torch
from torch import Tensor, nn

from mpt.model import Attend, MPTBlock, MPTModel


def run(transformer: MPTModel, x: Tensor, attend: Attend, position_ids: Tensor | None = None) -> Tensor:
    """`MPTModel.run`, for inference. Writes into x, (B, T, C)."""
    if transformer.wpe is not None:
        assert position_ids is not None
        x = x + transformer.wpe(position_ids)
    last = None  # what the last part of the model has yet to add to x
    for block in transformer.blocks:
        assert isinstance(block, MPTBlock)
        last = block.attn(add_norm(x, last, block.norm_1), attend)
        last = block.ffn(add_norm(x, last, block.norm_2))
    return add_norm(x, last, transformer.norm_f)


def add_norm(x: Tensor, y: Tensor | None, norm: nn.LayerNorm) -> Tensor:
    """norm(x + y), with the sum written into x; both (..., C), x contiguous."""
    from mpt.backends import paged_kernels

    C = x.shape[-1]
    rows, added = x.view(-1, C), x.view(-1, C) if y is None else y.reshape(-1, C).contiguous()
    out = torch.empty_like(x)
    block_c = 1 << (C - 1).bit_length()
    paged_kernels.add_norm[(len(rows),)](
        rows, added, norm.weight, norm.weight if norm.bias is None else norm.bias, out,
        rows.stride(0), added.stride(0), norm.eps,
        C=C, BLOCK_C=block_c, HAS_Y=y is not None, HAS_BIAS=norm.bias is not None,
        num_warps=min(16, max(1, block_c // 512)),
    )  # fmt: skip
    return out
