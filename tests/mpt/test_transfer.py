"""How a step's numbers get to a GPU: pinned, without waiting, and safe from whoever made them."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mpt.transfer import to_device

CUDA = torch.device("cuda")
_WAITS = r"torch\.(?:tensor|from_numpy)\(.*(?:\.to\((?:self\._|logits\.)?device|device=).*"
ROOT = Path(__file__).parents[2]
IN_A_STEP = [
    *("backends/paged_backend.py", "backends/paged_attention.py", "backends/packed.py", "backends/flash.py"),
    *("engine/drawing.py", "sampling.py"),
]


def test_on_cpu_the_numbers_stay_where_they_are() -> None:
    numbers = np.arange(3)
    assert np.shares_memory(to_device(numbers, torch.device("cpu")).numpy(), numbers)


@pytest.mark.parametrize("kind", ["numpy", "strided"])
def test_on_cuda_they_go_from_a_pinned_copy_and_nobody_waits(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    done: list[object] = []

    def pin_memory(host: Tensor) -> Tensor:
        assert host.is_contiguous()  # a strided one would be copied once more, to memory that is not pinned
        done.append("pinned")
        return host.clone()

    def to(host: Tensor, *args: object, **kwargs: object) -> Tensor:
        done.append((args, kwargs))
        return host

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(Tensor, "to", to)
    numbers: np.ndarray | Tensor = np.arange(6).reshape(2, 3) if kind == "numpy" else torch.arange(6).view(3, 2).t()
    expected = np.array(numbers)
    sent = to_device(numbers, CUDA)
    assert done == ["pinned", ((CUDA,), {"non_blocking": True})]
    numbers[:] = 9
    assert np.array_equal(sent.numpy(), expected)


@pytest.mark.gpu
def test_numbers_that_are_overwritten_at_once_arrive_as_they_were() -> None:
    busy = torch.randn(4096, 4096, device=CUDA)
    numbers, sent = np.zeros(1000, dtype=np.int64), []
    for n in range(200):  # of one size, so that pinned memory is used again as soon as that is allowed
        busy @ busy
        numbers[:] = n
        sent.append(to_device(numbers, CUDA))
    assert [int(each.unique()) for each in sent] == list(range(200))


@pytest.mark.parametrize("name", IN_A_STEP)
def test_what_a_step_tells_the_gpu_goes_this_way(name: str) -> None:
    text = (ROOT / "mpt" / name).read_text(encoding="utf-8")
    assert "to_device(" in text and not re.findall(_WAITS, text)
