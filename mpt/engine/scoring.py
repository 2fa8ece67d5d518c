"""What is asked of tokens that are there already: log-probabilities of prompts and answers, embeddings of prompts.

Not here: drawing the next token (`drawing.py`).
"""

from collections.abc import Iterable
from collections.abc import Sequence as Sequences

import torch
from torch import Tensor

from mpt.engine.request import Embedded, TokenLogprob
from mpt.engine.sequence import Sequence

CHUNK = 512  # positions whose logits are held at once when a prompt is scored: 100 MB at 50,432 tokens


def is_scoring(sequence: Sequence) -> bool:
    """Whether the log-probabilities of its prompt are being taken: those of a request's first sample, once."""
    return sequence.sampling.prompt_logprobs is not None and sequence.index == 0 and not sequence.started


def reads_all(sequence: Sequence) -> bool:
    """Whether every position of its prompt must be computed, so that nothing cached can stand for it."""
    return is_scoring(sequence) or sequence.sampling.embed


def score(sequence: Sequence, logits: Tensor, start: int) -> None:
    """Record the log-probability of each prompt token that the logits (T, V) predict, from position `start` on."""
    if start == 0:
        sequence.scored.append(TokenLogprob(sequence.tokens[0], None, ()))
    targets = sequence.tokens[start + 1 : start + 1 + len(logits)]
    k = sequence.sampling.prompt_logprobs or 0
    sequence.scored += token_logprobs(logits[: len(targets)], targets, [k] * len(targets))


def embedding(sequence: Sequence) -> Embedded | None:
    """The mean of its prompt's last hidden states, scaled to length 1; None where that is no number."""
    vector = torch.stack(sequence.hidden).sum(0)  # its direction is the mean's
    vector = vector / vector.norm()
    return Embedded(tuple(vector.tolist())) if bool(vector.isfinite().all()) else None


def token_logprobs(
    logits: Tensor, tokens: list[int], n_top: list[int], named: Sequences[Sequences[int]] | None = None
) -> list[TokenLogprob]:
    """Each token's log-probability in its row of logits, (N, V) float32, with its row's n_top best alternatives.

    named: for each row, tokens that are told of however likely they are.
    """
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
        wanted = list(named[row]) if named else []
        values = logprobs[row, wanted].tolist() if wanted else []
        out.append(TokenLogprob(token, logprob, tuple(top), tuple(zip(wanted, values, strict=True))))
    return out
