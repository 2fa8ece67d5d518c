"""Trees of maps, lists and values: what a document says, before it is written."""

import re
from collections.abc import Callable, Container
from typing import Any

from training.corpora.yaml_documents.scalars import EMPTY_MAP, Values, few_digits, number, truth

_DEEPEST = 8


def tree(words: Values, n: int) -> Any:
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

    def __init__(self, words: Values) -> None:
        self.words = words
        self._joint = words.rng.choice(("_", "_", "_", "-", "camel", " ", ".", "upper", "title"))
        self._lone = words.rng.random()
        self._again = words.rng.choice((0.3, 0.6, 0.85) if words.has_few else (0.05, 0.15, 0.4))
        self._patience = 1.0 if words.hard == "all" else 0.7
        self._odd = words.rng.choice((0.02, 0.02, 0.02, 0.3) if words.hard != "signs" else (0.1, 0.5))
        self._drawn: list[str] = []

    def draw(self, taken: Container[str]) -> str:
        """A key that is not one of these."""
        again = self._again
        while True:
            key = self._any(again)
            if key not in taken:
                self._drawn.append(key)
                return key
            again *= self._patience  # a map may hold all that were drawn

    def _any(self, again: float) -> str:
        rng, words = self.words.rng, self.words
        if self._drawn and rng.random() < again:
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
    nests = rng.choice((0.3, 0.5, 0.7, 0.9) if keys.words.has_few else (0.1, 0.3, 0.5, 0.7))
    if depth >= _DEEPEST:
        nests = 0
    result: dict[str, Any] = {}
    while n > 0:
        key = keys.draw(result)
        if n > 1 and rng.random() < nests:
            size = n if _goes_down(keys) else rng.randint(1, max(1, n - 1))
            result[key] = _collection(keys, size, depth + 1)
            n -= size
        else:
            result[key] = _value(keys.words)
            n -= 1
    return result


def _goes_down(keys: _Keys) -> bool:
    """Whether all that is left of a collection goes into one entry of it, so that the document ends deep down there."""
    return keys.words.hard in ("depth", "mixed") and keys.words.rng.random() < 0.4


def _value(words: Values) -> Any:
    if words.rng.random() < 0.045:
        return Block.made(words)
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
    if words.hard == "mixed" and rng.random() < 0.4:
        return _words_and_maps(keys, n, depth)
    kind = rng.random()
    if kind < 0.14 and n > 2 and depth < _DEEPEST:
        result = []
        is_matrix, size = rng.random() < 0.5, rng.randint(1, 4)
        cell = few_digits if words.has_few else number
        while n > 0:
            result.append(
                [cell(rng) if is_matrix else words.value() for _ in range(size if is_matrix else rng.randint(1, 4))]
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
    short = (words.word, words.value, lambda: few_digits(rng))
    maker = rng.choice(short if words.has_few else makers)
    blocks = 0.1 if rng.random() < 0.1 else 0
    return [Block.made(words) if rng.random() < blocks else maker() for _ in range(n)]


def _words_and_maps(keys: _Keys, n: int, depth: int) -> list[Any]:
    """A list of words, some of which have something of their own below them: `- pip` and then `- pip: [...]`."""
    words, rng = keys.words, keys.words.rng
    maps = rng.choice((0.15, 0.3, 0.5))
    result: list[Any] = []
    while n > 0:
        if n > 1 and depth < _DEEPEST and rng.random() < maps:
            size = rng.randint(1, min(n - 1, 4))
            below = _collection(keys, size, depth + 2) if rng.random() < 0.6 else words.value()
            result.append({keys.draw({}): below})
            n -= size
        else:
            result.append(words.word() if rng.random() < 0.8 else words.string())
        n -= 1
    return result


def _maker(words: Values) -> Callable[[], Any]:
    """What makes the values of one key in many maps."""
    rng = words.rng
    kind = words.kind()
    return rng.choice((kind, kind, words.word, words.phrase, words.value, lambda: number(rng), lambda: truth(rng)))


def _records(keys: _Keys, n: int, depth: int) -> list[Any]:
    """A list of maps that have their keys in common."""
    rng = keys.words.rng
    n_keys = rng.randint(1, min(5, n))
    makers: dict[str, Callable[[], Any]] = {}
    while len(makers) < n_keys:
        makers[keys.draw(makers)] = _maker(keys.words)
    result: list[Any] = []
    present, nests = (0.9, 0.15) if keys.words.hard == "all" else (rng.choice((0.5, 0.9, 1)), rng.choice((0, 0.2, 0.6)))
    while n > 0:
        record = {key: make() for key, make in makers.items() if rng.random() < present}
        if rng.random() < nests and n > n_keys + 1 and depth < _DEEPEST:
            size = n - n_keys if _goes_down(keys) else rng.randint(1, max(1, (n - n_keys) // 2))
            is_shared = keys.words.hard != "all" and rng.random() < 0.4
            record[rng.choice(list(makers)) if is_shared else keys.draw(record)] = _collection(keys, size, depth + 1)
            n -= size
        if record:
            result.append(record)
        n -= n_keys if keys.words.hard == "all" else max(1, len(record))
    return result or [EMPTY_MAP]


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
            if rng.random() >= 0.25:
                entry[key] = keys.words.value()
            elif keys.words.hard == "all":
                entry[key] = _list(keys, rng.randint(1, 3), depth + 2)
            else:
                entry[key] = _collection(keys, rng.randint(1, 4), depth + 2)
        result[keys.draw(result)] = entry
        n -= size
    return result


class Block:
    """A block scalar: `|` keeps its lines, `>` joins them."""

    def __init__(self, header: str, lines: list[str], value: str) -> None:
        self.header, self.lines, self.value = header, lines, value

    @classmethod
    def made(cls, words: Values) -> "Block":
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
