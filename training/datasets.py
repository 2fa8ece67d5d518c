"""Datasets by name or file, as samples that are pure functions of (seed, number): nothing to save, nothing to replay.

A finite set is visited in a new order each epoch; a generated one never ends. What a row may look like is in
`training/data/rows.py`, where sets come from in `training/data/hub.py`.
"""

import logging
import random
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mpt.errors import MPTError, UserError
from mpt.prompts import Message, PromptStyle, encode_training
from mpt.tokenizer import Tokenizer
from training.corpora import chat, mixture, novels, yaml_json
from training.data.rows import Learn, Sample, sample_of, text_sample

log = logging.getLogger(__name__)

_ROWS_BETWEEN_NEWS = 10_000
_BAD_ROWS_SHOWN = 5
_BAD_ROWS_ALLOWED = 0.01  # of all rows; more look like a mistake about the file


class Dataset(Protocol):
    """n_samples is None for a generated set, which never ends."""

    @property
    def n_samples(self) -> int | None: ...

    def sample(self, number: int) -> Sample: ...


@dataclass(frozen=True)
class Generated:
    """Samples made from a random generator of their own."""

    make: Callable[[random.Random], Sample]
    seed: int
    n_samples: int | None = None

    def sample(self, number: int) -> Sample:
        return self.make(random.Random(f"{self.seed}/{number}"))


class Rows:
    """A finite set in memory, shuffled anew each epoch."""

    def __init__(self, samples: Iterable[Sample], seed: int) -> None:
        lengths, ids, learned = [], array("i"), bytearray()  # flat: a list of lists takes ten times the memory
        for sample in samples:
            lengths.append(len(sample.ids))
            ids.extend(sample.ids)
            learned.extend(sample.learned)
        self._ends = np.cumsum(lengths, dtype=np.int64)
        self._ids, self._learned = np.frombuffer(ids, np.int32), np.frombuffer(learned, np.bool_)
        self._seed = seed
        self.n_samples: int | None = len(lengths)
        self._epoch, self._order = -1, list(range(len(lengths)))

    def sample(self, number: int) -> Sample:
        epoch, place = divmod(number, len(self._order))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(len(self._order)))
            random.Random(f"{self._seed}/{epoch}").shuffle(self._order)
        row = self._order[place]
        part = slice(int(self._ends[row - 1]) if row else 0, int(self._ends[row]))
        return Sample(self._ids[part].tolist(), self._learned[part].tolist())


def load(
    name: str, tokenizer: Tokenizer, style: PromptStyle, max_seq_len: int, seed: int, learn: Learn = "responses"
) -> Dataset:
    """The set of this name: one of ours, a file, a folder of files, MDS shards, a mixture, or a set of the hub.

    Raises UserError for an unknown name, a missing file, and too many rows that cannot be read, by line.
    """
    from training.data import files, hub, streams

    if name in DATASETS:
        return DATASETS[name](tokenizer, style, max_seq_len, seed)
    if streams.is_stream(name):
        return streams.load(name, tokenizer, max_seq_len, seed)
    path = Path(name).expanduser()
    if path.is_file() and files.kind(path) == ".txt":
        ((_, text),) = files.rows(str(path))
        ids = [*tokenizer.encode(text), tokenizer.eos_id]
        pieces = (ids[i : i + max_seq_len] for i in range(0, len(ids), max_seq_len))
        return Rows([text_sample(piece) for piece in pieces if len(piece) > 1], seed)
    if path.exists():
        found = files.rows(str(path), is_strict=False)
    elif hub.is_known(name):
        found = hub.rows(name)
    else:
        known = [*DATASETS, *hub.SETS]
        close = get_close_matches(name, known, n=1)
        hint = f"did you mean `{close[0]}`?" if close else f"known: {', '.join(known)}; or give a file, folder or URL"
        raise UserError(f"no dataset `{name}`; {hint}")
    return Rows(_samples(name, found, tokenizer, style, max_seq_len, learn), seed)


def _samples(
    name: str,
    rows: Iterable[tuple[str, Any]],
    tokenizer: Tokenizer,
    style: PromptStyle,
    max_seq_len: int,
    learn: Learn,
) -> Iterator[Sample]:
    """The rows' samples; what was cut, left out or could not be read is said. Raises UserError for too much of it."""
    n_rows = n_kept = n_cut = 0
    bad: list[str] = []
    for where, row in rows:
        n_rows += 1
        if n_rows % _ROWS_BETWEEN_NEWS == 0:
            log.info("`%s`: %d rows read", Path(name).name, n_rows)
        try:
            sample = sample_of(row, tokenizer, style, learn)
        except MPTError as error:
            bad.append(f"{where}: {error}")
            continue
        if any(sample.learned[1:max_seq_len]):  # else nothing is left to learn
            yield sample
            n_kept += 1
            n_cut += len(sample.ids) > max_seq_len
    if bad:
        more = f" (and {len(bad) - _BAD_ROWS_SHOWN} more)" if len(bad) > _BAD_ROWS_SHOWN else ""
        story = f"`{name}`: {len(bad)} of {n_rows} rows cannot be read: {'; '.join(bad[:_BAD_ROWS_SHOWN])}{more}"
        if len(bad) > _BAD_ROWS_ALLOWED * n_rows:
            raise UserError(f"{story}; mend them, or look at --data")
        log.warning("%s; they are left out", story)
    n_left_out = n_rows - len(bad) - n_kept
    if n_cut or n_left_out:
        log.warning(
            "`%s`: of %d rows, %d are cut at %d tokens and %d left out, since nothing to learn remains of them",
            *(Path(name).name, n_rows, n_cut, max_seq_len, n_left_out),
        )
    if not n_kept:
        raise UserError(f"`{name}` has no row with anything to learn within {max_seq_len} tokens")


def _yaml_to_json(
    tokenizer: Tokenizer, style: PromptStyle, max_seq_len: int, seed: int, longest_of: int = 1
) -> Dataset:
    def make(rng: random.Random) -> Sample:
        question, answer = yaml_json.exchange(rng, longest_of)
        messages = [Message(role="user", content=question), Message(role="assistant", content=answer)]
        return Sample(*encode_training(tokenizer, "instruct" if style == "none" else style, messages))

    return Generated(make, seed)


def _tiny_chat(tokenizer: Tokenizer, style: PromptStyle, max_seq_len: int, seed: int) -> Dataset:
    def make(rng: random.Random) -> Sample:
        messages = chat.conversation(rng).messages()
        return Sample(*encode_training(tokenizer, "chatml" if style == "none" else style, messages))

    return Generated(make, seed)


def _tiny_copying(tokenizer: Tokenizer, style: PromptStyle, max_seq_len: int, seed: int) -> Dataset:
    shelf = mixture.Shelf(tokenizer, novels.training_files())
    return Generated(lambda rng: Sample(*mixture.copying_document(rng, tokenizer, shelf)), seed)


def _tiny_pretrain(tokenizer: Tokenizer, style: PromptStyle, max_seq_len: int, seed: int) -> Dataset:
    shelf = mixture.Shelf(tokenizer, novels.training_files())
    return Generated(lambda rng: Sample(*mixture.base_document(rng, tokenizer, shelf, max_seq_len)), seed)


def _tiny_stories(tokenizer: Tokenizer, style: PromptStyle, max_seq_len: int, seed: int) -> Dataset:
    shelf = mixture.Shelf(tokenizer, novels.training_files())
    return Generated(lambda rng: Sample(*mixture.long_document(rng, tokenizer, shelf, max_seq_len)), seed)


DATASETS: dict[str, Callable[[Tokenizer, PromptStyle, int, int], Dataset]] = {
    "yaml_to_json": _yaml_to_json,
    "yaml_to_json_long": partial(_yaml_to_json, longest_of=2),
    "tiny_chat": _tiny_chat,
    "tiny_copying": _tiny_copying,
    "tiny_pretrain": _tiny_pretrain,
    "tiny_stories": _tiny_stories,
}
