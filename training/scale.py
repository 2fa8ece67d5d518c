"""Small runs that tell how a large one would end: planned, trained, and read for `training/scaling_law.py`.

Each run is an ordinary one in a folder of its own, so a sweep that was interrupted goes on where it stopped. Within a
sweep only size and tokens differ: the same data, batch and context, a shape of one proportion, and Kaplan et al.'s
learning rate for its size.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpt.errors import UserError
from mpt.files import write_whole
from training import curves, plan, recipes
from training.run import Run
from training.scaling_law import Interval, Law, Point

RESULTS, PICTURE = "scale.json", "scale.png"
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9}
_HEAD = 64  # wide, as in every MPT of 125M to 3B; narrower models have two heads
_ASPECT = 64  # d_model for each layer: the 125M, 350M and 760M yamls have 43 to 64, 1B 85, 7B 128
_LAST = 0.1  # of the steps: their mean loss is the run's, where no set is held out
_SAMPLED = 256  # samples that say how long the others are


@dataclass(frozen=True)
class Amount:
    """Tokens of a run: a number, or so many for each parameter."""

    value: float
    per_parameter: bool

    def of(self, parameters: float) -> float:
        return self.value * parameters if self.per_parameter else self.value


def number(text: str, what: str) -> float:
    """`25m`, `1.3b`, `2e6` as a number. Raises UserError for anything else."""
    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)([kmb]?)", text.strip().lower())
    try:
        value = float(found[1]) * _UNITS[found[2]] if found else 0.0
    except ValueError:
        value = 0.0
    if not value > 0:
        raise UserError(f"`{what}` has `{text}`; give numbers like 25m, 1.3b or 2e6")
    return value


def amount(text: str) -> Amount:
    """`20n` is 20 tokens a parameter; anything else a number of tokens."""
    per_parameter = text.strip().lower().endswith("n")
    return Amount(number(text.strip()[:-1] if per_parameter else text, "--tokens"), per_parameter)


def model_of(parameters: float, vocab_size: int, max_seq_len: int) -> dict[str, Any]:
    """The `model` of a run whose size is nearest: d_model in steps of 16 or 64, a layer for every 64 of it, at least 2.

    Raises UserError for a size that its embedding alone exceeds by half.
    """
    rows = -(-vocab_size // 128) * 128

    def built(d_model: int) -> dict[str, Any]:
        heads = max(2, d_model // _HEAD) if d_model % _HEAD == 0 else 2
        return recipes.TINY_SHAPE | {
            "d_model": d_model, "n_heads": heads, "n_layers": max(2, round(d_model / _ASPECT)),
            "vocab_size": rows, "max_seq_len": max_seq_len,
        }  # fmt: skip

    def size(d_model: int) -> int:
        return plan.shape_of_model(built(d_model)).n_parameters

    widths = [*range(16, 256, 16), *range(256, 16_384, 64)]
    best = min(widths, key=lambda d_model: abs(math.log(size(d_model) / parameters)))
    if not 0.5 < size(best) / parameters < 2:
        raise UserError(
            f"no model of {parameters:g} parameters with {rows:,} tokens: the nearest has {size(best):,}; take larger "
            "--sizes, or a smaller tokenizer"
        )
    return built(best)


def learning_rate(parameters: float) -> float:
    """Peak, for a size. Source: Kaplan et al. 2020, equation D.1; 6.5e-4 at 125M, where llm-foundry's yaml has 6e-4."""
    return 0.003239 - 0.0001395 * math.log(parameters)


@dataclass(frozen=True)
class Planned:
    """One run of a sweep."""

    size: str  # as asked for
    parameters: int
    run: Run


def sweep(
    sizes: Sequence[str], amounts: Sequence[str], *, data: str, out: Path, tokenizer: str, eval_data: str | None,
    max_seq_len: int, global_batch: int, precision: str,
) -> list[Planned]:  # fmt: skip
    """The runs of all sizes on all amounts of tokens, smallest first. Raises UserError for what cannot be trained."""
    from mpt.checkpoint_text import open_tokenizer

    vocab_size = open_tokenizer(tokenizer).vocab_size
    found: list[Planned] = []
    of_step = 0.0
    for size in sorted(sizes, key=lambda text: number(text, "--sizes")):
        model = model_of(number(size, "--sizes"), vocab_size, max_seq_len)
        parameters = plan.shape_of_model(model).n_parameters
        for text in amounts:
            run = Run(
                name=f"{size}-{text}", base=None, data=data, out=str(out / f"{size}-{text}"), tokenizer=tokenizer,
                model=model, max_seq_len=max_seq_len, global_batch=global_batch, steps=1, epochs=None,
                lr=learning_rate(parameters), schedule="cosine", lr_floor=0.1, precision=precision,  # type: ignore[arg-type]
                eval_data=eval_data,
            )  # fmt: skip
            of_step = of_step or _tokens_of_step(run)
            found.append(Planned(size, parameters, _timed(run, amount(text).of(parameters), of_step)))
    return found


def _tokens_of_step(run: Run) -> float:
    """By the first samples of its data."""
    from training import batches

    data = batches.load_data(run, batches.load_tokenizer(run), run.data)
    n = _SAMPLED if data.n_samples is None else min(_SAMPLED, data.n_samples)
    return run.global_batch * sum(len(data.sample(at).ids) for at in range(n)) / n


def _timed(run: Run, tokens: float, of_step: float) -> Run:
    """With the steps that read so many tokens, a twentieth of them warming up."""
    if tokens < of_step:
        raise UserError(
            f"`--tokens` gives {run.name} {tokens:,.0f}, less than the {of_step:,.0f} of one step; lower "
            "--global-batch, or give more"
        )
    steps = max(1, round(tokens / of_step))
    return recipes.change(run, steps=steps, warmup_steps=steps // 20, checkpoint_every=max(20, steps // 5))


def train(planned: Sequence[Planned], each: Callable[[Planned], None]) -> list[Point]:
    """Train all, each from where it stood, and give what they ended at. each: called before a run begins."""
    from training import loop, show

    points = []
    for one in planned:
        each(one)
        with show.steps() as report:
            loop.fit(one.run, report)
        points.append(point(one))
    return points


def point(planned: Planned) -> Point:
    """A finished run: its held-out loss, or the mean loss of its last tenth of steps, on what it had not read yet."""
    lines = curves.read(Path(planned.run.out))
    last = lines[-1]
    if "held_out_loss" in last:
        loss = last["held_out_loss"]
    else:
        losses = [line["loss"] for line in lines if "loss" in line]
        tail = losses[-max(1, round(_LAST * len(losses))) :]
        loss = sum(tail) / len(tail)
    return Point(planned.parameters, last["tokens"], loss)


@dataclass(frozen=True)
class Forecast:
    """What the law says of a size that was not trained."""

    parameters: float
    tokens: float
    loss: Interval


def write(out: Path, planned: Sequence[Planned], points: Sequence[Point], law: Law, forecast: Forecast) -> Path:
    """scale.json and scale.png in the sweep's folder; the picture's path."""
    runs = [{"run": one.run.name, **asdict(point)} for one, point in zip(planned, points, strict=True)]
    story = {"form": law.form, "law": law.named, "prediction": asdict(forecast), "runs": runs}
    write_whole(out / RESULTS, json.dumps(story, indent=2) + "\n")
    return draw(out / PICTURE, points, law, forecast)


def draw(path: Path, points: Sequence[Point], law: Law, forecast: Forecast) -> Path:
    """Loss over FLOPs: the runs, the law through the tokens a parameter of each size, and the prediction."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axis = figure.subplots()
    sizes = sorted({point.parameters for point in points})
    for parameters in sizes:
        of_size = sorted((p for p in points if p.parameters == parameters), key=lambda p: p.tokens)
        (dots,) = axis.plot([p.flops for p in of_size], [p.loss for p in of_size], "o", label=f"{parameters:,.0f}")
        fitted = [law.loss(p.parameters, p.tokens).value for p in of_size]
        axis.plot([p.flops for p in of_size], fitted, "-", color=dots.get_color(), linewidth=1)
    if law.form == "power":
        ratio = forecast.tokens / forecast.parameters
        grown = [(n, law.loss(n, ratio * n).value) for n in (*sizes, forecast.parameters)]
        axis.plot([6 * ratio * n * n for n, _ in grown], [loss for _, loss in grown], "-", color="grey", linewidth=1)
    found = forecast.loss
    axis.errorbar(
        [6 * forecast.parameters * forecast.tokens], [found.value],
        yerr=[[found.value - found.low], [found.high - found.value]], fmt="s", color="black", capsize=4,
        label=f"{forecast.parameters:,.0f}, predicted",
    )  # fmt: skip
    named = ", ".join(f"{name} {value:.3g}" for name, value in law.named.items())
    axis.set(title=named, xlabel="FLOPs (6 N D)", ylabel="loss, nats a token", xscale="log")
    axis.grid(alpha=0.3, which="both")
    axis.legend(title="parameters")
    return curves.save(figure, path)
