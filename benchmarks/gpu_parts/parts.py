"""The parts of `benchmarks/gpu.py`, in order of value: what each measures, how long it may take, what it stands on.

Light enough for `--help`: a part's own module is imported by `child.py`, in the process that runs it.
"""

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


PARTS = (
    Part("card", "the card, versions, clocks and power; copy bandwidth and matmul peak", 45),
    Part("right", "kernels beside float64, the backend beside transformers; what is wrong is not measured", 75),
    Part("gpu_tests", "`pytest -m gpu`, in up to eight processes", 150),
    Part("one_stream", "decode at three contexts, prefill of 2,048, the book read and written on", 90, True),
    Part("many_requests", "1, 16 and 64 requests with fresh prompts, top-p, penalties; transformers", 100, True),
    Part("quantised", "steps and a prompt with weights in int8 and 4 bits, beside bfloat16", 90, True),
    Part("training_right", "training, the same again, resumed, FSDP2 on a mesh of one", 75),
    Part("training_speed", "training steps: four blocks of 7B and 1B; checkpointing; compiled", 110),
    Part("training_long", "a training row of 65,536 tokens beside `train plan`", 45),
    Part("cold_start", "process to first token, the longest step from 1 to 64 streams, empty caches", 75, True, True),
    Part("sampling", "greedy, top-p, penalties and a grammar's mask at 64 x 50,432", 30),
    Part("kernel_choices", "products, attention of prompts, decode with other options, block masks", 120),
    Part("two_processes", "tensor parallelism: two processes on one GPU over gloo", 45),
    Part("in_onnxruntime", "onnxruntime on CUDA, where it is installed", 45),
)
NAMES = tuple(part.name for part in PARTS)
