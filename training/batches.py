"""What a run's steps are made of: its tokenizer, its data, how many steps they come to, each step's packed batch."""

import math
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from mpt.catalog import resolve
from mpt.checkpoint_text import open_tokenizer
from mpt.errors import UserError
from mpt.prompts import PromptFormat, open_format
from mpt.tokenizer import Tokenizer
from training import datasets, packing, vocabulary
from training.data.streams import Stream
from training.packing import Batch
from training.run import Run


def load_tokenizer(run: Run) -> Tokenizer:
    """The tokenizer the run names, or its base's."""
    return open_tokenizer(vocabulary.find(run.tokenizer) if run.tokenizer is not None else resolve(str(run.base)))


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
    return datasets.load(
        name, tokenizer, prompts.style, run.max_seq_len, run.seed, run.learn, template=prompts.template,
        learn_prompts=run.learn_prompts, columns=run.columns, max_bad_rows=run.max_bad_rows,
    )  # fmt: skip


def count_steps(run: Run, data: datasets.Dataset) -> int:
    """How many optimizer steps the run takes. Raises UserError for epochs of a set that never ends."""
    if run.steps is not None:
        return run.steps
    assert run.epochs is not None
    if data.n_samples is None:
        raise UserError(f"`{run.data}` is generated and never ends; give --steps instead of --epochs")
    return max(1, math.ceil(run.epochs * data.n_samples / run.global_batch))


def held_out(run: Run, tokenizer: Tokenizer) -> Batch | None:
    """The first `eval_samples` of the run's held-out set, packed; None for a run without one."""
    if run.eval_data is None:
        return None
    data = load_data(run, tokenizer, run.eval_data)
    n = run.eval_samples if data.n_samples is None else min(run.eval_samples, data.n_samples)
    return packing.pack([data.sample(number) for number in range(n)], run.max_seq_len, run.microbatch_tokens)


class Batches:
    """Each step's samples, packed; the next step's while this one is computed.

    Every rank packs all of them and takes its share of the rows.
    """

    def __init__(self, run: Run, data: datasets.Dataset) -> None:
        self._run, self.data, self.n_steps = run, data, count_steps(run, data)
        self._n_samples = self.n_steps * run.global_batch
        if run.epochs is not None and data.n_samples is not None:  # the last step of the last epoch may be short
            self._n_samples = max(1, round(run.epochs * data.n_samples))
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: tuple[int, Future[Batch]] | None = None

    def get(self, step: int) -> Batch:
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

    def _pack(self, step: int) -> Batch:
        first = step * self._run.global_batch
        last = min(first + self._run.global_batch, self._n_samples)
        samples = [self.data.sample(number) for number in range(first, last)]
        return packing.pack(samples, self._run.max_seq_len, self._run.microbatch_tokens)
