"""One optimizer step on a packed batch: forward, loss, backward, clip, update, in as many microbatches as memory asks.

The loss of a step is the sum over its learned tokens divided by their number, however the step is cut into microbatches
and dealt to ranks: sums are divided by the whole step's tokens, and gradients are added.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from mpt import dropout
from mpt.transformers_model import MPTForCausalLM
from training import context, distributed, losses, packing
from training.distributed import Context, World
from training.packing import IGNORED, Batch
from training.run import Run

Metrics = dict[str, float]
_LOSS_CHUNK = 4096  # positions whose logits exist at a time: 400 MB in bfloat16 at MPT-7B's vocabulary


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
    loss = 0.0
    part = (0, 1) if world.context is None else (world.context.rank, world.context.n)
    for micro in _dealt(batch, world, microbatch):
        with dropout.drawn_for(micro.row.tolist(), part):
            loss += backward(model, micro, total, run, world)
    return world.sum(loss)[0]


def _dealt(batch: Batch, world: World, microbatch: int) -> list[Batch]:
    """This rank's microbatches, whole rows, of which it computes `microbatch` positions at a time."""
    n = world.sharing
    return packing.deal(context.padded(batch, n), world.rank // n, world.size // n, microbatch * n)


def backward(model: MPTForCausalLM, batch: Batch, total: int, run: Run, world: World) -> float:
    """Add the gradient of (sum of losses / total) to the parameters' and return that quotient.

    Only learned positions are unembedded, a chunk at a time: each chunk goes backward to the hidden states before the
    next one's logits exist, and then the hidden states go backward once.
    """
    selected, targets = select(model, batch, run, world.context)
    leaf = selected.detach().requires_grad_()
    loss = 0.0
    for part, its in _chunks(leaf, targets):
        logits = _logits(model, part, run)
        gradient = logits.detach()  # of the same memory
        loss += losses.loss_and_gradient(gradient, its, total)
        logits.backward(gradient)
    # Also where nothing is learned: every rank must take part in gathering and reducing.
    selected.backward(torch.zeros_like(selected) if leaf.grad is None else leaf.grad)
    return loss


@torch.no_grad()
def mean_loss(model: MPTForCausalLM, batch: Batch, run: Run, world: World, microbatch: int) -> float:
    """The mean loss over a batch's learned tokens, on all ranks, of a model in evaluation mode."""
    loss = 0.0
    for micro in _dealt(batch, world, microbatch):
        selected, targets = select(model, micro, run, world.context)
        for part, its in _chunks(selected, targets):
            loss += losses.loss(_logits(model, part, run), its)
    distributed.free(model)
    return world.sum(loss)[0] / batch.n_learned


def select(model: MPTForCausalLM, batch: Batch, run: Run, shared: Context | None = None) -> tuple[Tensor, Tensor]:
    """The hidden states of the positions that are learned, (N, C), and the tokens they should predict, (N,).

    Of this rank's positions, where several share the rows.
    """
    device = next(model.parameters()).device
    ids, labels, sequence_id = batch.ids.to(device), batch.labels.to(device), batch.sequence_id.to(device)
    with autocast(device, run):
        if shared is None:
            hidden = model.hidden_states(ids, sequence_id)
        else:
            hidden = context.hidden_states(model, ids, sequence_id, shared)
            labels = context.own(labels, shared)
    learned = labels != IGNORED
    return hidden[learned], labels[learned]


def token_losses(model: MPTForCausalLM, hidden: Tensor, targets: Tensor, run: Run) -> Tensor:
    """Minus the log-probability of each target (N,) after the hidden state (N, C) that predicts it, in float32."""
    return F.cross_entropy(_logits(model, hidden, run).float(), targets, reduction="none")


def _chunks(hidden: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions whose logits may exist together, and their targets; none where nothing is learned."""
    for start in range(0, len(targets), _LOSS_CHUNK):
        part = slice(start, start + _LOSS_CHUNK)
        yield hidden[part], targets[part]


def _logits(model: MPTForCausalLM, hidden: Tensor, run: Run) -> Tensor:
    with autocast(hidden.device, run):
        return model.unembed(hidden)


def autocast(device: torch.device, run: Run) -> torch.autocast:
    """In which a run's passes are computed: matrix products in bfloat16, or everything as it is."""
    return torch.autocast(device.type, torch.bfloat16, enabled=run.precision == "bf16")
