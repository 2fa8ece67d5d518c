"""Between logits and events: how the sequences of a step draw, and the log-probabilities they are told."""

from collections.abc import Iterable

import torch
from torch import Tensor

from mpt.engine.request import TokenLogprob
from mpt.engine.sequence import Sequence
from mpt.sampling import greedy, sample


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
                logits = raw.clone()
                for (sequence, _), its_logits in zip(others, logits, strict=True):
                    if sequence.adjusts_logits:
                        sequence.adjust(its_logits)
            tokens = sample(logits, *_columns([sequence for sequence, _ in others], logits.device))
            drawn |= zip((row for _, row in others), _where_finite(tokens, raw), strict=True)
        return [drawn[row] for row in rows]

    def logprobs(self, sequences: list[Sequence], rows: list[int], tokens: list[int]) -> list[TokenLogprob | None]:
        """What those who asked are told of their tokens."""
        asked = [at for at, sequence in enumerate(sequences) if sequence.sampling.logprobs is not None]
        told: list[TokenLogprob | None] = [None] * len(rows)
        if asked:
            n_top = [sequences[at].sampling.logprobs or 0 for at in asked]
            logits = self._rows([rows[at] for at in asked])
            for at, logprob in zip(asked, token_logprobs(logits, [tokens[at] for at in asked], n_top), strict=True):
                told[at] = logprob
        return told

    def _rows(self, rows: list[int]) -> Tensor:
        return self._logits if rows == list(range(len(self._logits))) else self._logits[rows]


def _where_finite(tokens: Tensor, logits: Tensor) -> list[int | None]:
    finite = logits.sum(-1).isfinite().tolist()
    return [token if good else None for token, good in zip(tokens.tolist(), finite, strict=True)]


def _columns(sequences: list[Sequence], device: torch.device) -> tuple[Tensor, ...]:
    """Temperature, top_p, top_k, min_p and this step's uniform number of each sequence, (B,) float64 each."""
    rows = [
        (s.sampling.temperature, s.sampling.top_p, s.sampling.top_k, s.sampling.min_p, s.random.random())
        for s in sequences
    ]
    return torch.tensor(rows, device=device, dtype=torch.float64).unbind(-1)


def token_logprobs(logits: Tensor, tokens: list[int], n_top: list[int]) -> list[TokenLogprob]:
    """Each token's log-probability in its row of logits, (N, V) float32, with its row's n_top best alternatives."""
    if not tokens:
        return []
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None]).squeeze(-1).tolist()
    top_values, top_ids = logprobs.topk(min(max(n_top), logits.shape[-1]), dim=-1) if max(n_top) else (None, None)
    out = []
    for row, (token, logprob, n) in enumerate(zip(tokens, own, n_top, strict=True)):
        top: Iterable[tuple[int, float]] = ()
        if n and top_values is not None and top_ids is not None:
            top = zip(top_ids[row, :n].tolist(), top_values[row, :n].tolist(), strict=True)
        out.append(TokenLogprob(token, logprob, tuple(top)))
    return out
