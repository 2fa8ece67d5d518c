"""How the sequences of a step draw their next tokens, and what each is told of its own. Not here: `scoring.py`."""

import numpy as np
import torch
from torch import Tensor

from mpt.engine.request import TokenLogprob
from mpt.engine.scoring import token_logprobs
from mpt.engine.sequence import Sequence
from mpt.sampling import columns, greedy, penalize, places, sample
from mpt.transfer import to_device


class Draws:
    """What sequences draw from a step's logits, (N, V) float32, row by row or many rows at once.

    Rows of greedy sequences are all looked at beforehand, those behind guesses too: 16 rows of 50,432 take 0.2 ms.
    Sampling waits until a row is reached: 0.2 ms each in C, 4.5 in torch, and one uniform number for each token.
    """

    def __init__(self, logits: Tensor, greedy_rows: list[int]) -> None:
        self._logits = logits
        best = self._rows(greedy_rows)
        self._best = dict(zip(greedy_rows, _where_finite(greedy(best), best), strict=True)) if greedy_rows else {}

    def draw(self, sequences: list[Sequence], rows: list[int]) -> list[int | None]:
        """The next token of each sequence from its row; None where that is not finite."""
        others = [(sequence, row) for sequence, row in zip(sequences, rows, strict=True) if row not in self._best]
        drawn = dict(self._best)
        if others:
            logits = raw = self._rows([row for _, row in others])
            if any(sequence.adjusts_logits for sequence, _ in others):
                logits = raw.clone(memory_format=torch.contiguous_format)
                adjust(logits, [sequence for sequence, _ in others])
            luck = torch.tensor([sequence.random.random() for sequence, _ in others], dtype=torch.float64)
            wanted = columns([sequence.sampling for sequence, _ in others])
            tokens = sample(logits, uniform=luck, **wanted)
            drawn |= zip((row for _, row in others), _where_finite(tokens, raw), strict=True)
        return [drawn[row] for row in rows]

    def logprobs(self, sequences: list[Sequence], rows: list[int], tokens: list[int]) -> list[TokenLogprob | None]:
        """What those who asked are told of their tokens."""
        told: list[TokenLogprob | None] = [None] * len(rows)
        if asked := [at for at, sequence in enumerate(sequences) if sequence.sampling.logprobs is not None]:
            n_top = [sequences[at].sampling.logprobs or 0 for at in asked]
            logits = self._rows([rows[at] for at in asked])
            named = [sequences[at].sampling.logprob_token_ids for at in asked]
            found = token_logprobs(logits, [tokens[at] for at in asked], n_top, named)
            for at, logprob in zip(asked, found, strict=True):
                told[at] = logprob
        return told

    def _rows(self, rows: list[int]) -> Tensor:
        return self._logits if rows == list(range(len(self._logits))) else self._logits[rows]


def adjust(logits: Tensor, sequences: list[Sequence]) -> None:
    """Apply each one's bias, penalties, bans and grammar to its row of logits, (B, V) in one piece, in place.

    All rows at once, in a few calls each of which takes a GPU 10 us to be told: row by row 64 took 4 to 7 ms.
    """
    flat = logits.view(-1)
    biased = [(row, *one.bias) for row, one in enumerate(sequences) if len(one.bias[0])]
    if biased:
        rows, ids, values = zip(*biased, strict=True)
        flat[places(logits, rows, ids)] += to_device(np.concatenate(values), logits.device)
    penalized = [(row, one.penalties) for row, one in enumerate(sequences) if one.penalties is not None]
    if penalized:
        penalize(logits, *zip(*penalized, strict=True))
    banned = [(row, one.banned_early) for row, one in enumerate(sequences) if one.is_too_early]
    if banned:
        flat[places(logits, *zip(*banned, strict=True))] = -torch.inf
    for row, one in enumerate(sequences):
        if one.allowed is not None:
            allowed = to_device(one.allowed, logits.device)
            kept = logits[row, allowed]
            logits[row].fill_(-torch.inf)
            logits[row, allowed] = kept
        if one.grammar is not None:  # last: no bias lets through what it forbids
            one.mask(logits[row])


def _where_finite(tokens: Tensor, logits: Tensor) -> list[int | None]:
    finite = torch.where(logits.sum(-1).isfinite(), tokens, -1)  # in one piece: a GPU is waited for once
    return [None if token < 0 else token for token in finite.tolist()]
