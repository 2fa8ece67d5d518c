"""One training row of 65,536 tokens through blocks as wide as 7B's: does it take what `train plan` says?"""

from typing import Any

from benchmarks.gpu_parts.bench import Bench
from benchmarks.gpu_parts.training_speed import run_of, timed
from training import plan

WAYS: tuple[tuple[int, Any], ...] = ((1, "none"), (2, "full"), (2, "selective"))  # blocks, checkpointing


def run(bench: Bench) -> None:
    for n_blocks, how in WAYS:
        name = f"a row of {bench.scale.row:,} tokens, {n_blocks} blocks, checkpointing {how}"
        bench.measure(name, lambda a=(n_blocks, how, name): one_row(bench, *a))


def one_row(bench: Bench, n_blocks: int, how: Any, name: str) -> None:
    n, d_model = bench.scale.row, bench.scale.row_d_model
    shape = {"d_model": d_model, "n_heads": max(1, d_model // 128), "n_layers": n_blocks, "vocab_size": 50_432}
    settings = run_of(shape, n, 1, n, how, compiled=False)
    [seconds], peak = timed(bench, settings, 1, 1, 1)
    planned = plan.memory(plan.shape_of_run(settings), settings, 1, 1).total / 1e9
    found = bench.found.get("rows", {})
    found[f"{n_blocks} blocks, {how}"] = {
        "seconds": seconds,
        "tok_s": n / seconds,
        "peak_gb": peak,
        "planned_gb": planned,
    }
    bench.note(rows=found)
    bench.row(name, f"{peak:.2f} GB", f"`train plan`: {planned:.2f} GB; {seconds:.2f} s, {n / seconds:,.0f} tok/s")
