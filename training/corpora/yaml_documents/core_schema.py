"""What YAML 1.2's core schema reads in a scalar without quotes: null, a boolean, a number, or a string."""

import re
from dataclasses import dataclass
from typing import Any

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOLEAN = re.compile(r"true|True|TRUE|false|False|FALSE")
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_NOT_FIRST = frozenset("-?:,[]{}#&*!|>'\"%@`")


@dataclass(frozen=True)
class Spelled:
    """A value and the one way its YAML is written, without quotes."""

    value: Any
    text: str


def is_plain(text: str, in_flow: bool = False) -> bool:
    """Whether YAML reads these characters without quotes as this very string."""
    if not text or text != text.strip() or not text.isprintable() or is_other(text):
        return False
    if text[0] in _NOT_FIRST and not (text[0] in "-?:" and len(text) > 1 and text[1] not in " ,[]{}"):
        return False
    if ": " in text or " #" in text or text.endswith(":") or text.startswith(("---", "...")):
        return False
    return not (in_flow and (text[0] == ":" or any(sign in text for sign in ",[]{}?")))


def is_other(text: str) -> bool:
    """Whether the core schema reads this text as null, a boolean or a number."""
    return any(pattern.fullmatch(text) for pattern in (_NULL, _BOOLEAN, _INTEGER, _FLOAT))


def core_number(text: str) -> int | float:
    """The number that the core schema reads in a text that is one."""
    if text.startswith(("0o", "0x")):
        return int(text, 0)
    return int(text) if _INTEGER.fullmatch(text) else float(text)
