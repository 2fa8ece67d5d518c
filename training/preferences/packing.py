"""A step's answers laid into rows; the two of a pair lie side by side, so that one microbatch holds both."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training import packing
from training.data.rows import Sample
from training.packing import IGNORED, Batch


@dataclass(frozen=True)
class Answers:
    """Packed answers, numbered 0 .. N - 1 in the order they were given; `rows.sequence_id` is an answer's number."""

    rows: Batch
    is_answer: Tensor  # (tokens,) bool, the answers' tokens end to end: which belong to an answer, not to its prompt
    starts: Tensor  # (N,) int64, where each begins in `is_answer`
    n_learned: int

    @property
    def ids(self) -> Tensor:
        return self.rows.ids

    @property
    def sequence_id(self) -> Tensor:
        return self.rows.sequence_id


def pack(groups: Sequence[Sequence[Sample]], width: int, learns_all: Sequence[bool] | None = None) -> Answers:
    """Groups of samples in rows of at most `width` tokens, no group cut apart; a group of more is refused by assertion.

    learns_all: of each sample, whether its prompt's tokens have labels too.
    """
    samples = [sample for group in groups for sample in group]
    lengths = np.array([len(sample.ids) for sample in samples])
    starts = np.cumsum(lengths) - lengths
    number = torch.from_numpy(np.repeat(np.arange(len(samples)), lengths))
    flat_ids = torch.tensor([token for sample in samples for token in sample.ids])
    is_answer = torch.tensor([learned for sample in samples for learned in sample.learned])
    has_label = is_answer.clone()
    if learns_all is not None:
        has_label |= torch.tensor(learns_all)[number]
    labels = torch.full_like(flat_ids, IGNORED)
    follows = number[1:] == number[:-1]  # the next token is of the same sample
    labels[:-1] = torch.where(follows & has_label[1:], flat_ids[1:], IGNORED)
    # Packed are the places of the tokens, which then say everything else of them.
    units, at = [], 0
    for group in groups:
        n = sum(len(sample.ids) for sample in group)
        assert n <= width, (n, width)
        units.append(Sample(list(range(at, at + n)), [False] * n))
        at += n
    packed = packing.pack(units, width)
    is_token = packed.sequence_id >= 0
    rows = packed._replace(
        ids=torch.where(is_token, flat_ids[packed.ids], 0),
        labels=torch.where(is_token, labels[packed.ids], IGNORED),
        sequence_id=torch.where(is_token, number[packed.ids], -1),
    )
    return Answers(rows, is_answer, torch.from_numpy(starts), int((labels != IGNORED).sum()))


def which_answers(answers: Answers, micro: Batch) -> tuple[Tensor, Tensor]:
    """Of each labelled position of some rows: the number of its sample, and whether the token it predicts is answer.

    Both (positions with a label,).
    """
    has_label = micro.labels != IGNORED
    number = micro.sequence_id
    place = torch.arange(number.shape[1]).expand_as(number)
    is_first = torch.ones_like(number, dtype=torch.bool)
    is_first[:, 1:] = number[:, 1:] != number[:, :-1]
    within = place - torch.where(is_first, place, 0).cummax(1).values
    number, within = number[has_label], within[has_label]
    return number, answers.is_answer[answers.starts[number] + within + 1]
