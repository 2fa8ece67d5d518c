"""How the sequences of a step draw their next tokens, and what each is told of its own. Not here: `scoring.py`."""

import torch
from torch import Tensor

from mpt.engine.request import TokenLogprob
from mpt.engine.scoring import token_logprobs
from mpt.engine.sequence import Sequence
from mpt.sampling import columns, greedy, sample


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
            luck = torch.tensor([sequence.random.random() for sequence, _ in others], dtype=torch.float64)
            wanted = columns([sequence.sampling for sequence, _ in others], logits.device)
            tokens = sample(logits, uniform=luck.to(logits.device), **wanted)
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
