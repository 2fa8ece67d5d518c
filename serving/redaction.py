"""Takes out of text what identifies people or opens doors: addresses, numbers, keys. docs/operations.md lists it.

It knows forms, not meanings: a name, a street or a password in a sentence stays. Each pattern reads a text in time
proportional to its length.
"""

import re
from collections.abc import Callable
from typing import Any

_LUHN_DOUBLED = (0, 2, 4, 6, 8, 1, 3, 5, 7, 9)  # the sum of the digits of twice a digit


def _card(match: re.Match[str]) -> str:
    """A card's number, by the check digit that all of them have (ISO/IEC 7812); else a long number."""
    digits = [int(each) for each in match[0] if each.isdigit()]
    total = sum(d if n % 2 == 0 else _LUHN_DOUBLED[d] for n, d in enumerate(reversed(digits)))
    return "[card]" if total % 10 == 0 else "[number]"


_NAMES = r"api[_-]?key|secret[_-]?key|secret|token|password|passwd|pwd|authorization"
_SECRET = re.compile(rf"(?i)(?:\w*[_-])?(?:{_NAMES})")
# In this order: a key may hold what looks like a number.
PATTERNS: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,40}PRIVATE KEY-----|\Z)", re.S),
     "[key]"),
    (re.compile(r"\beyJ[\w-]{8,4000}\.[\w-]{4,8000}(?:\.[\w-]{0,2000})?"), "[key]"),  # JSON web tokens
    (re.compile(r"\b(?:sk|pk|rk|hf|ghp|gho|ghs|ghu|github_pat|glpat|xox[abeoprs]|npm|pypi|AIza|ya29)[-_.]?"
                r"(?=[\w-]{0,200}\d)[\w.-]{8,4000}"), "[key]"),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), "[key]"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,8000}"), r"\1 [key]"),
    (re.compile(rf"(?i)\b((?:\w{{0,40}}_)?(?:{_NAMES})[\"']?\s{{0,3}}[:=]\s{{0,3}}[\"']?)[^\s\"',;]{{4,4000}}"),
     r"\1[key]"),
    (re.compile(r"(?i)\b([a-z][a-z0-9+.-]{1,30}://)[^\s/@:]{1,200}:[^\s/@]{1,400}@"), r"\1[key]@"),
    (re.compile(r"[\w.!#$%&'*+/=?^`{|}~-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}"), "[email]"),
    (re.compile(r"\+\d(?:[\s().-]{0,2}\d){6,14}"), "[phone]"),
    (re.compile(r"(?<![\w.])(?:\(\d{3}\)\s?|\d{3}[-.\s])\d{3}[-.\s]\d{4}(?!\w)"), "[phone]"),
    (re.compile(r"(?<![\w.])\(?0\d(?:[\s()/.-]{0,2}\d){6,12}(?!\w)"), "[phone]"),
    (re.compile(r"(?<![\w.])(?:\d[ -]?){12,18}\d(?![\w])"), _card),
    (re.compile(r"(?<![\w.])\d{10,}(?!\w)"), "[number]"),
)  # fmt: skip


def redacted(text: str) -> str:
    """A text without what the patterns find."""
    for pattern, instead in PATTERNS:
        text = pattern.sub(instead, text)
    return text


def redacted_json(value: Any, longest: int) -> Any:
    """JSON with its texts redacted, names too, and cut behind about `longest` characters.

    Token ids, which are text to whoever has the tokenizer, become their count.
    """
    if isinstance(value, str):
        return _short(value, longest)
    if isinstance(value, dict):
        return {
            _short(name, longest): "[key]"
            if isinstance(each, str) and _SECRET.fullmatch(name)
            else redacted_json(each, longest)
            for name, each in value.items()
        }
    if isinstance(value, list):
        if value and all(isinstance(each, int) and not isinstance(each, bool) for each in value):
            return f"[{len(value)} token ids]"
        return [redacted_json(each, longest) for each in value]
    return value


_MARGIN = 1024  # characters: what is found is found whole, if it begins so far before the cut


def _short(text: str, longest: int) -> str:
    if len(text) <= longest:
        return redacted(text)
    kept = redacted(text[: longest + _MARGIN])[:-_MARGIN]
    return f"{kept}[{len(text) - longest} characters more]"
