"""What a run takes in hours and dollars, predicted: the utilisation published for its like, and all that is not steps.

A prediction has an origin, printed beside it; a utilisation that is given replaces it, and is then of the whole run.
"""

import math
from dataclasses import dataclass
from typing import Any

from mpt.errors import UserError
from training import nodes, utilisation
from training.plan import GPUS, Gpu, Memory, Shape, fitting, memory
from training.run import Run

# Packed rows leave this share of positions useful: measured with the instruct recipe's 48 rows (docs/architecture.md).
PACKED = 0.994
# GB/s at which a rank's share of a checkpoint leaves the GPU for the host, which holds the step up; the rest is written
# in the background. An assumption: half of what PCIe 4 x16 moves.
_TO_HOST = 16.0
# Runs of days took longer than steps, restarts and checkpoints account for: MPT-7B by 1.19, StoryWriter by 1.23,
# MPT-30B by 1.04 on A100 and by 1.06 on H100. Their geometric mean is taken (test_forecast.py computes it).
_LONG_RUNS = 1.13
_A_DAY_S = 24 * 3600.0
# Tokens for a parameter where compute is spent best. Source: Hoffmann et al. 2022 (Chinchilla).
CHINCHILLA = 20.0
# Dollars of writing data for after pretraining. Source: the seeds' slides.
PAIR, COMPARISON, CONVERSATION = 30.0, 8.0, 130.0


@dataclass(frozen=True)
class Work:
    """What is computed: tokens that are read, positions that are computed for them, and how many steps that takes.

    tokens: None where padded rows were counted and not what they hold.
    """

    tokens: float | None
    positions: float
    steps: float


def work(run: Run, tokens: float | None, rows: int | None = None, is_padded: bool = False) -> Work:
    """Of a run on so many tokens in all, or on `rows` rows an epoch. is_padded: every row takes max_seq_len positions.

    Without tokens, the recipe's steps with full rows. Raises UserError where that does not say how long it is.
    """
    for name, value in (("--tokens", tokens), ("--rows", rows)):
        if value is not None and not value > 0:
            raise UserError(f"`{name}` is {value:g}; it must be above 0")
    full = run.global_batch * run.max_seq_len
    steps = float(run.steps) if run.steps is not None else None
    if rows is not None:
        if run.epochs is None:
            raise UserError("`--rows` is of an epoch, and the recipe counts steps; give --tokens, or leave both out")
        steps = math.ceil(rows / run.global_batch) * run.epochs
    if is_padded:
        if steps is None:
            raise UserError("`--padded` needs `--rows`, the rows of an epoch: each of them takes a whole sequence")
        if tokens is not None and tokens > steps * full:
            raise UserError(f"{tokens:g} tokens do not fit {steps:g} steps of {full:,} positions; check --rows")
        return Work(tokens, steps * full, steps)
    if tokens is None:
        if run.steps is None:
            raise UserError(
                "the recipe runs for epochs of data that is not known here; give --tokens, or --rows with --padded"
            )
        return Work(run.steps * full, run.steps * full, run.steps)
    positions = tokens if run.base is None else tokens / PACKED
    return Work(tokens, positions, steps if rows is not None and steps else max(1.0, positions / full))


@dataclass(frozen=True)
class Hours:
    """Where the time of a run goes."""

    steps: float
    evaluations: float
    checkpoints: float
    start: float
    failures: float
    other: float  # what runs of days took beyond all that

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Job:
    """What a run costs on so many GPUs of a kind. mfu: of the whole run; hfu: of its steps, recomputing counted."""

    gpu: Gpu
    n_gpus: int
    n_parameters: int
    draws_weights: bool  # a pretraining
    work: Work
    flops: float
    mfu: float
    mfu_of_steps: float
    mfu_causal: float  # of steps, attention counted as causal
    mfu_without_attention: float  # of steps: 6 N a token alone
    hfu: float
    origin: str
    hours: Hours
    dollars: float
    speedup: float  # over one node at the same global batch
    expected_failures: float
    checkpoint_steps: int  # between checkpoints
    best_checkpoint_steps: float
    memory: Memory
    sequences: int  # at a time on each GPU, the most that fit; 0: none does

    @property
    def positions_per_s(self) -> float:
        return self.work.positions / self.hours.total / 3600


@dataclass(frozen=True)
class _Step:
    seconds: float
    computing_s: float
    origin: str


def job(
    shape: Shape, run: Run, done: Work, gpu_name: str, n_gpus: int, mfu: float | None = None,
    price: float | None = None, network: float | None = None, weekly_failures: float = nodes.WEEKLY_FAILURES,
) -> Job:  # fmt: skip
    """A run's time, money and memory. mfu: of the whole run, instead of the prediction; network: GB/s of a node.

    Raises UserError for unknown GPUs and for numbers out of range.
    """
    gpu = _checked(gpu_name, n_gpus, mfu, network, weekly_failures)
    run.check_ranks(n_gpus)
    sequences = fitting(shape, run, gpu, n_gpus)
    flops = done.positions * _flops_per_position(shape, run)
    step = _step(shape, run, done, gpu, n_gpus, sequences, network)
    save_s = _state_bytes(shape, run) / n_gpus / (_TO_HOST * 1e9)
    failing = nodes.failures(
        done.steps * step.seconds, n_gpus, run.checkpoint_every * step.seconds, save_s, weekly_failures
    )
    if mfu is None:
        hours, origin = _hours(run, done, step, failing), step.origin
        seconds = step.seconds
    else:
        seconds = flops / done.steps / (n_gpus * gpu.peak_tflops * 1e12 * mfu)
        hours, origin = Hours(done.steps * seconds / 3600, 0, 0, 0, 0, 0), "given, of the whole run"
    peak = n_gpus * gpu.peak_tflops * 1e12
    of_steps = flops / (done.steps * seconds * peak)
    whole = shape.flops_per_token(run.max_seq_len)
    return Job(
        gpu=gpu, n_gpus=n_gpus, n_parameters=shape.n_parameters, draws_weights=run.base is None, work=done, flops=flops,
        mfu=flops / (hours.total * 3600 * peak), mfu_of_steps=of_steps,
        mfu_causal=of_steps * shape.flops_per_token(run.max_seq_len, is_causal=True) / whole,
        mfu_without_attention=of_steps * shape.flops_per_token(0) / whole,
        hfu=of_steps * (4 / 3 if run.activation_checkpointing == "full" else 1),
        origin=origin, hours=hours, dollars=hours.total * n_gpus * (gpu.price if price is None else price),
        speedup=speedup(shape, run, done, gpu, n_gpus, network), expected_failures=failing.expected,
        checkpoint_steps=run.checkpoint_every, best_checkpoint_steps=failing.best_interval_s / step.seconds,
        memory=memory(shape, run, n_gpus, max(1, sequences)), sequences=sequences,
    )  # fmt: skip


def speedup(shape: Shape, run: Run, done: Work, gpu: Gpu, n_gpus: int, network: float | None = None) -> float:
    """How many times as fast as one node of 8 these GPUs do the same global batch; a node or less has no network."""
    if n_gpus <= nodes.GPUS_PER_NODE:
        return n_gpus / nodes.GPUS_PER_NODE
    # One GPU's speed while it computes is the same on both sides: what is compared is the network.
    fits = fitting(shape, run, gpu, n_gpus)
    many = _step(shape, run, done, gpu, n_gpus, fits, network)
    alone_s = many.computing_s * _sequences(run, done, nodes.GPUS_PER_NODE) / _sequences(run, done, n_gpus)
    return alone_s / many.seconds


def _checked(gpu_name: str, n_gpus: int, mfu: float | None, network: float | None, weekly: float) -> Gpu:
    gpu = GPUS.get(gpu_name)
    if gpu is None:
        raise UserError(f"no GPU `{gpu_name}`; known: {', '.join(GPUS)}")
    if n_gpus < 1:
        raise UserError(f"`--gpus` is {n_gpus}; at least 1 is needed")
    if mfu is not None and not 0 < mfu <= 1:
        raise UserError(f"`--mfu` is {mfu}; it is a share, above 0 and at most 1")
    if network is not None and not network > 0:
        raise UserError(f"`--network` is {network}; it is GB/s of a node, above 0")
    if weekly < 0:
        raise UserError(f"`--weekly-failures` is {weekly}; it must be at least 0")
    return gpu


def _sequences(run: Run, done: Work, n_gpus: int) -> float:
    """Of a step on each GPU. At least one, or its part of one: a GPU without a row waits for the others."""
    return max(1.0 / run.context_parallel, done.positions / done.steps / run.max_seq_len / n_gpus)


def _flops_per_position(shape: Shape, run: Run) -> float:
    """Of forward and backward, and of the forward pass of a preference tuning's reference."""
    needs_reference = run.preference is not None and run.preference.has_reference
    return shape.flops_per_token(run.max_seq_len) * (4 / 3 if needs_reference else 1)


def _step(
    shape: Shape, run: Run, done: Work, gpu: Gpu, n_gpus: int, fits: int, network: float | None
) -> _Step:  # fmt: skip
    found = utilisation.predict(
        gpu, shape.n_parameters, run.max_seq_len, n_gpus, run.activation_checkpointing == "full"
    )
    sequences = _sequences(run, done, n_gpus)
    n_micro = math.ceil(sequences / max(1, fits))
    flops = sequences * run.max_seq_len * _flops_per_position(shape, run)
    computing_s = flops / (gpu.peak_tflops * 1e12 * found.mfu)
    moving_s = nodes.transfer(shape, network or gpu.network, n_gpus, n_micro)
    return _Step(
        max(computing_s, moving_s) + nodes.latency(shape, gpu, n_gpus, n_micro),
        computing_s,
        found.origin + ("; the network is slower than the GPUs" if moving_s > computing_s else ""),
    )


def _hours(run: Run, done: Work, step: _Step, failing: nodes.Failures) -> Hours:
    """From seconds; an evaluation is a forward pass, a third of a step's work, or a quarter where steps recompute."""
    seconds = done.steps * step.seconds
    n_evaluations = 0.0 if run.eval_data is None else 1 + done.steps // run.eval_every
    part = 0.25 if run.activation_checkpointing == "full" else 1 / 3
    sequences_of_step = done.positions / done.steps / run.max_seq_len
    evaluating_s = n_evaluations * run.eval_samples / max(1.0, sequences_of_step) * step.seconds * part
    known_s = seconds + evaluating_s + failing.saving_s + nodes.RESTART_S + failing.lost_s
    other_s = (_LONG_RUNS - 1) * known_s if known_s > _A_DAY_S else 0.0
    parts_s = (seconds, evaluating_s, failing.saving_s, nodes.RESTART_S, failing.lost_s, other_s)
    return Hours(*(part_s / 3600 for part_s in parts_s))


def _state_bytes(shape: Shape, run: Run) -> float:
    """Of a checkpoint: float32 parameters and the optimizer's moments; of adapters, theirs."""
    needed = memory(shape, run, 1)
    trained = needed.gradients  # 4 bytes for each trained parameter
    return trained + needed.optimizer


@dataclass(frozen=True)
class Optimal:
    """The size and tokens that spend some FLOPs best, by Chinchilla's 20 tokens a parameter and C = 6 N D."""

    parameters: float
    tokens: float


def optimal(flops: float) -> Optimal:
    """For a budget of FLOPs, attention not counted."""
    parameters = math.sqrt(flops / (6 * CHINCHILLA))
    return Optimal(parameters, CHINCHILLA * parameters)


def data_cost(pairs: int = 0, comparisons: int = 0, conversations: int = 0) -> float:
    """Dollars of having people write so many prompts with responses, compare so many, and hold so many talks."""
    return PAIR * pairs + COMPARISON * comparisons + CONVERSATION * conversations


def render(found: Job) -> str:
    """A job as `key value` lines, one fact each."""
    return "\n".join(f"{key} {value}" for key, value in [*_of_work(found), *_of_time(found), *_of_memory(found)])


def _of_work(found: Job) -> list[tuple[str, str]]:
    done = found.work
    rows = [("parameters", f"{found.n_parameters:,}")]
    if done.tokens is not None:
        rows.append(("tokens", f"{done.tokens:.4g}, {done.tokens / done.positions:.1%} of the positions"))
    rows.append(("positions", f"{done.positions:.4g} in {done.steps:,.0f} steps"))
    if done.tokens is not None and found.draws_weights:
        best = optimal(6 * found.n_parameters * done.tokens)
        chinchilla = f"Chinchilla's {CHINCHILLA:g} are {CHINCHILLA * found.n_parameters:.3g} tokens"
        rows.append(("tokens_per_parameter", f"{done.tokens / found.n_parameters:.3g}; {chinchilla}"))
        rows.append(("same_flops_at_chinchilla", f"{best.parameters:.3g} parameters on {best.tokens:.3g} tokens"))
    return [*rows, ("flops", f"{found.flops:.3g}")]


def _of_time(found: Job) -> list[tuple[str, str]]:
    hours = found.hours
    rows = [
        ("gpus", f"{found.n_gpus} x {found.gpu.name}, {found.gpu.peak_tflops:g} TFLOP/s each"),
        ("mfu", f"{found.mfu:.1%} of the whole run, {found.mfu_of_steps:.1%} of its steps "
         f"({found.mfu_causal:.1%} with causal attention, {found.mfu_without_attention:.1%} without attention)"),
        ("hfu", f"{found.hfu:.1%} of its steps, recomputed activations counted"),
        ("mfu_from", found.origin),
        ("positions_per_s", f"{found.positions_per_s:,.0f}"),
        ("time", f"{hours.total:.1f} hours ({hours.total / 24:.1f} days)"),
    ]  # fmt: skip
    rows += [(f"time_{name}", f"{value:.2f} hours") for name, value in vars(hours).items()]
    rows.append(("cost", f"${found.dollars:,.0f}"))
    n_nodes = math.ceil(found.n_gpus / nodes.GPUS_PER_NODE)
    if n_nodes > 1:
        rows.append(("speedup", f"{found.speedup:.1f} of {n_nodes} nodes"))
    best = found.best_checkpoint_steps
    rows.append(("failures", f"{found.expected_failures:.2f} expected, each a restart and half of "
                 f"{found.checkpoint_steps:,} steps"))  # fmt: skip
    if math.isfinite(best):
        rows.append(("checkpoint_every", f"{max(1, round(best)):,} steps would lose least (Young, Daly)"))
    return rows


def _of_memory(found: Job) -> list[tuple[str, str]]:
    rows = [(f"memory_{key}", f"{value / 1e9:.2f} GB") for key, value in vars(found.memory).items()]
    rows.append(("memory_total", f"{found.memory.total / 1e9:.2f} of {found.gpu.memory_gb:g} GB on each GPU"))
    fits = f"{found.sequences} at a time" if found.sequences else "does not fit; take more GPUs, or checkpointing"
    return [*rows, ("sequences", fits)]


def as_dict(found: Job) -> dict[str, Any]:
    """A job for JSON, totals included."""
    import dataclasses

    return dataclasses.asdict(found) | {"total_hours": found.hours.total, "positions_per_s": found.positions_per_s}
