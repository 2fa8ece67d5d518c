"""Our Triton kernels where there is no GPU: a mark for tests that run them under Triton's interpreter."""

import os
import subprocess
import sys

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


def compile_for(capability: int, program: str) -> None:
    """Compile down to machine code, by the assembler that Triton brings; the interpreter takes what compilers refuse.

    program: compiles kernels for the compute capability in `sys.argv[1]`, and prints `compiled`.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", program, str(capability)], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.stdout.strip() == "compiled", ran.stderr
