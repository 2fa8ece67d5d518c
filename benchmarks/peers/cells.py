"""How a side of the ladder is asked: a process that reads one cell a line from stdin and answers on stdout.

A cell is {"prompts": [[ids]], "n_tokens": n}: all prompts at the same instant, n greedy tokens each. The answer has,
for each prompt, its tokens and the seconds from that instant to each of them. Lines of the protocol begin with `MARK`,
since libraries print too. Only the standard library here: every side's interpreter imports it.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARK = "@ladder "

Prompts = list[list[int]]
Answer = tuple[list[list[float]], list[list[int]]]  # per prompt: seconds to each token, the tokens


def answer(about: dict[str, Any], run: Callable[[Prompts, int], Answer]) -> None:
    """Say what this side is, then answer cells until stdin ends.

    about: `version`, `weight_bytes`, `kv_item_bytes`; `queues` if it takes more requests than its memory holds.
    """
    _tell(about)
    for line in sys.stdin:
        cell = json.loads(line)
        times, tokens = run(cell["prompts"], cell["n_tokens"])
        _tell({"times": [[round(t, 6) for t in stream] for stream in times], "tokens": tokens})


def refuse(why: str) -> None:
    """Say that this side cannot run these models at all, which becomes its row, and end."""
    _tell({"refused": why})
    sys.stdout.flush()
    os._exit(0)  # whatever was started stays behind


def size_of(folder: Path, *patterns: str) -> int:
    """Bytes of the files in a folder that match."""
    return sum(file.stat().st_size for pattern in patterns for file in folder.glob(pattern))


def _tell(message: dict[str, Any]) -> None:
    print(MARK + json.dumps(message), flush=True)
