"""Tests that are not for a GPU see none, on any machine."""

import platform
import subprocess
import sys

import pytest
import torch

from tests.devices import HAS_GPU, selects_gpu
from tests.kernels import can_interpret


def test_a_test_without_the_mark_sees_the_cpu_alone_and_so_does_what_it_starts() -> None:
    assert not torch.cuda.is_available()
    script = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'] == '')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("not slow and not gpu and not index", False),  # pyproject.toml
        ("slow", False),
        ("gpu", True),
        ("gpu and not slow", True),
        ("gpu or index", True),
        ("not index", True),
        ("", True),
    ],
)
def test_which_marks_ask_for_the_gpu(expression: str, expected: bool) -> None:
    assert selects_gpu(expression) is expected


@pytest.mark.skipif((sys.platform, platform.machine()) != ("linux", "x86_64"), reason="Triton is not installed here")
@pytest.mark.skipif(HAS_GPU, reason="a GPU is here: `TRITON_INTERPRET=1 pytest` interprets, and so does `pytest -n 1`")
def test_the_kernels_of_a_gpu_are_interpreted_where_there_is_none() -> None:
    """`make setup` brings Triton here. If it did not interpret, all tests of the kernels would skip and nobody know."""
    assert can_interpret()
