"""Datasets by name or file, as samples that are pure functions of (seed, number): nothing to save, nothing to replay.

A finite set is visited in a new order each epoch; a generated one never ends. What a row may look like is in
`training/data/rows.py`, where sets come from in `training/data/hub.py`.
"""

import itertools
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

from mpt.chat_template import ChatTemplate
from mpt.errors import MPTError, UserError
from mpt.prompts import PROMPT_STYLES, Message, PromptFormat, PromptStyle, encode_training
from mpt.tokenizer import Tokenizer
from training.corpora import chat, mixture, novels, tool_talks, yaml_json
from training.data import files, hub
from training.data.rows import STYLES, Sample, sample_of, shape, text_sample
from training.run import Learn

log = logging.getLogger(__name__)

_ROWS_BETWEEN_NEWS = 10_000
_BAD_ROWS_SHOWN = 5
_ROWS_LOOKED_AT = 100  # to know what a set is made for
_BAD_ROWS_ALLOWED = 0.01  # of all rows; more look like a mistake about the file
# Of mpt-tiny-chat's last conversations, so that it stays as good without tools as it was.
_WITHOUT_TOOLS, _SUMS = 0.35, 0.1


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
    name: str,
    tokenizer: Tokenizer,
    style: PromptStyle,
    max_seq_len: int,
    seed: int,
    learn: Learn = "responses",
    template: ChatTemplate | None = None,
) -> Dataset:
    """The set of this name: one of ours, a file, a folder of files, MDS shards, a mixture, or a set of the hub.

    template: of style `template`. Raises UserError for an unknown name, a missing file, and too many rows that cannot
    be read, by line.
    """
    from training.data import streams

    if name in DATASETS:
        generated = DATASETS[name]
        prompts = PromptFormat(generated.style if style == "none" else style, template)
        return generated.make(tokenizer, prompts, max_seq_len, seed)
    if streams.is_stream(name):
        return streams.load(name, tokenizer, max_seq_len, seed)
    path = Path(name).expanduser()
    if path.is_file() and files.kind(path) == ".txt":
        ((_, text),) = files.rows(str(path))
        ids = [*tokenizer.encode(text), tokenizer.eos_id]
        pieces = (ids[i : i + max_seq_len] for i in range(0, len(ids), max_seq_len))
        return Rows([text_sample(piece) for piece in pieces if len(piece) > 1], seed)
    return Rows(_samples(name, rows_of(name), tokenizer, PromptFormat(style, template), max_seq_len, learn), seed)


def style_of(name: str) -> tuple[PromptStyle, str]:
    """The prompt style that a set is made for, and what shows it.

    Of a set without a name the first rows are read. Raises UserError for rows of no known shape or of several.
    """
    from training.data import streams

    if name in DATASETS:
        return DATASETS[name].style, f"`{name}` is generated for it"
    if name in hub.SETS:
        return hub.SETS[name].style, f"the rows of `{name}` are made for it"
    path = Path(name).expanduser()
    if streams.is_stream(name) or (path.is_file() and files.kind(path) == ".txt"):
        return "none", f"`{name}` is plain text"
    found: dict[PromptStyle, str] = {}
    keys = ""
    for where, row in itertools.islice(rows_of(name), _ROWS_LOOKED_AT):
        kind = shape(row) if isinstance(row, dict) else None
        if kind is not None:
            shown = {"text": "plain text", "tree": "a tree of messages", "transcript": "a transcript"}
            found.setdefault(STYLES[kind], f"{where} has {shown.get(kind, f'`{kind}`')}")
        elif isinstance(row, dict):
            keys = keys or f"; {where} has the keys {', '.join(map(str, row))}"
    if len(found) == 1:
        return next(iter(found.items()))
    seen = f"its rows are of several shapes: {', '.join(found.values())}" if found else f"its rows do not say{keys}"
    raise UserError(
        f"the prompt style for `{name}` is not known, {seen}; give --prompt-style {', '.join(PROMPT_STYLES)}"
    )


def has_rows(name: str) -> bool:
    """Whether a set is rows of conversations or short texts: neither generated, nor shards, nor one long text."""
    from training.data import streams

    path = Path(name).expanduser()
    is_text = path.is_file() and files.kind(path) == ".txt"
    return name not in DATASETS and not streams.is_stream(name) and not is_text


def rows_of(name: str) -> Iterator[tuple[str, Any]]:
    """The rows of a file, a folder or a set of the hub, each with where it stands. Raises UserError for other names."""
    path = Path(name).expanduser()
    if path.exists():
        return files.rows(str(path), is_strict=False)
    if hub.is_known(name):
        return hub.rows(name)
    known = [*DATASETS, *hub.SETS]
    close = get_close_matches(name, known, n=1)
    hint = f"did you mean `{close[0]}`?" if close else f"known: {', '.join(known)}; or give a file, folder or URL"
    raise UserError(f"no dataset `{name}`; {hint}")


def _samples(
    name: str,
    rows: Iterable[tuple[str, Any]],
    tokenizer: Tokenizer,
    prompts: PromptFormat,
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
            sample = sample_of(row, tokenizer, prompts.style, learn, prompts.template)
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
    tokenizer: Tokenizer, prompts: PromptFormat, max_seq_len: int, seed: int, longest_of: int = 1
) -> Dataset:
    def make(rng: random.Random) -> Sample:
        question, answer = yaml_json.exchange(rng, longest_of)
        messages = [Message(role="user", content=question), Message(role="assistant", content=answer)]
        return Sample(*encode_training(tokenizer, prompts.style, messages, prompts.template))

    return Generated(make, seed)


def _tiny_chat(tokenizer: Tokenizer, prompts: PromptFormat, max_seq_len: int, seed: int) -> Dataset:
    def make(rng: random.Random) -> Sample:
        messages = chat.conversation(rng).messages()
        return Sample(*encode_training(tokenizer, prompts.style, messages, prompts.template))

    return Generated(make, seed)


def _tiny_chat_with_tools(tokenizer: Tokenizer, prompts: PromptFormat, max_seq_len: int, seed: int) -> Dataset:
    def make(rng: random.Random) -> Sample:
        kind = rng.random()
        if kind < _WITHOUT_TOOLS + _SUMS:
            messages = (chat.conversation(rng) if kind < _WITHOUT_TOOLS else chat.sums(rng)).messages()
            return Sample(*encode_training(tokenizer, prompts.style, messages, prompts.template))
        talk = tool_talks.conversation(rng)
        return Sample(*encode_training(tokenizer, prompts.style, talk.messages, prompts.template, tools=talk.tools))

    return Generated(make, seed)


def _tiny_copying(tokenizer: Tokenizer, prompts: PromptFormat, max_seq_len: int, seed: int) -> Dataset:
    shelf = mixture.Shelf(tokenizer, novels.training_files())
    return Generated(lambda rng: Sample(*mixture.copying_document(rng, tokenizer, shelf)), seed)


def _tiny_pretrain(tokenizer: Tokenizer, prompts: PromptFormat, max_seq_len: int, seed: int) -> Dataset:
    shelf = mixture.Shelf(tokenizer, novels.training_files())
    return Generated(lambda rng: Sample(*mixture.base_document(rng, tokenizer, shelf, max_seq_len)), seed)


def _tiny_stories(tokenizer: Tokenizer, prompts: PromptFormat, max_seq_len: int, seed: int) -> Dataset:
    shelf = mixture.Shelf(tokenizer, novels.training_files())
    return Generated(lambda rng: Sample(*mixture.long_document(rng, tokenizer, shelf, max_seq_len)), seed)


@dataclass(frozen=True)
class GeneratedSet:
    """A set made here. style: the prompt style of its conversations where a run has none. make: what `load` calls."""

    make: Callable[[Tokenizer, PromptFormat, int, int], Dataset]
    style: PromptStyle


# A new generated set is a function above and a line here; a published one is a line in `training/data/hub.py`.
DATASETS = {
    "yaml_to_json": GeneratedSet(_yaml_to_json, "instruct"),
    "yaml_to_json_long": GeneratedSet(partial(_yaml_to_json, longest_of=2), "instruct"),
    "tiny_chat": GeneratedSet(_tiny_chat, "chatml"),
    "tiny_chat_with_tools": GeneratedSet(_tiny_chat_with_tools, "chatml"),
    "tiny_copying": GeneratedSet(_tiny_copying, "none"),
    "tiny_pretrain": GeneratedSet(_tiny_pretrain, "none"),
    "tiny_stories": GeneratedSet(_tiny_stories, "none"),
}
