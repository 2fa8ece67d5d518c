"""Datasets by name or file, as samples that are pure functions of (seed, number): nothing to save, nothing to replay.

A finite set is visited in a new order each epoch; a generated one never ends. What a row may look like is in
`training/data/rows.py`, where sets come from in `training/data/hub.py`.
"""

import contextlib
import itertools
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mpt.chat_template import ChatTemplate
from mpt.errors import UserError
from mpt.prompts import PROMPT_STYLES, Message, PromptFormat, PromptStyle, encode_training
from mpt.tokenizer import Tokenizer
from training import show
from training.corpora import chat, mixture, novels, tool_talks, yaml_json
from training.corpora.yaml_documents import documents
from training.corpora.yaml_documents.scalars import Hard
from training.corpora.yaml_documents.words import Shelf
from training.data import columns as columns_of
from training.data import hub, layout, tokenized
from training.data.files import RawSet
from training.data.order import Shuffled
from training.data.rows import Sample
from training.data.rows import style_of as row_style
from training.run import Learn

log = logging.getLogger(__name__)

_BETWEEN_NEWS_S = 10.0
_ROWS_LOOKED_AT = 100  # to know what a set is made for
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
    """A finite set of pieces of tokens, shuffled anew each epoch.

    ids and learned: every token's, in memory or mapped. starts and ends: of the pieces among them.
    """

    def __init__(self, ids: Any, learned: Any, starts: Any, ends: Any, seed: int) -> None:
        self._ids, self._learned, self._starts, self._ends = ids, learned, starts, ends
        self.n_samples: int | None = len(starts)
        self._order = Shuffled(len(starts), seed)

    def sample(self, number: int) -> Sample:
        row = self._order.row(number)
        part = slice(int(self._starts[row]), int(self._ends[row]))
        return Sample(self._ids[part].tolist(), self._learned[part].tolist())


def load(
    name: str,
    tokenizer: Tokenizer,
    style: PromptStyle,
    max_seq_len: int,
    seed: int,
    learn: Learn = "responses",
    template: ChatTemplate | None = None,
    *,
    learn_prompts: str = "none",
    columns: str | None = None,
    max_bad_rows: float = 0.01,
) -> Dataset:
    """The set of this name: one of ours, a file, a folder of files, MDS shards, a mixture, or a set of the hub.

    template: of style `template`. columns, max_bad_rows: as `Run` has them. Raises UserError for an unknown name, a
    missing file, and too many rows that cannot be read, by line.
    """
    from training.data import streams

    if name in DATASETS:
        generated = DATASETS[name]
        prompts = PromptFormat(generated.style if style == "none" else style, template)
        return generated.make(tokenizer, prompts, max_seq_len, seed)
    if streams.is_stream(name) and streams.rows_of(name) is None:
        return streams.load(name, tokenizer, max_seq_len, seed)
    reading = tokenized.Reading(PromptFormat(style, template), learn, learn_prompts, columns)
    return _rows(name, _raw_set(name), tokenizer, reading, max_seq_len, seed, max_bad_rows)


def require_rows(name: str, learn: Learn, learn_prompts: str, columns: str | None) -> None:
    """Raises UserError where settings of rows are given for a set that has none, and would change nothing."""
    from training.data import streams

    given = {
        "--columns": columns is not None, "--learn": learn != "responses", "--learn-prompts": learn_prompts != "none",
    }  # fmt: skip
    idle = [flag for flag, is_given in given.items() if is_given]
    if not idle:
        return
    if name in DATASETS or (streams.is_stream(name) and streams.rows_of(name) is None):
        what = "is generated" if name in DATASETS else "holds tokens or texts"
        raise UserError(f"`{name}` {what}, so {' and '.join(idle)} would change nothing; leave it out")


def style_of(name: str, columns: str | None = None) -> tuple[PromptStyle, str]:
    """The prompt style that a set is made for, and what shows it.

    Of a set without a name the first rows are read. Raises UserError for rows of no known shape or of several.
    """
    from training.data import streams

    if name in DATASETS:
        return DATASETS[name].style, f"`{name}` is generated for it"
    if name in hub.SETS:
        return hub.SETS[name].style, f"the rows of `{name}` are made for it"
    keys = columns_of.parse(columns) if columns else None
    found: dict[PromptStyle, str] = {}
    unknown = ""
    try:
        if streams.is_stream(name) and streams.rows_of(name) is None:
            return "none", f"`{name}` is plain text"
        rows = rows_of(name)
    except hub.NotHere as error:
        raise UserError(f"{error}; its rows decide the prompt style: give --prompt-style too") from error
    for where, row in itertools.islice(rows, _ROWS_LOOKED_AT):
        try:
            made_for = row_style(row, keys)
        except UserError as error:
            unknown = unknown or f"; {where}: {error}"
            continue
        if made_for is not None:
            found.setdefault(made_for[0], f"{where} {made_for[1]}")
        elif isinstance(row, dict):
            unknown = unknown or f"; {where} has the keys {', '.join(map(str, row))}"
    if len(found) == 1:
        return next(iter(found.items()))
    seen = f"its rows are of several shapes: {', '.join(found.values())}" if found else f"its rows do not say{unknown}"
    raise UserError(
        f"the prompt style for `{name}` is not known, {seen}; give --prompt-style {', '.join(PROMPT_STYLES)}"
    )


def has_rows(name: str) -> bool:
    """Whether a set is rows of conversations or texts: neither generated nor shards of tokens."""
    from training.data import streams

    return name not in DATASETS and not (streams.is_stream(name) and streams.rows_of(name) is None)


def rows_of(name: str) -> Iterator[tuple[str, Any]]:
    """The rows of a file, a folder, a set of the hub or shards of rows, each with where it stands.

    What is no row comes as `Unreadable`. Raises UserError for other names.
    """
    return _raw_set(name).parsed()


def _raw_set(name: str) -> RawSet:
    from training.data import streams

    if (stored := streams.rows_of(name)) is not None:
        return stored.raw_set()
    check_name(name)
    bare, parts = layout.split_name(name)
    path = Path(bare).expanduser()
    if path.is_dir():
        return RawSet(hub.in_folder(path, parts))
    return RawSet([path]) if path.exists() and not parts else hub.open_set(name)


def check_name(name: str) -> None:
    """Raises UserError for a name of no set, and for a path where nothing is; nothing is read or downloaded."""
    from training.data import streams

    if name in DATASETS or streams.is_stream(name) or hub.is_known(name):
        return
    bare, parts = layout.split_name(name)
    path = Path(bare).expanduser()
    if path.is_dir() or (path.exists() and not parts):
        return
    known = [*DATASETS, *hub.SETS]
    close = get_close_matches(bare, known, n=1)
    hint = f"did you mean `{close[0]}`?" if close else f"known: {', '.join(known)}; or give a file, folder or URL"
    raise UserError(f"no dataset `{name}`; {hint}")


def _rows(
    name: str,
    raw: RawSet,
    tokenizer: Tokenizer,
    reading: tokenized.Reading,
    max_seq_len: int,
    seed: int,
    max_bad_rows: float,
) -> Rows:
    """The set's samples; what was cut, left out or could not be read is said. Raises UserError for too much of it."""
    with show.counter("rows") as count, _told(Path(name).name, count) as report:
        found = tokenized.open_set(raw, tokenizer, reading, report)
    story = found.story
    if story.n_bad > (max_bad_rows if max_bad_rows >= 1 else max_bad_rows * story.n_rows):
        raise UserError(f"`{name}`: {tokenized.shown(story)}; mend them, or look at --data, --columns, --max-bad-rows")
    if story.n_bad:
        log.warning("`%s`: %s; they are left out", name, tokenized.shown(story))
    ends, is_kept = found.ends, found.is_document | (found.first < max_seq_len)
    starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
    n_cut = int((is_kept & ~found.is_document & (ends - starts > max_seq_len)).sum())
    n_left_out = int((~is_kept).sum())
    if n_cut or n_left_out:
        log.warning(
            "`%s`: of %d rows, %d are cut at %d tokens and %d left out, since nothing to learn remains of them",
            *(Path(name).name, story.n_rows, n_cut, max_seq_len, n_left_out),
        )
    starts, ends = _pieces(starts[is_kept], ends[is_kept], found.is_document[is_kept], max_seq_len)
    if not len(starts):
        raise UserError(f"`{name}` has no row with anything to learn within {max_seq_len} tokens")
    return Rows(found.ids, found.learned, starts, ends, seed)


def _pieces(starts: Any, ends: Any, is_document: Any, max_seq_len: int) -> tuple[Any, Any]:
    """Where each sample begins and ends: a document is cut into as many as it needs, without a last token alone."""
    if not is_document.any():
        return starts, ends
    found = []
    for start, end, is_cut in zip(starts.tolist(), ends.tolist(), is_document.tolist(), strict=True):
        cuts = range(start, end, max_seq_len) if is_cut else [start]
        found += [(at, min(at + max_seq_len, end) if is_cut else end) for at in cuts if not is_cut or end - at > 1]
    whole = np.array(found, np.int64).reshape(-1, 2)
    return whole[:, 0], whole[:, 1]


@contextlib.contextmanager
def _told(name: str, count: Callable[[int, str], None]) -> Iterator[tokenized.Report]:
    """What takes how many rows are read, and the seconds: shown by `count`, and in the log from time to time."""
    said = 0.0

    def report(n_rows: int, seconds: float) -> None:
        nonlocal said
        rate = f"{n_rows / max(seconds, 1e-3):,.0f} rows/s"
        count(n_rows, rate)
        if seconds - said >= _BETWEEN_NEWS_S:
            said = seconds
            log.info("`%s`: %d rows read, %s", name, n_rows, rate)

    yield report


def _yaml_to_json(tokenizer: Tokenizer, prompts: PromptFormat, max_seq_len: int, seed: int) -> Dataset:
    def make(rng: random.Random) -> Sample:
        question, answer = yaml_json.exchange(rng)
        messages = [Message(role="user", content=question), Message(role="assistant", content=answer)]
        return Sample(*encode_training(tokenizer, prompts.style, messages, prompts.template))

    return Generated(make, seed)


# What documents are hard in, each as often as it stands here.
_HARD: tuple[Hard, ...] = ("all", "all", "all", "all", "shape", "shape", "shape", "numbers", "signs")
_HARDEST: tuple[Hard, ...] = (
    "all", "all", "all", "all", "shape", "shape", "depth", "depth", "depth", "depth", "mixed", "mixed",
    "numbers", "amounts", "signs", "escapes",
)  # fmt: skip


_LAST: tuple[Hard, ...] = (
    "all", "all", "all", "shape", "shape", "depth", "depth", "depth", "depth", "depth", "mixed", "mixed",
    "prices", "prices", "prices", "numbers", "amounts", "signs", "escapes",
)  # fmt: skip


def _tiny_yaml(
    tokenizer: Tokenizer,
    prompts: PromptFormat,
    max_seq_len: int,
    seed: int,
    sizes: tuple[int, ...],
    hard: tuple[Hard, ...] = ("all",),
) -> Dataset:
    shelf = Shelf([novels.read(path) for path in novels.training_files()])

    def make(rng: random.Random) -> Sample:
        while True:
            question, answer = documents.exchange(rng, shelf, sizes, hard)
            messages = [Message(role="user", content=question), Message(role="assistant", content=answer)]
            sample = Sample(*encode_training(tokenizer, prompts.style, messages, prompts.template))
            if len(sample.ids) <= max_seq_len:  # a part of a document has no answer
                return sample

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
    "tiny_yaml_short": GeneratedSet(partial(_tiny_yaml, sizes=(1, 1, 2, 3, 4, 6)), "instruct"),
    "tiny_yaml": GeneratedSet(partial(_tiny_yaml, sizes=(1, 2, 4, 6, 8, 12, 16, 24)), "instruct"),
    "tiny_yaml_hard": GeneratedSet(
        partial(_tiny_yaml, sizes=(1, 2, 4, 6, 8, 12, 16, 24, 32, 44), hard=_HARD), "instruct"
    ),
    "tiny_yaml_hardest": GeneratedSet(
        partial(_tiny_yaml, sizes=(1, 2, 4, 6, 8, 12, 16, 24, 32, 44), hard=_HARDEST), "instruct"
    ),
    "tiny_yaml_last": GeneratedSet(
        partial(_tiny_yaml, sizes=(1, 2, 4, 6, 8, 12, 16, 24, 32, 44), hard=_LAST), "instruct"
    ),
    "tiny_chat": GeneratedSet(_tiny_chat, "chatml"),
    "tiny_chat_with_tools": GeneratedSet(_tiny_chat_with_tools, "chatml"),
    "tiny_copying": GeneratedSet(_tiny_copying, "none"),
    "tiny_pretrain": GeneratedSet(_tiny_pretrain, "none"),
    "tiny_stories": GeneratedSet(_tiny_stories, "none"),
}
