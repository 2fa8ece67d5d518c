"""Rows that hold a chat format's marks are told of; those that reading takes out of Dolly's template are not."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from mpt.prompts import INSTRUCT_TEMPLATE
from mpt.tokenizer import Tokenizer
from training import batches
from training.data import rendered
from training.run import Run

CHAT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>"


@pytest.mark.parametrize(
    ("row", "mark"),
    [
        ({"text": CHAT}, "<|im_start|>"),
        ({"prompt": "<s>[INST] Hi [/INST]", "response": "Hello"}, "[INST]"),
        ({"messages": [{"role": "user", "content": "### Instruction:\nHi"}, {"role": "assistant", "content": "Yes"}]},
         "### Instruction:"),
        ({"chosen": f"{CHAT}!", "rejected": CHAT}, "<|im_start|>"),
        ({"prompt": INSTRUCT_TEMPLATE.format(instruction="Hi"), "response": "Hello"}, None),  # dolly_hhrlhf's
        ({"instruction": "Hi", "output": "Hello", "text": "### Instruction:\nHi"}, None),  # Alpaca's copy is not read
        ({"prompt": "Hi", "response": "Hello"}, None),
        ("no object", None),
    ],
)  # fmt: skip
def test_marks_are_found_in_what_is_trained(row: Any, mark: str | None) -> None:
    assert rendered.mark_in(row) == mark


def test_a_finetune_says_which_rows_and_how_many(
    small_run: Run, tokenizer: Tokenizer, tokenizer_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [{"prompt": "Hi", "response": "Hello"}, {"prompt": CHAT, "response": "Hello"}]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = dataclasses.replace(small_run, base=str(tokenizer_folder), model={})
    batches.load_data(run, tokenizer, str(rows))
    assert (
        "`rows.jsonl`: 1 of the first 2 rows are rendered already, `<|im_start|>` of ChatML first in `rows.jsonl` line "
        "2; they are trained as text inside the prompt style `instruct`"
    ) in caplog.text
    caplog.clear()
    rows.write_text(json.dumps(lines[0]))
    batches.load_data(run, tokenizer, str(rows))
    assert "rendered" not in caplog.text
