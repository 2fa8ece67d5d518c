"""What many nodes cost a run: collectives that wait, nodes that fail, and how often to save because of them.

FSDP gathers the parameters of each block before its forward and its backward pass and scatters its gradients after:
three collectives a block, and as many for the embedding. A ring over G GPUs has G hops, each with a latency that no
bandwidth shortens; the bytes themselves travel while the block before is computed, and cost time only where the network
is slower than the GPUs.
"""

import math
from dataclasses import dataclass

from training.plan import Gpu, Shape

GPUS_PER_NODE = 8
# One node of 16 fails in a week. Source: the seeds' slides. Their logbook of 440 GPUs for 9.5 days has 4 failures; this
# rate expects 4.7.
WEEKLY_FAILURES = 1 / 16
# A restart without a human took 1 to 6 minutes. Source: the launch blog.
RESTART_S = 360.0
_WEEK_S = 7 * 24 * 3600.0


def latency(shape: Shape, gpu: Gpu, n_gpus: int, microbatches: int) -> float:
    """Seconds of a step in which all wait for the hops of its collectives; within a node they are next to nothing."""
    if n_gpus <= GPUS_PER_NODE:
        return 0.0
    return 3 * (shape.n_layers + 1) * microbatches * n_gpus * gpu.hop_us * 1e-6


def transfer(shape: Shape, bandwidth: float, n_gpus: int, microbatches: int) -> float:
    """Seconds that a step's parameters and gradients, in bfloat16, take on a node's network of so many GB/s."""
    n_nodes = math.ceil(n_gpus / GPUS_PER_NODE)
    if n_nodes == 1:
        return 0.0
    return 3 * 2 * shape.n_parameters * microbatches * (n_nodes - 1) / n_nodes / (bandwidth * 1e9)


@dataclass(frozen=True)
class Failures:
    """What failing nodes and the checkpoints against them cost over a run."""

    expected: float
    lost_s: float  # restarts, and the steps done again: half an interval each
    saving_s: float  # what the checkpoints hold the run up
    best_interval_s: float  # between checkpoints: Daly's


def failures(
    seconds: float, n_gpus: int, interval_s: float, save_s: float, weekly: float = WEEKLY_FAILURES
) -> Failures:
    """Of a run that computes for so many seconds and saves every interval_s, each save holding it up for save_s.

    weekly: failures of a node in a week. Sources: Young 1974, sqrt(2 save M) with M the mean time between failures;
    Daly 2006, equation 37, which adds two terms to it.
    """
    n_nodes = math.ceil(n_gpus / GPUS_PER_NODE)
    saving_s = seconds / interval_s * save_s
    mean_s = _WEEK_S / (weekly * n_nodes) if weekly else math.inf
    expected = (seconds + saving_s) / mean_s
    return Failures(expected, expected * (RESTART_S + interval_s / 2), saving_s, best_interval(save_s, mean_s))


def best_interval(save_s: float, mean_s: float) -> float:
    """Seconds of computing between checkpoints that lose least, for a mean time between failures of mean_s."""
    if math.isinf(mean_s):
        return math.inf
    if save_s >= 2 * mean_s:
        return mean_s
    share = save_s / (2 * mean_s)
    return math.sqrt(2 * save_s * mean_s) * (1 + math.sqrt(share) / 3 + share / 9) - save_s
