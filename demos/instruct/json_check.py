"""Whether an answer is JSON, where it breaks if not, and whether it holds what the YAML of the instruction holds.

Not a schema validator. Both texts are untrusted: nesting is bounded by Python's recursion, size by the callers, and
YAML with aliases, which can grow without bound, is not compared.
"""

import json
import re
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import yaml

_MAX_YAML_CHARACTERS = 20_000
_MAX_DIFFERENCES = 3
_FENCE = re.compile(r"^```[\w-]*\n(.*?)(?:\n```.*)?$", re.DOTALL)
# Not `JSON to YAML`, nor what is told of (`stored as JSON in Postgres`).
_TO_JSON = re.compile(
    r"\b(to|into|as|in|valid|write|make|give|return)\s+(me\s+)?(a\s+|an\s+|the\s+)?(valid\s+)?json\b(?!\s+(to|into|in)\b)",
    re.IGNORECASE,
)
# `Convert this to JSON:` is a sentence, though to YAML it would be a name without a value; `server:` is YAML.
_ASKS = re.compile(r".*\b(yaml|json|convert|turn|translate|following|below|this)\b.*:", re.IGNORECASE)


@dataclass(frozen=True)
class Check:
    """What is to be said of an answer that should be JSON, and the text to show."""

    verdict: Literal["valid", "invalid", "differs"]
    sentence: str
    text: str


def looks_like_json(answer: str) -> bool:
    return _unfenced(answer).startswith(("{", "["))


def asks_for_json(instruction: str) -> bool:
    """Whether the answer should be JSON, by the first and last lines of the instruction: between them may be the data."""
    lines = instruction.strip().splitlines() or [""]
    return any(_TO_JSON.search(line) for line in (lines[0], lines[-1]))


def check(answer: str, instruction: str) -> Check:
    """The answer read as JSON, laid out anew if it is, and compared with the YAML of the instruction, if any."""
    text = _unfenced(answer)
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        return Check("invalid", _where(text, error), text)
    except (ValueError, RecursionError) as error:
        return Check("invalid", f"Not valid JSON: {str(error) or 'nested too deeply'}.", text)
    pretty = json.dumps(value, indent=2, ensure_ascii=False)
    is_asked, asked = yaml_of(instruction)
    if not is_asked:
        return Check("valid", "Valid JSON.", pretty)
    differences = _differences(asked, value, "")
    if not differences:
        return Check("valid", "Valid JSON, and it holds what the YAML holds.", pretty)
    shown, n_more = differences[:_MAX_DIFFERENCES], len(differences) - _MAX_DIFFERENCES
    rest = f"; and {n_more} more" if n_more > 0 else ""
    return Check("differs", f"Valid JSON, but not what the YAML says: {'; '.join(shown)}{rest}.", pretty)


def yaml_of(instruction: str) -> tuple[bool, Any]:
    """Whether the instruction holds a YAML mapping or list, and its value.

    That is what stands between fences; else the whole text, or what follows a blank line or the first line.
    """
    fenced = re.search(r"```[\w-]*\n(.*?)```", instruction, re.DOTALL)
    first, _, rest = instruction.partition("\n")
    parts = [instruction.partition("\n\n")[2], rest]
    for text in [fenced[1]] if fenced else [instruction, *parts]:
        value = _parsed(text)
        if isinstance(value, dict | list) and not (text is instruction and _is_sentence(first, rest, value)):
            return True, _as_json(value)
    return False, None


def _is_sentence(first: str, rest: str, value: Any) -> bool:
    """Whether the first line asks for something, though to YAML it is a name: `Convert this to JSON:`.

    One word that asks (`Convert:`) does so where it has no value: `json:` above an indented line is a name.
    """
    if not rest.strip():
        return True
    name, asks = first.strip().removesuffix(":"), _ASKS.fullmatch(first.strip()) is not None
    is_empty = isinstance(value, dict) and value.get(name, "") is None
    return asks or is_empty if " " in name else asks and is_empty


def _parsed(text: str) -> Any:
    """A text as YAML; None where it is none, or cannot be compared."""
    if not text.strip() or len(text) > _MAX_YAML_CHARACTERS:
        return None
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            return None
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date such as 2026-02-31
        return None


def _unfenced(answer: str) -> str:
    stripped = answer.strip()
    fence = _FENCE.match(stripped)
    return fence[1].strip() if fence else stripped


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no value of JSON")


def _where(text: str, error: json.JSONDecodeError) -> str:
    if error.msg == "Extra data":
        return f"Not valid JSON: after a whole value it goes on at line {error.lineno}, column {error.colno}."
    if error.pos >= len(text.rstrip()):
        return f"Not valid JSON: it ends too soon, at line {error.lineno}, column {error.colno}."
    around = text[max(0, error.pos - 12) : error.pos + 12].replace("\n", " ")
    what = error.msg[0].lower() + error.msg[1:]
    return f"Not valid JSON: line {error.lineno}, column {error.colno}, near `{around}`: {what}."


def _as_json(value: Any) -> Any:
    """A value of YAML as JSON can hold it: names are strings, dates are their ISO text."""
    if isinstance(value, dict):
        return {_name(name): _as_json(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_as_json(entry) for entry in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _name(name: Any) -> str:
    return name if isinstance(name, str) else json.dumps(_as_json(name))


def _differences(asked: Any, given: Any, path: str) -> list[str]:
    where = f"`{path}`" if path else "the whole"
    if isinstance(asked, dict) and isinstance(given, dict):
        missing = [f"`{_join(path, name)}` is missing" for name in asked if name not in given]
        extra = [f"`{_join(path, name)}` is not in the YAML" for name in given if name not in asked]
        inner = [_differences(asked[name], given[name], _join(path, name)) for name in asked if name in given]
        return [*missing, *extra, *(each for several in inner for each in several)]
    if isinstance(asked, list) and isinstance(given, list):
        if len(asked) != len(given):
            return [f"{where} has {len(given)} entries, not {len(asked)}"]
        pairs = enumerate(zip(asked, given, strict=True))
        return [each for n, (left, right) in pairs for each in _differences(left, right, f"{path}[{n}]")]
    if type(asked) is type(given) and asked == given:
        return []
    if {type(asked), type(given)} == {int, float} and asked == given:
        return []
    return [f"{where} is {_short(given)}, not {_short(asked)}"]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."
