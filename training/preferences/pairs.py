"""Preference sets as pairs or judged answers, visited in a new order each epoch as every set is."""

import logging
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from mpt.errors import MPTError, UserError
from mpt.prompts import PROMPT_STYLES, PromptFormat, PromptStyle
from mpt.tokenizer import Tokenizer
from training import datasets
from training.data import tokenized
from training.data.order import Shuffled
from training.data.rows import Sample
from training.preferences import rows
from training.preferences.rows import Judged, Pair
from training.run import PreferenceLoss

log = logging.getLogger(__name__)

_ALLOWED = 0.01  # of all rows; more look like a mistake about the file
_BETWEEN_NEWS = 10_000  # rows
_LOOKED_AT = 100  # rows, to know what a set is made for


class _Flat:
    """Samples end to end in memory: a list of lists takes ten times as much."""

    def __init__(self) -> None:
        self._ends, self._ids, self._learned = array("q", [0]), array("i"), bytearray()

    def add(self, sample: Sample) -> None:
        self._ids.extend(sample.ids)
        self._learned.extend(sample.learned)
        self._ends.append(len(self._ids))

    def __getitem__(self, number: int) -> Sample:
        part = slice(self._ends[number], self._ends[number + 1])
        return Sample(self._ids[part].tolist(), [bool(is_learned) for is_learned in self._learned[part]])


class Pairs:
    """Pairs in memory, in a new order each epoch."""

    def __init__(self, pairs: Iterable[Pair], seed: int) -> None:
        self._chosen, self._rejected, n = _Flat(), _Flat(), 0
        for pair in pairs:
            self._chosen.add(pair.chosen)
            self._rejected.add(pair.rejected)
            n += 1
        self.n_samples, self._order = n, Shuffled(n, seed)

    def sample(self, number: int) -> Pair:
        row = self._order.row(number)
        return Pair(self._chosen[row], self._rejected[row])


class Judgements:
    """Judged answers in memory, in a new order each epoch."""

    def __init__(self, judged: Iterable[Judged], seed: int) -> None:
        self._answers, self._labels = _Flat(), bytearray()
        for each in judged:
            self._answers.add(each.answer)
            self._labels.append(each.is_desirable)
        self.n_samples, self._order = len(self._labels), Shuffled(len(self._labels), seed)

    def sample(self, number: int) -> Judged:
        row = self._order.row(number)
        return Judged(self._answers[row], bool(self._labels[row]))


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
    n_made = n_kept = n_cut = n_alike = 0
    story = tokenized.Story()
    for where, row in datasets.rows_of(name):
        story.n_rows += 1
        if story.n_rows % _BETWEEN_NEWS == 0:
            log.info("`%s`: %d rows read", Path(name).name, story.n_rows)
        try:
            found = read(row)
        except MPTError as error:
            story.n_bad += 1
            story.bad += [f"{where}: {error}"] if len(story.bad) < tokenized.BAD_ROWS_SHOWN else []
            continue
        n_alike += not found
        for example in found:
            n_made += 1
            cut = example._make(_cut(part, max_seq_len) if isinstance(part, Sample) else part for part in example)
            if all(any(part.learned[1:]) for part in cut if isinstance(part, Sample)):
                n_kept += 1
                n_cut += cut != example
                yield cut
    _judge(name, story)
    if n_alike or n_cut or n_kept < n_made:
        log.warning(
            "`%s`: of %d rows, %d have two equal answers and are left out; of %d examples, %d are cut at %d tokens and "
            "%d left out, since nothing to learn remains of them",
            *(Path(name).name, story.n_rows, n_alike, n_made, n_cut, max_seq_len, n_made - n_kept),
        )
    if not n_kept:
        raise UserError(f"`{name}` has no answers to compare within {max_seq_len} tokens; give another --data")


def _judge(name: str, story: tokenized.Story) -> None:
    """Say which rows cannot be read. Raises UserError for too many of them."""
    if story.n_bad > _ALLOWED * story.n_rows:
        raise UserError(f"`{name}`: {tokenized.shown(story)}; mend them, or look at --data")
    if story.n_bad:
        log.warning("`%s`: %s; they are left out", name, tokenized.shown(story))


def _cut(sample: Sample, max_seq_len: int) -> Sample:
    return Sample(sample.ids[:max_seq_len], sample.learned[:max_seq_len])
