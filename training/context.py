"""Context parallelism: ranks that compute one sequence together, each a part of its positions.

Everything but attention looks at one position at a time. For attention the ranks exchange: each gets all positions of a
part of the heads, and gives the outputs back (DeepSpeed-Ulysses, Jacobs et al. 2023). So activations of a sequence are
divided by the ranks that share it, and the kernels are those of one rank. Parameters are split over all ranks as ever.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from mpt import attention
from mpt.config import MPTConfig
from mpt.errors import UserError
from mpt.transformers_model import MPTForCausalLM
from training.distributed import Context
from training.packing import IGNORED, Batch


def check(config: MPTConfig, n: int) -> None:
    """Raises UserError where n ranks cannot share the attention of a model."""
    if n == 1:
        return
    for what, heads in (("heads", config.n_heads), ("KV heads", config.n_kv_heads)):
        if heads % n:
            raise UserError(f"{heads} {what} cannot be shared by `--context-parallel {n}`; give a divisor of {heads}")
    if config.attention["attn_pdrop"]:
        raise UserError("`--context-parallel` does not go with `attn_pdrop`, which holds all scores; set it to 0")


def padded(batch: Batch, n: int) -> Batch:
    """The batch with rows of a multiple of n positions, so that n ranks have equally many."""
    missing = -batch.ids.shape[1] % n
    if not missing:
        return batch
    return batch._replace(
        ids=F.pad(batch.ids, (0, missing)),
        labels=F.pad(batch.labels, (0, missing), value=IGNORED),
        sequence_id=F.pad(batch.sequence_id, (0, missing), value=-1),
    )


def own(x: Tensor, context: Context) -> Tensor:
    """This rank's positions of x, (B, T, ...) to (B, T / n, ...)."""
    return x.chunk(context.n, dim=1)[context.rank]


def hidden_states(model: MPTForCausalLM, ids: Tensor, sequence_id: Tensor, context: Context) -> Tensor:
    """What `unembed` takes of this rank's positions, (B, T / n, C). ids, sequence_id: of all positions, (B, T)."""
    slopes = model.transformer.alibi_slopes()
    documents = attention.Documents(
        sequence_id,
        scale=model.transformer.attention.scale,
        slopes=None if slopes is None else slopes.chunk(context.n)[context.rank],
        kernel=model.transformer.documents_kernel()[0],
    )

    def attend(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        of_heads = documents.attend(*(to_heads(x, context) for x in (q, k, v)))
        return to_positions(of_heads, context)

    positions = None  # ALiBi needs none
    if model.transformer.wpe is not None:
        positions = own(model.transformer.positions(ids, None, sequence_id, 0), context)
    return model.hidden_states(own(ids, context), attend=attend, position_ids=positions)


def to_heads(x: Tensor, context: Context) -> Tensor:
    """All heads of this rank's positions, (B, H, T/n, D), to this rank's heads of all positions, (B, H/n, T, D)."""
    B, H, _, D = x.shape
    sent = x.unflatten(1, (context.n, H // context.n)).movedim(1, 0)  # (n, B, H/n, T/n, D)
    return _exchange(sent, context).movedim(0, 2).reshape(B, H // context.n, -1, D)


def to_positions(x: Tensor, context: Context) -> Tensor:
    """The way back: (B, H/n, T, D) to (B, H, T/n, D)."""
    B, _, T, D = x.shape
    sent = x.unflatten(2, (context.n, T // context.n)).movedim(2, 0)  # (n, B, H/n, T/n, D)
    return _exchange(sent, context).movedim(0, 1).reshape(B, -1, T // context.n, D)


@torch.compiler.disable
def _exchange(x: Tensor, context: Context) -> Tensor:
    received: Tensor = _Exchange.apply(x, context)
    return received


class _Exchange(torch.autograd.Function):
    """(n, ...): part i goes to rank i, and what comes from rank i becomes part i. Gradients go back the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, context: Context) -> Tensor:
        ctx.context = context
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, x.contiguous(), group=context.group)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(gradients[0], ctx.context), None
