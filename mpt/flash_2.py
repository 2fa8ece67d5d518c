"""flash-attn 2: whether it can be called here, and its attention over rows of any lengths, forward and backward.

`flash_attn` is the name of two libraries. Version 2 brings `flash_attn_varlen_func`, which takes ALiBi's slopes;
version 4 brings `flash_attn.cute` alone. So what counts is what can be imported. Not here: where it is wanted
(`documents_kernel` in `mpt/attention.py`, `prompt_kernel` in `mpt/backends/flash.py`).
"""

import importlib.util
from collections.abc import Callable

from torch import Tensor

_LARGEST_HEAD = 256  # what its kernels are compiled for


def why_no_flash_2(d_head: int) -> str | None:
    """Why flash-attn 2 cannot be called for heads of this size, None where it can."""
    if d_head > _LARGEST_HEAD:
        return f"flash-attn 2 is for heads of up to {_LARGEST_HEAD}, and those of this model have {d_head}"
    if not is_installed("flash_attn"):
        return "flash-attn 2 is not installed"
    try:
        flash_2()
    except Exception as error:  # its code runs at import, and beside another torch that may fail in any way
        return f"flash-attn 2 does not load, perhaps it is another version or for another torch ({error})"
    return None


def flash_2() -> Callable[..., Tensor]:
    """flash-attn 2's attention over rows of any lengths, with gradients. Raises whatever its import does."""
    from flash_attn import flash_attn_varlen_func

    kernel: Callable[..., Tensor] = flash_attn_varlen_func
    return kernel


def is_installed(name: str) -> bool:
    """Whether Python finds a module. To find one inside a package it imports the package, which may fail in any way."""
    try:
        return importlib.util.find_spec(name) is not None
    except Exception:  # one whose package does not load is as good as none
        return False
