"""A model cut into N for tensor parallelism: each process holds a share of the heads and of the feed-forward's width.

As Megatron does it (Shoeybi et al. 2019): Wqkv and up_proj by rows, out_proj and down_proj by columns, and after those
two the sum over the processes. Embeddings, norms and the head are whole everywhere. Plain slices rather than DTensors:
a process reads no more than its own share, and a decoding step pays no dispatch.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from mpt.config import MPTConfig
from mpt.errors import UnsupportedConfig, UserError
from mpt.model import MPTLanguageModel


@dataclass(frozen=True)
class Shard:
    """Share number `rank` of `n`."""

    rank: int
    n: int

    def check(self, config: MPTConfig) -> None:
        """Raises UserError where the model cannot be cut so, UnsupportedConfig where no cut is made."""
        if config.attention["qk_ln"]:
            raise UnsupportedConfig(
                "`qk_ln` normalizes over all heads, which tensor parallelism cuts apart; use one GPU"
            )
        for what, value in (("heads", config.n_heads), ("KV heads", config.n_kv_heads), ("d_ffn", config.d_ffn)):
            if value % self.n:
                raise UserError(f"{value} {what} cannot be shared by {self.n} processes; give a divisor of {value}")

    def cut(self, model: MPTLanguageModel) -> None:
        """Give a model on the meta device this share's shapes, and the sums after each half of a block."""
        config = model.config
        self.check(config)
        n_heads = config.n_heads // self.n
        model.transformer.heads = slice(self.rank * n_heads, (self.rank + 1) * n_heads)
        for name, parameter in list(model.named_parameters()):
            cut = self.part(name, parameter, config)
            if cut is not parameter:
                owner, _, key = name.rpartition(".")
                setattr(model.get_submodule(owner), key, nn.Parameter(cut, requires_grad=False))
        for block in model.transformer.blocks:
            attn: Any = block.attn
            ffn: Any = block.ffn
            attn.n_heads, attn.n_kv_heads = n_heads, config.n_kv_heads // self.n
            attn.widths = [width // self.n for width in attn.widths]
            attn.Wqkv.out_features = sum(attn.widths)
            attn.out_proj.in_features = config.d_model // self.n
            ffn.up_proj.out_features = ffn.down_proj.in_features = config.d_ffn // self.n
            for linear in (attn.out_proj, ffn.down_proj):
                linear.register_forward_hook(_sum_over_processes)
                if self.rank and linear.bias is not None:
                    linear.bias = None  # the first process adds it

    def part(self, name: str, whole: Tensor, config: MPTConfig) -> Tensor:
        """This share of a parameter of the whole model; the same tensor where it is not cut."""
        kind = ".".join(name.split(".")[-3:])
        if kind.startswith("attn.Wqkv."):
            q, k, v = whole.split([config.d_model, *[config.n_kv_heads * config.d_head] * 2])
            return torch.cat([self._rows(q), self._rows(k), self._rows(v)])
        if kind.startswith("ffn.up_proj."):
            return self._rows(whole)
        if kind in ("attn.out_proj.weight", "ffn.down_proj.weight"):
            width = whole.shape[1] // self.n
            return whole[:, self.rank * width : (self.rank + 1) * width]
        return whole

    def _rows(self, whole: Tensor) -> Tensor:
        height = whole.shape[0] // self.n
        return whole[self.rank * height : (self.rank + 1) * height]


def _sum_over_processes(_: nn.Module, __: tuple[Tensor], output: Tensor) -> Tensor:
    whole = output.contiguous()
    torch.distributed.all_reduce(whole)
    return whole
