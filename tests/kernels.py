"""Our Triton kernels where there is no GPU: a mark for tests that run them under Triton's interpreter."""

import pytest


def can_interpret() -> bool:
    """Whether Triton was imported to interpret.

    Its own functions, such as `tl.sum`, must be interpreted too, and those are made once, when it is imported.
    """
    try:
        from triton import language
        from triton.runtime.interpreter import InterpretedFunction
    except ImportError:
        return False
    return isinstance(language.sum, InterpretedFunction)


needs_interpreter = pytest.mark.skipif(
    not can_interpret(), reason="needs Triton, and TRITON_INTERPRET=1, which tests set where there is no GPU"
)
