"""Rows that are rendered already: whose texts hold a chat format's own marks, so that a prompt style doubles them.

Text never becomes a control token, so a `<|im_start|>` in a row is not the token that a chat model knows.
"""

import logging
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from mpt.errors import UserError
from mpt.prompts import PromptStyle
from training.data.rows import read, shape

log = logging.getLogger(__name__)

_LOOKED_AT = 100  # rows
# What only a rendered text begins a turn with, and the format it is of.
_MARKS = {
    "<|im_start|>": "ChatML", "### Instruction:": "Dolly's and Alpaca's template", "[INST]": "Llama 2's template",
    "<|start_header_id|>": "Llama 3's template", "<start_of_turn>": "Gemma's template",
    "<|assistant|>": "Zephyr's template", "<|start|>assistant": "gpt-oss's template",
}  # fmt: skip


def tell(name: str, rows: Iterable[tuple[str, Any]], style: PromptStyle) -> None:
    """Warn where the first rows of a set hold marks of a chat format.

    Not where reading takes them off, as it takes prompts out of Dolly's template.
    """
    found: dict[str, str] = {}
    n_rows = n_rendered = 0
    for where, row in islice(rows, _LOOKED_AT):
        n_rows += 1
        mark = mark_in(row)
        if mark is not None:
            n_rendered += 1
            found.setdefault(mark, where)
    if not found:
        return
    mark, where = next(iter(found.items()))
    what = "the text they are" if style == "none" else f"text inside the prompt style `{style}`"
    log.warning(
        "`%s`: %d of the first %d rows are rendered already, `%s` of %s first in %s; they are trained as %s, and no "
        "mark becomes a control token: give the rows as messages, and --prompt-style for the format",
        *(Path(name).name, n_rendered, n_rows, mark, _MARKS[mark], where, what),
    )


def mark_in(row: Any) -> str | None:
    """The mark of a chat format in what a row says, None where there is none."""
    said = row
    if isinstance(row, dict) and shape(row) not in (None, "text", "turns"):
        with suppress(UserError):  # a row that is told of where it is read
            said = [message["content"] for message in read(row).messages]
    texts = list(_texts(said))
    return next((mark for mark in _MARKS for text in texts if mark in text), None)


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
