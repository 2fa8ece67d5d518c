"""From logits to a token: penalties, filters and the draw, for a batch of rows that each want something else.

Randomness comes in from outside as one uniform number a row and step, so a row's draw depends on nothing but its own
logits and its own seed. Order: bias and penalties, temperature, top-k, top-p, min-p, draw by inverting the cumulative
distribution in the order of the ids. On CPU the draw is in C where C runs (mpt/backends/native/draw.c):
the same tokens in a twentieth of the time.
"""

import functools
from collections.abc import Sequence
from dataclasses import fields
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mpt.backends.native.draw import draw
from mpt.backends.native.library import Unavailable, load
from mpt.draw_parameters import DrawParameters
from mpt.transfer import to_device

# On CUDA, where sorting all 50,432 logits of each row costs more than the rest of a draw. Rows for which the first
# number of tokens is too few go on to the second, and are sorted whole after that.
N_BEST = (1024, 8192)


def columns(rows: Sequence[DrawParameters]) -> dict[str, Tensor]:
    """What `sample` takes for these rows, (B,) float64 on CPU each, by name."""
    names = [each.name for each in fields(DrawParameters)]
    numbers = torch.tensor([[getattr(row, name) for name in names] for row in rows], dtype=torch.float64)
    return dict(zip(names, numbers.unbind(-1), strict=True))


class TokenCounts:
    """What one sequence has said so far, for the penalties: the tokens of prompt and answer, each once.

    A list and not vectors over the vocabulary: a step then touches a few hundred logits of a sequence, not 50,432.
    """

    def __init__(self, prompt: Sequence[int], generated: Sequence[int] = ()) -> None:
        tokens = list(dict.fromkeys(prompt))
        self._places = {token: place for place, token in enumerate(tokens)}
        self._ids = np.concatenate([np.array(tokens, dtype=np.int64), np.zeros(64, dtype=np.int64)])
        self._times = np.zeros(len(self._ids), dtype=np.float32)
        for token in generated:
            self.add(token)

    @property
    def ids(self) -> np.ndarray:
        """The tokens seen, (N,) int64, in the order they came."""
        return self._ids[: len(self._places)]

    @property
    def times(self) -> np.ndarray:
        """How often each was generated, (N,) float32."""
        return self._times[: len(self._places)]

    def add(self, token: int) -> None:
        """Count a token that was generated."""
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._times = np.concatenate([self._times, np.zeros_like(self._times)])
        self._ids[place] = token
        self._times[place] += 1


class Penalties(NamedTuple):
    """What one row is penalised for, and how much.

    presence and frequency: OpenAI's, over generated tokens. repetition: Keskar et al. 2019, over prompt and answer.
    """

    counts: TokenCounts
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0


def penalize(logits: Tensor, rows: Sequence[int], wanted: Sequence[Penalties]) -> None:
    """Apply penalties to these rows of logits, (B, V) float32, in place: all of them in a handful of calls."""
    n_seen = [len(each.counts.ids) for each in wanted]
    at = places(logits, rows, [each.counts.ids for each in wanted])
    strengths = np.array([each[1:] for each in wanted], dtype=np.float32)  # (rows, 3)
    per_token = np.repeat(strengths, n_seen, axis=0).T  # (3, N)
    times = np.concatenate([each.counts.times for each in wanted])
    table = to_device(np.vstack([per_token, times]), logits.device)
    presence, frequency, repetition, count = table
    seen = logits.view(-1)[at]
    seen = torch.where(seen > 0, seen / repetition, seen * repetition)
    logits.view(-1)[at] = seen - presence * (count > 0) - frequency * count


def places(logits: Tensor, rows: Sequence[int], ids: Sequence[np.ndarray]) -> Tensor:
    """Where these ids of each of these rows lie in logits, (B, V) in one piece, laid end to end: (N,) int64."""
    laid = [row * logits.shape[1] + of for row, of in zip(rows, ids, strict=True)]
    return to_device(np.concatenate(laid), logits.device)


def ban_others(logits: Tensor, allowed: np.ndarray) -> None:
    """Set all but the allowed tokens, (V,) bool, to -inf in a row of logits, (V,), in place."""
    logits.masked_fill_(~to_device(allowed, logits.device), -torch.inf)


def greedy(logits: Tensor) -> Tensor:
    """The likeliest token of each row, (B,), the lowest id among equals. logits: (B, V)."""
    return logits.max(-1).indices  # the first of equals, like argmax, at a third of its time


def sample(logits: Tensor, *, uniform: Tensor, **columns: Tensor) -> Tensor:
    """Draw one token per row, (B,). logits: (B, V) float32; uniform: (B,) float64 in [0, 1); columns: from `columns`.

    Temperature 0 is greedy, the lowest id among equals. top_k 0 is off. top_p keeps the smallest set of tokens that
    reaches it, min_p those with at least that share of the best one's probability; never fewer than one token stays.
    uniform and columns are on CPU, wherever the logits are: they decide what is computed, and asking a GPU waits.
    """
    if not bool((columns["temperature"] > 0).any()):
        return greedy(logits)
    if logits.device.type == "cpu" and _draws_in_c():
        return draw(logits, uniform=uniform, **columns)
    return sample_in_torch(logits, uniform=uniform, n_best=N_BEST if logits.is_cuda else (), **columns)


def sample_in_torch(
    logits: Tensor,
    *,
    uniform: Tensor,
    temperature: Tensor,
    top_p: Tensor,
    top_k: Tensor,
    min_p: Tensor,
    n_best: Sequence[int] = (),
) -> Tensor:
    """What `sample` gives, on any device. n_best: among how many tokens to look for those that filters keep, before all
    are sorted; rising.
    """
    out, drawn = greedy(logits), temperature > 0
    filtered = drawn & ((top_p < 1) | (top_k > 0) | (min_p > 0))
    plain = drawn & ~filtered
    device = logits.device
    if bool(plain.any()):
        rows = to_device(plain.nonzero()[:, 0], device)
        asked = [to_device(column[plain], device) for column in (temperature, uniform)]
        out[rows] = _draw(_probabilities(logits[rows], asked[0]), asked[1])
    if bool(filtered.any()):
        rows = to_device(filtered.nonzero()[:, 0], device)
        asked = [to_device(column[filtered], device) for column in (uniform, temperature, top_p, top_k, min_p)]
        out[rows] = _draw_filtered(n_best, logits[rows], *asked)
    return out


def _draw_filtered(
    n_best: Sequence[int],
    logits: Tensor,
    uniform: Tensor,
    temperature: Tensor,
    top_p: Tensor,
    top_k: Tensor,
    min_p: Tensor,
) -> Tensor:
    """The token of each row from what its filters keep, (B,)."""
    probs = _probabilities(logits, temperature)
    if n_best and n_best[0] < probs.shape[-1]:
        return _draw_among_best(n_best, probs, logits, uniform, temperature, top_p, top_k, min_p)
    token = torch.sort(logits, dim=-1, descending=True, stable=True).indices  # half the bytes of their probabilities
    ordered = probs.gather(-1, token)
    kept = _keep(ordered, ordered.sum(-1), top_p, top_k, min_p)
    return _draw(torch.zeros_like(probs).scatter(-1, token, kept), uniform)


def _draw_among_best(
    n_best: Sequence[int],
    probs: Tensor,
    logits: Tensor,
    uniform: Tensor,
    temperature: Tensor,
    top_p: Tensor,
    top_k: Tensor,
    min_p: Tensor,
) -> Tensor:
    """`_draw_filtered` without sorting all: the first n_best of each row nearly always hold what its filters keep.

    That is sure where one filter ends before the least of them, and so before others that equal it. Rows where it is
    not are drawn from the next n_best, or from all.
    """
    ids = torch.topk(logits, n_best[0], dim=-1, sorted=False).indices.sort(-1).values  # (B, N), in the order of the ids
    best, own, total = logits.gather(-1, ids), probs.gather(-1, ids), probs.sum(-1)
    place = torch.sort(best, dim=-1, descending=True, stable=True).indices
    kept = _keep(own.gather(-1, place), total, top_p, top_k, min_p)
    drawn = _draw(torch.zeros_like(own).scatter(-1, place, kept), uniform)
    token = ids.gather(-1, drawn[:, None])[:, 0]

    is_sure = best > best.amin(-1, keepdim=True)
    by_rank = (top_k > 0) & (top_k <= is_sure.sum(-1))
    by_mass = (own * is_sure).sum(-1) / total > top_p + 1e-12  # more than float64's sums can differ
    by_share = own.amin(-1) < min_p * own.amax(-1)
    unsure = (~(by_rank | ((top_k <= 0) & (by_mass | by_share)))).nonzero()[:, 0]
    if len(unsure):
        columns = (logits, uniform, temperature, top_p, top_k, min_p)
        token[unsure] = _draw_filtered(n_best[1:], *(column[unsure] for column in columns))
    return token


def _keep(probs: Tensor, total: Tensor, top_p: Tensor, top_k: Tensor, min_p: Tensor) -> Tensor:
    """The probabilities (B, N), the largest first, 0 where a filter leaves one out. total: (B,), of all there are."""
    rank = torch.arange(probs.shape[-1], device=probs.device)
    limit = torch.where(top_k > 0, top_k, probs.shape[-1])
    probs = probs.masked_fill(rank >= limit[:, None], 0)
    probs = probs / torch.where(top_k > 0, probs.sum(-1), total)[:, None]
    outside = probs.cumsum(-1) - probs >= top_p[:, None]  # the mass before this token is enough
    outside |= probs < min_p[:, None] * probs[:, :1]
    outside[:, 0] = False
    return probs.masked_fill(outside, 0)


@functools.cache
def _draws_in_c() -> bool:
    try:
        load()
    except Unavailable:
        return False
    return True


def _probabilities(logits: Tensor, temperature: Tensor) -> Tensor:
    """Softmax at a temperature, (B, V) float64: 50,432 float32 terms do not add up to 1 closely enough to invert."""
    return (logits.double() / temperature[:, None]).softmax(-1)


def _draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the cumulative distribution passes `uniform`, (B,). probs need not add up to 1."""
    cumulative = probs.cumsum(-1)
    target = uniform[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    last = probs.shape[-1] - 1 - (probs > 0).flip(-1).to(torch.uint8).argmax(-1)  # rounding must not pass the last
    return torch.minimum(token, last)
