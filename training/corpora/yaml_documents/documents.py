"""YAML documents of any shape and in any notation, with their JSON, and how they are asked for.

A document is a tree (`trees.py`) of keys and values (`words.py`, `scalars.py`), written in a style of its own
(`writer.py`). None is of a particular format, so that nothing helps a model but reading and copying.
"""

# ruff: noqa: E501

import json
import random
from dataclasses import dataclass
from typing import Any

from training.corpora import yaml_json
from training.corpora.yaml_documents.core_schema import Spelled
from training.corpora.yaml_documents.refusals import REFUSED, put_in, refusal
from training.corpora.yaml_documents.scalars import Hard, Values
from training.corpora.yaml_documents.trees import Block, tree
from training.corpora.yaml_documents.words import Shelf
from training.corpora.yaml_documents.writer import Writer

_MOST_LINES = 70


@dataclass(frozen=True)
class Document:
    """A text and the answer to it: its JSON on one line, or why it is refused."""

    yaml: str
    answer: str


def document(rng: random.Random, shelf: Shelf, n_values: int, hard: Hard = "all") -> Document:
    """A document of about n_values values."""
    while True:
        words = Values(rng, shelf, hard)
        value = tree(words, n_values)
        text = Writer(words).text(value)
        if text.count("\n") < _MOST_LINES:
            return Document(text, as_json(value))


def refused(rng: random.Random, shelf: Shelf, n_values: int) -> Document:
    """A document with an anchor, an alias, a tag, a directive, a complex key or a second document in it."""
    words = Values(rng, shelf)
    text = Writer(words, has_marks=False, has_blocks=False).text(tree(words, n_values))
    sign = rng.choice(("&", "&", "&", "*", "*", "!", "!", "!", "---", "---", "---", "%", "?"))
    return Document(put_in(sign, text, words), refusal(REFUSED[sign]))


def as_json(value: Any) -> str:
    """A tree as one line of JSON, `Spelled` values as what they mean."""
    return json.dumps(_plain(value), ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Spelled | Block):
        return value.value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


# How it is asked for.

_OPENINGS = (
    "", "", "", "", "Please ", "please ", "Can you ", "Could you please ", "Hi, ", "Now ", "I want you to ", "Help me ",
)  # fmt: skip
_VERBS = (
    "convert {it} to JSON", "convert {it} into JSON", "turn {it} into JSON", "translate {it} to JSON", "rewrite {it} as JSON",
    "write {it} as JSON", "express {it} in JSON", "give me {it} in JSON", "make JSON of {it}", "transform {it} from YAML to JSON",
    "change {it} to json", "show {it} as one line of JSON", "format {it} as JSON", "parse {it} and print JSON", "put {it} in JSON",
    "output {it} as JSON on one line", "return JSON for {it}", "convert {it} to a single line of JSON", "convert to JSON",
    "get the JSON of {it}",
)  # fmt: skip
_ITS = (
    "the following YAML", "this YAML", "this", "the following", "this file", "it", "the YAML below", "this document", "that YAML",
    "the YAML", "my config", "the configuration below", "this snippet", "the following file", "these lines", "this YAML document",
)  # fmt: skip
_QUESTIONS = (
    "What is {it} in JSON?", "What would {it} be as JSON?", "How does {it} look in JSON?", "How do I write {it} in JSON?", "JSON for {it}?",
    "What's the JSON of {it}?", "yaml2json", "YAML to JSON", "to json", "json please", "as JSON", "I need {it} in JSON.", "JSON:", "in json, one line",
)  # fmt: skip


_GAPS = ("\n", "\n\n", "\n\n")


def request(rng: random.Random, yaml: str) -> str:
    """A question for the JSON of this text, in one of very many wordings; the text comes last, first or alone."""
    if rng.random() < 0.03:
        return yaml
    if rng.random() < 0.3:
        return yaml_json.instruction(rng, yaml)
    if rng.random() < 0.7:
        asked = rng.choice(_OPENINGS) + rng.choice(_VERBS).format(it=rng.choice(_ITS))
        if rng.random() < 0.7:
            asked = asked[0].upper() + asked[1:]
    else:
        asked = rng.choice(_QUESTIONS).format(it=rng.choice(_ITS))
    fence = rng.random()
    if fence < 0.25:
        yaml = f"```{rng.choice(('yaml', 'yaml', 'yml', '', ''))}\n{yaml}\n```"
    if rng.random() < 0.2:
        return f"{yaml}\n\n{asked}{rng.choice(('', '.', ''))}"
    end = "" if asked.endswith(("?", ":")) and rng.random() < 0.8 else rng.choice((":", ":", ":", ".", "", "?"))
    return f"{asked}{end}{rng.choice(_GAPS)}{yaml}"


def exchange(
    rng: random.Random, shelf: Shelf, sizes: tuple[int, ...], hard: tuple[Hard, ...] = ("all",)
) -> tuple[str, str]:
    """A training instruction and its response, a document of one of these numbers of values, hard in one of these.

    One of seven is of `yaml_json.exchange`: persons and the blog's shapes, the way back, and what is declined.
    """
    kind = rng.random()
    if kind < 0.14:
        return yaml_json.exchange(rng)
    size = rng.choice(sizes)
    made = (
        refused(rng, shelf, max(1, size // 2))
        if kind < 0.2
        else document(rng, shelf, size, rng.choice(hard) if len(hard) > 1 else hard[0])
    )
    return request(rng, made.yaml), made.answer
