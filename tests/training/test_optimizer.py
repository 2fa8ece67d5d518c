"""Optimizers and schedules follow their published formulas."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from training import optimizer
from training.run import Run


def test_schedules_by_hand(small_run: Run) -> None:
    cosine = dataclasses.replace(small_run, warmup_steps=4, lr_floor=0.1, schedule="cosine")
    at = [optimizer.multiplier(cosine, step, 104) for step in (0, 1, 3, 4, 54, 104)]
    assert at == pytest.approx([0.25, 0.5, 1.0, 1.0, 0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2, 0.1])
    linear = dataclasses.replace(small_run, warmup_steps=0, schedule="linear")
    assert [optimizer.multiplier(linear, step, 10) for step in (0, 5, 9)] == pytest.approx([1.0, 0.5, 0.1])
    constant = dataclasses.replace(small_run, warmup_steps=2, schedule="constant")
    assert [optimizer.multiplier(constant, step, 10) for step in (0, 1, 9)] == [0.5, 1.0, 1.0]


def gradients(n_steps: int) -> list[torch.Tensor]:
    return list(torch.randn(n_steps, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


def test_lion_follows_its_paper(small_run: Run) -> None:
    """Chen et al. 2023: c = b1 m + (1-b1) g; p -= lr sign(c); m = b2 m + (1-b2) g; decay by lr / peak lr * wd."""
    run = dataclasses.replace(small_run, optimizer="lion", lr=1e-2, betas=(0.9, 0.99), weight_decay=0.02)
    parameter = nn.Parameter(torch.linspace(-1, 1, 7, dtype=torch.float64))
    lion = optimizer.build(run, [parameter])
    p, m = parameter.detach().clone(), torch.zeros(7, dtype=torch.float64)
    for step, g in enumerate(gradients(10)):
        lr = 1e-2 / (step + 1)
        lion.param_groups[0]["lr"] = lr
        parameter.grad = g.clone()
        lion.step()
        p = p * (1 - lr / 1e-2 * 0.02)
        p = p - lr * torch.sign(0.9 * m + 0.1 * g)
        m = 0.99 * m + 0.01 * g
    torch.testing.assert_close(parameter.detach(), p)


def test_adamw_decays_decoupled_from_the_learning_rate(small_run: Run) -> None:
    """llm-foundry's DecoupledAdamW by hand: the weight shrinks by lr / peak lr * wd, whatever lr is."""
    run = dataclasses.replace(small_run, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.03)
    parameter = nn.Parameter(torch.linspace(-1, 1, 7, dtype=torch.float64))
    adamw = optimizer.build(run, [parameter])
    p = parameter.detach().clone()
    m = v = torch.zeros(7, dtype=torch.float64)
    for step, g in enumerate(gradients(10), 1):
        lr = 1e-2 * (1 - step / 20)
        adamw.param_groups[0]["lr"] = lr
        parameter.grad = g.clone()
        adamw.step()
        p = p * (1 - lr / 1e-2 * 0.03)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        p = p - lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
    torch.testing.assert_close(parameter.detach(), p)
