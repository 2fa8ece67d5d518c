"""A byte order mark, which editors on Windows put before a text, is passed over in every file that a user writes."""

import codecs
import json
from pathlib import Path

from serving.auth import Keys
from serving.batch.lines import check, read
from serving.bench.load import read_dataset


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    body = {"model": "mpt-tiny", "prompt": "Hi"}
    lines = {
        "keys.txt": "ada: secret",
        "prompts.jsonl": json.dumps(body),
        "requests.jsonl": json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}),
    }
    for name, line in lines.items():
        (tmp_path / name).write_bytes(codecs.BOM_UTF8 + line.encode() + b"\n")
    headers = {b"authorization": "Bearer secret"}
    assert Keys([], tmp_path / "keys.txt").client(headers).name == "ada"  # type: ignore[arg-type]
    assert read_dataset(tmp_path / "prompts.jsonl", chat=False) == ["Hi"]
    assert check(tmp_path / "requests.jsonl") == (1, [])
    assert [line.custom_id for line in read(tmp_path / "requests.jsonl")] == ["a"]
