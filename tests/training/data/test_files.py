"""Files of every kind give the same rows; a bad byte or line costs itself and is named."""

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import zstandard

from mpt.errors import UserError
from mpt.tokenizer import Tokenizer
from training import datasets
from training.data import files
from training.data.files import Document, Unreadable

ROWS = [{"prompt": "Zwölf?", "response": "12"}, {"prompt": 'A, "B"\nor C', "response": "C"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = 'prompt,response\r\nZwölf?,12\r\n"A, ""B""\nor C",C\r\n'


def rows_of(path: Path, data: bytes) -> list[Any]:
    path.write_bytes(data)
    return [row for _, row in files.rows(str(path))]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", LINES.encode()),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("a.jsonl", LINES.encode("utf-16")),
        ("a.jsonl", LINES.encode("utf-32")),
        ("a.jsonl", LINES.replace("\n", "\r\n").encode()),
        ("a.json", json.dumps(ROWS).encode()),
        ("a.json", b"\xef\xbb\xbf" + json.dumps(ROWS, indent=1).encode()),
        ("a.json", json.dumps({"version": "1", "data": ROWS}).encode()),
        ("a.json", LINES.encode()),
        ("a.csv", CSV.encode()),
        ("a.csv", b"\xef\xbb\xbf" + CSV.encode()),
        ("a.csv", CSV.encode("utf-16")),
        ("a.tsv", 'prompt\tresponse\nZwölf?\t12\n\n"A, ""B""\nor C"\tC\n'.encode()),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("a.jsonl.bz2", bz2.compress(LINES.encode())),
        ("a.jsonl.xz", lzma.compress(LINES.encode())),
        ("a.csv.zst", zstandard.compress(CSV.encode())),
        ("a.jsonl.zst", b"".join(zstandard.compress(line.encode()) for line in LINES.splitlines(keepends=True))),
    ],
    # The bytes in a name would differ where a format holds the time, and workers must collect the same names.
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str, data: bytes) -> None:
    assert rows_of(tmp_path / name, data) == ROWS


def test_arrow_files_and_streams_are_read(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    for make in (pyarrow.ipc.new_stream, pyarrow.ipc.new_file):
        with make(tmp_path / "a.arrow", table.schema) as writer:
            writer.write_table(table)
        assert [row for _, row in files.rows(str(tmp_path / "a.arrow"))] == ROWS
    (tmp_path / "a.arrow").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="no arrow file"):
        list(files.rows(str(tmp_path / "a.arrow")))


@pytest.mark.parametrize(
    ("name", "data", "where", "reason"),
    [
        ("a.jsonl", b'{"prompt": "a", "response": "b\xff"}\n', "`a.jsonl` line 2", "byte 0xff at 31 is not UTF-8"),
        ("a.jsonl", b"{nothing\n", "`a.jsonl` line 2", "it is not JSON"),
        ("a.csv", b"a,b\xe4\n", "`a.csv` line 3", "byte 0xe4 is not UTF-8"),
        ("a.csv", b"a,b,c\n", "`a.csv` line 3", "it has 3 fields, the header has 2"),
    ],
)
def test_one_bad_byte_costs_its_own_line(
    tokenizer: Tokenizer, tmp_path: Path, name: str, data: bytes, where: str, reason: str
) -> None:
    good = b'{"prompt": "a", "response": "b"}\n' if name == "a.jsonl" else b"a,b\n"
    head = b"" if name == "a.jsonl" else b"prompt,response\n"
    path = tmp_path / name
    path.write_bytes(head + good + data + good)
    found = list(files.rows(str(path)))
    assert [row for _, row in found if not isinstance(row, Unreadable)] == [{"prompt": "a", "response": "b"}] * 2
    ((place, bad),) = [(place, row) for place, row in found if isinstance(row, Unreadable)]
    assert place == where and reason in bad.reason
    with pytest.raises(UserError, match="1 of 3 rows") as caught:
        datasets.load(str(path), tokenizer, "none", 100, 0)
    assert f"{where}: {bad.reason}" in str(caught.value)
    assert datasets.load(str(path), tokenizer, "none", 100, 0, max_bad_rows=1).n_samples == 2
    assert datasets.load(str(path), tokenizer, "none", 100, 0, max_bad_rows=0.34).n_samples == 2


def test_a_documents_bad_byte_is_named_by_its_line(tmp_path: Path) -> None:
    assert rows_of(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo") == [Document("one\ntwo")]
    assert rows_of(tmp_path / "b.txt", b"one\ntwo\xff\n") == [Unreadable("line 2: byte 0xff is not UTF-8")]
    with pytest.raises(UserError, match=r"`b\.txt`: line 2: byte 0xff"):
        list(files.documents([str(tmp_path / "b.txt")]))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.xz", "a.jsonl.zst", "a.parquet"])
def test_a_damaged_file_is_one_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        list(files.rows(str(tmp_path / name)))


def test_a_folder_of_text_files_is_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = ["it was the best of times " * 3, "it was the worst of times " * 2]
    for n, text in enumerate(texts):
        (tmp_path / f"{n}.txt").write_text(text)
    data = datasets.load(str(tmp_path), tokenizer, "instruct", 16, 0)
    assert data.n_samples is not None
    by_hand = []
    for text in texts:
        ids = [*tokenizer.encode(text), tokenizer.eos_id]
        by_hand += [tuple(ids[n : n + 16]) for n in range(0, len(ids), 16) if len(ids) - n > 1]
    found = [data.sample(n) for n in range(data.n_samples)]
    assert sorted(tuple(sample.ids) for sample in found) == sorted(by_hand)
    assert all(all(sample.learned) for sample in found)
    assert datasets.style_of(str(tmp_path)) == ("none", "`0.txt` is plain text")


def test_the_name_of_a_run_has_no_colon_and_no_ending() -> None:
    names = {"sets/my.v2.jsonl.gz": "my.v2", "a/b.csv.xz": "b", "owner/name:train_sft": "name-train_sft"}
    assert {source: files.stem(source) for source in names} == names
