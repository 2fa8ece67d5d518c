"""Optimizers with decoupled weight decay, and the learning rate as a pure function of the step.

AdamW here is torch's: llm-foundry's DecoupledAdamW(lr, wd) equals AdamW(lr, weight_decay=wd / lr) under any schedule
(largest difference 5.6e-17 in 39 steps). Lion: Chen et al. 2023, algorithm 2; decay as llm-foundry's DecoupledLionW.
Muon: Jordan et al. 2024, with the step's size of Liu et al. 2025 (arXiv 2502.16982, 2.2). torch.optim.Muon is not used:
it takes no vectors and no embeddings, and would make one orthogonal matrix of the queries', keys' and values'.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from training.run import Run


def multiplier(run: Run, step: int, n_steps: int, tokens: int = 0) -> float:
    """What lr is multiplied by at `step`, counted from 0, after `tokens`; warm-up is linear, never from zero."""
    rises = warmup(run, n_steps)
    if step < rises:
        return (step + 1) / rises
    if run.warmup_tokens is not None and tokens < run.warmup_tokens:
        return max(tokens, 1) / run.warmup_tokens
    if run.schedule == "constant":
        return 1.0
    done = (step - rises) / max(1, n_steps - rises)
    left = 1 - done if run.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return run.lr_floor + (1 - run.lr_floor) * left


def warmup(run: Run, n_steps: int) -> int:
    """The steps in which the learning rate rises: the run's number, within its share of the run where it has one."""
    if run.warmup_share is None:
        return run.warmup_steps
    most = math.ceil(run.warmup_share * n_steps)
    return min(run.warmup_steps, most) if run.warmup_steps else most


def build(
    run: Run, parameters: Iterable[nn.Parameter], embeddings: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """The run's optimizer at its peak lr; set each group's lr before every step.

    embeddings: those of the parameters whose rows are tokens, or positions; Muon leaves them to AdamW.
    """
    parameters = list(parameters)
    if run.optimizer == "lion":
        return Lion(parameters, lr=run.lr, betas=run.betas, weight_decay=run.weight_decay)
    if run.optimizer == "muon":
        left_out = {id(parameter) for parameter in embeddings}
        matrices = [p for p in parameters if p.ndim == 2 and id(p) not in left_out]
        others = [p for p in parameters if p.ndim != 2 or id(p) in left_out]
        return Muon(matrices, others, run.lr, run.betas, run.eps, run.weight_decay)
    return torch.optim.AdamW(
        parameters, lr=run.lr, betas=run.betas, eps=run.eps, weight_decay=run.weight_decay / run.lr, fused=True
    )


def embeddings(model: nn.Module) -> list[nn.Parameter]:
    """The weights of a model's embeddings; packed ones have none that are trained."""
    found = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return [weight for module in found for weight in module.parameters(recurse=False)]


class Muon(torch.optim.AdamW):
    """Orthogonal steps for matrices, from their momentum; AdamW's for vectors and embeddings.

    A step of a matrix has the size of AdamW's, so that one learning rate does for both. A matrix that is three times as
    high as it is wide holds queries, keys and values, and is three matrices.
    """

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        others: Sequence[nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        groups = [{"params": matrices, "is_orthogonal": True}, {"params": others, "is_orthogonal": False}]
        every = [group for group in groups if group["params"]]
        super().__init__(every, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay / lr, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        assert closure is None
        every = self.param_groups
        for group in every:
            if group["is_orthogonal"]:
                self._turn(group)
        self.param_groups = [group for group in every if not group["is_orthogonal"]]
        try:
            super().step()
        finally:
            self.param_groups = every
        return None

    def _turn(self, group: dict[str, Any]) -> None:
        lr, beta = group["lr"], group["betas"][1]
        for p in group["params"]:
            if p.grad is None:
                continue
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            momentum = self.state[p]["momentum"]
            momentum.lerp_(p.grad, 1 - beta)
            update = p.grad.lerp(momentum, beta)  # Nesterov's
            height, width = p.shape
            if height == 3 * width:
                update = orthogonal(update.view(3, width, width)).reshape(p.shape)
                height = width
            else:
                update = orthogonal(update)
            p.mul_(1 - lr * group["weight_decay"])
            p.add_(update, alpha=-lr * _ADAMW_RMS * math.sqrt(max(height, width)))


_ADAMW_RMS = 0.2  # of what AdamW changes a value by, in units of lr (Liu et al. 2025)
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: singular values end between 0.7 and 1.2


def orthogonal(matrix: Tensor) -> Tensor:
    """The matrix (or each of a batch) with all its singular values brought near 1, by five steps of Newton and Schulz.

    The products are in bfloat16.
    """
    a, b, c = _NEWTON_SCHULZ
    is_high = matrix.size(-2) > matrix.size(-1)
    x = matrix.mT if is_high else matrix
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(5):
        square = x @ x.mT
        x = a * x + (b * square + c * (square @ square)) @ x
    return (x.mT if is_high else x).to(matrix.dtype)


class Lion(torch.optim.Optimizer):
    """Steps of one size in the sign of an interpolated momentum; half of Adam's state."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, {"lr": lr, "peak_lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._step_group(group, parameters)
        return None

    def _step_group(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum"] for p in parameters]
        beta_1, beta_2 = group["betas"]
        torch._foreach_mul_(parameters, 1 - group["lr"] / group["peak_lr"] * group["weight_decay"])
        update = torch._foreach_lerp(momenta, gradients, 1 - beta_1)
        torch._foreach_sign_(update)
        torch._foreach_add_(parameters, update, alpha=-group["lr"])
        torch._foreach_lerp_(momenta, gradients, 1 - beta_2)
