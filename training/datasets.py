"""Datasets by name or file, as samples that are pure functions of (seed, number): nothing to save, nothing to replay.

A finite set is visited in a new order each epoch; a generated one never ends. What a row of a file may look like:
`prompt` and `response`, `messages` (roles and contents), or `text`.
"""

import gzip
import json
import logging
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from mpt.errors import MPTError, UserError
from mpt.prompts import INSTRUCT_PREAMBLE, INSTRUCT_TURN, Message, PromptStyle, encode_training
from mpt.tokenizer import Tokenizer
from training.corpora import chat, mixture, novels, yaml_json

log = logging.getLogger(__name__)

_SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
_BAD_ROWS_SHOWN = 5


class Sample(NamedTuple):
    """One document or conversation: its tokens, and which of them are learned."""

    ids: list[int]
    learned: list[bool]


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
    """The rows of a file, shuffled anew each epoch."""

    def __init__(self, samples: Sequence[Sample], seed: int) -> None:
        self.samples, self.seed = samples, seed
        self.n_samples: int | None = len(samples)
        self._epoch, self._order = -1, list(range(len(samples)))

    def sample(self, number: int) -> Sample:
        epoch, place = divmod(number, len(self.samples))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(len(self.samples)))
            random.Random(f"{self.seed}/{epoch}").shuffle(self._order)
        return self.samples[self._order[place]]


def load(name: str, tokenizer: Tokenizer, style: PromptStyle, max_seq_len: int, seed: int) -> Dataset:
    """The dataset of this name, or in this .jsonl, .jsonl.gz, .txt or .txt.gz file.

    Raises UserError for an unknown name, a missing file, and rows that cannot be read, by line.
    """
    if name in DATASETS:
        return DATASETS[name](tokenizer, style, max_seq_len, seed)
    from training.data import streams

    if streams.is_stream(name):
        return streams.load(name, tokenizer, max_seq_len, seed)
    path = Path(name).expanduser()
    if not path.is_file():
        close = get_close_matches(name, DATASETS, n=1)
        hint = (
            f"did you mean `{close[0]}`?" if close else f"known: {', '.join(DATASETS)}; or give a .jsonl or .txt file"
        )
        raise UserError(f"no dataset `{name}`; {hint}")
    return _file(path, tokenizer, style, max_seq_len, seed)


def _file(path: Path, tokenizer: Tokenizer, style: PromptStyle, max_seq_len: int, seed: int) -> Dataset:
    suffix = path.name.removesuffix(".gz").rpartition(".")[2]
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"`{path}` cannot be read: {error}") from error
    if suffix == "txt":
        ids = [*tokenizer.encode(text), tokenizer.eos_id]
        samples = [_text_sample(ids[i : i + max_seq_len]) for i in range(0, len(ids), max_seq_len)]
        return Rows([sample for sample in samples if len(sample.ids) > 1], seed)
    if suffix not in ("jsonl", "json"):
        raise UserError(f"`{path}` ends in `.{suffix}`; supported: .jsonl and .txt, also with .gz")
    samples, bad = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            samples.append(row_sample(json.loads(line), tokenizer, style))
        except (ValueError, MPTError) as error:
            bad.append(f"line {number}: {error}")
    if bad:
        more = f" (and {len(bad) - _BAD_ROWS_SHOWN} more)" if len(bad) > _BAD_ROWS_SHOWN else ""
        raise UserError(f"`{path}` has {len(bad)} bad rows: {'; '.join(bad[:_BAD_ROWS_SHOWN])}{more}")
    n_rows = len(samples)
    samples = [sample for sample in samples if any(sample.learned[1:max_seq_len])]  # else nothing is left to learn
    n_cut = sum(len(sample.ids) > max_seq_len for sample in samples)
    if n_cut or len(samples) < n_rows:
        log.warning(
            "`%s`: of %d rows, %d are cut at %d tokens and %d left out, since nothing to learn remains of them",
            *(path.name, n_rows, n_cut, max_seq_len, n_rows - len(samples)),
        )
    if not samples:
        raise UserError(f"`{path}` has no row with anything to learn within {max_seq_len} tokens")
    return Rows(samples, seed)


def row_sample(row: Any, tokenizer: Tokenizer, style: PromptStyle) -> Sample:
    """A row of a file as tokens, rendered the way the server renders prompts. Raises UserError for other schemas."""
    if not isinstance(row, dict):
        raise UserError(f"a row is a {type(row).__name__}; an object is needed")
    if isinstance(row.get("text"), str):
        return _text_sample([*tokenizer.encode(row["text"]), tokenizer.eos_id])
    response = row.get("response", row.get("completion"))
    if isinstance(row.get("prompt"), str) and isinstance(response, str):
        if not row["prompt"] or not response:
            raise UserError("prompt or response is empty")
        if style == "none":
            return _plain(row["prompt"], response, tokenizer)
        messages = [Message(role="user", content=_instruction(row["prompt"])), _said(response)]
        return Sample(*encode_training(tokenizer, style, messages))
    if isinstance(row.get("messages"), list):
        messages = [_message(message) for message in row["messages"]]
        return Sample(*encode_training(tokenizer, style, messages))
    raise UserError(f"a row has the keys {', '.join(map(str, row))}; needed: prompt and response, messages, or text")


def _message(value: Any) -> Message:
    if isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str):
        return Message(role=value["role"], content=value["content"])
    raise UserError("a message needs the texts `role` and `content`")


def _said(text: str) -> Message:
    return Message(role="assistant", content=text)


def _plain(prompt: str, response: str, tokenizer: Tokenizer) -> Sample:
    before, after = tokenizer.encode(prompt), [*tokenizer.encode(response), tokenizer.eos_id]
    return Sample(before + after, [False] * len(before) + [True] * len(after))


def _instruction(prompt: str) -> str:
    """What was asked: a prompt that already is in Dolly's template, as dolly_hhrlhf's are, is taken out of it."""
    head, tail = (INSTRUCT_PREAMBLE + INSTRUCT_TURN).split("{instruction}")
    if prompt.startswith(head) and prompt.endswith(tail):
        return prompt[len(head) : -len(tail)]
    return prompt


def _text_sample(ids: list[int]) -> Sample:
    return Sample(ids, [True] * len(ids))


def test_data() -> Path:
    """The folder of real files that tests, demos and evaluation read: $MPT_TEST_DATA, or ../shared/data."""
    return Path(os.environ.get("MPT_TEST_DATA", _SHARED_DATA))


def _dolly_hhrlhf(tokenizer: Tokenizer, style: PromptStyle, max_seq_len: int, seed: int) -> Dataset:
    folder = test_data() / "instruct"
    files = sorted(folder.glob("dolly_hhrlhf_train*.jsonl*"))
    if not files:
        raise UserError(
            f"`dolly_hhrlhf` is not in `{folder}`; set MPT_TEST_DATA, or give --data the .jsonl file you have"
        )
    return _file(files[0], tokenizer, style, max_seq_len, seed)


def _yaml_to_json(
    tokenizer: Tokenizer, style: PromptStyle, max_seq_len: int, seed: int, longest_of: int = 1
) -> Dataset:
    def make(rng: random.Random) -> Sample:
        question, answer = yaml_json.exchange(rng, longest_of)
        messages = [Message(role="user", content=question), _said(answer)]
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
    "dolly_hhrlhf": _dolly_hhrlhf,
    "yaml_to_json": _yaml_to_json,
    "yaml_to_json_long": partial(_yaml_to_json, longest_of=2),
    "tiny_chat": _tiny_chat,
    "tiny_copying": _tiny_copying,
    "tiny_pretrain": _tiny_pretrain,
    "tiny_stories": _tiny_stories,
}
