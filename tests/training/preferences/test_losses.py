"""The losses' formulas, against values computed by hand."""

import math

import pytest
import torch

from training.preferences import losses


def test_dpo() -> None:
    # log-ratios 2 and -1 at beta 0.5: -log sigmoid(1.5) = log(1 + e^-1.5)
    assert float(losses.dpo(torch.tensor(2.0), torch.tensor(-1.0), 0.5)) == pytest.approx(math.log(1 + math.exp(-1.5)))
    assert float(losses.dpo(torch.tensor(3.0), torch.tensor(3.0), 7.0)) == pytest.approx(math.log(2))


def test_ipo() -> None:
    # A token: 6 / 3 = 2 and -4 / 2 = -2; beta 0.25 asks for a gap of 2, and there is one of 4.
    found = losses.ipo(torch.tensor(6.0), torch.tensor(-4.0), torch.tensor(3.0), torch.tensor(2.0), 0.25)
    assert float(found) == pytest.approx((4 - 2) ** 2)


def test_orpo() -> None:
    # Mean tokens of probability 1/2 and 1/4: odds 1 and 1/3, log of their ratio log 3; sigmoid(log 3) = 3/4.
    half, quarter = torch.tensor(2 * math.log(0.5)), torch.tensor(3 * math.log(0.25))
    found = losses.orpo(half, quarter, torch.tensor(2.0), torch.tensor(3.0), 0.1)
    assert float(found) == pytest.approx(-0.1 * math.log(0.75), rel=1e-5)


def test_kto() -> None:
    # 1 - sigmoid(0.5 (3 - 1)) of the desirable one, 1 - sigmoid(0.5 (1 - 3)) of the other.
    found = losses.kto(torch.tensor([3.0, 3.0]), torch.tensor([True, False]), 1.0, 0.5)
    assert found.tolist() == pytest.approx([1 - 1 / (1 + math.exp(-1)), 1 - 1 / (1 + math.exp(1))])
