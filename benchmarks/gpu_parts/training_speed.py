"""Tokens a second, MFU and memory of training steps, in every way of checkpointing, compiled or not.

The product's own step and optimizer, on rows of one document each. MFU counts what a step's tokens need, as
`training/plan.py` does for `metrics.jsonl`, without what is computed again, against the card's peak in its data sheet;
the table says it against the measured peak too.
"""

import statistics
import time
from typing import Any, get_args

import torch

from benchmarks.gpu_parts.bench import Bench
from mpt.transformers_model import MPTForCausalLM
from training import build, optimizer, packing, plan
from training.distributed import World
from training.packing import Batch
from training.run import ActivationCheckpointing, Run
from training.step import Metrics, accumulate, train_step

WARM_UP, TIMED = 2, 3  # steps


def run(bench: Bench) -> None:
    for name in bench.scale.trained:
        for compiled in (False, True) if bench.scale.compiles else (False,):
            for how in get_args(ActivationCheckpointing):
                what = f"{name}, checkpointing {how}" + (", compiled" if compiled else "")
                bench.measure(what, lambda a=(name, how, compiled, what): steps(bench, *a))


def steps(bench: Bench, name: str, how: Any, compiled: bool, what: str) -> None:
    torch._dynamo.reset()
    scale = bench.scale
    settings = run_of(scale.trained[name], scale.trained_tokens, scale.trained_rows, scale.microbatch, how, compiled)
    times, peak = timed(bench, settings, scale.trained_rows, WARM_UP, TIMED)
    seconds = statistics.median(times)
    shape = plan.shape_of_run(settings)
    n_tokens = scale.trained_rows * scale.trained_tokens
    tflop_s = plan.step_flops(shape, n_tokens, scale.trained_rows * scale.trained_tokens**2) / seconds / 1e12
    paper = plan.peak_tflops(torch.cuda.get_device_name(bench.device)) if bench.is_cuda else None
    mfu = None if paper is None else tflop_s / paper
    numbers = {"tok_s": n_tokens / seconds, "seconds": seconds, "tflop_s": tflop_s, "mfu": mfu, "peak_gb": peak}
    planned = plan.memory(shape, settings, 1, max(1, scale.microbatch // scale.trained_tokens)).total / 1e9
    key = f"{how}, compiled" if compiled else how
    found = bench.found.get("speeds", {})
    found.setdefault(name, {})[key] = numbers | {"planned_gb": planned}
    bench.note(speeds=found)
    beside = "" if mfu is None else f"MFU {mfu:.1%}, "
    bench.row(
        what, f"{n_tokens / seconds:,.0f} tok/s",
        f"{beside}{tflop_s:,.1f} TFLOP/s {bench.share(tflop_s, 'matmul_tflop_s', 'the matmul peak')}; "
        f"{peak:.1f} GB, planned {planned:.1f}",
    )  # fmt: skip


def run_of(
    shape: dict[str, int], n_tokens: int, rows: int, microbatch: int, how: ActivationCheckpointing, compiled: bool
) -> Run:
    """A pretraining run of a shape; its data, tokenizer and folder are never opened."""
    model = {**shape, "max_seq_len": n_tokens, "no_bias": True, "attn_config": {"alibi": True}}
    return Run(
        name="measured", base=None, data="none", tokenizer="none", out="none", model=model, max_seq_len=n_tokens,
        global_batch=rows, epochs=None, steps=WARM_UP + TIMED, lr=1e-4, precision="bf16", microbatch_tokens=microbatch,
        activation_checkpointing=how, compile=compiled,
    )  # fmt: skip


def timed(bench: Bench, run: Run, rows: int, n_before: int, n: int) -> tuple[list[float], float]:
    """Seconds of n steps after some that are not counted, and the most GB held in all of them."""
    bench.reset_peak()
    world = World(0, 1, bench.device)
    model = build.model(run, world)
    opt = optimizer.build(run, model.parameters())
    batch = random_batch(rows, run.max_seq_len, model.config.vocab_size)
    times = []
    for _ in range(n_before + n):
        bench.sync()
        started = time.perf_counter()
        found, norm = train_step(model, opt, run, lambda: whole_step(model, batch, run, world))
        bench.sync()
        times.append(time.perf_counter() - started)
        assert found["loss"] > 0 and norm > 0, (found, norm)
    return times[n_before:], bench.peak_gb()


def whole_step(model: MPTForCausalLM, batch: Batch, run: Run, world: World) -> Metrics:
    return {"loss": accumulate(model, batch, run, world, run.microbatch_tokens)}


def random_batch(rows: int, n_tokens: int, n_vocab: int) -> Batch:
    """One document a row, all of it learned."""
    ids = torch.randint(4, min(n_vocab, 50_000), (rows, n_tokens), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, packing.IGNORED)
    labels[:, :-1] = ids[:, 1:]
    return Batch(ids, labels, torch.zeros_like(ids), torch.arange(rows))
