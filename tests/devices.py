"""Which device tests use: the CPU alone, unless those marked `gpu` are asked for."""

import os

import torch
from _pytest.mark.expression import Expression


def choose(expression: str) -> None:
    """Before the first test of `pytest -m expression`, for this process and all it starts.

    So `make test` does the same on every machine: two ranks are two processes on the CPU, device `auto` is the CPU.
    """
    if not selects_gpu(expression):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if not torch.cuda.is_available():
        os.environ.setdefault(
            "TRITON_INTERPRET", "1"
        )  # our kernels then run on CPU; Triton reads it when they are made


def selects_gpu(expression: str) -> bool:
    """Whether `pytest -m expression` runs tests that are marked `gpu`."""
    return not expression or Expression.compile(expression).evaluate(lambda mark, **_: mark == "gpu")
