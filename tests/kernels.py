"""Our Triton kernels where there is no GPU: a mark for tests that run them under Triton's interpreter."""

import os
from importlib.metadata import PackageNotFoundError, version

import pytest


def can_interpret() -> bool:
    """Before 3.9 the interpreter fails with numpy 2.4: it turns arrays of one element into numbers."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return False
    try:
        return tuple(map(int, version("triton").split(".")[:2])) >= (3, 9)
    except PackageNotFoundError:
        return False


needs_interpreter = pytest.mark.skipif(
    not can_interpret(), reason="needs triton 3.9 and TRITON_INTERPRET=1, which tests set where there is no CUDA"
)
