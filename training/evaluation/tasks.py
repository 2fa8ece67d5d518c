"""A task: what its rows are and how they become token sequences to be scored or continued.

A context is the question and its delimiter, stripped on the right; a continuation begins with a space; the two are
tokenized apart. Sequences over the model's context lose their beginning. Source: LLM Foundry's
`InContextLearningDataset` and its kinds, whose names the fields have. Which tasks there are is in `catalog.py`.
"""

import gzip
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mpt.errors import UserError
from mpt.tokenizer import Tokenizer

# `choice`: one context, several continuations. `schema`: several contexts, one continuation. `language`: is every token
# of the continuation the likeliest. `generation`: does the greedy answer begin with one of the aliases. `programs`:
# does the greedy continuation of a program pass its tests.
Kind = Literal["choice", "schema", "language", "generation", "programs"]
_BEYOND_A_CHAIN = 10  # tokens an answer may have beyond the longest worked one, as LLM Foundry has it
_PROGRAM_TOKENS = 512
_MOST_BYTES = 512_000_000  # of a task's rows, unpacked; the largest of the Gauntlet has 20 MB


@dataclass(frozen=True)
class Task:
    """What a file of rows is asked for.

    n_rows: of the file as it was published; None where nobody says. cot_delimiter: what stands between a chain of
    thought and its answer. stops: strings that end a generated answer.
    """

    name: str
    kind: Kind
    file: str  # in the data folder, with or without .gz; may have a *
    n_rows: int | None
    continuation_delimiter: str = " "
    question_prelimiter: str = ""
    prompt_string: str = ""
    example_delimiter: str = "\n"
    cot_delimiter: str = ""
    stops: tuple[str, ...] = ()
    normalizes: bool = True  # case, punctuation and articles do not count in generated answers
    has_categories: bool = True  # a score for each `category` that rows name


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
    program: tuple[str, str] = ("", "")  # what a continuation is put between: the prompt, and the tests


def files(task: Task, folder: Path) -> list[Path]:
    """The files of a folder that may hold the task's rows."""
    return sorted(path for pattern in (task.file, task.file + ".gz") for path in folder.glob(pattern))


def file_of(task: Task, folder: Path) -> Path:
    """The file of its rows. Raises UserError when it is missing."""
    found = files(task, folder)
    if not found:
        raise UserError(
            f"`{task.name}` needs `{task.file}` in `{folder}`; it is in llm-foundry's scripts/eval/local_data; "
            "name another folder with --data-folder"
        )
    return found[0]


def rows(task: Task, folder: Path) -> list[dict[str, Any]]:
    """The task's rows from a .jsonl or .jsonl.gz of the folder. Raises UserError for a missing file and a bad line."""
    path = file_of(task, folder)
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        raw = file.read(_MOST_BYTES + 1)
    if len(raw) > _MOST_BYTES:
        raise UserError(f"`{path}` has more than {_MOST_BYTES} bytes of rows; a task's are read whole, so split it")
    text = raw.decode("utf-8-sig")
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [_row(task, f"{path}:{n}", line) for n, line in lines]


_NEEDED: dict[Kind, dict[str, type]] = {
    "choice": {"query": str, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": str, "gold": int},
    "language": {"context": str, "continuation": str},
    "generation": {"context": str, "answer": str},
    "programs": {"prompt": str, "test": str, "entry_point": str},
}


def _row(task: Task, where: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"`{where}` is not JSON: {error}") from error
    for key, kind in _NEEDED[task.kind].items():
        if not isinstance(row, dict) or not isinstance(row.get(key), kind):
            raise UserError(
                f"`{where}`: a row of `{task.name}`, a task of kind `{task.kind}`, needs `{key}`, a {kind.__name__}"
            )
    options = row.get("choices" if task.kind == "choice" else "context_options")
    if options is not None and not 0 <= row["gold"] < len(options):
        raise UserError(f"`{where}`: gold is {row['gold']}, of {len(options)} choices counted from 0")
    found: dict[str, Any] = row
    return found


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
    longest = _longest_chain(task, data, tokenizer)
    made = []
    for number, row in enumerate(data[:limit]):
        shots = task.prompt_string
        for other in rng.sample([n for n in range(len(data)) if n != number], n_shots) if n_shots else ():
            shots += (task.example_delimiter if shots else "") + _worked(task, data[other])
        made.append(
            _example(task, row, shots + (task.example_delimiter if shots else ""), tokenizer, max_seq_len, longest)
        )
    return made


def _longest_chain(task: Task, data: Sequence[dict[str, Any]], tokenizer: Tokenizer) -> int:
    """Tokens of the longest worked answer, and some more; 0 where answers have no chain of thought."""
    if not task.cot_delimiter or not data:
        return 0
    return _BEYOND_A_CHAIN + max(
        len(tokenizer.encode(" " + _chain(task, row, alias), is_continuation=True))
        for row in data
        for alias in _aliases(row)
    )


def _example(
    task: Task, row: dict[str, Any], shots: str, tokenizer: Tokenizer, max_seq_len: int, longest: int
) -> Example:
    known: dict[str, list[int]] = {}  # the context of several choices is tokenized once

    def sequence(context: str, continuation: str) -> tuple[list[int], int]:
        if context not in known:
            known[context] = tokenizer.encode(shots + context)
        before = known[context]
        after = tokenizer.encode(" " + continuation.lstrip(), is_continuation=True)
        whole = (before or [tokenizer.eos_id]) + after
        cut = max(0, len(whole) - max_seq_len)
        return whole[cut:], max(1, len(whole) - len(after) - cut)

    category = row.get("category") if task.has_categories else None
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
    if task.kind == "programs":
        prompt = tokenizer.encode(row["prompt"])[-max(1, max_seq_len - _PROGRAM_TOKENS) :]
        tests = f"{row['test']}\ncheck({row['entry_point']})\n"
        return Example(Query((prompt,), (_PROGRAM_TOKENS,)), program=(row["prompt"], tests))
    aliases = _aliases(row)
    prompt = tokenizer.encode(shots + _context(task, row["context"]))
    longest = longest or max(len(tokenizer.encode(" " + alias, is_continuation=True)) for alias in aliases)
    return Example(Query((prompt[-max(1, max_seq_len - longest) :],), (longest,)), aliases=aliases, category=category)


def _query(pairs: Sequence[tuple[list[int], int]]) -> Query:
    return Query(tuple(ids for ids, _ in pairs), tuple(start for _, start in pairs))


def _aliases(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(dict.fromkeys([*row.get("aliases", ()), row["answer"]]))


def _chain(task: Task, row: dict[str, Any], answer: str) -> str:
    """An answer behind its chain of thought, where it has one."""
    return f"{row.get('chain_of_thought', '')}{task.cot_delimiter}{answer}" if task.cot_delimiter else answer


def _context(task: Task, text: str) -> str:
    return (task.question_prelimiter + text.rstrip() + task.continuation_delimiter).rstrip()


def _worked(task: Task, row: dict[str, Any]) -> str:
    """A row with its answer, as few-shot prompts show it."""
    if task.kind == "schema":
        return f"{row['context_options'][row['gold']].rstrip()} {row['continuation'].lstrip()}"
    if task.kind == "choice":
        question, answer = row["query"], row["choices"][row["gold"]]
    elif task.kind == "language":
        question, answer = row["context"], row["continuation"]
    else:
        question, answer = row["context"], _chain(task, row, row["answer"])
    return f"{task.question_prelimiter}{question.rstrip()}{task.continuation_delimiter}{answer.lstrip()}"
