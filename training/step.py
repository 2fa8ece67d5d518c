"""One optimizer step on a packed batch: forward, loss, backward, clip, update, in as many microbatches as memory asks.

The loss of a step is the sum over its learned tokens divided by their number, however the step is cut into microbatches
and dealt to ranks: sums are divided by the whole step's tokens, and gradients are added.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mpt.model import MPTForCausalLM
from training import packing
from training.distributed import World
from training.packing import IGNORED, Batch
from training.run import Run

_LOSS_CHUNK = 2048  # positions whose logits exist at a time: 400 MB in float32 at MPT-7B's vocabulary


def train_step(
    model: MPTForCausalLM, optimizer: torch.optim.Optimizer, batch: Batch, run: Run, world: World, microbatch: int
) -> tuple[float, float]:
    """The mean loss over the step's learned tokens and the gradient's norm; not finite, and nothing is updated.

    microbatch: most positions of one forward and backward. Gradients are empty before and after, also when it raises.
    """
    try:
        loss = accumulate(model, batch, run, world, microbatch)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        limit = run.clip if run.clip is not None else math.inf
        norm = torch.nn.utils.clip_grad_norm_(trained, limit, foreach=True)
        norm = norm.full_tensor() if isinstance(norm, torch.distributed.tensor.DTensor) else norm
        if math.isfinite(float(norm)) and math.isfinite(loss):
            optimizer.step()
        return loss, float(norm)
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
    selected, targets = _selected(model, batch, run)
    leaf = selected.detach().requires_grad_()
    loss = 0.0
    for start in range(0, len(targets), _LOSS_CHUNK):
        part = slice(start, start + _LOSS_CHUNK)
        chunk = _loss(model, leaf[part], targets[part], run) / total
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
        selected, targets = _selected(model, micro, run)
        for start in range(0, len(targets), _LOSS_CHUNK):
            part = slice(start, start + _LOSS_CHUNK)
            loss += float(_loss(model, selected[part], targets[part], run))
    return world.sum(loss)[0] / batch.n_learned


def _selected(model: MPTForCausalLM, batch: Batch, run: Run) -> tuple[Tensor, Tensor]:
    """The hidden states of the positions that are learned, (N, C), and the tokens they should predict, (N,)."""
    device = next(model.parameters()).device
    ids, labels, sequence_id = (x.to(device) for x in batch)
    with autocast(device, run):
        hidden = model.hidden_states(ids, sequence_id)
    learned = labels != IGNORED
    return hidden[learned], labels[learned]


def _loss(model: MPTForCausalLM, hidden: Tensor, targets: Tensor, run: Run) -> Tensor:
    with autocast(hidden.device, run):
        logits = model.unembed(hidden)
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def autocast(device: torch.device, run: Run) -> torch.autocast:
    """In which a run's passes are computed: matrix products in bfloat16, or everything as it is."""
    return torch.autocast(device.type, torch.bfloat16, enabled=run.precision == "bf16")
