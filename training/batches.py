"""What a run's steps are made of: its tokenizer, its data, how many steps they come to, each step's packed batch."""

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from mpt.catalog import resolve
from mpt.checkpoint import read_config
from mpt.checkpoint_text import open_tokenizer
from mpt.errors import UserError
from mpt.prompts import PromptFormat, open_format
from mpt.tokenizer import CHATML_END, CHATML_START, Tokenizer
from training import datasets, packing, vocabulary
from training.data import rendered
from training.data.streams import Stream
from training.run import Run


class Numbered(Protocol):
    """A set of whatever an objective packs; n_samples is None for one that never ends."""

    @property
    def n_samples(self) -> int | None: ...

    def sample(self, number: int) -> Any: ...


def load_tokenizer(run: Run) -> Tokenizer:
    """The tokenizer the run names, or its base's; of a run in ChatML with ChatML's tokens, which the result keeps.

    A base like MPT-7B has more rows in its embedding than its tokenizer has ids, and MPT-7B-Chat's tokens are the first
    two of these. Raises UserError where none are spare, or where it has more ids than there are rows.
    """
    place = vocabulary.find(run.tokenizer) if run.tokenizer is not None else resolve(str(run.base))
    tokenizer = open_tokenizer(place)
    n_rows = run.model.get("vocab_size") or read_config(resolve(str(run.base))).vocab_size
    tokenizer.require_rows(n_rows, place, is_given=run.tokenizer is not None)
    if run.prompt_style != "chatml":
        return tokenizer
    made = tokenizer.with_chatml()
    if made is not tokenizer and made.vocab_size > n_rows:
        raise UserError(
            f"the tokenizer has no `{CHATML_START}` and `{CHATML_END}`, and cannot get them: with them it has "
            f"{made.vocab_size} ids, and the embedding {n_rows} rows; give --prompt-style instruct"
        )
    return made


def load_format(run: Run, tokenizer: Tokenizer) -> PromptFormat:
    """How the run renders messages; of style `template` the one of its file, else its base's own. Raises MPTError."""
    if run.prompt_style != "template":
        return PromptFormat(run.prompt_style)
    folder = resolve(run.base) if run.base is not None else vocabulary.find(str(run.tokenizer))
    file = None if run.chat_template is None else Path(run.chat_template).expanduser()
    return open_format(folder, run.prompt_style, tokenizer, file)


def load_data(run: Run, tokenizer: Tokenizer, name: str) -> datasets.Dataset:
    """A set as the run reads it."""
    prompts = load_format(run, tokenizer)
    if name == run.data:  # a held-out set may be of another kind
        datasets.require_rows(name, run.learn, run.learn_prompts, run.columns)
    data = datasets.load(
        name, tokenizer, prompts.style, run.max_seq_len, run.seed, run.learn, template=prompts.template,
        learn_prompts=run.learn_prompts, columns=run.columns, max_bad_rows=run.max_bad_rows,
    )  # fmt: skip
    if run.base is not None and datasets.has_rows(name):
        rendered.tell(name, datasets.rows_of(name), prompts.style)
    return data


def count_steps(run: Run, data: Numbered) -> int:
    """How many optimizer steps the run takes. Raises UserError for epochs of a set that never ends."""
    if run.steps is not None:
        return run.steps
    assert run.epochs is not None
    if data.n_samples is None:
        raise UserError(f"`{run.data}` is generated and never ends; give --steps instead of --epochs")
    return max(1, math.ceil(run.epochs * data.n_samples / run.global_batch))


def held_out(run: Run, data: Numbered) -> list[Any]:
    """The first `eval_samples` samples of a run's held-out set."""
    n = run.eval_samples if data.n_samples is None else min(run.eval_samples, data.n_samples)
    return [data.sample(number) for number in range(n)]


class Batches:
    """Each step's samples, packed; the next step's while this one is computed.

    Every rank packs all of them and takes its share of the rows. pack: makes a batch of samples; by default
    `packing.pack` to the run's length.
    """

    def __init__(self, run: Run, data: Numbered, pack: Callable[[list[Any]], Any] | None = None) -> None:
        self._run, self.data, self.n_steps = run, data, count_steps(run, data)
        self._pack_samples = pack or partial(packing.pack, max_seq_len=run.max_seq_len, widest=run.microbatch_tokens)
        self._n_samples = self.n_steps * run.global_batch
        if run.epochs is not None and data.n_samples is not None:  # the last step of the last epoch may be short
            self._n_samples = max(1, round(run.epochs * data.n_samples))
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: tuple[int, Future[Any]] | None = None

    def get(self, step: int) -> Any:
        """The batch of a step, counted from 0."""
        if self._next is not None and self._next[0] == step:
            batch = self._next[1].result()
        else:  # the first, or the run was rolled back
            batch = self._pool.submit(self._pack, step).result()
        self._next = (step + 1, self._pool.submit(self._pack, step + 1)) if step + 1 < self.n_steps else None
        return batch

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        if isinstance(self.data, Stream):
            self.data.close()

    def samples(self, step: int) -> list[Any]:
        """What the batch of a step is packed from."""
        first = step * self._run.global_batch
        last = min(first + self._run.global_batch, self._n_samples)
        return [self.data.sample(number) for number in range(first, last)]

    def _pack(self, step: int) -> Any:
        return self._pack_samples(self.samples(step))
