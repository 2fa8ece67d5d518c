"""The twelve tasks of the MPT launch blog's Table 1, by LLM Foundry's definitions, as token sequences to be scored.

A context is the question and its delimiter, stripped on the right; a continuation begins with a space; the two are
tokenized apart. Source: llm-foundry v0.1.0 `scripts/eval/yamls/tasks.yaml` with Composer v0.14.1, zero shots.
Sequences over the model's context lose their beginning.
"""

import gzip
import json
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mpt.errors import UserError
from mpt.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# `choice`: one context, several continuations. `schema`: several contexts, one continuation. `language`: is every token
# of the continuation the likeliest. `generation`: does the greedy answer begin with one of the aliases.
Kind = Literal["choice", "schema", "language", "generation"]


@dataclass(frozen=True)
class Task:
    name: str
    kind: Kind
    file: str  # in the data folder, with or without .gz
    n_rows: int  # of the whole file Table 1 used; fewer are said
    delimiter: str = " "


_ANSWER = "\nAnswer: "
TASKS = {
    task.name: task
    for task in (
        Task("lambada_openai", "language", "lambada_openai.jsonl", 5153),
        Task("hellaswag", "choice", "hellaswag*.jsonl", 10042),
        Task("piqa", "choice", "piqa.jsonl", 1838, _ANSWER),
        Task("arc_easy", "choice", "arc_easy.jsonl", 2376, _ANSWER),
        Task("arc_challenge", "choice", "arc_challenge.jsonl", 1172, _ANSWER),
        Task("boolq", "choice", "boolq.jsonl", 3270, _ANSWER),
        Task("copa", "choice", "copa.jsonl", 100),
        Task("winograd", "schema", "winograd_wsc.jsonl", 273),
        Task("winogrande", "schema", "winogrande.jsonl", 1267),
        Task("triviaqa", "generation", "triviaqa*.jsonl", 11313),
        Task("jeopardy", "language", "jeopardy_all.jsonl", 2117, _ANSWER),
        Task("mmlu", "choice", "mmlu*test.jsonl", 14042, _ANSWER),
    )
}


@dataclass(frozen=True)
class Query:
    """Alternatives to compare: whole sequences, and where each one's scored part begins."""

    sequences: tuple[list[int], ...]
    starts: tuple[int, ...]


@dataclass(frozen=True)
class Example:
    """One row: what is scored or generated from, and what would be right."""

    query: Query
    gold: int = 0  # of the alternatives
    texts: tuple[str, ...] = ()  # the alternatives' own texts, for the mean over bytes
    aliases: tuple[str, ...] = ()
    category: str | None = None


def select(names: str, folder: Path) -> list[Task]:
    """The tasks of a comma-separated list; `table1` is every one whose file the folder holds, the others are said.

    Raises UserError for unknown names, and for a named task without its file.
    """
    found: list[Task] = []
    for name in names.split(","):
        if name == "table1":
            present = [task for task in TASKS.values() if _files(task, folder)]
            missing = [task.name for task in TASKS.values() if task not in present]
            if missing and present:
                log.warning("not run, since `%s` does not hold their files: %s", folder, ", ".join(missing))
            found += present or TASKS.values()
        elif name in TASKS:
            found.append(TASKS[name])
        else:
            raise UserError(f"no task `{name}`; known: {', '.join(TASKS)}, and table1 for all of them")
    for task in found:
        _file(task, folder)
    return found


def _files(task: Task, folder: Path) -> list[Path]:
    return sorted(path for pattern in (task.file, task.file + ".gz") for path in folder.glob(pattern))


def _file(task: Task, folder: Path) -> Path:
    found = _files(task, folder)
    if not found:
        raise UserError(
            f"`{task.name}` needs `{task.file}` in `{folder}`; it is in llm-foundry's scripts/eval/local_data; "
            "name another folder with --data-folder"
        )
    return found[0]


def rows(task: Task, folder: Path) -> list[dict[str, Any]]:
    """The task's rows from a .jsonl or .jsonl.gz of the folder. Raises UserError when it is missing."""
    path = _file(task, folder)
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def examples(
    task: Task,
    data: Sequence[dict[str, Any]],
    tokenizer: Tokenizer,
    max_seq_len: int,
    n_shots: int = 0,
    limit: int | None = None,
) -> list[Example]:
    """The first rows as examples, each after n_shots of all others with their answers.

    The shots are drawn as llm-foundry draws them, seed 1234.
    """
    rng = random.Random(1234)
    made = []
    for number, row in enumerate(data[:limit]):
        shots = ""
        for other in rng.sample([n for n in range(len(data)) if n != number], n_shots) if n_shots else ():
            shots += _worked(task, data[other]) + "\n"
        made.append(_example(task, row, shots, tokenizer, max_seq_len))
    return made


def _example(task: Task, row: dict[str, Any], shots: str, tokenizer: Tokenizer, max_seq_len: int) -> Example:
    known: dict[str, list[int]] = {}  # the context of several choices is tokenized once

    def sequence(context: str, continuation: str) -> tuple[list[int], int]:
        if context not in known:
            known[context] = tokenizer.encode(shots + context)
        before = known[context]
        after = tokenizer.encode(" " + continuation.lstrip(), is_continuation=True)
        whole = (before or [tokenizer.eos_id]) + after
        cut = max(0, len(whole) - max_seq_len)
        return whole[cut:], max(1, len(whole) - len(after) - cut)

    category = row.get("category")
    if task.kind == "choice":
        context = _context(task, row["query"])
        pairs = [sequence(context, choice) for choice in row["choices"]]
        texts = tuple(" " + choice.lstrip() for choice in row["choices"])
        return Example(_query(pairs), row["gold"], texts, category=category)
    if task.kind == "schema":
        pairs = [sequence(option.rstrip(), row["continuation"]) for option in row["context_options"]]
        return Example(_query(pairs), row["gold"], (" " + row["continuation"].lstrip(),) * len(pairs))
    if task.kind == "language":
        return Example(_query([sequence(_context(task, row["context"]), row["continuation"])]), category=category)
    prompt = tokenizer.encode(shots + _context(task, row["context"]))
    longest = max(len(tokenizer.encode(" " + alias, is_continuation=True)) for alias in row["aliases"])
    prompt = prompt[-(max_seq_len - longest) :]
    return Example(Query((prompt,), (longest,)), aliases=tuple(row["aliases"]))


def _query(pairs: Sequence[tuple[list[int], int]]) -> Query:
    return Query(tuple(ids for ids, _ in pairs), tuple(start for _, start in pairs))


def _context(task: Task, text: str) -> str:
    return (text.rstrip() + task.delimiter).rstrip()


def _worked(task: Task, row: dict[str, Any]) -> str:
    """A row with its answer, as few-shot prompts show it."""
    if task.kind == "choice":
        return f"{_context(task, row['query'])} {row['choices'][row['gold']].lstrip()}"
    if task.kind == "schema":
        return f"{row['context_options'][row['gold']].rstrip()} {row['continuation'].lstrip()}"
    answer = row["continuation"] if task.kind == "language" else row["answer"]
    return f"{_context(task, row['context'])} {answer.lstrip()}"
