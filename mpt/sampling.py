"""From logits to a token: penalties, filters and the draw, for a batch of rows that each want something else.

Randomness comes in from outside as one uniform number a row and step, so a row's draw depends on nothing but its own
logits and its own seed. Order: bias and penalties, temperature, top-k, top-p, min-p, draw by inverting the cumulative
distribution in the order of the ids. On CPU the draw is in C where C runs (mpt/backends/native/draw.c):
the same tokens in a twentieth of the time.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from mpt.backends.native.draw import draw
from mpt.backends.native.library import Unavailable, load


def asked_over_http(default: Any, **limits: float) -> Any:
    """A field of a dataclass that requests may set, within these limits (ge, gt, le, lt of pydantic's Field)."""
    return field(default=default, metadata={"http": limits})


@dataclass(frozen=True, kw_only=True)
class DrawParameters:
    """How a token is drawn from its logits, declared here for Python, C and HTTP.

    Each field is a column of `sample`, a number of draw.c's `Wish` under the same name, and a field of OpenAI's bodies.
    """

    temperature: float = asked_over_http(1.0, ge=0, le=2)  # 0 is greedy
    top_p: float = asked_over_http(1.0, ge=0, le=1)
    top_k: int = asked_over_http(0, ge=-1)  # 0 and -1 are off
    min_p: float = asked_over_http(0.0, ge=0, le=1)


def columns(rows: Sequence[DrawParameters], device: torch.device | None = None) -> dict[str, Tensor]:
    """What `sample` takes for these rows, (B,) float64 each, by name."""
    names = [each.name for each in fields(DrawParameters)]
    numbers = torch.tensor([[getattr(row, name) for name in names] for row in rows], dtype=torch.float64, device=device)
    return dict(zip(names, numbers.unbind(-1), strict=True))


class TokenCounts:
    """What one sequence has said so far, for the penalties: the tokens of prompt and answer, each once.

    A list and not vectors over the vocabulary: a step then touches a few hundred logits of a sequence, not 50,432.
    """

    def __init__(self, prompt: Sequence[int], generated: Sequence[int] = ()) -> None:
        tokens = list(dict.fromkeys(prompt))
        self._places = {token: place for place, token in enumerate(tokens)}
        room = torch.zeros(64, dtype=torch.int64)
        self._ids = torch.cat([torch.tensor(tokens, dtype=torch.int64), room])
        self._times = torch.zeros(len(self._ids))
        for token in generated:
            self.add(token)

    @property
    def ids(self) -> Tensor:
        """The tokens seen, (N,), in the order they came."""
        return self._ids[: len(self._places)]

    @property
    def times(self) -> Tensor:
        """How often each was generated, (N,) float32."""
        return self._times[: len(self._places)]

    def add(self, token: int) -> None:
        """Count a token that was generated."""
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):
            self._ids = torch.cat([self._ids, torch.zeros_like(self._ids)])
            self._times = torch.cat([self._times, torch.zeros_like(self._times)])
        self._ids[place] = token
        self._times[place] += 1


def penalize(
    logits: Tensor,
    counts: TokenCounts,
    *,
    presence: float = 0.0,
    frequency: float = 0.0,
    repetition: float = 1.0,
) -> None:
    """Apply the penalties to one row of logits, (V,) float32, in place.

    presence and frequency: OpenAI's, over generated tokens. repetition: Keskar et al. 2019, over prompt and answer.
    """
    ids, times = counts.ids.to(logits.device), counts.times.to(logits.device)
    seen = logits[ids]
    if repetition != 1.0:
        seen = torch.where(seen > 0, seen / repetition, seen * repetition)
    logits[ids] = seen - presence * (times > 0) - frequency * times


def greedy(logits: Tensor) -> Tensor:
    """The likeliest token of each row, (B,), the lowest id among equals. logits: (B, V)."""
    return logits.max(-1).indices  # the first of equals, like argmax, at a third of its time


def sample(logits: Tensor, *, uniform: Tensor, **columns: Tensor) -> Tensor:
    """Draw one token per row, (B,). logits: (B, V) float32; uniform: (B,) float64 in [0, 1); columns: from `columns`.

    Temperature 0 is greedy, the lowest id among equals. top_k 0 is off. top_p keeps the smallest set of tokens that
    reaches it, min_p those with at least that share of the best one's probability; never fewer than one token stays.
    """
    if not bool((columns["temperature"] > 0).any()):
        return greedy(logits)
    if logits.device.type == "cpu" and _draws_in_c():
        return draw(logits, uniform=uniform, **columns)
    return sample_in_torch(logits, uniform=uniform, **columns)


def sample_in_torch(
    logits: Tensor, *, uniform: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, min_p: Tensor
) -> Tensor:
    """What `sample` gives, on any device."""
    out, drawn = greedy(logits), temperature > 0
    filtered = drawn & ((top_p < 1) | (top_k > 0) | (min_p > 0))
    plain = drawn & ~filtered
    if bool(plain.any()):
        out[plain] = _draw(_probabilities(logits[plain], temperature[plain]), uniform[plain])
    if bool(filtered.any()):
        probs, token = torch.sort(
            _probabilities(logits[filtered], temperature[filtered]), dim=-1, descending=True, stable=True
        )
        rank = torch.arange(probs.shape[-1], device=probs.device)
        limit = torch.where(top_k > 0, top_k, probs.shape[-1])[filtered]
        probs = probs.masked_fill(rank >= limit[:, None], 0)
        probs = probs / probs.sum(-1, keepdim=True)
        outside = probs.cumsum(-1) - probs >= top_p[filtered][:, None]  # the mass before this token is enough
        outside |= probs < min_p[filtered][:, None] * probs[:, :1]
        outside[:, 0] = False
        kept = torch.zeros_like(probs).scatter(-1, token, probs.masked_fill(outside, 0))
        out[filtered] = _draw(kept, uniform[filtered])
    return out


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
