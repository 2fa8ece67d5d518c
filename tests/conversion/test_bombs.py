"""Files that are small and ask for much, and files that are too large: one line of error, before memory is touched."""

import gzip
import json
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from conversion.formats import fastertransformer
from conversion.open import open_source
from mpt.bounded import parse_yaml
from mpt.chat_template import read_source
from mpt.checkpoint import load
from mpt.checkpoint_text import open_tokenizer
from mpt.engine.room import room_for
from mpt.errors import DamagedFile, MPTError, UserError
from mpt.lora import open_lora
from mpt.memory import Memory
from mpt.options import ModelOptions
from serving.cluster import local
from tests import sparse
from tests.containers import container
from training.data import files, mds, streams
from training.run import Run

HUGE = 5_000_000_000  # bytes, which no disk has to hold: a hole


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return sparse.make(tmp_path / "model", d_model=64, n_heads=4, n_layers=2, vocab_size=2048)


def with_config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def with_text(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def with_hole(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with (folder / name).open("ab") as file:
            file.truncate(HUGE)

    return change


def with_header(header: str) -> Callable[[Path], None]:
    """A safetensors file of this header and no data."""
    text = header.encode()
    return lambda folder: (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text) and None


def with_pickle(folder: Path) -> None:
    """A torch file whose names unpack to 65 MB."""
    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 65_000_000)


def open_all(options: ModelOptions) -> None:
    """As a server does before it reads weights."""
    open_tokenizer(options.root)
    room_for("m", options)
    load(options.root)


DEEP = "[" * 200_000 + "]" * 200_000
BOMBS = {
    "layers": (with_config(n_layers=10**9), "`n_layers` must be a whole number of 1 to 1024, not `1000000000`"),
    "width": (with_config(d_model=10**9), "`d_model` must be a whole number of 1 to 262144"),
    "heads": (with_config(n_heads=10**9), "`n_heads` must be a whole number of 1 to 8192"),
    "vocabulary": (with_config(vocab_size=10**12), "`vocab_size` must be a whole number"),
    "context": (with_config(max_seq_len=10**12), "`max_seq_len` must be a whole number"),
    "ratio": (with_config(expansion_ratio=10**9), "`expansion_ratio` must be a number above 0 and at most 1024"),
    "layers that are not there": (with_config(n_layers=1000), "misses"),
    "a long value": (with_config(norm_type="x" * 1_000_000), r"`norm_type` is `'x+\.\.\.x+'`"),
    "depth": (with_text("config.json", DEEP), "nested too deeply"),
    "depth of a value": (with_config(init_config=json.loads("[" * 100 + "]" * 100)), "nested more than 64 deep"),
    "config of 5 GB": (with_hole("config.json"), "has 5000000000 bytes; such a file has at most 32000000"),
    "index of 5 GB": (with_hole("model.safetensors.index.json"), "has 5000000000 bytes"),
    "tokenizer of 5 GB": (with_hole("tokenizer.json"), "has 5000000000 bytes; such a file has at most 256000000"),
    "tokenizer's depth": (with_text("tokenizer.json", DEEP), "not a readable tokenizer.json"),
    "a negative shape": (
        with_header('{"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}'), "does not fit in the file"
    ),
    "a shape beyond 64 bits": (
        with_header('{"a": {"dtype": "F32", "shape": [9000000000000000000, 9], "data_offsets": [0, 4]}}'),
        "does not fit in the file",
    ),
    "a header's depth": (with_header(DEEP), "nested too deeply"),
    "a pickle that grows": (with_pickle, "has 65000000 bytes, at most 64000000"),
}  # fmt: skip


OF_NO_USE_HERE = ("ratio", "a long value")  # what a file says that is whole, but not computed here


@pytest.mark.parametrize("name", BOMBS)
def test_a_checkpoint_is_refused_in_one_line_of_its_own(name: str, folder: Path) -> None:
    change, said = BOMBS[name]
    change(folder)
    served = ModelOptions(str(folder), device="cpu")
    for read in (lambda: (open_tokenizer(folder), load(folder)), lambda: open_source(folder), lambda: open_all(served)):
        with pytest.raises(MPTError) as caught:
            read()
        assert caught.value.exit_code == (2 if name in OF_NO_USE_HERE else 3)
        assert re.search(said, str(caught.value)) and "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_a_command_ends_with_its_code_in_a_small_container(folder: Path) -> None:
    """5 GB of config, in 600 MB."""
    with_hole("config.json")(folder)
    with container(memory=600_002_560) as limited:
        command = limited.command(sys.executable, "-m", "mpt", "serve", "--port", "0", "--model", f"m={folder}")
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert limited.kills() == 0
    assert done.returncode == 3 and "has 5000000000 bytes" in done.stderr.splitlines()[-1], done.stderr


@pytest.mark.parametrize("rank", [0, 10**9, 1e400])
def test_an_adapters_rank(tmp_path: Path, rank: float) -> None:
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 1}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(DamagedFile, match=r"gives rank|no adapter's configuration"):
        open_lora(tmp_path)
    (tmp_path / "adapter_config.json").write_text(DEEP)
    with pytest.raises(DamagedFile, match="nested too deeply"):
        open_lora(tmp_path)


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [LAUGHS, "a: &a [*a]", "[" * 1500 + "]" * 1500, "x" * 1_000_001],
    ids=["a billion laughs", "itself", "depth", "size"],
)
def test_a_config_in_yaml_that_grows(tmp_path: Path, text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        parse_yaml(text)
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="is no YAML"):
        local.run(path, None, None, 1.0)


def test_aliases_may_be_used() -> None:
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: *a\n") == {
        "a": {"x": 1},
        "b": {"x": 1, "y": 2},
        "c": {"x": 1},
    }


def test_a_row_that_unpacks_to_more_than_a_row_may_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_LINE_BYTES", 1_000_000)
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wb") as file:
        file.write(b'{"text": "a"}\n{"text": "' + b"x" * 2_000_000 + b'"}\n')
    with pytest.raises(UserError, match="line 2 is longer than the 1000000 bytes that a row may have"):
        list(files.rows(str(path)))


def test_a_shard_of_snappy_that_claims_too_much(tmp_path: Path) -> None:
    (tmp_path / "shard.mds.snappy").write_bytes(b"\xff\xff\xff\xff\x0f" + b"\0" * 100)
    claims = mds.ShardInfo(1, "shard.mds.snappy", 105, {}, "snappy", (), HUGE)
    with pytest.raises(DamagedFile, match="cannot unpack to the 5000000000 bytes that its index says"):
        streams._decompress(tmp_path / "shard.mds.snappy", tmp_path / "shard.mds", claims)


def test_other_files_that_are_read_whole_have_a_size(tmp_path: Path) -> None:
    with_hole("big")(tmp_path)
    for read in (read_source, Run.read, lambda path: fastertransformer._section(path)):
        with pytest.raises(DamagedFile, match="has 5000000000 bytes"):
            read(tmp_path / "big")


def test_a_file_that_is_read_whole_must_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "memory", lambda: Memory(3000, 9_000_000, "the container's"))
    path = tmp_path / "text.txt"
    path.write_text("a line\n" * 200)
    with pytest.raises(MPTError, match=r"more than a third of the 0\.00 GB that are free of the container's 0\.01 GB"):
        list(files.rows(str(path)))


def test_a_torch_file_of_ours_passes(tmp_path: Path) -> None:
    from mpt.checkpoint import describe_torch_file

    torch.save({"a": torch.ones(2)}, tmp_path / "x.bin")
    assert describe_torch_file(tmp_path / "x.bin")["a"].shape == (2,)
