"""The loss is torch's cross entropy, and what is left in the logits' place is its gradient."""

import pytest
import torch
from torch.nn import functional as F

from training import losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 7, 64])
def test_loss_and_gradient_are_torchs(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, n: int) -> None:
    monkeypatch.setattr(losses, "_VALUES_ON_CPU", 3 * 97 // torch.get_num_threads())  # a few rows at a time
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n, 97, generator=generator).mul(10).to(dtype)
    targets = torch.randint(0, 97, (n,), generator=generator)
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="sum")
    expected.backward()
    assert exact.grad is not None
    assert losses.loss(logits, targets) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert losses.loss_and_gradient(logits, targets, 10) == pytest.approx(float(expected.detach()) / 10, rel=1e-6)
    # Rounded once to the logits' dtype; in float32 the softmax itself is right to a few of its epsilons.
    torch.testing.assert_close(logits.double(), exact.grad / 10, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


def test_a_row_that_is_certain_has_no_loss_and_no_gradient() -> None:
    logits = torch.tensor([[200.0, -200.0, 0.0]])
    assert losses.loss_and_gradient(logits, torch.tensor([0]), 1) == 0.0
    assert torch.equal(logits, torch.zeros(1, 3))
