"""The process that runs one part: `python -m benchmarks.gpu_parts.child PART SCALE FILE SECONDS STARTED`.

SCALE `toy` is a rehearsal on the CPU. FILE gets what is found; on stdin comes what other parts found, as JSON. SECONDS
are left; STARTED is when the process was started. Ends with 1 where a measurement failed, with 5 where torch has no
CUDA device. `benchmarks/gpu.py` starts it.
"""

import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.gpu_parts.bench import Bench

NO_CUDA = 5


def main() -> int:
    name, scale, file, seconds, started = sys.argv[1:]
    deadline = time.monotonic() + float(seconds)
    import torch

    device = torch.device("cpu" if scale == "toy" else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        return NO_CUDA
    if device.type == "cpu":
        torch.set_num_threads(1)  # toys are faster so, and a rehearsal may share its machine
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    from benchmarks.gpu_parts.bench import SCALES, Bench

    if scale == "auto":
        scale = fitting(torch.cuda.get_device_properties(0).total_memory)
    bench = Bench(SCALES[scale], device, Path(file), deadline, float(started), json.load(sys.stdin))
    bench.note(shape=scale, device=torch.cuda.get_device_name() if bench.is_cuda else "CPU")
    function_of(name)(bench)
    return 1 if bench.failures else 0


def fitting(memory: int) -> str:
    """The shape for a card: the book's KV cache is 36 GB beside 13 of 7B's weights."""
    return "7b" if memory > 70e9 else "1b"


def function_of(name: str) -> "Callable[[Bench], None]":
    """A part's `run`. Only its own module is imported, since imports count in a cold start."""
    if name == "card":
        from benchmarks.gpu_parts.card import run
    elif name == "right":
        from benchmarks.gpu_parts.right import run
    elif name == "gpu_tests":
        from benchmarks.gpu_parts.gpu_tests import run
    elif name == "one_stream":
        from benchmarks.gpu_parts.one_stream import run
    elif name == "many_requests":
        from benchmarks.gpu_parts.many_requests import run
    elif name == "quantised":
        from benchmarks.gpu_parts.quantised import run
    elif name == "training_right":
        from benchmarks.gpu_parts.training_right import run
    elif name == "training_speed":
        from benchmarks.gpu_parts.training_speed import run
    elif name == "training_long":
        from benchmarks.gpu_parts.training_long import run
    elif name == "cold_start":
        from benchmarks.gpu_parts.cold_start import run
    elif name == "sampling":
        from benchmarks.gpu_parts.sampling import run
    elif name == "kernel_choices":
        from benchmarks.gpu_parts.kernel_choices import run
    elif name == "two_processes":
        from benchmarks.gpu_parts.two_processes import run
    else:
        assert name == "in_onnxruntime", name
        from benchmarks.gpu_parts.in_onnxruntime import run
    return run


if __name__ == "__main__":
    sys.exit(main())
