"""Attention within packed documents on CPU, forward and backward: in C beside torch's kernel, in turns.

    python benchmarks/documents.py [--threads 1] [--rounds 20]

Prints the median of each in processor milliseconds of all threads, which a neighbour disturbs less than the clock, and
their ratio: bfloat16, as many documents of a length as make 1,800 tokens.
"""

import argparse
import statistics
import time

import torch
from torch import Tensor

from mpt import attention

LENGTHS = (100, 200, 400, 900)
TOKENS = 1800
SHAPES = ((8, 32), (12, 64), (8, 128))  # heads and their sizes


def measure(documents: attention.Documents, q: Tensor, k: Tensor, v: Tensor, gradient: Tensor) -> float:
    """Milliseconds of one forward and backward pass."""
    began = time.process_time()
    torch.autograd.grad(documents.attend(q, k, v), (q, k, v), gradient)
    return (time.process_time() - began) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads, {options.rounds} rounds\nheads  size  length  torch ms    C ms  ratio")
    for H, D in SHAPES:
        slopes = attention.alibi_slopes(H)
        for length in LENGTHS:
            ids = torch.arange(TOKENS // length).repeat_interleave(length)[None]
            both = {
                kernel: attention.Documents(ids, scale=D**-0.5, slopes=slopes, kernel=kernel)
                for kernel in ("torch", "C")
            }
            made = torch.randn(4, 1, ids.numel(), H, D, dtype=torch.bfloat16).transpose(2, 3)
            q, k, v = (x.detach().requires_grad_() for x in made[:3])
            found: dict[str, list[float]] = {kernel: [] for kernel in both}
            for _ in range(options.rounds + 2):
                for kernel, documents in both.items():
                    found[kernel].append(measure(documents, q, k, v, made[3]))
            torchs, ours = (statistics.median(times[2:]) for times in found.values())  # the first two warm up
            print(f"{H:5} {D:5} {length:7} {torchs:9.2f} {ours:7.2f} {torchs / ours:6.2f}", flush=True)


if __name__ == "__main__":
    main()
