"""Runs tasks on a model, at hand or behind a URL, and adds their results up.

Accuracies are named after what decides: `token_mean` (LLM Foundry, Table 1), `sum` (lm-evaluation-harness' acc) and
`byte_mean` (its acc_bytes, and its acc_norm where choices are ASCII); different conventions are not comparable.
"""

import math
import string
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mpt.tokenizer import Tokenizer
from training.distributed import World
from training.evaluation import programs
from training.evaluation.scoring import Score
from training.evaluation.tasks import Example, Query, Task, examples, rows


class Model(Protocol):
    """What a task asks: scores of alternatives, and greedy texts."""

    tokenizer: Tokenizer
    max_seq_len: int

    def score(self, queries: Sequence[Query], done: Callable[[int], None]) -> list[list[Score]]: ...

    def continue_greedily(
        self, prompts: Sequence[list[int]], n_tokens: Sequence[int], stops: Sequence[str], done: Callable[[int], None]
    ) -> list[str]: ...


@dataclass(frozen=True)
class Result:
    """One task's accuracies, each between 0 and 1, their standard errors, and what guessing would reach."""

    task: str
    n_rows: int
    n_rows_published: int | None
    n_shots: int
    accuracy: dict[str, float]  # by convention; the first is LLM Foundry's
    stderr: dict[str, float]
    by_category: dict[str, float]
    random_guess: float
    majority_guess: float
    seconds: float

    @property
    def headline(self) -> float:
        return next(iter(self.accuracy.values()))

    @property
    def headline_stderr(self) -> float:
        return next(iter(self.stderr.values()))

    @property
    def by_categories(self) -> float:
        """The mean over categories where there are some, else over rows."""
        return self.headline if self.category_mean is None else self.category_mean

    @property
    def category_mean(self) -> float | None:
        return sum(self.by_category.values()) / len(self.by_category) if self.by_category else None


def run(
    model: Model,
    task: Task,
    folder: Path,
    world: World,
    *,
    n_shots: int = 0,
    limit: int | None = None,
    strict: bool = False,
    report: Callable[[int, int], None] = lambda done, of: None,
) -> Result:
    """A task's result over all ranks, each of which takes every n-th row.

    limit: only the first so many rows. strict: generated answers must equal an alias, not begin with one. What a
    model writes for a task of kind `programs` is run.
    """
    started = time.perf_counter()
    everything = examples(task, rows(task, folder), model.tokenizer, model.max_seq_len, n_shots, limit)
    mine = everything[world.rank :: world.size]
    finished = 0

    def done(n: int) -> None:
        nonlocal finished
        finished += n
        report(finished, len(mine))

    if task.kind in ("generation", "programs"):
        prompts = [example.query.sequences[0] for example in mine]
        texts = model.continue_greedily(prompts, [example.query.starts[0] for example in mine], task.stops, done)
        if task.kind == "programs":
            passed = programs.run([e.program[0] + text + e.program[1] for text, e in zip(texts, mine, strict=True)])
            rights = [{"passed": each} for each in passed]
        else:
            rights = [{"prefix": is_right(task, text, e.aliases, strict)} for text, e in zip(texts, mine, strict=True)]
    else:
        scores = model.score([example.query for example in mine], done)
        rights = [judge(task, example, its) for example, its in zip(mine, scores, strict=True)]
    conventions = list(_CONVENTIONS[task.kind])
    categories = sorted({example.category for example in everything if example.category is not None})
    counts: dict[str, float] = defaultdict(float)
    for example, right in zip(mine, rights, strict=True):
        for convention in conventions:
            counts[convention] += right[convention]
        if example.category is not None:
            counts[f"right in {example.category}"] += right[conventions[0]]
            counts[f"rows in {example.category}"] += 1
    names = [*conventions, *(f"{what} in {name}" for name in categories for what in ("right", "rows"))]
    total = dict(zip(names, world.sum(*(counts[name] for name in names)), strict=True))
    n = len(everything)
    chances = [1 / len(example.query.sequences) for example in everything]
    golds = [example.gold for example in everything]
    is_choice = task.kind in ("choice", "schema")
    accuracy = {convention: total[convention] / n for convention in conventions}
    return Result(
        task=task.name,
        n_rows=n,
        n_rows_published=task.n_rows,
        n_shots=n_shots,
        accuracy=accuracy,
        # Of a mean of n rows that are right or wrong, as lm-evaluation-harness counts it.
        stderr={name: math.sqrt(mean * (1 - mean) / max(1, n - 1)) for name, mean in accuracy.items()},
        by_category={name: total[f"right in {name}"] / total[f"rows in {name}"] for name in categories},
        random_guess=sum(chances) / n if is_choice else 0.0,
        majority_guess=max(golds.count(gold) for gold in set(golds)) / n if is_choice else 0.0,
        seconds=time.perf_counter() - started,
    )


_CONVENTIONS = {
    "choice": ("token_mean", "sum", "byte_mean"),
    "schema": ("token_mean", "sum", "byte_mean"),
    "language": ("every_token",),
    "generation": ("prefix",),
    "programs": ("passed",),
}


def judge(task: Task, example: Example, scores: Sequence[Score]) -> dict[str, bool]:
    """Whether the gold alternative wins under each convention; the first of equals wins."""
    if task.kind == "language":
        return {"every_token": scores[0].is_greedy}
    sizes = {
        "token_mean": [score.n_tokens for score in scores],
        "sum": [1] * len(scores),
        "byte_mean": [len(text.strip().encode()) for text in example.texts],
    }
    found = {}
    for convention, divisors in sizes.items():
        means = [score.logprob / max(1, n) for score, n in zip(scores, divisors, strict=True)]
        found[convention] = means.index(max(means)) == example.gold
    return found


def is_right(task: Task, text: str, aliases: Sequence[str], strict: bool = False) -> bool:
    """Whether a generated text answers: what comes before a stop and behind the chain of thought."""
    ends = [text.index(stop) for stop in task.stops if stop in text]
    answer = text[: min(ends, default=len(text))]
    if task.cot_delimiter:
        answer = answer.rpartition(task.cot_delimiter)[2]
    if task.normalizes:
        return is_answer(answer, aliases, strict)
    if strict:
        return answer.strip().split("\n")[0] in [alias.strip() for alias in aliases]
    return answer.strip().startswith(tuple(alias.strip() for alias in aliases))


def is_answer(text: str, aliases: Sequence[str], strict: bool = False) -> bool:
    """Whether an answer begins with one of the aliases, both normalized; strict: its first line equals one.

    An alias of which nothing remains begins every answer, in LLM Foundry too; strict leaves such aliases out.
    """
    if strict:
        first = normalized(text.strip().split("\n")[0])
        return any(first == normalized(alias) for alias in aliases if normalized(alias))
    return any(normalized(text).startswith(normalized(alias)) for alias in aliases)


def normalized(text: str) -> str:
    """Lower case, punctuation as spaces, articles gone, single spaces."""
    spaced = "".join(" " if c in _PUNCTUATION else c for c in text.lower().replace("_", " "))
    return " ".join(word for word in spaced.split() if word not in ("a", "an", "the"))


_PUNCTUATION = set(string.punctuation) | set("‘’´`")
