"""Int8 weights: each row of a projection as int8 with one scale, activations as they are.

weight = int8 * scale, scale = max|row| / 127. Half the memory and, while decoding, half the bytes read per token.
Activations stay bfloat16 here: those of large models have outliers that int8 activations with one step for a token lose
(Dettmers et al. 2022). The C code rounds them to int8 with a step for each 32, but in AMX's tiles (docs/kernels.md).
"""

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpt.errors import MachineRefused
from mpt.model import MPTLanguageModel

_FEW_ROWS = 4  # up to here torch's kernel for int8 weights is faster than widening them (measured)


class Int8Linear(nn.Linear):
    """A projection with int8 weights (n_out, n_in) and bfloat16 scales (n_out), in place of the one it is made of."""

    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)  # nothing of nn.Linear's: its weight is a parameter, which int8 cannot be
        weight, scale = quantize(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = linear.bias
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        if len(rows) <= _FEW_ROWS:
            out = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            out = F.linear(rows, _widened(self.weight)) * self.scale
        out = out if self.bias is None else out + self.bias
        return out.view(*x.shape[:-1], self.out_features)


_scratch = threading.local()


def _widened(weight: Tensor) -> Tensor:
    """Int8 weights in bfloat16, which holds them exactly; valid until this thread's next call.

    In memory that is kept: new memory for each of a model's matrices, page by page from the system, took longer than
    filling it.
    """
    kept = getattr(_scratch, "tensor", None)
    if kept is None or kept.numel() < weight.numel():
        kept = _scratch.tensor = torch.empty(weight.numel(), dtype=torch.bfloat16)
    return kept[: weight.numel()].view(weight.shape).copy_(weight)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Int8 weights and the scale (n_out) bfloat16 of each row, of a matrix (n_out, n_in)."""
    weight = weight.float()
    exact = weight.abs().amax(1).clamp(min=1e-12) / 127
    scale = exact.bfloat16()
    scale = torch.where(scale.float() < exact, torch.nextafter(scale, torch.full_like(scale, torch.inf)), scale)
    return (weight / scale.float()[:, None]).round().to(torch.int8), scale


def quantize_model(model: MPTLanguageModel) -> None:
    """Give a model int8 weights, in place: every projection, and the head; of the embedding only rows are read.

    Raises MachineRefused for a model that is not bfloat16 on CPU.
    """
    weight = model.transformer.wte.weight
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        raise MachineRefused(
            f"int8 weights are computed with in bfloat16 on CPU; this model is {str(weight.dtype)[6:]} on "
            f"{weight.device.type}: give `--dtype bfloat16 --device cpu`, or leave `--quantize` out"
        )
    blocks: Any = model.transformer.blocks
    for block in blocks:  # one at a time, so that the wide weights of the last are free again
        for parent in (block.attn, block.ffn):
            for name, module in list(parent.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(parent, name, Int8Linear(module))
    model.lm_head = Int8Linear(model.lm_head)
