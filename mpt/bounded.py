"""Parses text of others, JSON and YAML, within bounds: its size before it is read, its depth, what aliases expand to.

A small file can take all memory, or Python's stack, in many ways; nothing that this program reads needs more than the
bounds here. Not here: which files there are (`files.py`), binary headers (`checkpoint.py`, `gguf/header.py`).
"""

import json
import reprlib
from pathlib import Path
from typing import Any

from mpt.errors import DamagedFile

JSON_BYTES = 32_000_000  # the index of a model of 100,000 tensors has 10 MB; a manifest with a report less
TOKENIZER_BYTES = 256_000_000  # the largest known tokenizer.json has 34 MB
_YAML_BYTES = 1_000_000
_DEPTH = 64  # of published configs, 5
_NODES = 100_000  # of a YAML document once its aliases stand for what they name


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120


def shown(value: object) -> str:
    """A value of a file for an error's one line: as Python writes it, long ones and deep ones cut."""
    return _SHORT.repr(value)


def check_size(path: Path, most: int = JSON_BYTES) -> None:
    """Raises DamagedFile for a file of more bytes. Raises OSError where there is none."""
    size = path.stat().st_size
    if size > most:
        raise DamagedFile(
            f"`{path}` has {size} bytes; such a file has at most {most}, so it is not read: copy it again"
        )


def read_text(path: Path, most: int = JSON_BYTES, *, errors: str = "strict") -> str:
    """A file's text, in UTF-8, without a byte order mark, which editors on Windows put before it.

    Raises DamagedFile for one of more bytes, OSError, UnicodeDecodeError.
    """
    check_size(path, most)
    return path.read_text(encoding="utf-8-sig", errors=errors)


def parse_json(text: str | bytes) -> Any:
    """A value of JSON. Raises ValueError, for what is nested too deeply too."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [found]
    for _ in range(_DEPTH):
        level = [each for value in level for each in _inside(value)]
        if not level:
            return found
    raise ValueError(f"it is nested more than {_DEPTH} deep")


def _inside(value: object) -> list[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [each for each in inner if isinstance(each, dict | list)]


def parse_yaml(text: str, loader: Any = None) -> Any:
    """A value of YAML. loader: of yaml, by default its SafeLoader.

    Raises yaml.YAMLError, for what is too long, too deep, or grows beyond bounds by its aliases.
    """
    import yaml

    if len(text) > _YAML_BYTES:
        raise yaml.YAMLError(f"it has {len(text)} characters, at most {_YAML_BYTES} are read")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None and _n_nodes(node, {}) > _NODES:
            raise yaml.YAMLError(f"its aliases stand for more than {_NODES} values; write them out, or use fewer")
        return yaml.load(text, loader or yaml.SafeLoader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


def _n_nodes(node: Any, known: dict[int, int]) -> int:
    """How many nodes it is when every alias is what it names; an alias of what it stands in counts as too many."""
    if id(node) not in known:
        known[id(node)] = _NODES + 1
        inner = node.value if isinstance(node.value, list) else []
        parts = (part for each in inner for part in (each if isinstance(each, tuple) else (each,)))
        known[id(node)] = 1 + sum(_n_nodes(part, known) for part in parts)
    return known[id(node)]
