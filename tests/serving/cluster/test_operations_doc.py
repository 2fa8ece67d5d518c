"""docs/operations.md says every option there is, and its arithmetic is the models'."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from mpt import MPTConfig
from serving.cluster.options import ClusterOptions, ReplicaOptions

TEXT = (Path(__file__).parents[3] / "docs" / "operations.md").read_text(encoding="utf-8")
# d_model, heads and layers as published (hub configs; reference: MosaicML's launch posts)
SHAPES = {"mpt-1b-redpajama-200b": (2048, 16, 24), "mpt-7b": (4096, 32, 32), "mpt-30b": (7168, 64, 48)}
ROWS = re.findall(
    r"^\| (mpt-[\w-]+)(.*?) \| ([\d,]+)( each)? \| [^|]+ \| [^|]+ \| ([\d.]+) GB[^|]*\| ([\d,]+) \| (.*?) \| (.*?) \|$",
    TEXT,
    re.M,
)


@pytest.mark.parametrize("options", [ReplicaOptions, ClusterOptions])
def test_every_option_is_told(options):
    told = set(re.findall(r"`(\w+)`", TEXT))
    assert {field.name for field in fields(options)} <= told


def test_the_arithmetic_of_the_table():
    assert len(ROWS) == 6
    for name, _, per_token, halved, room_gb, tokens, short, whole in ROWS:
        base = "mpt-7b" if name.startswith("mpt-7b") else name
        d_model, n_heads, n_layers = SHAPES[base]
        bytes_per_token = MPTConfig(d_model=d_model, n_heads=n_heads, n_layers=n_layers).kv_bytes_per_token
        bytes_per_token //= 2 if halved else 1
        n_tokens = int(float(room_gb) * 1e9 / bytes_per_token)
        assert (int(per_token.replace(",", "")), int(tokens.replace(",", ""))) == (bytes_per_token, n_tokens), name
        if short != "-":
            assert (int(short), int(whole)) == (n_tokens // 768, n_tokens // 2048), name
        else:
            assert whole == f"{n_tokens // 65536} book"


def test_every_row_of_the_table_of_deaths_names_a_test_that_is_there():
    section = TEXT.partition("### When a part dies")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    tests = Path(__file__).with_name("test_deaths.py").read_text(encoding="utf-8")
    assert len(rows) == 10
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py::)?(test_\w+)`", row)
        assert named and all(file or f"def {name}(" in tests for file, name in named), row
