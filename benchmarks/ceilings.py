"""What this machine can do at best: bytes read per second, bfloat16 multiplications per second.

python benchmarks/ceilings.py BYTES
"""

import json
import statistics
import sys
import time
from collections.abc import Callable


def read_gb_s(n_bytes: int) -> float:
    """GB/s of a read-only pass over a buffer of n_bytes with all threads."""
    import torch

    buffer = torch.ones(n_bytes // 4)
    return buffer.nbytes / median_of(5, lambda: buffer.sum()) / 1e9


def bf16_tflop_s() -> float:
    """TFLOP/s of a bfloat16 product of two matrices of 2,048 x 2,048."""
    import torch

    a = torch.randn(2048, 2048).bfloat16()
    return 2 * 2048**3 / median_of(9, lambda: a @ a) / 1e12


def median_of(n: int, run: Callable[[], object], warm_up: int = 1) -> float:
    """Median seconds of n runs after warm_up ones."""
    times = []
    for i in range(n + warm_up):
        started = time.perf_counter()
        run()
        if i >= warm_up:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


if __name__ == "__main__":
    print(json.dumps({"read_gb_s": read_gb_s(int(sys.argv[1])), "bf16_tflop_s": bf16_tflop_s()}))
