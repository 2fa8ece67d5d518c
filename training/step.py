"""One optimizer step on a packed batch: forward, loss, backward, clip, update, in as many microbatches as memory asks.

The loss here is that of the next token; which one a run lowers is said by its objective (`training/objective.py`). The
loss of a step is the sum over its learned tokens divided by their number, however the step is cut into microbatches and
dealt to ranks: sums are divided by the whole step's tokens, and gradients are added.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mpt.model import MPTForCausalLM
from training import packing
from training.distributed import World
from training.packing import IGNORED, Batch
from training.run import Run

LOSS_CHUNK = 2048  # positions whose logits exist at a time: 400 MB in float32 at MPT-7B's vocabulary


Metrics = dict[str, float]


def train_step(
    model: MPTForCausalLM, optimizer: torch.optim.Optimizer, run: Run, accumulate: Callable[[], Metrics]
) -> tuple[Metrics, float]:
    """What `accumulate` gives, `loss` among it, and the gradient's norm; either not finite, and nothing is updated.

    accumulate: adds the step's gradients up. They are empty before and after, also when it raises.
    """
    try:
        metrics = accumulate()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        limit = run.clip if run.clip is not None else math.inf
        norm = torch.nn.utils.clip_grad_norm_(trained, limit, foreach=True)
        norm = norm.full_tensor() if isinstance(norm, torch.distributed.tensor.DTensor) else norm
        if math.isfinite(float(norm)) and math.isfinite(metrics["loss"]):
            optimizer.step()
        return metrics, float(norm)
    finally:
        optimizer.zero_grad()


def accumulate(model: MPTForCausalLM, batch: Batch, run: Run, world: World, microbatch: int) -> float:
    """Add a step's gradients up over microbatches and ranks; the mean loss over its learned tokens."""
    total = batch.n_learned
    mine = packing.deal(batch, world.rank, world.size, microbatch)
    return world.sum(sum(backward(model, micro, total, run) for micro in mine))[0]


def backward(model: MPTForCausalLM, batch: Batch, total: int, run: Run) -> float:
    """Add the gradient of (sum of losses / total) to the parameters' and return that quotient.

    Only learned positions are unembedded, a chunk at a time: each chunk goes backward to the hidden states before the
    next one's logits exist, and then the hidden states go backward once.
    """
    selected, targets = select(model, batch, run)
    leaf = selected.detach().requires_grad_()
    loss = 0.0
    for start in range(0, len(targets), LOSS_CHUNK):
        part = slice(start, start + LOSS_CHUNK)
        chunk = losses(model, leaf[part], targets[part], run).sum() / total
        chunk.backward()
        loss += float(chunk.detach())
    # Also where nothing is learned: every rank must take part in gathering and reducing.
    selected.backward(torch.zeros_like(selected) if leaf.grad is None else leaf.grad)
    return loss


@torch.no_grad()
def mean_loss(model: MPTForCausalLM, batch: Batch, run: Run, world: World, microbatch: int) -> float:
    """The mean loss over a batch's learned tokens, on all ranks, of a model in evaluation mode."""
    loss = 0.0
    for micro in packing.deal(batch, world.rank, world.size, microbatch):
        selected, targets = select(model, micro, run)
        for start in range(0, len(targets), LOSS_CHUNK):
            part = slice(start, start + LOSS_CHUNK)
            loss += float(losses(model, selected[part], targets[part], run).sum())
    return world.sum(loss)[0] / batch.n_learned


def select(model: MPTForCausalLM, batch: Batch, run: Run) -> tuple[Tensor, Tensor]:
    """The hidden states of the positions that are learned, (N, C), and the tokens they should predict, (N,)."""
    device = next(model.parameters()).device
    ids, labels, sequence_id = (x.to(device) for x in batch)
    with autocast(device, run):
        hidden = model.hidden_states(ids, sequence_id)
    learned = labels != IGNORED
    return hidden[learned], labels[learned]


def losses(model: MPTForCausalLM, hidden: Tensor, targets: Tensor, run: Run) -> Tensor:
    """Minus the log-probability of each target (N,) after the hidden state (N, C) that predicts it, in float32."""
    with autocast(hidden.device, run):
        logits = model.unembed(hidden)
    return F.cross_entropy(logits.float(), targets, reduction="none")


def autocast(device: torch.device, run: Run) -> torch.autocast:
    """In which a run's passes are computed: matrix products in bfloat16, or everything as it is."""
    return torch.autocast(device.type, torch.bfloat16, enabled=run.precision == "bf16")
