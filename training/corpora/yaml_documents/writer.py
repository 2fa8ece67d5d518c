"""Writes a tree as YAML in a style of its own: indentation, quotes, flow collections, comments, blank lines."""

import json
import re
from dataclasses import dataclass
from itertools import islice
from typing import Any

from training.corpora.yaml_documents.core_schema import Spelled, is_plain
from training.corpora.yaml_documents.scalars import Values
from training.corpora.yaml_documents.trees import Block


@dataclass
class _Line:
    text: str
    may_end: bool = True  # in a comment
    may_follow: bool = True  # comments and blank lines before it change nothing
    keeps: bool = False  # blank lines after it are part of its value


class Writer:
    """Writes a tree in one style."""

    def __init__(self, words: Values, has_marks: bool = True, has_blocks: bool = True) -> None:
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
        self._is_mixed = words.hard == "mixed" and has_blocks

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
                if self._is_mixed:
                    pad = rng.choice((pad, pad, f"{pad}  ", ""))
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
        if isinstance(item, Block):
            if not self._has_blocks:
                return [_Line(f"{start} {self._quoted(item.value)}")]
            pad = " " * map_depth
            lines = [_Line(f"{start} {item.header}", may_end=False)]
            lines += [_Line((pad + line) if line else "", False, False) for line in item.lines]
            lines[-1].keeps = item.header.endswith("+")
            return lines
        if item is None:
            return [_Line(start), *(self._commented_out(map_depth) if self._is_mixed and rng.random() < 0.5 else [])]
        text = self._scalar(item)
        if isinstance(item, str) and " " in item and len(item) > 24 and rng.random() < self._wraps:
            return self._wrapped(start, item, text, map_depth)
        return [_Line(f"{start} {text}")]

    def _commented_out(self, depth: int) -> list[_Line]:
        """Entries that are comments, where the value of a key was: it has none, then."""
        rng, words = self._rng, self._words
        sign = rng.choice(("# - ", "# ", "#", "#- "))
        pad = " " * rng.choice((depth, depth, max(0, depth - self._indent)))
        entries = (rng.choice((words.word(), f"{words.word()}: {words.word()}", words.phrase())) for _ in range(3))
        return [_Line(f"{pad}{sign}{entry}", may_end=False) for entry in islice(entries, rng.choice((1, 1, 2, 3)))]

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
        if isinstance(item, Block):
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
            parts = [f"{self._flow_key(key)}: {self._flow_text(item)}".rstrip() for key, item in value.items()]
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
