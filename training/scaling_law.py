"""The scaling law of small runs: fitted to their losses, with an interval for what it predicts.

Chinchilla's form is L = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, approach 3), N parameters and D tokens.
Runs of one number of tokens a parameter cannot tell A from B; of those the compute-optimal power law L = E + A /
N^alpha is fitted. Both are fitted as there, by the Huber loss of log L, from several starts; scipy does it.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mpt.errors import UserError
from mpt.extras import install

Form = Literal["chinchilla", "power"]
_HUBER = 1e-3  # Hoffmann et al.'s delta, of log L
_RESAMPLES = 100
_CERTAINTY = 0.9  # of an interval
_NAMES: dict[Form, tuple[str, ...]] = {
    "chinchilla": ("E", "A", "alpha", "B", "beta"),
    "power": ("E", "A", "alpha"),
}
# Of the fit's own numbers: the logs of E, A and B, and the exponents.
_BOUNDS = {"E": (-10.0, 5.0), "A": (-20.0, 60.0), "alpha": (0.0, 3.0), "B": (-20.0, 60.0), "beta": (0.0, 3.0)}
_EXPONENTS = (0.1, 0.2, 0.3, 0.45, 0.7, 1.0)  # of the starts
_REFINED = 4  # starts that are worth it


@dataclass(frozen=True)
class Point:
    """One finished run. parameters: all, the tied embedding once; loss: nats a token."""

    parameters: float
    tokens: float
    loss: float

    @property
    def flops(self) -> float:
        """6 N D: attention is not counted."""
        return 6 * self.parameters * self.tokens


@dataclass(frozen=True)
class Interval:
    """A prediction, and where it lies in nine of ten refits to resampled residuals."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Law:
    """A fit. values: E, A, alpha, and B, beta in Chinchilla's form; refits: the same of each resample."""

    form: Form
    values: tuple[float, ...]
    refits: tuple[tuple[float, ...], ...]

    @property
    def named(self) -> dict[str, float]:
        return dict(zip(_NAMES[self.form], self.values, strict=True))

    def loss(self, parameters: float, tokens: float) -> Interval:
        """What a run of this size on so many tokens would end at."""
        found = sorted(_loss(self.form, values, parameters, tokens) for values in self.refits)
        outside = round((1 - _CERTAINTY) / 2 * len(found))
        return Interval(
            _loss(self.form, self.values, parameters, tokens), found[outside], found[len(found) - 1 - outside]
        )

    def optimal(self, flops: float) -> tuple[float, float] | None:
        """Parameters and tokens that spend so many FLOPs best; None in the power law, which took them as given."""
        if self.form == "power":
            return None
        _, a, alpha, b, beta = self.values
        parameters = (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * (flops / 6) ** (beta / (alpha + beta))
        return parameters, flops / 6 / parameters


def form_of(points: Sequence[Point]) -> Form:
    """Which form the runs can tell: Chinchilla's needs six, of three sizes, at several tokens a parameter."""
    sizes = {point.parameters for point in points}
    ratios = [point.tokens / point.parameters for point in points]
    varied = max(ratios) > 1.5 * min(ratios)
    return "chinchilla" if len(points) >= 6 and len(sizes) >= 3 and varied else "power"


def check(points: Sequence[Point]) -> Form:
    """Which form these runs, with any losses, can be fitted by.

    Raises UserError for fewer runs than it has numbers, and one to spare, and where scipy is missing.
    """
    form, n_sizes = form_of(points), len({point.parameters for point in points})
    needed = len(_NAMES[form]) + 1
    if n_sizes < 3 or len(points) < needed:
        raise UserError(
            f"{len(points)} runs of {n_sizes} sizes; a law needs {needed} runs of at least 3 sizes: add to --sizes, "
            "for example `--sizes 10m 25m 60m 125m`"
        )
    _optimize()
    return form


def fit(points: Sequence[Point], seed: int = 17) -> Law:
    """The law of some runs. Raises what `check` does."""
    form = check(points)
    np = _numpy()
    logs = np.log([[point.parameters, point.tokens] for point in points])
    losses = np.log([point.loss for point in points])
    tried = [_solve(form, start, logs, losses) for start in _starts(form, logs, losses)]
    best = _refined(form, min(tried, key=lambda found: found[1])[0], logs, losses)
    fitted = _log_loss(form, best, logs)
    spare = len(points) - len(best)
    residuals = (losses - fitted) * math.sqrt(len(points) / spare)
    rng = np.random.default_rng(seed)
    refits = []
    for _ in range(_RESAMPLES):
        drawn = fitted + rng.choice(residuals, len(points))
        refits.append(_plain(form, _refined(form, _solve(form, best, logs, drawn)[0], logs, drawn)))
    return Law(form, _plain(form, best), tuple(refits))


def _loss(form: Form, values: tuple[float, ...], parameters: float, tokens: float) -> float:
    e, a, alpha, *rest = values
    found = e + a / parameters**alpha
    return found + (rest[0] / tokens ** rest[1] if form == "chinchilla" else 0.0)


def _starts(form: Form, logs: Any, losses: Any) -> list[list[float]]:
    """In the fit's own numbers: log E, log A, alpha, log B, beta.

    With the exponents given the others are linear, so each pair of a grid has its best; the best pairs are refined.
    """
    np, nnls = _numpy(), _optimize().nnls
    pairs = itertools.product(_EXPONENTS, _EXPONENTS if form == "chinchilla" else (0.0,))
    found = []
    for alpha, beta in pairs:
        columns = [np.ones(len(logs)), np.exp(-alpha * logs[:, 0])]
        if form == "chinchilla":
            columns.append(np.exp(-beta * logs[:, 1]))
        # Divided by the losses, so that all count by their relative error, and by each column's size.
        sizes = [column.max() for column in columns]
        matrix = np.stack([column / size for column, size in zip(columns, sizes, strict=True)], axis=1)
        factors, left = nnls(matrix / np.exp(losses)[:, None], np.ones(len(losses)))
        e, a, *b = (math.log(max(1e-6, factor / size)) for factor, size in zip(factors, sizes, strict=True))
        found.append((left, [e, a, alpha, *([b[0], beta] if b else [])]))
    found.sort(key=lambda pair: pair[0])
    return [start for _, start in found[:_REFINED]]


def _terms(form: Form, x: Any, logs: Any) -> Any:
    """The logs of the law's two or three terms at each run."""
    terms = [0 * logs[:, 0] + x[0], x[1] - x[2] * logs[:, 0]]
    if form == "chinchilla":
        terms.append(x[3] - x[4] * logs[:, 1])
    return terms


def _log_loss(form: Form, x: Any, logs: Any) -> Any:
    """log L of each run, as the log of a sum of exponentials: no number over- or underflows on the way."""
    return _numpy().logaddexp.reduce(_terms(form, x, logs))


def _slopes(form: Form, x: Any, logs: Any) -> Any:
    """How log L of each run changes with each number of the fit."""
    np = _numpy()
    terms = _terms(form, x, logs)
    shares = np.exp(np.stack(terms) - np.logaddexp.reduce(terms))
    columns = [shares[0], shares[1], -shares[1] * logs[:, 0]]
    if form == "chinchilla":
        columns += [shares[2], -shares[2] * logs[:, 1]]
    return np.stack(columns, axis=1)


def _solve(form: Form, start: Any, logs: Any, losses: Any) -> tuple[Any, float]:
    """The numbers that fit from this start, and the sum of squares that is left over."""
    bounds = [_BOUNDS[name] for name in _NAMES[form]]
    lower, upper = zip(*bounds, strict=True)
    np, solve = _numpy(), _optimize().least_squares
    found = solve(
        lambda x: _log_loss(form, x, logs) - losses, np.clip(start, lower, upper), lambda x: _slopes(form, x, logs),
        bounds=(lower, upper), x_scale="jac",
    )  # fmt: skip
    return found.x, float(found.cost)


def _refined(form: Form, start: Any, logs: Any, losses: Any) -> Any:
    """The same by the Huber loss, so that one bad run does not bend the law; delta is never below the noise itself."""
    np, solve = _numpy(), _optimize().least_squares
    lower, upper = zip(*(_BOUNDS[name] for name in _NAMES[form]), strict=True)
    delta = max(_HUBER, float(np.median(np.abs(_log_loss(form, start, logs) - losses))))
    found = solve(
        lambda x: _log_loss(form, x, logs) - losses, start, lambda x: _slopes(form, x, logs),
        bounds=(lower, upper), x_scale="jac", loss="huber", f_scale=delta,
    )  # fmt: skip
    return found.x


def _plain(form: Form, x: Any) -> tuple[float, ...]:
    values = [math.exp(x[0]), math.exp(x[1]), float(x[2])]
    if form == "chinchilla":
        values += [math.exp(x[3]), float(x[4])]
    return tuple(values)


def _numpy() -> Any:
    import numpy

    return numpy


def _optimize() -> Any:
    try:
        import scipy.optimize
    except ImportError as error:
        raise UserError(f"fitting a law needs scipy; {install('scale')}") from error
    return scipy.optimize
