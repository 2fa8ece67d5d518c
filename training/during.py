"""What a run does beside its steps, every so many of them: tasks of the suite, sample generations.

Every rank computes all of the tasks' rows and of the samples, for a sharded model needs all ranks in each pass. Random
numbers are not drawn, so a run with all of this takes the same steps as one without.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from mpt.errors import UserError
from mpt.model import MPTLanguageModel
from mpt.prompts import Message, encode_chat
from mpt.tokenizer import Tokenizer
from mpt.transformers_model import MPTForCausalLM
from training import batches, distributed
from training.batches import Numbered
from training.data import hub
from training.distributed import World
from training.evaluation import catalog, models, suite
from training.logbook import Logbook
from training.objective import Objective
from training.run import Run
from training.step import autocast
from training.trackers import Trackers

_SAMPLES = 4  # of a set; a file is taken whole
_MOST_SAMPLES = 32
_SAMPLE_TOKENS = 64


class During:
    """Knows what is due after a step. Everything that could be missing is looked for when it is made."""

    def __init__(
        self,
        run: Run,
        world: World,
        tokenizer: Tokenizer,
        objective: Objective,
        data: Numbered,
        logbook: Logbook,
        trackers: Trackers,
        beat: Callable[[str], None] = lambda _: None,
    ) -> None:
        """beat: called with what is being done, as long as it goes on. Raises UserError."""
        self._run, self._world, self._tokenizer = run, world, tokenizer
        self._logbook, self._trackers, self._beat = logbook, trackers, beat
        self._tasks = [] if run.eval_tasks is None else _tasks(run.eval_tasks)
        self._prompts = [] if run.sample_every is None else _prompts(run, tokenizer, objective, data)

    def after(self, step: int, is_last: bool, model: MPTForCausalLM) -> dict[str, float]:
        """What the step's line has besides."""
        run = self._run
        found: dict[str, float] = {}
        is_evaluated = bool(self._tasks) and (step % run.eval_every == 0 or is_last)
        is_sampled = run.sample_every is not None and (step % run.sample_every == 0 or is_last)
        if not is_evaluated and not is_sampled:
            return {}
        model.eval()
        try:
            with _whole(model), autocast(self._world.device, run):
                if is_evaluated:
                    found |= self._accuracies(step, model)
                if is_sampled:
                    self._sample(step, model)
        finally:
            model.train()
        return found

    def _accuracies(self, step: int, model: MPTForCausalLM) -> dict[str, float]:
        found = {}
        alone = World(0, 1, self._world.device)
        for chosen in self._tasks:
            name = chosen.task.name
            self._beat(f"task {name}")
            result = suite.run(
                _InTraining(model, self._tokenizer),
                chosen.task,
                chosen.folder,
                alone,
                n_shots=chosen.n_shots,
                limit=self._run.eval_rows,
                report=lambda *_: self._beat("task"),
            )
            found[f"task_{name}"] = result.headline
            self._logbook.write("task", step=step, task=name, accuracy=round(result.headline, 4), rows=result.n_rows)
        return found

    def _sample(self, step: int, model: MPTForCausalLM) -> None:
        found = continue_greedily(
            model, self._prompts, _SAMPLE_TOKENS, self._tokenizer.end_ids, lambda: self._beat("samples")
        )
        rows = [
            (self._tokenizer.decode(prompt), self._tokenizer.decode(ids))
            for prompt, ids in zip(self._prompts, found, strict=True)
        ]
        for prompt, text in rows:
            self._logbook.write("sample", step=step, prompt=prompt, text=text)
        if self._world.is_first:
            self._trackers.samples(step, rows)


def _tasks(names: str) -> list[catalog.Chosen]:
    """Tasks whose rows are there. Raises UserError, also for those that run programs."""
    chosen = catalog.select(names, hub.home() / "icl")
    for one in chosen:
        if one.task.kind == "programs":
            raise UserError(f"`--eval-tasks {one.task.name}` would run what the model writes; use `train evaluate`")
    return chosen


class _InTraining(models.Local):
    """A model between two steps: compiled or sharded perhaps, so that it takes whole rows only."""

    def continue_greedily(
        self, prompts: Sequence[list[int]], n_tokens: Sequence[int], stops: Sequence[str], done: Callable[[int], None]
    ) -> list[str]:
        """Up to each prompt's own number of tokens; text behind a stop is the caller's to leave out."""
        texts = []
        for start in range(0, len(prompts), _MOST_SAMPLES):
            part, limits = prompts[start : start + _MOST_SAMPLES], n_tokens[start : start + _MOST_SAMPLES]
            made = continue_greedily(self.model, part, max(limits), self.tokenizer.end_ids)
            texts += [self.tokenizer.decode(ids[:most]) for ids, most in zip(made, limits, strict=True)]
            done(len(part))
        return texts


@contextlib.contextmanager
def _whole(model: MPTForCausalLM) -> Iterator[None]:
    """What the blocks leave of a sharded model, whole on each rank; a block is gathered when it is computed."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        distributed.free(model)


def _prompts(run: Run, tokenizer: Tokenizer, objective: Objective, data: Numbered) -> list[list[int]]:
    """What is continued, as token ids, within half of the run's sequence. Raises UserError for an empty file."""
    if run.sample_prompts is not None and not run.sample_prompts.endswith(".jsonl"):
        path = Path(run.sample_prompts).expanduser()
        if not path.is_file():
            raise UserError(f"`--sample-prompts {path}` is no file; give one with a prompt on each line")
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        prompts = [_encoded(run, tokenizer, line) for line in lines]
    else:
        name = run.sample_prompts or run.eval_data
        rows = data if name is None else objective.load(name)
        most = _SAMPLES if run.sample_prompts is None else _MOST_SAMPLES
        n = most if rows.n_samples is None else min(most, rows.n_samples)
        prompts = [_beginning(*objective.text_of(rows.sample(number))) for number in range(n)]
    if not prompts or len(prompts) > _MOST_SAMPLES:
        raise UserError(f"`{run.sample_prompts}` has {len(prompts)} prompts; 1 to {_MOST_SAMPLES} can be continued")
    return [prompt[-max(1, run.max_seq_len // 2) :] for prompt in prompts]


def _encoded(run: Run, tokenizer: Tokenizer, line: str) -> list[int]:
    prompts = batches.load_format(run, tokenizer)
    if prompts.style == "none":
        return tokenizer.encode(line)
    return encode_chat(tokenizer, prompts.style, [Message(role="user", content=line)], template=prompts.template)


def _beginning(ids: Sequence[int], learned: Sequence[Any]) -> list[int]:
    """What a row has before its first learned token; of text, which is learned whole, the first half."""
    first = next((n for n, is_learned in enumerate(learned) if is_learned), len(ids))
    return list(ids[: first if first > 1 else max(1, len(ids) // 2)])


@torch.no_grad()
def continue_greedily(
    model: MPTLanguageModel,
    prompts: Sequence[list[int]],
    n_tokens: int,
    end_ids: Sequence[int],
    beat: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """The likeliest continuation of each prompt, up to and without its end token.

    Each token costs a pass over all rows in one shape, which a compiled and a sharded model take as they take a step.
    """
    device = next(model.parameters()).device
    width = max(map(len, prompts)) + n_tokens
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    ids = ids.to(device)
    whole = torch.zeros_like(ids)  # one document a row; what lies behind a token cannot change it
    rows = torch.arange(len(prompts), device=device)
    ends = torch.tensor([len(prompt) for prompt in prompts], device=device)
    for _ in range(n_tokens):
        beat()
        hidden = model.hidden_states(ids, whole)[rows, ends - 1]  # (B, C)
        ids[rows, ends] = model.unembed(hidden).float().argmax(-1)
        ends += 1
    made = [row[len(prompt) : len(prompt) + n_tokens].tolist() for row, prompt in zip(ids, prompts, strict=True)]
    return [row[: next((n for n, token in enumerate(row) if token in end_ids), len(row))] for row in made]
