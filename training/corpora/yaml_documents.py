"""YAML documents of any shape and in any notation, with their JSON: what the instruct model is to read for strangers.

A document is a tree of maps, lists and values (`_tree`), written in a style of its own (`_Writer`): indentation, quotes,
flow collections, block scalars, values over several lines, comments, blank lines. `tests/training/test_yaml_documents.py`
reads each back with two YAML libraries. None is of a particular format: keys and values are drawn by
`training/corpora/yaml_scalars.py`, so that nothing helps but reading and copying.
"""

# ruff: noqa: E501

import json
import random
import re
from dataclasses import dataclass
from typing import Any

from training.corpora import yaml_json
from training.corpora.yaml_scalars import Empty, Shelf, Spelled, Words, is_plain, number, truth

REFUSALS = {
    "&": "anchors (&)", "*": "aliases (*)", "!": "tags (!)", "---": "multiple documents (---)", "%": "directives (%)",
    "?": "complex keys (?)",
}  # fmt: skip
_MOST_LINES = 70
_DEEPEST = 8


@dataclass(frozen=True)
class Document:
    """A text and the answer to it: its JSON on one line, or why it is refused."""

    yaml: str
    answer: str


def document(rng: random.Random, shelf: Shelf, n_values: int) -> Document:
    """A document of about n_values values."""
    while True:
        words = Words(rng, shelf)
        value = _tree(words, n_values)
        text = _Writer(words).text(value)
        if text.count("\n") < _MOST_LINES:
            return Document(text, as_json(value))


def refused(rng: random.Random, shelf: Shelf, n_values: int) -> Document:
    """A document with an anchor, an alias, a tag, a directive, a complex key or a second document in it."""
    words = Words(rng, shelf)
    text = _Writer(words, has_marks=False, has_blocks=False).text(_tree(words, n_values))
    sign = rng.choice(("&", "&", "&", "*", "*", "!", "!", "!", "---", "---", "---", "%", "?"))
    return Document(_with(sign, text, words), json.dumps({"error": f"{REFUSALS[sign]} are not supported"}))


def as_json(value: Any) -> str:
    """A tree as one line of JSON, `Spelled` values as what they mean."""
    return json.dumps(_plain(value), ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Spelled):
        return value.value
    if isinstance(value, _Block):
        return value.value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


# How it is asked for.

_OPENINGS = (
    "",
    "",
    "",
    "",
    "Please ",
    "please ",
    "Can you ",
    "Could you please ",
    "Hi, ",
    "Now ",
    "I want you to ",
    "Help me ",
)
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
    return f"{asked}{end}{rng.choice((chr(10), chr(10) * 2, chr(10) * 2))}{yaml}"


def exchange(rng: random.Random, shelf: Shelf, sizes: tuple[int, ...]) -> tuple[str, str]:
    """A training instruction and its response, a document of one of these numbers of values.

    One of seven is of `yaml_json.exchange`: persons and the blog's shapes, the way back, and what is declined.
    """
    kind = rng.random()
    if kind < 0.14:
        return yaml_json.exchange(rng)
    size = rng.choice(sizes)
    made = refused(rng, shelf, max(1, size // 2)) if kind < 0.2 else document(rng, shelf, size)
    return request(rng, made.yaml), made.answer


# Trees.


def _tree(words: Words, n: int) -> Any:
    """A map or a list with about n values."""
    rng = words.rng
    keys = _Keys(words)
    kind = rng.random()
    if n > 3 and kind < 0.12:
        return {keys.draw({}): _collection(keys, n, 1)}
    if n > 3 and kind < 0.2:
        return _records(keys, n, 0)
    if kind < 0.24:
        return _list(keys, n, 0)
    return _map(keys, n, 0)


class _Keys:
    """The keys of a document: one way of joining words, and some keys again and again."""

    def __init__(self, words: Words) -> None:
        self.words = words
        self._joint = words.rng.choice(("_", "_", "_", "-", "camel", " ", ".", "upper", "title"))
        self._lone = words.rng.random()
        self._again = words.rng.choice((0.05, 0.15, 0.4))
        self._odd = words.rng.choice((0.02, 0.02, 0.02, 0.3))
        self._drawn: list[str] = []

    def draw(self, taken: Any) -> str:
        """A key that is not one of these."""
        while True:
            key = self._any()
            if key not in taken:
                self._drawn.append(key)
                return key

    def _any(self) -> str:
        rng, words = self.words.rng, self.words
        if self._drawn and rng.random() < self._again:
            return rng.choice(self._drawn)
        if rng.random() < self._odd:
            word, other = words.word(), words.word()
            odd = (
                f"/{word}",
                f"/{word}/{{{other}}}",
                f"${word}",
                f"@{word}/{other}",
                f"x-{word}",
                f"{word}.{other}",
                f"{word}/{other}",
                f"*.{word}",
                f"{word}:{other}",
            )
            return rng.choice(
                (str(rng.randint(0, 3000)), words.phrase(4), words.string() or "empty", words.name(), *odd)
            )
        parts = [words.word() for _ in range(1 if rng.random() < self._lone else rng.randint(1, 3))]
        if self._joint == "camel":
            return "".join([parts[0], *(part.capitalize() for part in parts[1:])])
        if self._joint == "upper":
            return "_".join(parts).upper()
        if self._joint == "title":
            return " ".join(part.capitalize() for part in parts)
        return self._joint.join(parts)


def _map(keys: _Keys, n: int, depth: int) -> dict[str, Any]:
    rng = keys.words.rng
    nests = rng.choice((0.1, 0.3, 0.5, 0.7)) if depth < _DEEPEST else 0
    result: dict[str, Any] = {}
    while n > 0:
        key = keys.draw(result)
        if n > 1 and rng.random() < nests:
            size = rng.randint(1, max(1, n - 1))
            result[key] = _collection(keys, size, depth + 1)
            n -= size
        else:
            result[key] = _value(keys.words)
            n -= 1
    return result


def _value(words: Words) -> Any:
    if words.rng.random() < 0.045:
        return _Block.made(words)
    return words.value()


def _collection(keys: _Keys, n: int, depth: int) -> Any:
    kind = keys.words.rng.random()
    if kind < 0.5:
        return _map(keys, n, depth)
    if kind < 0.7:
        return _list(keys, n, depth)
    if kind < 0.84 and depth < _DEEPEST:
        return _records(keys, n, depth)
    return _similar(keys, n, depth) if depth < _DEEPEST else _map(keys, n, depth)


def _list(keys: _Keys, n: int, depth: int) -> list[Any]:
    """A list of values, of lists, or of whatever comes."""
    words, rng = keys.words, keys.words.rng
    kind = rng.random()
    if kind < 0.14 and n > 2 and depth < _DEEPEST:
        result = []
        is_matrix, size = rng.random() < 0.5, rng.randint(1, 4)
        while n > 0:
            result.append(
                [number(rng) if is_matrix else words.value() for _ in range(size if is_matrix else rng.randint(1, 4))]
            )
            n -= max(1, len(result[-1]))
        return result
    if kind < 0.24 and n > 2 and depth < _DEEPEST:
        mixed: list[Any] = []
        while n > 0:
            size = rng.randint(1, max(1, n // 2))
            mixed.append(_collection(keys, size, depth + 1) if rng.random() < 0.5 else words.value())
            n -= size
        return mixed
    makers = (words.word, words.string, words.phrase, words.identifier, lambda: number(rng), words.value)
    maker = rng.choice(makers)
    blocks = 0.1 if rng.random() < 0.1 else 0
    return [_Block.made(words) if rng.random() < blocks else maker() for _ in range(n)]


def _maker(words: Words) -> Any:
    """What makes the values of one key in many maps."""
    rng = words.rng
    chosen = rng.choices(words._makers, words._weights)[0]
    return rng.choice(
        (
            lambda: chosen(words),
            lambda: chosen(words),
            words.word,
            words.phrase,
            words.value,
            lambda: number(rng),
            lambda: truth(rng),
        )
    )


def _records(keys: _Keys, n: int, depth: int) -> list[Any]:
    """A list of maps that have their keys in common."""
    rng = keys.words.rng
    n_keys = rng.randint(1, min(5, n))
    makers: dict[str, Any] = {}
    while len(makers) < n_keys:
        makers[keys.draw(makers)] = _maker(keys.words)
    result: list[Any] = []
    while n > 0:
        record = {key: make() for key, make in makers.items() if rng.random() < 0.9}
        if rng.random() < 0.15 and n > n_keys + 1 and depth < _DEEPEST:
            size = rng.randint(1, max(1, (n - n_keys) // 2))
            record[keys.draw(record)] = _collection(keys, size, depth + 1)
            n -= size
        if record:
            result.append(record)
        n -= n_keys
    return result or [Empty.MAP]


def _similar(keys: _Keys, n: int, depth: int) -> dict[str, Any]:
    """A map of maps or lists that have much in common, as services have."""
    rng = keys.words.rng
    inner: list[str] = []
    for _ in range(rng.randint(1, 6)):
        inner.append(keys.draw(inner))
    result: dict[str, Any] = {}
    while n > 0:
        size = rng.randint(1, min(n, 8))
        chosen = rng.sample(inner, min(len(inner), size))
        entry: dict[str, Any] = {}
        for key in sorted(chosen, key=inner.index):
            entry[key] = _list(keys, rng.randint(1, 3), depth + 2) if rng.random() < 0.25 else keys.words.value()
        result[keys.draw(result)] = entry
        n -= size
    return result


class _Block:
    """A block scalar: `|` keeps its lines, `>` joins them."""

    def __init__(self, header: str, lines: list[str], value: str) -> None:
        self.header, self.lines, self.value = header, lines, value

    @classmethod
    def made(cls, words: Words) -> "_Block":
        rng = words.rng
        is_literal = rng.random() < 0.6
        lines = []
        for _ in range(rng.choice((1, 2, 2, 3, 3, 4, 6))):
            line = rng.choice((words.sentence, words.string, words.phrase))() if is_literal else words.sentence(12)
            line = re.sub(r"\s+", " ", line).strip()
            lines.append(line or "text")
        if is_literal:
            lines = [line if not n or rng.random() < 0.85 else "  " + line for n, line in enumerate(lines)]
        if len(lines) > 2 and rng.random() < 0.25:
            lines.insert(rng.randrange(1, len(lines)), "")
        end = rng.choice(("", "", "-", "-", "+"))
        if is_literal:
            body = "\n".join(lines)
        else:
            body = ""
            for line in lines:
                body += "\n" if not line else line if not body or body.endswith("\n") else " " + line
        return cls(("|" if is_literal else ">") + end, lines, body + ("" if end == "-" else "\n"))


# Writing.


@dataclass
class _Line:
    text: str
    may_end: bool = True  # in a comment
    may_follow: bool = True  # comments and blank lines before it change nothing
    keeps: bool = False  # blank lines after it are part of its value


class _Writer:
    """Writes a tree in one style."""

    def __init__(self, words: Words, has_marks: bool = True, has_blocks: bool = True) -> None:
        rng = self._rng = words.rng
        self._words = words
        self._indent = rng.choice((2, 2, 2, 2, 4, 3 if rng.random() < 0.2 else 2))
        self._inset = rng.random() < 0.6
        self._quotes = rng.choice((0, 0.03, 0.1, 0.3, 0.9))
        self._single = rng.choice((0, 0.1, 0.5, 1))
        self._key_quotes = rng.choice((0, 0, 0, 0.05, 0.5))
        self._flow = rng.choice((0, 0.1, 0.4, 0.8, 0))
        self._is_flow_json = rng.random() < 0.1
        self._comments = rng.choice((0, 0, 0, 0.05, 0.2))
        self._blanks = rng.choice((0, 0, 0.05, 0.3))
        self._wraps = rng.choice((0, 0.1, 0.5)) if has_blocks else 0
        self._has_blocks = has_blocks
        self._has_marks = has_marks

    def text(self, value: Any) -> str:
        rng = self._rng
        if value and rng.random() < 0.03 and self._has_blocks:
            lines = self._over_lines(value, "") or self._lines(value, 0)
        else:
            lines = self._lines(value, 0)
        result: list[str] = []
        if rng.random() < max(0.06, self._comments):
            result += [f"#{self._comment()}" for _ in range(rng.choice((1, 1, 1, 2)))]
            result += [""] * (rng.random() < 0.2)
        for before, line in zip((_Line("", keeps=True), *lines), lines, strict=False):
            line.may_follow &= not before.keeps
            if line.may_follow and rng.random() < self._blanks * (1 if not line.text.startswith(" ") else 0.15):
                result.append("")
            if line.may_follow and rng.random() < self._comments:
                pad = line.text[: len(line.text) - len(line.text.lstrip())]
                result.append(f"{pad}#{self._comment()}")
            if line.may_end and rng.random() < self._comments * 0.7:
                line.text += f"{' ' * rng.choice((1, 1, 2, 3, 8))}#{self._comment()}"
            result.append(line.text)
        if self._comments and rng.random() < 0.1 and lines[-1].may_end:
            result.append(f"#{self._comment()}")
        if self._has_marks and rng.random() < 0.08:
            result.insert(0, "---")
            if rng.random() < 0.3 and self._comments:
                result.insert(0, f"#{self._comment()}")
        if self._has_marks and rng.random() < 0.025:
            result.append("...")
        return "\n".join(result)

    def _comment(self) -> str:
        rng, words = self._rng, self._words
        kind = rng.random()
        if kind < 0.3:
            said = f"{words.word()}: {words.word()}"
        elif kind < 0.6:
            said = words.sentence(9)
        else:
            said = rng.choice((words.phrase, words.string))()
        return rng.choice((" ", " ", " ", "")) + re.sub(r"\s+", " ", said).strip()

    def _lines(self, value: Any, depth: int) -> list[_Line]:
        return self._map_lines(value, depth) if isinstance(value, dict) else self._list_lines(value, depth)

    def _map_lines(self, value: dict[str, Any], depth: int) -> list[_Line]:
        lines: list[_Line] = []
        for key, item in value.items():
            lines += self._entry(
                f"{' ' * depth}{self._key(key)}:",
                item,
                depth,
                depth + self._indent,
                depth + (self._indent if self._inset else 0),
            )
        return lines

    def _list_lines(self, items: list[Any], depth: int) -> list[_Line]:
        lines: list[_Line] = []
        for item in items:
            start = f"{' ' * depth}-"
            if isinstance(item, (dict, list)) and item and self._rng.random() >= self._flow * 0.7:
                inner = self._lines(item, depth + 2)
                lines += [_Line(f"{start} {inner[0].text.lstrip()}", inner[0].may_end), *inner[1:]]
            else:
                lines += self._entry(start, item, depth, depth + 2, depth + 2)
        return lines

    def _entry(self, start: str, item: Any, depth: int, map_depth: int, list_depth: int) -> list[_Line]:
        """What follows `key:` or `-`."""
        rng = self._rng
        if isinstance(item, (dict, list)) and item:
            if rng.random() < self._flow and (flow := self._flow_text(item)) and len(flow) < 160:
                if rng.random() < 0.06 and self._has_blocks and (wrapped := self._over_lines(item, " " * depth)):
                    wrapped[0].text = f"{start} {wrapped[0].text}"
                    return wrapped
                return [_Line(f"{start} {flow}")]
            return [_Line(start), *self._lines(item, map_depth if isinstance(item, dict) else list_depth)]
        if isinstance(item, _Block):
            if not self._has_blocks:
                return [_Line(f"{start} {self._quoted(item.value)}")]
            pad = " " * map_depth
            lines = [_Line(f"{start} {item.header}", may_end=False)]
            lines += [_Line((pad + line) if line else "", False, False) for line in item.lines]
            lines[-1].keeps = item.header.endswith("+")
            return lines
        if item is None:
            return [_Line(start)]
        text = self._scalar(item)
        if isinstance(item, str) and " " in item and len(item) > 24 and rng.random() < self._wraps:
            return self._wrapped(start, item, text, map_depth)
        return [_Line(f"{start} {text}")]

    def _wrapped(self, start: str, item: str, text: str, depth: int) -> list[_Line]:
        """A scalar that goes on over lines; its line breaks are read as spaces."""
        is_quoted = text[0] in "\"'"
        pieces = text.split(" ")
        if any(not piece for piece in pieces):  # more than one space would be read as one
            return [_Line(f"{start} {text}")]
        lines, current = [], pieces[0]
        for piece in pieces[1:]:
            # A line of a plain scalar may not begin with a comment.
            if len(current) > self._rng.randint(16, 48) and (is_quoted or piece[0] not in "#-?:&*!|>%@`"):
                lines.append(current)
                current = piece
            else:
                current += f" {piece}"
        lines.append(current)
        pad = " " * depth
        if self._rng.random() < 0.2:
            return [_Line(start, may_end=False), *(_Line(pad + line, False, False) for line in lines)]
        result = [_Line(f"{start} {lines[0]}", may_end=len(lines) == 1)]
        return result + [_Line(pad + line, False, False) for line in lines[1:]]

    def _key(self, key: str, in_flow: bool = False) -> str:
        if key.isdecimal() and (key == "0" or key[0] != "0") and self._rng.random() < 0.8:
            return key  # a number, that JSON has as a string
        if is_plain(key, in_flow) and self._rng.random() >= self._key_quotes:
            return key
        return self._quoted(key)

    def _scalar(self, item: Any, in_flow: bool = False) -> str:
        if isinstance(item, Spelled):
            return item.text
        if isinstance(item, _Block):
            return self._quoted(item.value)
        if isinstance(item, str):
            is_bare = is_plain(item, in_flow) and self._rng.random() >= self._quotes
            return item if is_bare else self._quoted(item)
        return json.dumps(item)

    def _quoted(self, text: str) -> str:
        if text.isprintable() and self._rng.random() < (self._single if '"' not in text and "\\" not in text else 0.5):
            return "'" + text.replace("'", "''") + "'"
        if not text.isascii() and max(text) < "\U00010000" and self._rng.random() < 0.1:  # JSON's pairs are not YAML's
            return json.dumps(text)
        return json.dumps(text, ensure_ascii=False)

    def _flow_text(self, value: Any) -> str:
        if isinstance(value, dict) and value:
            colon = ": "
            parts = [f"{self._flow_key(key)}{colon}{self._flow_text(item)}".rstrip() for key, item in value.items()]
            inner = ", ".join(parts)
            return f"{{ {inner} }}" if self._rng.random() < 0.1 else f"{{{inner}}}"
        if isinstance(value, list) and value:
            inner = ", ".join(self._flow_text(item) for item in value)
            return f"[ {inner} ]" if self._rng.random() < 0.1 else f"[{inner}]"
        if value is None:
            return "null"
        if self._is_flow_json and isinstance(value, str):
            return json.dumps(value, ensure_ascii=False)
        return self._scalar(value, in_flow=True)

    def _flow_key(self, key: str) -> str:
        return json.dumps(key, ensure_ascii=False) if self._is_flow_json else self._key(key, in_flow=True)

    def _over_lines(self, value: Any, pad: str) -> list[_Line]:
        """A flow collection over lines: an entry on each, or some."""
        inner = f"{pad}{' ' * self._indent}"
        if isinstance(value, dict):
            parts = [f"{self._flow_key(key)}: {self._flow_text(item)}" for key, item in value.items()]
        else:
            parts = [self._flow_text(item) for item in value]
        signs = "{}" if isinstance(value, dict) else "[]"
        if self._rng.random() < 0.4:
            rows = [signs[0] + parts[0]]
            for part in parts[1:]:
                if self._rng.random() < 0.4:
                    rows.append(f"{inner}{part}")
                    rows[-2] += ","
                else:
                    rows[-1] += f", {part}"
            rows[-1] += signs[1]
            return [_Line(rows[0], len(rows) == 1), *(_Line(row, False, False) for row in rows[1:])]
        lines = [_Line(signs[0], False)]
        lines += [_Line(f"{inner}{part},", False, False) for part in parts[:-1]]
        return [*lines, _Line(inner + parts[-1], False, False), _Line(pad + signs[1], False, False)]


_VALUE = re.compile(r"^(?P<start>\s*(?:- )*(?:[\w.-]+:|-))(?: (?P<value>\S.*))?$")


def _with(sign: str, text: str, words: Words) -> str:
    """The text with one thing in it that is refused, and perhaps others after it."""
    rng = words.rng
    lines = text.split("\n")
    name = words.word() if rng.random() < 0.5 else words.identifier()
    name = re.sub("[^A-Za-z0-9_]", "", name) or "base"
    if sign == "%":
        return "\n".join(
            (
                rng.choice(
                    (
                        f"%YAML 1.{rng.randint(1, 2)}",
                        f"%TAG ! tag:{name}.com,{rng.randint(2000, 2025)}:",
                        f"%TAG !{name[0]}! !{name}-",
                    )
                ),
                "---",
                *lines,
            )
        )
    if sign == "---":
        more = _Writer(words, has_marks=False, has_blocks=False).text(_tree(words, rng.randint(1, 5))).split("\n")
        marked = ["---"] if rng.random() < 0.4 else []
        end = ["..."] if rng.random() < 0.1 else []
        if rng.random() < 0.15:
            more = [words.sentence(), *([words.sentence()] if rng.random() < 0.5 else [])]
        third = ["---", f"{name}: {rng.randint(0, 9)}"] if rng.random() < 0.2 else []
        return "\n".join((*marked, *lines, *end, "---", *more, *third))
    if sign == "?":
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
            return "\n".join(entry)
        places = [n for n, line in enumerate(lines) if line and not line.startswith((" ", "-", "#"))] + [len(lines)]
        at = rng.choice(places)
        return "\n".join((*lines[:at], *entry, *lines[at:]))
    places = [n for n, line in enumerate(lines) if _VALUE.match(line) and "#" not in line]
    if not places:
        lines, places = [f"{name}: {rng.randint(0, 99)}"], [0]
    at = rng.choice(places)
    match = _VALUE.match(lines[at])
    assert match
    start, value = match["start"], match["value"] or ""
    if sign == "&":
        lines[at] = f"{start} &{name} {value}".rstrip()
        if rng.random() < 0.75:
            pad = " " * (len(lines[-1]) - len(lines[-1].lstrip()))
            alias = [f"{pad}{words.word()}: *{name}"] if not lines[-1].lstrip().startswith("-") else [f"{pad}- *{name}"]
            if rng.random() < 0.3:
                alias = [f"{words.word()}:", f"  <<: *{name}", f"  {words.word()}: {words.word()}"]
            lines += alias
    elif sign == "*":
        if rng.random() < 0.35:
            lines[at:at] = [f"{start[: len(start) - len(start.lstrip())]}<<: *{name}"]
        else:
            lines[at] = f"{start} *{name}"
    else:
        tag = rng.choice(
            (
                f"!{name}",
                f"!{name}",
                "!Ref",
                "!Sub",
                "!secret",
                "!include",
                "!!str",
                "!!int",
                "!!set",
                "!!binary",
                f"!!python/{name}:{name}.{name}",
                f"!{name}/{name}",
                f"!GetAtt {name}.Arn",
            )
        )
        lines[at] = f"{start} {tag} {value}".rstrip()
    return "\n".join(lines)
