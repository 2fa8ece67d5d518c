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


@pytest.mark.parametrize("shape", [(8, 8), (32, 8), (8, 32)])
def test_muon_steps_as_torch_does(small_run: Run, shape: tuple[int, int]) -> None:
    """torch.optim.Muon with the step's size of Liu et al.; it too multiplies in bfloat16, in another order."""
    run = dataclasses.replace(small_run, optimizer="muon", lr=1e-2, betas=(0.9, 0.95), weight_decay=0.03)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    muon = optimizer.build(run, [ours])
    other = torch.optim.Muon([theirs], lr=1e-2, momentum=0.95, weight_decay=0.03 / 1e-2, adjust_lr_fn="match_rms_adamw")
    for step in range(10):
        ours.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        theirs.grad = ours.grad.clone()
        muon.step()
        other.step()
    changed = (theirs - start).abs().mean()
    assert changed > 0.02
    assert float((ours - theirs).abs().mean().detach()) < 0.01 * changed


def test_muon_turns_queries_keys_and_values_apart(small_run: Run) -> None:
    run = dataclasses.replace(small_run, optimizer="muon", lr=1e-2, betas=(0.9, 0.95))
    gradient = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    gradient[:8] *= 1000  # of one part alone
    whole = nn.Parameter(torch.zeros(24, 8))
    parts = [nn.Parameter(torch.zeros(8, 8)) for _ in range(3)]
    muon = optimizer.build(run, [whole, *parts])
    whole.grad = gradient
    for part, its in zip(parts, gradient.split(8), strict=True):
        part.grad = its.clone()
    muon.step()
    torch.testing.assert_close(whole, torch.cat(parts), rtol=0.02, atol=1e-4)


def test_muon_leaves_vectors_and_embeddings_to_adamw(small_run: Run) -> None:
    run = dataclasses.replace(small_run, optimizer="muon", lr=1e-2, betas=(0.9, 0.95), weight_decay=0.01)
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4))
    twin = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4))
    twin.load_state_dict(model.state_dict())
    muon = optimizer.build(run, model.parameters(), optimizer.embeddings(model))
    adamw = optimizer.build(dataclasses.replace(run, optimizer="adamw"), twin.parameters())
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            other.grad = parameter.grad.clone()
        muon.step()
        adamw.step()
    assert torch.equal(model[0].weight, twin[0].weight)
    assert torch.equal(model[1].bias, twin[1].bias)
    assert not torch.equal(model[1].weight, twin[1].weight)


def test_orthogonal_has_singular_values_near_one() -> None:
    matrix = torch.randn(3, 12, 40, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(optimizer.orthogonal(matrix))
    assert values.shape == (3, 12)
    assert 0.6 < float(values.min()) < float(values.max()) < 1.3


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
