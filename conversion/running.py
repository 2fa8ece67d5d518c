"""What computes a converted model's logits: our own model filled from a Source, or the format's own runtime.

Not here: what the logits are compared by (`verify.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from conversion.source import Source
from mpt.model import MPTMLP, MPTBlock, MPTLanguageModel

_CHUNK = 128  # tokens

# A batch of token ids (B, T) and its mask, 0 at padding on the left, to logits (B, T, V) in float32.
Forward = Callable[[Tensor, Tensor], Tensor]
# A runtime's cache (None at first) and more tokens of one row, to the cache after them and the last one's logits
# (1, 1, V).
Extend = Callable[[Any, list[int]], tuple[Any, Any]]


@dataclass(frozen=True)
class Runner:
    """Something that computes a written model."""

    name: str
    forward: Forward
    longest: int | None = None  # the most tokens it computes rightly
    least_exact: str | None = None  # judged as this dtype at best: its arithmetic differs, whatever its weights
    extend: Extend | None = None  # with a cache of its own


def read_back(target: Source) -> Runner:
    """Our model with the weights that were written."""
    return Runner(f"{target.kind} read back", forward_of(filled(target)))


def filled(source: Source, gelu: Literal["erf", "tanh"] = "erf") -> MPTLanguageModel:
    """Our model with a source's weights in float32."""
    with torch.device("meta"):
        model = MPTLanguageModel.of(source.config)
    model = model.to(torch.float32).to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(source.tensors[name].read())
    if gelu == "tanh":
        for block in model.transformer.blocks:
            assert isinstance(block, MPTBlock)
            block.ffn.forward = partial(_tanh_ffn, block.ffn)  # type: ignore[method-assign]
    return model.eval()


def _tanh_ffn(ffn: MPTMLP, x: Tensor) -> Tensor:
    out: Tensor = ffn.down_proj(F.gelu(ffn.up_proj(x), approximate="tanh"))
    return out


def forward_of(model: Any) -> Forward:
    """A row alone is read in chunks: ALiBi is anchored at a pass's last key, and far from it float32 rounds scores."""

    @torch.inference_mode()
    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        if len(ids) > 1:
            whole: Tensor = model(input_ids=ids, attention_mask=mask).logits
            return whole.float()
        cache, parts = None, []
        for chunk in ids.split(_CHUNK, dim=1):
            out = model(input_ids=chunk, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits.float())
        return torch.cat(parts, dim=1)

    return forward
