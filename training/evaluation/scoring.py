"""Log-probabilities of continuations from a model at hand, each token computed once.

The alternatives of a query share their longest common beginning, which is read once; all queries of a pass lie packed
in one row, so that no position is padding; only the positions that predict a scored token are unembedded.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpt import attention
from mpt.model import MPTForCausalLM
from training.evaluation.tasks import Query

_TOKENS_A_PASS = 8192
_UNEMBED_ROWS = 512  # positions whose logits are held at once: 100 MB at 50,432 tokens


@dataclass(frozen=True)
class Score:
    """Of one continuation: its log-probability, its tokens, and whether each of them was the likeliest."""

    logprob: float
    n_tokens: int
    is_greedy: bool


@dataclass(frozen=True)
class _Span:
    """Where a query lies in the pass: its shared beginning, then what is left of each alternative."""

    start: int
    shared: int
    tails: Tensor  # (K, longest) places in the pass, shorter ones filled up with their last
    lengths: list[int]


def score(
    model: MPTForCausalLM, queries: Sequence[Query], done: Callable[[int], None] = lambda _: None
) -> list[list[Score]]:
    """The scores of every query's alternatives, in order. done: called with the number of queries finished."""
    order = sorted(range(len(queries)), key=lambda n: max(map(len, queries[n].sequences)))
    results: list[list[Score]] = [[] for _ in queries]
    for numbers in _passes(queries, order):
        for number, scores in zip(numbers, _score(model, [queries[n] for n in numbers]), strict=True):
            results[number] = scores
        done(len(numbers))
    return results


def n_positions(query: Query) -> int:
    """Tokens that are read to score a query."""
    shared = _shared(query)
    return shared + sum(len(ids) - 1 - shared for ids in query.sequences)


def _passes(queries: Sequence[Query], order: Sequence[int]) -> Iterator[list[int]]:
    together: list[int] = []
    room = _TOKENS_A_PASS
    for number in order:
        n = n_positions(queries[number])
        if together and n > room:
            yield together
            together, room = [], _TOKENS_A_PASS
        together.append(number)
        room -= n
    if together:
        yield together


def _shared(query: Query) -> int:
    """How many inputs all alternatives begin with; the last token of a sequence is never an input."""
    inputs = [ids[:-1] for ids in query.sequences]
    shortest = min(map(len, inputs))
    return next((n for n in range(shortest) if len({ids[n] for ids in inputs}) > 1), shortest)


@torch.no_grad()  # not inference mode: a model in training keeps tables that its backward passes need
def _score(model: MPTForCausalLM, queries: Sequence[Query]) -> list[list[Score]]:
    device = model.device
    ids: list[int] = []
    positions: list[int] = []
    spans: list[_Span] = []
    predictors: list[int] = []  # places in the pass whose logits are needed, one for each scored token
    targets: list[int] = []
    for query in queries:
        start, shared = len(ids), _shared(query)
        ids += query.sequences[0][:shared]
        positions += range(shared)
        places = []
        for sequence, first in zip(query.sequences, query.starts, strict=True):
            tail = len(ids)
            ids += sequence[shared:-1]
            positions += range(shared, len(sequence) - 1)
            places.append(range(tail, len(ids)))
            for n in range(first, len(sequence)):
                predictors.append(start + n - 1 if n - 1 < shared else tail + n - 1 - shared)
                targets.append(sequence[n])
        lengths = [len(place) for place in places]
        longest = max(lengths)
        # An alternative without a tail takes any place as filler: its rows are not read.
        filled = [[*place, *[place[-1] if place else start] * (longest - len(place))] for place in places]
        spans.append(_Span(start, shared, torch.tensor(filled, dtype=torch.long, device=device), lengths))
    hidden = _run(model, torch.tensor(ids, device=device), torch.tensor(positions, device=device), spans)
    logprobs, greedy = _unembed(model, hidden[predictors], torch.tensor(targets, device=device))
    results, at = [], 0
    for query in queries:
        scores = []
        for sequence, first in zip(query.sequences, query.starts, strict=True):
            n = len(sequence) - first
            scores.append(Score(sum(logprobs[at : at + n]), n, all(greedy[at : at + n])))
            at += n
        results.append(scores)
    return results


def _run(model: MPTForCausalLM, ids: Tensor, positions: Tensor, spans: Sequence[_Span]) -> Tensor:
    """Hidden states of the packed queries, (N, C)."""
    transformer = model.transformer
    scale = model.config.softmax_scale
    bias = transformer.alibi_bias(int(positions.max()) + 1)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)  # (1, H, N, D)
        for span in spans:
            own = slice(span.start, span.start + span.shared)
            if span.shared:
                out[:, :, own] = attention.attend(q[:, :, own], k[:, :, own], v[:, :, own], scale=scale, bias=bias)
            if not span.tails.numel():
                continue
            # (K, H, tail, D): each alternative after a copy of the shared keys.
            queries, keys, values = (x[0][:, span.tails].transpose(0, 1) for x in (q, k, v))
            K = len(span.tails)
            keys, values = (
                torch.cat([x[:, :, own].expand(K, -1, -1, -1), tail], dim=2) for x, tail in ((k, keys), (v, values))
            )
            answers = attention.attend(queries, keys, values, scale=scale, bias=bias)
            for place, n, answer in zip(span.tails, span.lengths, answers, strict=True):
                out[0][:, place[:n]] = answer[:, :n]
        return out

    has_positions = transformer.wpe is not None
    x = transformer.wte(ids)[None]
    hidden: Tensor = transformer.run(x, attend, positions[None] if has_positions else None)
    return hidden[0]


def _unembed(model: MPTForCausalLM, hidden: Tensor, targets: Tensor) -> tuple[list[float], list[bool]]:
    """Each target's log-probability, and whether it is the likeliest token."""
    logprobs: list[float] = []
    greedy: list[bool] = []
    for start in range(0, len(targets), _UNEMBED_ROWS):
        part = slice(start, start + _UNEMBED_ROWS)
        logits = model.unembed(hidden[part]).float()  # (N, V)
        own = logits.gather(-1, targets[part, None]).squeeze(-1)
        best, likeliest = logits.max(-1)  # the first of equals, like argmax, at a third of its time
        total = logits.sub_(best[:, None]).exp_().sum(-1).log_().add_(best)
        logprobs += (own - total).tolist()
        greedy += (likeliest == targets[part]).tolist()
    return logprobs, greedy
