"""Optimizers with decoupled weight decay, and the learning rate as a pure function of the step.

AdamW here is torch's: llm-foundry's DecoupledAdamW(lr, wd) equals AdamW(lr, weight_decay=wd / lr) under any schedule
(largest difference 5.6e-17 in 39 steps). Lion: Chen et al. 2023, algorithm 2; decay as llm-foundry's DecoupledLionW.
"""

import math
from collections.abc import Callable, Iterable
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


def build(run: Run, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The run's optimizer at its peak lr; set each group's lr before every step."""
    parameters = list(parameters)
    if run.optimizer == "lion":
        return Lion(parameters, lr=run.lr, betas=run.betas, weight_decay=run.weight_decay)
    return torch.optim.AdamW(
        parameters, lr=run.lr, betas=run.betas, eps=run.eps, weight_decay=run.weight_decay / run.lr, fused=True
    )


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
