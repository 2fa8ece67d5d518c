"""Between logits and events: how the sequences of a step draw, and the log-probabilities they are told."""

from collections.abc import Iterable

import torch
from torch import Tensor

from serving.request import TokenLogprob
from serving.sequence import Sequence


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


def columns(sequences: list[Sequence], device: torch.device) -> tuple[Tensor, ...]:
    """Temperature, top_p, top_k, min_p and this step's uniform number of each sequence, (B,) float64 each."""
    rows = [
        (s.sampling.temperature, s.sampling.top_p, s.sampling.top_k, s.sampling.min_p, s.random.random())
        for s in sequences
    ]
    return torch.tensor(rows, device=device, dtype=torch.float64).unbind(-1)
