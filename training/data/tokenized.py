"""A set of rows as tokens on disk: made once on all cores, then mapped into memory by every rank and every later start.

A folder of $MPT_CACHE/tokenized is named after what decides its content: the files' bytes, the tokenizer, how rows are
rendered and learned, and the code that does so. It appears whole, and who comes while it is made waits for it. When all
together are over the limit, those go that were used longest ago. Where nothing can be written, the tokens stay in
memory.
"""

import fcntl
import hashlib
import io
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache as once
from pathlib import Path
from typing import IO, Any, NamedTuple

import jinja2
import numpy as np
import tokenizers

import mpt.prompts
from mpt.chat_template import ChatTemplate
from mpt.errors import MPTError, UserError
from mpt.prompts import PromptFormat
from mpt.tokenizer import Tokenizer
from training.data import cache, columns, workers
from training.data.files import Document, RawSet, parsed
from training.data.rows import sample_of
from training.run import Learn

log = logging.getLogger(__name__)

_ABOUT = "about.json"
_DEFAULT_GB = 20.0  # of all sets together
_ROWS_AT_ONCE, _BYTES_AT_ONCE = 256, 1 << 18  # a worker's share
_BYTES_A_PROCESS = 4 << 20  # of files: less is read before another process has started
BAD_ROWS_SHOWN = 5
_NEVER = np.iinfo(np.int32).max  # where nothing is learned
# What decides a sample beside a set and its settings.
_CODE = (
    *(Path(mpt.prompts.__file__).with_name(f"{name}.py") for name in (
        "prompts", "tools", "chat_template", "template_process", "tokenizer")),
    *(Path(__file__).with_name(f"{name}.py") for name in (
        "columns", "files", "hub", "mds", "messages", "rows", "streams", "tokenized")),
)  # fmt: skip

Report = Callable[[int, float], None]


@dataclass(frozen=True)
class Reading:
    """How rows become samples. columns: as `Run` has them."""

    prompts: PromptFormat
    learn: Learn = "responses"
    learn_prompts: str = "none"
    columns: str | None = None


@dataclass
class Story:
    """What became of a set's rows."""

    n_rows: int = 0
    n_bad: int = 0
    bad: list[str] = field(default_factory=list)  # the first of them, each with where it is and why


class Tokenized(NamedTuple):
    """All samples of a set, uncut. ids, learned: of every token; the others: of every sample."""

    ids: np.ndarray[Any, Any]
    learned: np.ndarray[Any, Any]
    ends: np.ndarray[Any, Any]  # int64, into ids
    first: np.ndarray[Any, Any]  # int32: the first token behind the first one that is learned, or a very large number
    is_document: np.ndarray[Any, Any]
    story: Story


def open_set(
    raw: RawSet, tokenizer: Tokenizer, reading: Reading, report: Report | None = None, n_processes: int | None = None
) -> Tokenized:
    """The set's samples, from the cache or made now. report: called with the rows that are done and the seconds.

    n_processes: by default one for each core where the set is large. Raises UserError for a file that cannot be read.
    """
    build = _Build(raw, tokenizer, reading, report or (lambda n, seconds: None), n_processes)
    name = _name(raw, tokenizer, reading)
    home = cache.home() / "tokenized"
    limit = cache.limit(_DEFAULT_GB)
    try:
        home.mkdir(parents=True, exist_ok=True)
        with _locked(home, name):
            found = _read(home / name)
            if found is None:
                _write(home / name, build)
                _make_room(home, name, limit)
                found = _read(home / name)
            if found is not None:
                return found
            why = "it does not read as it was written"
    except OSError as error:
        why = str(error)
    log.warning(
        "tokens cannot be kept in `%s` (%s); they stay in memory and are made again at the next start", home, why
    )
    ids, learned = io.BytesIO(), io.BytesIO()
    rest = build.run(ids, learned)
    return Tokenized(np.frombuffer(ids.getbuffer(), build.dtype), np.frombuffer(learned.getbuffer(), np.bool_), *rest)


# -- making --------------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """What a worker makes of some rows."""

    ids: bytes
    learned: bytes
    lengths: list[int]
    first: list[int]
    is_document: list[bool]
    n_rows: int
    bad: list[str]


@dataclass
class _Build:
    """A set to be tokenized."""

    raw: RawSet
    tokenizer: Tokenizer
    reading: Reading
    report: Report
    n_processes: int | None

    @property
    def dtype(self) -> type[np.uint16] | type[np.int32]:
        return np.uint16 if self.tokenizer.vocab_size <= 1 << 16 else np.int32

    def run(self, ids: IO[bytes], learned: IO[bytes]) -> tuple[Any, Any, Any, Story]:
        """Write every token's id and whether it is learned; the rest of `Tokenized`."""
        story, began = Story(), time.monotonic()
        lengths: list[int] = []
        first: list[int] = []
        is_document: list[bool] = []
        for part in workers.mapped(_tokenize, _shares(self.raw), self._processes(), _start, self._start_with()):
            ids.write(part.ids)
            learned.write(part.learned)
            lengths += part.lengths
            first += part.first
            is_document += part.is_document
            story.n_rows += part.n_rows
            story.n_bad += len(part.bad)
            story.bad += part.bad[: BAD_ROWS_SHOWN - len(story.bad)]
            self.report(story.n_rows, time.monotonic() - began)
        ends = np.cumsum(lengths, dtype=np.int64)
        return ends, np.array(first, np.int32), np.array(is_document, np.bool_), story

    def _processes(self) -> int:
        if self.n_processes is not None:
            return self.n_processes
        n_bytes = sum(path.stat().st_size for path in self.raw.files)
        return max(1, min(workers.n_cores(), n_bytes // _BYTES_A_PROCESS))

    def _start_with(self) -> tuple[Any, ...]:
        tokenizer, template = self.tokenizer, self.reading.prompts.template
        eos = tokenizer.decode([tokenizer.eos_id], skip_special_tokens=False)
        parts = None if template is None else (template.source, template.where, dict(template.token_names))
        plain = Reading(
            PromptFormat(self.reading.prompts.style), self.reading.learn, self.reading.learn_prompts,
            self.reading.columns,
        )  # fmt: skip
        return tokenizer.to_json(), eos, tokenizer.end_ids, parts, plain, self.dtype


def _shares(raw: RawSet) -> Iterator[list[tuple[str, Any]]]:
    share: list[tuple[str, Any]] = []
    n_bytes = 0
    for where, row in raw.rows():
        share.append((where, row))
        n_bytes += len(row) if isinstance(row, bytes) else len(row.text) if isinstance(row, Document) else 0
        if len(share) == _ROWS_AT_ONCE or n_bytes > _BYTES_AT_ONCE:
            yield share
            share, n_bytes = [], 0
    if share:
        yield share


class _Worker(NamedTuple):
    tokenizer: Tokenizer
    reading: Reading
    columns: dict[str, str] | None
    dtype: type[np.uint16] | type[np.int32]


_worker: _Worker | None = None  # a process's own


def _start(
    tokenizer_json: str,
    eos_token: str,
    end_ids: Sequence[int],
    template: tuple[str, str, dict[str, str]] | None,
    reading: Reading,
    dtype: type[np.uint16] | type[np.int32],
) -> None:
    global _worker
    tokenizer = Tokenizer.from_json(tokenizer_json, "tokenizer.json", eos_token=eos_token, end_ids=end_ids)
    if template is not None:
        source, where, names = template
        made = ChatTemplate(source, where, tokenizer, names)
        prompts = PromptFormat(reading.prompts.style, made)
        reading = Reading(prompts, reading.learn, reading.learn_prompts, reading.columns)
    _worker = _Worker(tokenizer, reading, columns.parse(reading.columns) if reading.columns else None, dtype)


def _tokenize(share: list[tuple[str, Any]]) -> _Part:
    assert _worker is not None
    tokenizer, reading, keys, dtype = _worker
    ids: list[int] = []
    learned = bytearray()
    part = _Part(b"", b"", [], [], [], len(share), [])
    for where, raw in share:
        where, row = parsed(where, raw)
        try:
            sample = sample_of(
                row, tokenizer, reading.prompts.style, reading.learn, reading.prompts.template,
                learn_prompts=reading.learn_prompts, columns=keys,
            )  # fmt: skip
        except MPTError as error:
            part.bad.append(f"{where}: {error}")
            continue
        ids += sample.ids
        learned += bytes(sample.learned)
        part.lengths.append(len(sample.ids))
        part.first.append(sample.learned.index(True, 1) if True in sample.learned[1:] else _NEVER)
        part.is_document.append(isinstance(row, Document))
    return part._replace(ids=np.array(ids, dtype).tobytes(), learned=bytes(learned))


# -- keeping -------------------------------------------------------------------------------------------------------


def _name(raw: RawSet, tokenizer: Tokenizer, reading: Reading) -> str:
    """What decides the samples, as a name."""
    template = reading.prompts.template
    described = {
        "code": _code(),
        "files": [(path.name, _digest(path)) for path in raw.files],
        "made_by": raw.made_by,
        "tokenizer": [tokenizer.to_json(), tokenizer.eos_id, tokenizer.end_ids],
        "style": reading.prompts.style,
        "template": None if template is None else [template.source, dict(template.token_names)],
        "settings": [reading.learn, reading.learn_prompts, reading.columns],
    }
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32]


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"`{path}` cannot be read: {error}") from error


@once
def _code() -> list[str]:
    return [tokenizers.__version__, jinja2.__version__, *map(_digest, _CODE)]


@contextmanager
def _locked(home: Path, name: str) -> Iterator[None]:
    """One process at a time; the lock's file stays, since removing it would let two lock two files of one name."""
    with (home / f"{name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process tokenizes the same rows; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write(folder: Path, build: _Build) -> None:
    """Make the folder, whole or not at all. Raises OSError where it cannot be written, and what reading rows raises."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    partial.mkdir()
    try:
        with (partial / "ids").open("wb") as ids, (partial / "learned").open("wb") as learned:
            ends, first, is_document, story = build.run(ids, learned)
        for name, values in (("ends", ends), ("first", first), ("is_document", is_document)):
            np.save(partial / f"{name}.npy", values)
        about = {"ids": np.dtype(build.dtype).name, "n_tokens": int(ends[-1]) if len(ends) else 0, **asdict(story)}
        (partial / _ABOUT).write_text(json.dumps(about), encoding="utf-8")
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _read(folder: Path) -> Tokenized | None:
    """A set that was kept, mapped into memory; None where there is none, or it is damaged."""
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        os.utime(folder / _ABOUT)
        dtype, n_tokens = np.dtype(about["ids"]), about["n_tokens"]
        ends, first, is_document = (np.load(folder / f"{name}.npy") for name in ("ends", "first", "is_document"))
        sizes = [(folder / name).stat().st_size for name in ("ids", "learned")]
        if sizes != [n_tokens * dtype.itemsize, n_tokens] or len({len(ends), len(first), len(is_document)}) != 1:
            return None
        ids, learned = np.empty(0, dtype), np.empty(0, np.bool_)
        if n_tokens:
            ids = np.memmap(folder / "ids", dtype, "r")  # which is longer than memory may be
            learned = np.memmap(folder / "learned", np.bool_, "r")
        return Tokenized(ids, learned, ends, first, is_document, Story(about["n_rows"], about["n_bad"], about["bad"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _make_room(home: Path, kept: str, limit: float) -> None:
    """Remove the sets that were used longest ago until all are within the limit; who reads one has it mapped."""
    found = []
    for path in home.iterdir():
        if path.is_dir():
            with suppress(FileNotFoundError):
                used = (path / _ABOUT).stat().st_mtime if (path / _ABOUT).exists() else 0.0
                found.append((used, sum(file.stat().st_size for file in path.iterdir()), path))
    total = sum(n_bytes for _, n_bytes, _ in found)
    for _, n_bytes, path in sorted(found):
        name = path.name.removesuffix(".partial")
        if total <= limit:
            return
        if name != kept and _remove(home, name, path):
            total -= n_bytes


def _remove(home: Path, name: str, path: Path) -> bool:
    """Whether a set could be removed: not while it is made or opened."""
    with (home / f"{name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        shutil.rmtree(path, ignore_errors=True)
        return True


def shown(story: Story) -> str:
    """The bad rows in words: how many, the first ones, how many more."""
    more = f" (and {story.n_bad - len(story.bad)} more)" if story.n_bad > len(story.bad) else ""
    return f"{story.n_bad} of {story.n_rows} rows cannot be read: {'; '.join(story.bad)}{more}"
