"""Which keys of a row hold what, as `--columns` says: prompt=question,response=answer."""

from collections.abc import Mapping
from typing import Any

from mpt.errors import UserError

NAMES = ("prompt", "response", "system", "messages", "text")
_SETS = ({"prompt", "response"}, {"messages"}, {"text"})  # what a row is made of, `system` aside


def parse(text: str) -> dict[str, str]:
    """The key of each part. Raises UserError for what is no list of NAME=KEY, and for parts that make no row."""
    keys: dict[str, str] = {}
    for part in text.split(","):
        name, sign, key = (piece.strip() for piece in part.partition("="))
        if not sign or not key or name not in NAMES or name in keys:
            raise UserError(
                f"`columns` has `{part.strip()}`; it is a list of NAME=KEY with each of {', '.join(NAMES)} at most "
                "once, for example `prompt=question,response=answer`"
            )
        keys[name] = key
    if keys.keys() - {"system"} not in _SETS or keys.keys() == {"text", "system"}:
        raise UserError(
            f"`columns` are `{text}`; a row is made of prompt and response, of messages, or of text, for example "
            "`prompt=question,response=answer`"
        )
    return keys


def apply(keys: Mapping[str, str], row: Mapping[str, Any]) -> dict[str, Any]:
    """The row under the names of `training/data/rows.py`; its tools stay. Raises UserError for a missing key."""
    for name, key in keys.items():
        if key not in row:
            raise UserError(f"there is no `{key}`, which --columns names for {name}; it has {', '.join(map(str, row))}")
    tools = {"tools": row["tools"]} if row.get("tools") else {}
    return {**tools, **{name: row[key] for name, key in keys.items()}}
