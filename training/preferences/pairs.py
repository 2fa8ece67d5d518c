"""Preference sets as pairs or judged answers, visited in a new order each epoch as every set is."""

import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from mpt.errors import MPTError, UserError
from mpt.prompts import PROMPT_STYLES, PromptFormat, PromptStyle
from mpt.tokenizer import Tokenizer
from training import datasets
from training.data.rows import Sample
from training.preferences import rows
from training.preferences.rows import Judged, Pair
from training.run import PreferenceLoss

log = logging.getLogger(__name__)

_SHOWN = 5  # rows that cannot be read
_ALLOWED = 0.01  # of all rows; more look like a mistake about the file
_LOOKED_AT = 100  # rows, to know what a set is made for


class Pairs:
    """Pairs in memory, as two sets of samples that are shuffled alike."""

    def __init__(self, pairs: Iterable[Pair], seed: int) -> None:
        found = list(pairs)
        self._chosen = datasets.Rows((pair.chosen for pair in found), seed)
        self._rejected = datasets.Rows((pair.rejected for pair in found), seed)
        self.n_samples = self._chosen.n_samples

    def sample(self, number: int) -> Pair:
        return Pair(self._chosen.sample(number), self._rejected.sample(number))


class Judgements:
    """Judged answers in memory; each label is a sample of one token, shuffled as its answer is."""

    def __init__(self, judged: Iterable[Judged], seed: int) -> None:
        found = list(judged)
        self._answers = datasets.Rows((each.answer for each in found), seed)
        self._labels = datasets.Rows((Sample([int(each.is_desirable)], [True]) for each in found), seed)
        self.n_samples = self._answers.n_samples

    def sample(self, number: int) -> Judged:
        return Judged(self._answers.sample(number), bool(self._labels.sample(number).ids[0]))


def load(
    name: str, tokenizer: Tokenizer, prompts: PromptFormat, max_seq_len: int, seed: int, loss: PreferenceLoss
) -> Pairs | Judgements:
    """The set of this name or file, cut at max_seq_len. Raises UserError, also for too many rows that cannot be read.

    What was cut or left out is said.
    """
    if loss == "kto":
        return Judgements(_kept(name, max_seq_len, lambda row: rows.judged_of(row, tokenizer, prompts)), seed)

    def pair_of(row: Any) -> list[Pair]:
        pair = rows.pair_of(row, tokenizer, prompts)
        return [] if pair is None else [pair]

    return Pairs(_kept(name, max_seq_len, pair_of), seed)


def style_of(name: str) -> tuple[PromptStyle, str]:
    """The prompt style that a set is made for, and which row shows it. Raises UserError where no row does."""
    for where, row in islice(datasets.rows_of(name), _LOOKED_AT):
        style = rows.style_of(row)
        if style is not None:
            return style, f"{where} is made for it"
    raise UserError(
        f"the prompt style for `{name}` is not known: its rows have no `chosen` and `rejected`, and no `label`; give "
        f"--prompt-style {', '.join(PROMPT_STYLES)}, or other --data"
    )


def _kept(name: str, max_seq_len: int, read: Any) -> Iterator[Any]:
    """What `read` makes of the rows, cut, where every answer still has something to learn."""
    n_rows = n_made = n_kept = n_cut = n_alike = 0
    bad: list[str] = []
    for where, row in datasets.rows_of(name):
        n_rows += 1
        try:
            found = read(row)
        except MPTError as error:
            bad.append(f"{where}: {error}")
            continue
        n_alike += not found
        for example in found:
            n_made += 1
            cut = example._make(_cut(part, max_seq_len) if isinstance(part, Sample) else part for part in example)
            if all(any(part.learned[1:]) for part in cut if isinstance(part, Sample)):
                n_kept += 1
                n_cut += cut != example
                yield cut
    _judge(name, n_rows, bad)
    if n_alike or n_cut or n_kept < n_made:
        log.warning(
            "`%s`: of %d rows, %d have two equal answers and are left out; of %d examples, %d are cut at %d tokens and "
            "%d left out, since nothing to learn remains of them",
            *(Path(name).name, n_rows, n_alike, n_made, n_cut, max_seq_len, n_made - n_kept),
        )
    if not n_kept:
        raise UserError(f"`{name}` has no answers to compare within {max_seq_len} tokens; give another --data")


def _judge(name: str, n_rows: int, bad: list[str]) -> None:
    """Say which rows cannot be read. Raises UserError for too many of them."""
    if not bad:
        return
    more = f" (and {len(bad) - _SHOWN} more)" if len(bad) > _SHOWN else ""
    story = f"`{name}`: {len(bad)} of {n_rows} rows cannot be read: {'; '.join(bad[:_SHOWN])}{more}"
    if len(bad) > _ALLOWED * n_rows:
        raise UserError(f"{story}; mend them, or look at --data")
    log.warning("%s; they are left out", story)


def _cut(sample: Sample, max_seq_len: int) -> Sample:
    return Sample(sample.ids[:max_seq_len], sample.learned[:max_seq_len])
