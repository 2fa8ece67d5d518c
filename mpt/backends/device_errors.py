"""Which errors of a device are the end of it: afterwards every call of this process fails, at once and for ever.

CUDA calls such errors sticky. A kernel that read beyond its memory, an assert in one, a memory error: the context is
dead, and only another process gets a new one. Others are about one call, which may have asked for too much: memory, a
grid that is too large, something that cannot be captured.
"""

import re

import torch

from mpt.errors import DeviceLost

_OF_DEVICE = re.compile(r"\b(CUDA|HIP)( driver)? error: |Triton Error \[(CUDA|HIP)\]: ")
# CUDA's own words for what concerns one call; whatever else it says is taken for the end, since a process that goes on
# without its device fails every request in milliseconds, which draws more of them.
_OF_ONE_CALL = re.compile(
    r"out of memory|_STATUS_(ALLOC_FAILED|NOT_INITIALIZED|INVALID_VALUE|NOT_SUPPORTED|ARCH_MISMATCH)"
    r"|out of resources|too many resources requested|invalid (argument|configuration argument|device function|value)"
    r"|no kernel image|captur",
    re.IGNORECASE,
)


def raise_if_lost(error: BaseException) -> None:
    """Raise DeviceLost if no later step can survive this error; what only one step did not survive is let pass."""
    if isinstance(error, DeviceLost):
        raise error
    cause: BaseException | None = error
    while cause is not None:
        if _is_the_end(cause):
            raise DeviceLost(f"the device is lost: {_first_line(cause)}") from error
        cause = cause.__cause__


def _is_the_end(error: BaseException) -> bool:
    if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
        return False
    is_of_device = isinstance(error, torch.AcceleratorError) or _OF_DEVICE.search(str(error)) is not None
    return is_of_device and _OF_ONE_CALL.search(_first_line(error)) is None


def _first_line(error: BaseException) -> str:
    """What happened, without the advice that torch adds to it."""
    return str(error).partition("\n")[0] or type(error).__name__
