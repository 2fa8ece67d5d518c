"""Two functions that `mpt-tiny-chat` was trained to call, for demonstrations and tests: the time and a calculator.

A client declares them as `TOOLS` says and answers their calls with `run`. Other functions can be declared beside them;
how well the model tells them apart is measured in docs/tiny.md.
"""

import json
import re
from collections.abc import Callable
from datetime import datetime
from fractions import Fraction
from typing import Any
from zoneinfo import ZoneInfo

from mpt.tools import Tool


def _of_one_string(argument: str) -> dict[str, Any]:
    properties = {argument: {"type": "string"}}
    return {"type": "object", "properties": properties, "required": [argument], "additionalProperties": False}


GET_TIME = Tool("get_time", "Tell the time in a city.", _of_one_string("city"))
CALCULATE = Tool("calculate", "Work out numbers with + - * and /.", _of_one_string("expression"))
TOOLS = (GET_TIME, CALCULATE)

_ZONES = {
    "Athens": "Europe/Athens", "Berlin": "Europe/Berlin", "Cairo": "Africa/Cairo", "Chicago": "America/Chicago",
    "Delhi": "Asia/Kolkata", "Denver": "America/Denver", "Lagos": "Africa/Lagos", "Lima": "America/Lima",
    "Lisbon": "Europe/Lisbon", "London": "Europe/London", "Los Angeles": "America/Los_Angeles",
    "Madrid": "Europe/Madrid", "Nairobi": "Africa/Nairobi", "New York": "America/New_York", "Oslo": "Europe/Oslo",
    "Paris": "Europe/Paris", "Rome": "Europe/Rome", "Sydney": "Australia/Sydney", "Tokyo": "Asia/Tokyo",
    "Toronto": "America/Toronto",
}  # fmt: skip


def as_openai() -> list[dict[str, Any]]:
    """`TOOLS` as the field `tools` of `/v1/chat/completions` takes them."""
    return [{"type": "function", "function": tool.as_json()} for tool in TOOLS]


def run(name: str, arguments: str) -> str:
    """The result of a call, in the words that the model gets; one that begins with `error` where it cannot be done."""
    functions: dict[str, tuple[str, Callable[[str], str]]] = {
        "get_time": ("city", get_time),
        "calculate": ("expression", calculate),
    }
    try:
        argument, function = functions[name]
        return function(json.loads(arguments)[argument])
    except (ValueError, KeyError, TypeError, ArithmeticError):
        return f"error: cannot {name} of {arguments}"


def get_time(city: str) -> str:
    """Hours and minutes, such as `14:05`. Raises KeyError for a city that is not listed."""
    return f"{datetime.now(ZoneInfo(_ZONES[city])):%H:%M}"


def calculate(expression: str) -> str:
    """The value of numbers joined by + - * /, with up to ten digits. Raises ValueError, ZeroDivisionError."""
    parts = re.findall(r"\d+(?:\.\d+)?|\S", expression)
    numbers, signs = [Fraction(part) for part in parts[::2]], parts[1::2]
    if len(numbers) != len(signs) + 1 or not set(signs) <= set("+-*/"):
        raise ValueError(f"`{expression}` is not numbers joined by + - * /")
    total, term, is_minus = Fraction(0), numbers[0], False  # a term: what * and / join, which bind closer
    for sign, number in zip(signs, numbers[1:], strict=True):
        if sign in "*/":
            term = term * number if sign == "*" else term / number
            continue
        total += -term if is_minus else term
        term, is_minus = number, sign == "-"
    return f"{float(total + (-term if is_minus else term)):.10g}"
