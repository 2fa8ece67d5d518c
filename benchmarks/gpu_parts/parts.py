"""The parts of `benchmarks/gpu.py`, in order of value: what each measures, how long it may take, what it stands on.

Light enough for `--help`: a part's own module is imported by `child.py`, in the process that runs it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")  # where compiled kernels go


@dataclass(frozen=True)
class Part:
    """One file of this folder. Its `run` is given a Bench."""

    name: str  # of the file
    what: str
    limit_s: float  # then it is ended
    needs_right: bool = False  # left out where `right` found a kernel or the backend wrong
    fresh_caches: bool = False  # begins without compiled kernels


# The card comes first, since the others state shares of what it reaches.
PARTS = (
    Part("card", "the card, versions, clocks and power; copy bandwidth and matmul peak", 30),
    Part("right", "kernels beside float64, the backend beside transformers; what is wrong is not measured", 60),
    Part("gpu_tests", "`pytest -m gpu`, in up to eight processes", 110),
    Part("kernel_choices", "products, attention of prompts, decode with other options, block masks", 80),
    Part("one_stream", "decode at three contexts, guesses, prefill of 2,048, the book read and written on", 70, True),
    Part("many_requests", "1, 16 and 64 requests with fresh prompts, top-p, penalties; transformers", 80, True),
    Part(
        "quantised", "steps and a prompt with weights in int8 and 4 bits or a cache in int8, beside bfloat16", 85, True
    ),
    Part("sampling", "greedy, top-p, penalties and a grammar's mask at 64 x 50,432", 20),
    Part("cold_start", "process to first token, the longest step from 1 to 64 streams, empty caches", 60, True, True),
    Part("training_right", "training, the same again, resumed, FSDP2 on a mesh of one", 60),
    Part("training_speed", "training steps: four blocks of 7B and 1B; checkpointing; compiled", 90),
    Part("training_long", "a training row of 65,536 tokens beside `train plan`", 40),
    Part("two_processes", "tensor parallelism: two processes on one GPU over gloo", 75),
    Part("in_onnxruntime", "onnxruntime on CUDA, where it is installed", 40),
)
NAMES = tuple(part.name for part in PARTS)


def certain(parts: Sequence[Part], budget_s: float, slower: float = 1.0) -> list[str]:
    """Those whose whole limit lies within the budget, whatever the parts before them take of theirs.

    The others run in the time that these leave: most end before their limit.
    """
    ends = itertools.accumulate(slower * part.limit_s for part in parts)
    return [part.name for part, end in zip(parts, ends, strict=True) if end <= budget_s]
