"""A model shared by two processes: does tensor parallelism answer as one process does?

    python -m benchmarks.gpu_parts.two_processes MEETING FOLDER DEVICE DTYPE     # the other process; the part starts it

Both processes are on the first GPU and speak over gloo, since NCCL refuses two ranks on one GPU: a check of what is
computed, not a measure of its speed. Each computes its share as the product does on CUDA, over pages and through our
kernels; the one process beside them is plain torch. Where two GPUs are there, the product's own way over NCCL is run
as well.
"""

import datetime
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import mpt.checkpoint
from benchmarks.gpu_parts.bench import Bench, make_model, make_tokenizer, random_text
from mpt.backends.backend import Backend, Work
from mpt.backends.paged_backend import Steps
from mpt.backends.sharded_backend import ShardedBackend, Share, follow, open_sharded, share_of
from mpt.backends.torch_backend import TorchBackend
from mpt.sharding import Shard

SHAPE = {"d_model": 256, "n_heads": 4, "n_layers": 4, "vocab_size": 512}
N_READ, N_WRITTEN = 300, 16
STEPS = Steps(n_rows=1, n_prompt=N_READ, context=N_READ + N_WRITTEN)
MEET = datetime.timedelta(seconds=60)  # a process that waits longer has lost the other one
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 8 * 2**-8}  # of the largest logit; a rounding in each half of a block


def run(bench: Bench) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for dtype in (torch.float32, torch.bfloat16):
            bench.measure(f"two processes, {str(dtype)[6:]}", lambda dtype=dtype: compare(bench, folder, dtype))
        if bench.is_cuda and torch.cuda.device_count() > 1:
            bench.measure("two GPUs over NCCL", lambda: over_nccl(bench, folder))


def compare(bench: Bench, folder: Path, dtype: torch.dtype) -> None:
    """Greedy tokens and logits of both, after a prompt and at each step."""
    name = str(dtype).removeprefix("torch.")
    model = make_model(SHAPE, bench.device, dtype)
    place = folder / name
    mpt.save(model, place, tokenizer=make_tokenizer(SHAPE["vocab_size"]))
    expected, tokens = greedy(TorchBackend(model), None)
    meeting = folder / f"store-{name}"
    command = [sys.executable, "-m", "benchmarks.gpu_parts.two_processes"]
    other = subprocess.Popen([*command, str(meeting), str(place), bench.device.type, name])
    try:
        local = meet(meeting, 0, place, bench.device.type, dtype)
        started = time.perf_counter()
        found, _ = greedy(ShardedBackend(local, [other]), tokens)
        seconds = time.perf_counter() - started
    finally:
        other.kill()
        other.wait()
        if dist.is_initialized():
            dist.destroy_process_group()
    tell(bench, f"two processes over gloo, {name}", found, expected, TOLERANCE[dtype], seconds)


def over_nccl(bench: Bench, folder: Path) -> None:
    dtype = torch.float32
    model = make_model(SHAPE, bench.device, dtype)
    expected, tokens = greedy(TorchBackend(model), None)
    backend = open_sharded(folder / "float32", 2, dtype=dtype, device="cuda", steps=STEPS)
    try:
        started = time.perf_counter()
        found, _ = greedy(backend, tokens)
        seconds = time.perf_counter() - started
    finally:
        backend.close()
        dist.destroy_process_group()
    tell(bench, "two GPUs over NCCL, float32", found, expected, TOLERANCE[dtype], seconds)


def tell(bench: Bench, what: str, found: torch.Tensor, expected: torch.Tensor, allowed: float, seconds: float) -> None:
    off = float((found - expected).abs().max() / expected.abs().max())
    same = int((found.argmax(-1) == expected.argmax(-1)).sum())
    bench.note(**{what: {"off": off, "same_tokens": same, "tokens": len(found), "seconds": seconds}})
    bench.row(
        what, f"logits {off:.1e} of the largest off one process's", f"{same} of {len(found)} greedy tokens are the same"
    )
    assert off < allowed, f"{what}: logits are {off} of the largest off, at most {allowed} was expected"


def greedy(backend: Backend, follows: list[int] | None) -> tuple[torch.Tensor, list[int]]:
    """Logits (N, V) on the CPU of N steps and the tokens read in them: the likeliest ones, or those of another run."""
    backend.allocate(2 * (N_READ + N_WRITTEN) * backend.bytes_per_token)
    row = backend.reserve(None, N_READ + N_WRITTEN)
    read, logits, tokens = random_text(N_READ, SHAPE["vocab_size"]), [], list[int]()
    for step in range(N_WRITTEN):
        logits.append(backend.forward([Work(row, read, 1)])[0].float().cpu())
        row.length += len(read)
        read = [int(logits[-1].argmax()) if follows is None else follows[step]]
        tokens += read
    return torch.stack(logits), tokens


def meet(meeting: Path, rank: int, folder: Path, device: str, dtype: torch.dtype) -> Share:
    """One of the two processes, its share loaded: both on the first GPU."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    kind = "cpu:gloo,cuda:gloo" if device == "cuda" else "gloo"
    dist.init_process_group(kind, init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=MEET)
    where = "cuda:0" if device == "cuda" else device
    backend = share_of(mpt.checkpoint.load_for_engine(folder, dtype=dtype, device=where, shard=Shard(rank, 2)), STEPS)
    dist.barrier()
    return backend


def main() -> None:
    meeting, folder, device, dtype = sys.argv[1:]
    kind: Any = getattr(torch, dtype)
    follow(meet(Path(meeting), 1, Path(folder), device, kind))


if __name__ == "__main__":
    main()
