"""Errors as torch, cuBLAS and Triton word them: after which of them CUDA's documentation calls the process's context
unusable (`cudaError_t`: "the process must be terminated and relaunched"), and after which a next call may succeed."""

import pytest
import torch

from mpt.backends.device_errors import raise_if_lost
from mpt.errors import DeviceLost, MachineRefused

ADVICE = (
    "\nSearch for `cudaErrorIllegalAddress' in the documentation for more information.\n"
    "CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA` to enable "
    "device-side assertions.\n"
)
FATAL = [
    "an illegal memory access was encountered",
    "device-side assert triggered",
    "unspecified launch failure",
    "uncorrectable ECC error encountered",
    "uncorrectable NVLink error detected during the execution",
    "misaligned address",
    "an illegal instruction was encountered",
    "the launch timed out and was terminated",
    "unknown error",
]
OF_ONE_CALL = [
    "out of memory",
    "invalid configuration argument",
    "invalid argument",
    "too many resources requested for launch",
    "no kernel image is available for execution on the device",
    "operation not permitted when stream is capturing",
    "operation failed due to a previous error during capture",
]


def is_lost(error: BaseException) -> bool:
    try:
        raise_if_lost(error)
    except DeviceLost:
        return True
    return False


@pytest.mark.parametrize("what", FATAL)
def test_what_no_context_survives_is_the_end_whoever_says_it(what):
    assert is_lost(torch.AcceleratorError(f"CUDA error: {what}{ADVICE}"))
    assert is_lost(RuntimeError(f"CUDA error: {what}{ADVICE}"))  # of cuBLAS's calls and older parts of torch
    assert is_lost(RuntimeError(f"CUDA driver error: {what}"))
    assert is_lost(RuntimeError(f"Triton Error [CUDA]: {what}"))
    assert is_lost(RuntimeError(f"HIP error: {what}"))


@pytest.mark.parametrize("what", OF_ONE_CALL)
def test_what_one_call_asked_too_much_for_is_not(what):
    assert not is_lost(torch.AcceleratorError(f"CUDA error: {what}{ADVICE}"))
    assert not is_lost(RuntimeError(f"Triton Error [CUDA]: {what}"))


def test_memory_shapes_and_plain_bugs_are_not():
    tried = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB"
    assert not is_lost(torch.OutOfMemoryError(tried))
    assert not is_lost(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert is_lost(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`"))
    for error in (RuntimeError("mat1 and mat2 shapes do not fit"), ValueError("CUDA error: x"), KeyError("x")):
        assert not is_lost(error)


def test_a_cause_counts_as_the_error_itself():
    refused = MachineRefused("no 2.0 GB in one piece")
    refused.__cause__ = torch.AcceleratorError(f"CUDA error: unspecified launch failure{ADVICE}")
    with pytest.raises(DeviceLost, match=r"^the device is lost: CUDA error: unspecified launch failure$"):
        raise_if_lost(refused)
    assert is_lost(DeviceLost("a process has gone"))
