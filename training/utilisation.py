"""How much of a GPU's peak a training run uses, predicted from the speeds that were published.

The table, `throughput.csv`, is llm-foundry's `scripts/train/benchmarking/README.md` at 8c8dd48f: 208 bfloat16 runs of
MPT shapes, 125M to 70B, 512 to 65,536 tokens, 8 to 512 GPUs (of two runs that differ in batch only, the faster).
Between its rows a run is interpolated over parameters, context and GPUs; outside it the nearest row stands. What
several nodes lose to the latency of their collectives is taken out of the rows first and put back for the run's own
batch and nodes (`training/nodes.py`), so that a small batch on many GPUs is not promised a large one's speed.
"""

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

from training import nodes
from training.plan import GPUS, Gpu, Shape

_TABLE = Path(__file__).with_name("throughput.csv")
ASSUMED = 0.4  # of a card that nobody published: the middle of the blog's "40 to 60 %", less what smaller cards lose
# Cards of the same chip: the H200 is an H100 with more and faster memory.
_SAME_CHIP = {"h200": "h100"}

_T = TypeVar("_T")


@dataclass(frozen=True)
class Published:
    """One measured run. mfu and hfu: shares; hfu is above mfu where the run recomputed its activations."""

    gpu: str
    shape: Shape
    parameters: int
    max_seq_len: int
    n_gpus: int
    sequences: float  # of a step on each GPU
    microbatches: int
    mfu: float
    hfu: float

    @property
    def recomputes(self) -> bool:
        return self.hfu > self.mfu

    @property
    def name(self) -> str:
        return f"{self.parameters / 1e9:.3g}B/{self.max_seq_len}/{self.n_gpus}"

    @property
    def computing(self) -> float:
        """The MFU that its GPUs had while they computed: the step without the latency of collectives."""
        flops = self.sequences * self.max_seq_len * self.shape.flops_per_token(self.max_seq_len)
        step_s = flops / (GPUS[self.gpu].peak_tflops * 1e12 * self.mfu)
        waits_s = nodes.latency(self.shape, GPUS[self.gpu], self.n_gpus, self.microbatches)
        return self.mfu * step_s / (step_s - waits_s)


@dataclass(frozen=True)
class Prediction:
    """mfu: of a GPU that waits for no other; origin: which rows it is from, in words."""

    mfu: float
    origin: str


@cache
def table() -> tuple[Published, ...]:
    """Every row, by card, size, context and GPUs."""
    with _TABLE.open(encoding="utf-8", newline="") as file:
        return tuple(_row(fields) for fields in csv.DictReader(file))


def _row(fields: dict[str, str]) -> Published:
    n_gpus, max_seq_len = int(fields["n_gpus"]), int(fields["max_seq_len"])
    # Its models have learned positions and no biases: one row of d_model for each position.
    shape = Shape(int(fields["d_model"]), 16, int(fields["n_layers"]), 50_368, learned_positions=max_seq_len)
    return Published(
        fields["gpu"], shape, int(fields["parameters"]), max_seq_len, n_gpus,
        int(fields["global_batch"]) / n_gpus, int(fields["microbatches"]),
        float(fields["mfu"]) / 100, float(fields["hfu"]) / 100,
    )  # fmt: skip


def predict(
    gpu: Gpu, parameters: int, max_seq_len: int, n_gpus: int, recomputes: bool, rows: Sequence[Published] | None = None
) -> Prediction:
    """The MFU of a run's GPUs while they compute. recomputes: full activation checkpointing, a forward pass more, so
    that a row without it counts three quarters. rows: instead of the table, for judging it."""
    card = _SAME_CHIP.get(gpu.name, gpu.name)
    rows = [row for row in (table() if rows is None else rows) if row.gpu == card]
    if not rows:
        return Prediction(ASSUMED, f"assumed, nothing was published for {gpu.name}; --mfu gives your own")
    sizes: dict[tuple[int, int], list[Published]] = {}
    for row in rows:
        sizes.setdefault((row.shape.d_model, row.shape.n_layers), []).append(row)
    near = _neighbours(sizes.values(), lambda group: math.log(min(row.parameters for row in group)), parameters)
    used: list[Published] = []
    mfu = sum(share * _of_size(group, max_seq_len, n_gpus, recomputes, used) for share, group in near)
    same = "" if card == gpu.name else f" (as {card}, the same chip)"
    named = ", ".join(dict.fromkeys(row.name for row in used))
    return Prediction(mfu, f"llm-foundry's table{same}, parameters/context/GPUs {named}")


def _of_size(rows: list[Published], max_seq_len: int, n_gpus: int, recomputes: bool, used: list[Published]) -> float:
    """Of one size: interpolated over the context on the fewest GPUs, then as the size gains or loses with GPUs."""

    def value(row: Published) -> float:
        used.append(row)
        return row.computing * (0.75 if recomputes and not row.recomputes else 1)

    lengths: dict[int, list[Published]] = {}
    for row in rows:
        lengths.setdefault(row.max_seq_len, []).append(row)
    firsts = [min(group, key=lambda row: row.n_gpus) for group in lengths.values()]
    found = sum(
        share * value(row) for share, row in _neighbours(firsts, lambda row: math.log(row.max_seq_len), max_seq_len)
    )
    many = max(lengths.values(), key=len)
    first = min(many, key=lambda row: row.n_gpus)
    near = _neighbours(many, lambda row: math.log(row.n_gpus), n_gpus)
    if [row for _, row in near] == [first]:
        return found
    return found * sum(share * value(row) for share, row in near) / value(first)


def _neighbours(items: Iterable[_T], log_key: Callable[[_T], float], target: float) -> list[tuple[float, _T]]:
    """The one or two items around a target by the logarithm of a key, with their shares; outside, the nearest."""
    known = sorted(items, key=log_key)
    at = math.log(target)
    above = next((n for n, item in enumerate(known) if log_key(item) >= at), len(known) - 1)
    high = log_key(known[above])
    if above == 0 or high <= at:
        return [(1.0, known[above])]
    low = log_key(known[above - 1])
    share = (at - low) / (high - low)
    return [(1 - share, known[above - 1]), (share, known[above])]
