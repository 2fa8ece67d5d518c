"""Which device tests use: the CPU alone, unless those marked `gpu` are asked for."""

import os

import torch
from _pytest.mark.expression import Expression

# `device_count` asks the driver's library and leaves open what is hidden below; `is_available` would not.
HAS_GPU = torch.cuda.device_count() > 0
if not HAS_GPU:  # our kernels then run on CPU; Triton reads this when it is imported, as torch.compile does on its own
    os.environ.setdefault("TRITON_INTERPRET", "1")


def choose(expression: str) -> None:
    """Before the first test of `pytest -m expression`, for this process and all it starts.

    So `make test` does the same on every machine: two ranks are two processes on the CPU, device `auto` is the CPU.
    """
    if not selects_gpu(expression):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # too late for this process, in time for xdist's


def selects_gpu(expression: str) -> bool:
    """Whether `pytest -m expression` runs tests that are marked `gpu`."""
    return not expression or Expression.compile(expression).evaluate(lambda mark, **_: mark == "gpu")
