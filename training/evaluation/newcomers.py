"""What newcomers paste: 200 YAML documents of real-world shapes with their JSON, and 24 that are to be refused.

They lie in `newcomers_yaml/`, a file for each shape, written by hand: no generator made any, and none may ever be
trained on. A line `=== title` begins a document and a line `=> answer` ends it. The JSON is what two YAML libraries
read, ruamel.yaml and yamlcore, which agree on all of it (tests/training/evaluation/test_newcomers.py). It is written by
`json.dumps` with `ensure_ascii=False`, on one line.

Values are those of YAML 1.2's core schema, not of YAML 1.1: `yes`, `no`, `on` and `off` are strings, and so are dates
and times; `010` is 10, `0o17` is 15 and `1e3` a float. Keys that are numbers become strings. A document is read as a
file that ends in a newline: a block scalar at its end keeps one. In scope are comments, both kinds of quotes with
escapes, flow maps and lists, block scalars (`|` and `>`, with `-` or `+`), scalars that go on over lines, nested
lists, empty maps and lists, and one `---` at the start or `...` at the end. Out of scope are `.inf` and `.nan`,
indentation indicators (`|2`), tabs as indentation, keys that occur twice, and more than 60 lines.

Anchors, aliases, tags, directives, complex keys, and more documents than one are refused by name, in one line of JSON:
`{"error": "anchors (&) are not supported"}`, where the first that is met from the top is named (REFUSALS). An alias is
the first only where its anchor was not copied along; more documents are met at the `---` that begins the second. A sign
that YAML reads as text, such as the `&` of `R&B`, is none of these.
"""

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from training.corpora.yaml_documents.refusals import REFUSED, refusal

SHAPES = (
    "compose", "ci", "kubernetes", "openapi", "packages", "servers", "people", "recipes", "records", "prose", "numbers",
    "notation", "languages",
)  # fmt: skip
REFUSALS = {what: refusal(what) for what in REFUSED.values()}

INSTRUCTIONS = (
    "Convert the following YAML to JSON:\n\n{yaml}",  # as the README and the demo ask
    "convert to json\n\n{yaml}",
    "Convert this YAML to JSON:\n\n```yaml\n{yaml}\n```",
    "Can you turn this into JSON please?\n\n{yaml}",
    "yaml to json:\n{yaml}",
    "{yaml}\n\nas json",
    "I need this file as JSON:\n\n```\n{yaml}\n```",
    "What does this look like in JSON?\n\n{yaml}",
    "Please convert the following configuration from YAML into JSON.\n\n{yaml}",
    "Give me one line of JSON for this YAML:\n{yaml}",
    "How would I write this YAML as JSON?\n\n{yaml}",
)

_FOLDER = Path(__file__).with_name("newcomers_yaml")
_DOCUMENT = re.compile(r"^=== (?P<title>.+)\n(?P<yaml>(?:.*\n)+?)=> (?P<answer>.+)\n", re.MULTILINE)


@dataclass(frozen=True)
class Document:
    """A document, how it is asked for, and the one right answer."""

    shape: str
    title: str
    yaml: str  # without the newline at its end
    answer: str
    instruction: str


@cache
def documents() -> tuple[Document, ...]:
    """Those to be converted, shape by shape. Their wordings take turns, so that every shape meets many."""
    return tuple(document for shape in SHAPES for document in _read(shape))


@cache
def refused() -> tuple[Document, ...]:
    """Those to be refused, whose answers are of REFUSALS."""
    return tuple(_read("refused"))


def _read(shape: str) -> list[Document]:
    found = _DOCUMENT.finditer((_FOLDER / f"{shape}.txt").read_text(encoding="utf-8"))
    return [_document(shape, number, *match.group("title", "yaml", "answer")) for number, match in enumerate(found)]


def _document(shape: str, number: int, title: str, yaml: str, answer: str) -> Document:
    yaml = yaml.removesuffix("\n")
    return Document(shape, title, yaml, answer, INSTRUCTIONS[number % len(INSTRUCTIONS)].format(yaml=yaml))


def has_equal_values(answer: str, expected: str) -> bool:
    """Whether two JSON texts hold the same values, whatever the spaces, the escapes and the order of keys.

    A number is no boolean, and `1` is not `1.0`.
    """
    try:
        return _canonical(answer) == _canonical(expected)
    except (ValueError, RecursionError):  # no JSON, or nested without end
        return False


def _canonical(text: str) -> str:
    return json.dumps(json.loads(text), sort_keys=True)
