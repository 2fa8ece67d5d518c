"""Small tensors on their way to the GPU, without waiting for it."""

import numpy as np
import torch
from torch import Tensor


def to_device(numbers: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """Numbers that lie on the CPU, on a device.

    On CUDA by way of pinned memory: the copy takes its place in the stream, and Python goes on. From other memory a
    copy waits until the GPU has done all that it was given before. The pinned copy is nobody else's, and torch's
    allocator keeps its memory until the stream has read it, so the caller may overwrite the numbers at once. On CPU the
    result is the numbers themselves.
    """
    host = torch.from_numpy(numbers) if isinstance(numbers, np.ndarray) else numbers
    if device.type != "cuda":
        return host.to(device)
    return host.contiguous().pin_memory().to(device, non_blocking=True)
