"""Rows of preference sets, in any of the shapes people keep them in, as tokens.

A pair is `chosen` and `rejected`: texts, messages, or transcripts (HH-RLHF). What was asked is in `prompt` (also
`question`, `instruction`, `query`, `input`, or `messages` and `conversations` of the turns before), or it is what both
begin with. An answer judged by itself has `prompt`, `completion` (or `response`) and `label`. Each is made into a row
of `training/data/rows.py` and rendered there, as finetuning renders it.
"""

import re
from collections.abc import Mapping
from os.path import commonprefix
from typing import Any, NamedTuple

from mpt.errors import UserError
from mpt.prompts import Message, PromptFormat, PromptStyle
from mpt.tokenizer import Tokenizer
from training.data.messages import kind_of
from training.data.rows import Sample, read, sample_of

_ASKED = ("prompt", "question", "instruction", "query", "input")
_ANSWERED = ("completion", "response", "answer", "output")
_TRANSCRIPT = re.compile(r"\s*(Human|Assistant):")
_ROLES = {"human": "user", "gpt": "assistant"}  # of ShareGPT


class Pair(NamedTuple):
    """Two answers to one prompt, with the prompt; of both only the answers are learned."""

    chosen: Sample
    rejected: Sample


class Judged(NamedTuple):
    """An answer with its prompt, and whether it is of the desirable kind."""

    answer: Sample
    is_desirable: bool


def pair_of(row: Any, tokenizer: Tokenizer, prompts: PromptFormat) -> Pair | None:
    """A row as a pair; None where both answers are the same. Raises UserError for a row of no known shape."""
    row = _object(row, tokenizer)
    if not {"chosen", "rejected"} <= row.keys():
        raise UserError(f"a row has the keys {', '.join(map(str, row))}; needed: prompt, chosen and rejected")
    rows = _common_text(row) or tuple(_side(row, row[side]) for side in ("chosen", "rejected"))
    turns = [list(read(side).messages) for side in rows]
    n_common = _n_common(*turns)
    if n_common == len(turns[0]) == len(turns[1]):
        return None
    return Pair(*(_rendered(side, told, n_common, tokenizer, prompts) for side, told in zip(rows, turns, strict=True)))


def judged_of(row: Any, tokenizer: Tokenizer, prompts: PromptFormat) -> list[Judged]:
    """A row as an answer with its label; a pair as two. Raises UserError as `pair_of` does."""
    row = _object(row, tokenizer)
    if "label" not in row:
        pair = pair_of(row, tokenizer, prompts)
        return [] if pair is None else [Judged(pair.chosen, True), Judged(pair.rejected, False)]
    if row["label"] not in (True, False):  # also 1 and 0
        raise UserError(f"`label` is {row['label']!r}; it must be true or false")
    answer = next((row[key] for key in _ANSWERED if key in row), None)
    side = row if answer is None else _side(row, answer)
    turns = list(read(side).messages)
    n_last = len(_turns(answer)) if isinstance(answer, list) else 1
    return [Judged(_rendered(side, turns, len(turns) - n_last, tokenizer, prompts), bool(row["label"]))]


def style_of(row: Any) -> PromptStyle | None:
    """The prompt style that a row is made for; None for a row that is no pair and no judged answer."""
    if not isinstance(row, dict) or not ({"chosen", "rejected"} <= row.keys() or "label" in row):
        return None
    texts = [row.get(key) for key in ("chosen", *_ASKED, *_ANSWERED) if key in row]
    is_chat = any(isinstance(text, list | dict) or _is_transcript(text) for text in texts)
    return "chatml" if is_chat or not texts else "instruct"


def _object(row: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    if not isinstance(row, dict):
        sample_of(row, tokenizer, "none")  # which says what a row is that cannot be read
        raise UserError("it is plain text; needed: prompt, chosen and rejected")
    return row


def _side(row: Mapping[str, Any], answer: Any) -> dict[str, Any]:
    """The finetuning row of a prompt with one of its answers."""
    asked = next((row[key] for key in (*_ASKED, "messages", "conversations") if row.get(key)), None)
    more = {key: row[key] for key in ("tools", "functions") if row.get(key)}
    if isinstance(answer, str):
        if asked is None and _is_transcript(answer):
            return {"chosen": answer}
        if isinstance(asked, str) and _is_transcript(asked):
            return {"chosen": asked + answer}
        if isinstance(asked, str) and not row.get("system") and not more:
            return {"prompt": asked, "response": answer}
        answer = [{"role": "assistant", "content": answer}]
    turns = _turns(answer)
    if asked is not None and turns and turns[0].get("role") not in ("system", "developer", "user"):
        turns = [*_turns(asked), *turns]
    if isinstance(row.get("system"), str) and row["system"] and turns and turns[0].get("role") != "system":
        turns = [{"role": "system", "content": row["system"]}, *turns]
    return {"messages": turns, **more}


def _turns(value: Any) -> list[dict[str, Any]]:
    """A text, a message or several as a list of messages."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    messages = value if isinstance(value, list) else [value]
    for message in messages:
        if not isinstance(message, dict) or not message.keys() & {"role", "from"}:
            raise UserError(
                f"`prompt`, `chosen`, `rejected` and `completion` must be a text, a message, or a list of messages; "
                f"here is {kind_of(message)}"
            )
    return [
        {"role": _ROLES.get(m["from"], m["from"]), "content": m["value"]} if {"from", "value"} <= m.keys() else m
        for m in messages
    ]


def _common_text(row: Mapping[str, Any]) -> tuple[dict[str, Any], ...] | None:
    """Both sides of a row without a prompt whose texts are no transcripts: it is what they begin with, by TRL's rule.

    The last word that both share whole ends it.
    """
    answers = [row["chosen"], row["rejected"]]
    has_prompt = any(row.get(key) for key in (*_ASKED, "messages", "conversations"))
    if has_prompt or not all(isinstance(answer, str) for answer in answers) or any(map(_is_transcript, answers)):
        return None
    prompt = commonprefix(answers)  # noqa: RUF071  (characters are meant)
    prompt = prompt[: prompt.rfind(" ") + 1] if len(prompt) < max(map(len, answers)) else prompt
    if not prompt.strip():
        raise UserError("there is no `prompt`, and `chosen` and `rejected` do not begin alike; give the prompt")
    return tuple({"prompt": prompt, "response": answer[len(prompt) :]} for answer in answers)


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and _TRANSCRIPT.match(value) is not None


def _n_common(one: list[Message], other: list[Message]) -> int:
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _rendered(
    row: dict[str, Any], turns: list[Message], n_before: int, tokenizer: Tokenizer, prompts: PromptFormat
) -> Sample:
    """A conversation as tokens, of which the answers behind the first n_before turns are learned.

    Every answer is a run of learned tokens, and text of the format stands between two of them.
    """
    n_answers = sum(turn["role"] == "assistant" for turn in turns[n_before:])
    sample = sample_of(row, tokenizer, prompts.style, template=prompts.template)
    starts = [n for n, is_learned in enumerate(sample.learned) if is_learned and not (n and sample.learned[n - 1])]
    if n_answers < 1 or len(starts) < n_answers:
        raise UserError("an answer is missing behind what both conversations share")
    first = starts[-n_answers]
    return Sample(sample.ids, [False] * first + list(sample.learned[first:]))
