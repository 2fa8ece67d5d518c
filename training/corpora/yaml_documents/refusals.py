"""What no answer has: anchors, aliases, tags, directives, complex keys and second documents, refused by name."""

import json
import re

from training.corpora.yaml_documents.scalars import Values
from training.corpora.yaml_documents.trees import tree
from training.corpora.yaml_documents.writer import Writer

REFUSED = {
    "&": "anchors (&)",
    "*": "aliases (*)",
    "!": "tags (!)",
    "---": "multiple documents (---)",
    "%": "directives (%)",
    "?": "complex keys (?)",
}
_ENTRY = re.compile(r"^(?P<start>\s*(?:- )*(?:[\w.-]+:|-))(?: (?P<value>\S.*))?$")
_TAGS = ("!Ref", "!Sub", "!secret", "!include", "!!str", "!!int", "!!set", "!!binary")


def refusal(what: str) -> str:
    """The answer to a document with one of REFUSED in it."""
    return json.dumps({"error": f"{what} are not supported"})


def put_in(sign: str, text: str, words: Values) -> str:
    """The text with one thing in it that is refused, and perhaps others after it. sign: a key of REFUSED."""
    rng = words.rng
    lines = text.split("\n")
    name = words.word() if rng.random() < 0.5 else words.identifier()
    name = re.sub("[^A-Za-z0-9_]", "", name) or "base"
    match sign:
        case "%":
            lines = [_directive(name, words), "---", *lines]
        case "---":
            lines = _with_another(name, lines, words)
        case "?":
            lines = _with_complex_key(lines, words)
        case _:
            lines = _with_property(sign, name, lines, words)
    return "\n".join(lines)


def _directive(name: str, words: Values) -> str:
    rng = words.rng
    return rng.choice(
        (
            f"%YAML 1.{rng.randint(1, 2)}",
            f"%TAG ! tag:{name}.com,{rng.randint(2000, 2025)}:",
            f"%TAG !{name[0]}! !{name}-",
        )
    )


def _with_another(name: str, lines: list[str], words: Values) -> list[str]:
    """Two documents or three; the second may be the text after front matter."""
    rng = words.rng
    more = Writer(words, has_marks=False, has_blocks=False).text(tree(words, rng.randint(1, 5))).split("\n")
    marked = ["---"] if rng.random() < 0.4 else []
    end = ["..."] if rng.random() < 0.1 else []
    if rng.random() < 0.15:
        more = [words.sentence(), *([words.sentence()] if rng.random() < 0.5 else [])]
    third = ["---", f"{name}: {rng.randint(0, 9)}"] if rng.random() < 0.2 else []
    return [*marked, *lines, *end, "---", *more, *third]


def _with_complex_key(lines: list[str], words: Values) -> list[str]:
    rng = words.rng
    pad = rng.choice(("", "", "  "))
    key = rng.choice(
        (
            f"[{words.word()}, {words.word()}]",
            f"{words.word()}: {words.word()}",
            f"{{{words.word()}: {rng.randint(0, 9)}}}",
            words.phrase(3),
        )
    )
    value = rng.choice((words.word(), str(rng.randint(0, 999)), words.phrase(3)))
    entry = [f"{pad}? {key}", f"{pad}: {value}"]
    if pad:
        entry.insert(0, f"{words.word()}:")
    if lines[0].startswith(("-", " ", "{", "[")):
        return entry
    places = [n for n, line in enumerate(lines) if line and not line.startswith((" ", "-", "#"))] + [len(lines)]
    at = rng.choice(places)
    return [*lines[:at], *entry, *lines[at:]]


def _with_property(sign: str, name: str, lines: list[str], words: Values) -> list[str]:
    """An anchor, an alias or a tag in front of a value."""
    rng = words.rng
    if not (entries := _entries(lines)):
        lines = [f"{name}: {rng.randint(0, 99)}"]
        entries = _entries(lines)
    at = rng.choice(list(entries))
    start, value = entries[at]["start"], entries[at]["value"] or ""
    if sign == "*" and rng.random() < 0.35:
        return [*lines[:at], f"{start[: len(start) - len(start.lstrip())]}<<: *{name}", *lines[at:]]
    if sign == "*":
        return [*lines[:at], f"{start} *{name}", *lines[at + 1 :]]
    if sign == "!":
        own = (f"!!python/{name}:{name}.{name}", f"!{name}/{name}", f"!GetAtt {name}.Arn")
        tag = rng.choice((f"!{name}", f"!{name}", *_TAGS, *own))
        return [*lines[:at], f"{start} {tag} {value}".rstrip(), *lines[at + 1 :]]
    lines[at] = f"{start} &{name} {value}".rstrip()
    return [*lines, *_alias(name, lines[-1], words)] if rng.random() < 0.75 else lines


def _entries(lines: list[str]) -> dict[int, re.Match[str]]:
    """The lines that a value can be put into, by number."""
    return {n: match for n, line in enumerate(lines) if "#" not in line and (match := _ENTRY.match(line))}


def _alias(name: str, last: str, words: Values) -> list[str]:
    """Lines that use an anchor, to stand after this one."""
    pad = " " * (len(last) - len(last.lstrip()))
    alias = [f"{pad}{words.word()}: *{name}"] if not last.lstrip().startswith("-") else [f"{pad}- *{name}"]
    if words.rng.random() < 0.3:
        return [f"{words.word()}:", f"  <<: *{name}", f"  {words.word()}: {words.word()}"]
    return alias
