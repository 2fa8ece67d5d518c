"""Which elements are dropped follows from the seed, the row and the place, and from nothing else."""

import pytest
import torch

from mpt import dropout
from mpt.dropout import Dropout, drawn_for


def drop(rows: list[int], place: str = "here", p: float = 0.25, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    with drawn_for(rows):
        return dropout.dropout(torch.ones(len(rows), 50, 64), p, True, place)


def test_a_row_loses_the_same_elements_in_every_batch() -> None:
    together = drop([4, 5, 6])
    torch.testing.assert_close(torch.cat([drop([6]), drop([5, 4])]), together[[2, 1, 0]], rtol=0, atol=0)


def test_rows_places_and_seeds_differ() -> None:
    masks = [drop([4]), drop([5]), drop([4], "there"), drop([4], seed=1)]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            # Two independent draws agree in 0.25^2 + 0.75^2 = 0.625 of 3,200 elements; 5 standard deviations.
            assert float((one == other).float().mean()) == pytest.approx(0.625, abs=5 * (0.625 * 0.375 / 3200) ** 0.5)


def test_the_share_is_dropped_and_the_rest_makes_up_for_it() -> None:
    dropped = drop(list(range(10)), p=0.25)
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert float((dropped == 0).float().mean()) == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 32000) ** 0.5)


def test_the_gradient_goes_where_the_value_went() -> None:
    x = torch.ones(1, 8, 8, requires_grad=True)
    with drawn_for([0]):
        kept = dropout.dropout(x, 0.5, True, "here")
        kept.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, kept.detach())


def test_outside_training_and_outside_rows_it_is_torchs() -> None:
    x = torch.ones(2, 8, 8)
    assert dropout.dropout(x, 0.5, False, "here") is x
    torch.manual_seed(5)
    found = dropout.dropout(x, 0.5, True, "here")
    torch.manual_seed(5)
    assert torch.equal(found, torch.nn.functional.dropout(x, 0.5))


def test_a_compiled_module_drops_other_elements_for_other_rows() -> None:
    module = torch.compile(Dropout(0.5, "here"), backend="aot_eager", fullgraph=True)
    x = torch.ones(1, 8, 8)
    for row in (0, 1):
        torch.manual_seed(0)
        with drawn_for([row]):
            assert torch.equal(module(x), dropout.dropout(x, 0.5, True, "here"))
