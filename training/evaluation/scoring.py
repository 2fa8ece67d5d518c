"""Log-probabilities of continuations from a model at hand, each token computed once.

The alternatives of a query share their longest common beginning, which is read once; so do the queries of a group, such
as those under one header of worked examples. All queries of a pass lie packed in one row, so that no position is
padding; only the positions that predict a scored token are unembedded.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpt import attention
from mpt.model import MPTLanguageModel
from training.evaluation.tasks import Query

_TOKENS_A_PASS = 8192
_SHORTEST_HEADER = 32  # tokens; sharing fewer saves less than cutting the row in more pieces costs
_UNEMBED_ROWS = 512  # positions whose logits are held at once: 100 MB at 50,432 tokens


@dataclass(frozen=True)
class Score:
    """Of one continuation: its log-probability, its tokens, and whether each of them was the likeliest."""

    logprob: float
    n_tokens: int
    is_greedy: bool


@dataclass(frozen=True)
class _Span:
    """Where a query lies in the pass: its header, its own beginning behind it, then the rest of each alternative."""

    header: slice
    own: slice
    tails: Tensor  # (K, longest) places in the pass, shorter ones filled up with their last
    lengths: list[int]


@dataclass(frozen=True)
class _Group:
    """Queries by number, and how many tokens all of them begin with that are read once for all."""

    numbers: list[int]
    n_header: int


def score(
    model: MPTLanguageModel, queries: Sequence[Query], done: Callable[[int], None] = lambda _: None
) -> list[list[Score]]:
    """The scores of every query's alternatives, in order. done: called with the number of queries finished."""
    results: list[list[Score]] = [[] for _ in queries]
    for groups in _passes(queries, _groups(queries)):
        together = _score(model, [(group.n_header, [queries[n] for n in group.numbers]) for group in groups])
        for number, scores in zip([n for group in groups for n in group.numbers], together, strict=True):
            results[number] = scores
        done(len(together))
    return results


def n_positions(query: Query) -> int:
    """Tokens that are read to score a query."""
    shared = _shared(query)
    return shared + sum(len(ids) - 1 - shared for ids in query.sequences)


def _groups(queries: Sequence[Query]) -> list[_Group]:
    """All queries, those side by side that begin alike: each joins the one before it where that saves tokens."""
    order = sorted(range(len(queries)), key=lambda n: queries[n].sequences[0])
    groups: list[_Group] = []
    for number in order:
        inputs = queries[number].sequences[0][: _shared(queries[number])]
        if groups:
            last = groups[-1]
            known = queries[last.numbers[0]].sequences[0][: last.n_header]
            n = _common(known, inputs)
            if n >= _SHORTEST_HEADER and n * len(last.numbers) >= last.n_header * (len(last.numbers) - 1):
                groups[-1] = _Group([*last.numbers, number], n)
                continue
        groups.append(_Group([number], len(inputs)))
    return [group if len(group.numbers) > 1 else _Group(group.numbers, 0) for group in groups]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    shortest = min(len(one), len(other))
    return next((n for n in range(shortest) if one[n] != other[n]), shortest)


def _passes(queries: Sequence[Query], groups: Sequence[_Group]) -> Iterator[list[_Group]]:
    """Groups that are read together; one that is too large for a pass is cut, and its header read in each."""
    together: list[_Group] = []
    room = _TOKENS_A_PASS
    for group in groups:
        here: list[int] = []
        for number in group.numbers:
            n = n_positions(queries[number]) - group.n_header + (0 if here else group.n_header)
            if (together or here) and n > room:
                yield [*together, *([_Group(here, group.n_header)] if here else [])]
                together, here, room = [], [], _TOKENS_A_PASS
                n = n_positions(queries[number])
            here.append(number)
            room -= n
        together.append(_Group(here, group.n_header))
    if together:
        yield together


def _shared(query: Query) -> int:
    """How many inputs all alternatives begin with; the last token of a sequence is never an input."""
    inputs = [ids[:-1] for ids in query.sequences]
    shortest = min(map(len, inputs))
    return next((n for n in range(shortest) if len({ids[n] for ids in inputs}) > 1), shortest)


@torch.no_grad()  # not inference mode: a model in training keeps tables that its backward passes need
def _score(model: MPTLanguageModel, groups: Sequence[tuple[int, Sequence[Query]]]) -> list[list[Score]]:
    """The scores of the queries of some groups, each with the length of its header."""
    device = model.device
    ids: list[int] = []
    positions: list[int] = []
    spans: list[_Span] = []
    predictors: list[int] = []  # places in the pass whose logits are needed, one for each scored token
    targets: list[int] = []
    for n_header, queries in groups:
        header = slice(len(ids), len(ids) + n_header)
        ids += queries[0].sequences[0][:n_header]
        positions += range(n_header)
        for query in queries:
            start, shared = len(ids), _shared(query)
            ids += query.sequences[0][n_header:shared]
            positions += range(n_header, shared)
            places = []
            for sequence, first in zip(query.sequences, query.starts, strict=True):
                tail = len(ids)
                ids += sequence[shared:-1]
                positions += range(shared, len(sequence) - 1)
                places.append(range(tail, len(ids)))
                for n in range(first - 1, len(sequence) - 1):  # inputs that predict
                    place = header.start + n if n < n_header else start + n - n_header
                    predictors.append(place if n < shared else tail + n - shared)
                    targets.append(sequence[n + 1])
            lengths = [len(place) for place in places]
            longest = max(lengths)
            # An alternative without a tail takes any place as filler: its rows are not read.
            filled = [[*place, *[place[-1] if place else 0] * (longest - len(place))] for place in places]
            tails = torch.tensor(filled, dtype=torch.long, device=device)
            spans.append(_Span(header, slice(start, start + shared - n_header), tails, lengths))
    hidden = _run(model, torch.tensor(ids, device=device), torch.tensor(positions, device=device), spans)
    logprobs, greedy = _unembed(model, hidden[predictors], torch.tensor(targets, device=device))
    results, at = [], 0
    for query in (query for _, queries in groups for query in queries):
        scores = []
        for sequence, first in zip(query.sequences, query.starts, strict=True):
            n = len(sequence) - first
            scores.append(Score(sum(logprobs[at : at + n]), n, all(greedy[at : at + n])))
            at += n
        results.append(scores)
    return results


def _run(model: MPTLanguageModel, ids: Tensor, positions: Tensor, spans: Sequence[_Span]) -> Tensor:
    """Hidden states of the packed queries, (N, C)."""
    transformer = model.transformer
    scale = model.config.softmax_scale
    bias = transformer.alibi_bias(int(positions.max()) + 1)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)  # (1, H, N, D)
        read: slice | None = None
        for span in spans:
            if span.header != read and span.header.stop > span.header.start:
                read = span.header
                out[:, :, read] = attention.attend(q[:, :, read], k[:, :, read], v[:, :, read], scale=scale, bias=bias)
            keys, values = k[:, :, span.own], v[:, :, span.own]
            if span.header.stop > span.header.start:
                keys, values = (torch.cat([x[:, :, read], own], dim=2) for x, own in ((k, keys), (v, values)))
            if span.own.stop > span.own.start:
                out[:, :, span.own] = attention.attend(q[:, :, span.own], keys, values, scale=scale, bias=bias)
            if not span.tails.numel():
                continue
            # (K, H, tail, D): each alternative after a copy of the shared keys.
            queries, own_keys, own_values = (x[0][:, span.tails].transpose(0, 1) for x in (q, k, v))
            K = len(span.tails)
            keys, values = (
                torch.cat([x.expand(K, -1, -1, -1), tail], dim=2)
                for x, tail in ((keys, own_keys), (values, own_values))
            )
            answers = attention.attend(queries, keys, values, scale=scale, bias=bias)
            for place, n, answer in zip(span.tails, span.lengths, answers, strict=True):
                out[0][:, place[:n]] = answer[:, :n]
        return out

    has_positions = transformer.wpe is not None
    x = transformer.wte(ids)[None]
    hidden: Tensor = transformer.run(x, attend, positions[None] if has_positions else None)
    return hidden[0]


def _unembed(model: MPTLanguageModel, hidden: Tensor, targets: Tensor) -> tuple[list[float], list[bool]]:
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
