"""Damaged and malicious checkpoints: one clear error that names the file, nothing executed, nothing left behind."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion.convert import convert
from conversion.open import open_source
from conversion.options import Options
from mpt.errors import CheckpointNotFound, DamagedFile, MPTError, UserError
from tests.conversion.conftest import make

BLOCK = "transformer.blocks.0."


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def header_of(folder: Path) -> tuple[dict[str, Any], bytes]:
    data = (folder / "model.safetensors").read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def with_header(folder: Path, header: dict[str, Any], data: bytes, size: int | None = None) -> None:
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A checkpoint without a manifest, as foreign ones come."""
    folder = make(tmp_path / "source", "mpt-7b")
    (folder / "manifest.json").unlink()
    return folder


def refused(source: Path, match: str, tmp_path: Path, error: type[MPTError] = DamagedFile) -> None:
    for to in ("hf", "gguf"):
        with pytest.raises(error, match=match) as caught:
            convert(source, tmp_path / "out", Options(to=to))  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers(bare: Path, tmp_path: Path, value: float) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{BLOCK}ffn.up_proj.weight"][3, 3] = value

    refused(rewritten(bare, spoil), r"`transformer\.blocks\.0\.ffn\.up_proj\.weight` in `model.*` holds 1 ", tmp_path)


def test_missing_extra_and_misshapen_tensors(bare: Path, tmp_path: Path) -> None:
    whole = load_file(bare / "model.safetensors")
    name = f"{BLOCK}norm_1.weight"
    refused(rewritten(bare, lambda t: t.pop(name)), r"misses `transformer\.blocks\.0\.norm_1\.weight`", tmp_path)
    save_file({**whole, "extra": torch.ones(2)}, bare / "model.safetensors")
    refused(bare, "holds `extra`, unknown", tmp_path)
    save_file({**whole, name: torch.ones(7)}, bare / "model.safetensors")
    refused(bare, r"norm_1\.weight` in `model\.safetensors` is \[7\], the config makes it \[64\]", tmp_path)
    save_file({**whole, name: torch.ones(64, dtype=torch.uint8)}, bare / "model.safetensors")
    refused(bare, "no weights", tmp_path)
    save_file({**whole, "lm_head.weight": whole["transformer.wte.weight"] + 1}, bare / "model.safetensors")
    refused(bare, r"`lm_head\.weight` in `model\.safetensors` differs", tmp_path)


def test_headers_that_lie(bare: Path, tmp_path: Path) -> None:
    header, data = header_of(bare)
    for size in (2**63, 200_000_000, 10**6):
        with_header(bare, header, data, size)
        refused(bare, r"model\.safetensors` is not a whole safetensors file \(header of", tmp_path)
    first, second = (name for name in list(header)[1:3])
    overlapping = {**header, second: {**header[second], "data_offsets": header[first]["data_offsets"]}}
    overlapping[second]["shape"] = header[first]["shape"]
    with_header(bare, overlapping, data)
    refused(bare, "overlaps another tensor", tmp_path)
    beyond = {**header, first: {**header[first], "data_offsets": [10**12, 10**12 + 4 * 64]}}
    with_header(bare, beyond, data)
    refused(bare, "not a whole safetensors file", tmp_path)
    with_header(bare, header, data[:-100])
    refused(bare, "not a whole safetensors file", tmp_path)
    (bare / "model.safetensors").write_bytes(b"")
    refused(bare, "not a whole safetensors file", tmp_path)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "a/../../b"])
def test_an_index_that_points_elsewhere(bare: Path, tmp_path: Path, file: str) -> None:
    (tmp_path / "secret.safetensors").write_bytes((bare / "model.safetensors").read_bytes())
    names = load_file(bare / "model.safetensors")
    (bare / "model.safetensors").unlink()
    (bare / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))
    refused(bare, "points outside its folder", tmp_path)


def test_links_that_leave_the_folder(bare: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes((bare / "model.safetensors").read_bytes())
    (bare / "model.safetensors").unlink()
    (bare / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    refused(bare, "is a link to .* outside its folder", tmp_path)


def test_the_hubs_cache_may_link_to_its_blobs(bare: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--x--y"
    snapshot = cache / "snapshots" / "0123"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for n, path in enumerate(sorted(bare.iterdir())):
        path.rename(cache / "blobs" / str(n))
        (snapshot / path.name).symlink_to(os.path.relpath(cache / "blobs" / str(n), snapshot))
    convert(snapshot, tmp_path / "out", Options(to="hf"))


def test_archives_and_unknown_files(tmp_path: Path) -> None:
    for name in ("mpt.tar.gz", "mpt.zip", "mpt.tar"):
        (tmp_path / name).write_bytes(b"PK\x03\x04" * 9)
        with pytest.raises(UserError, match="is an archive; unpack it"):
            open_source(tmp_path / name)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointNotFound, match=r"is no checkpoint file.* \.pt .*\.gguf .*\.bin "):
        open_source(tmp_path / "notes.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointNotFound, match="holds no checkpoint"):
        open_source(tmp_path / "empty")
    (tmp_path / "empty" / "training_args.bin").write_bytes(b"PK\x03\x04" * 9)  # not GGML's, whose name it has
    with pytest.raises(CheckpointNotFound, match="holds no checkpoint"):
        open_source(tmp_path / "empty")
    (tmp_path / "empty" / "ggml-model.bin").write_bytes(b"lmgg" * 9)
    with pytest.raises(CheckpointNotFound, match=r"give the file, for example `.*ggml-model\.bin`"):
        open_source(tmp_path / "empty")
    (tmp_path / "x.pt").write_bytes(b"PK not a zip")
    with pytest.raises(DamagedFile, match="is damaged"):
        open_source(tmp_path / "x.pt")


@pytest.fixture
def gguf(tmp_path: Path) -> bytes:
    convert(make(tmp_path / "gguf-source", "mpt-7b"), tmp_path / "made", Options(to="gguf", verify=False))
    return (tmp_path / "made" / "model.gguf").read_bytes()


def test_gguf_counts_and_lengths_that_lie(gguf: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"

    def attempt(data: bytes, match: str) -> None:
        path.write_bytes(data)
        with pytest.raises(DamagedFile, match=match) as caught:
            convert(path, tmp_path / "out", Options(to="hf"))
        assert "bad.gguf" in str(caught.value) and not list(tmp_path.glob("out*"))

    def changed(at: int, value: int, form: str = "<Q") -> bytes:
        return gguf[:at] + struct.pack(form, value) + gguf[at + struct.calcsize(form) :]

    attempt(changed(4, 9, "<I"), "version 2 or 3")
    attempt(changed(8, 2**60), "entries, more than fit")  # tensors
    attempt(changed(16, 2**60), "entries, more than fit")  # keys
    attempt(changed(24, 2**60), "a text of")  # the first key's length
    tokens = gguf.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens")
    attempt(changed(tokens + 8, 2**60), "entries, more than fit")  # its array's length
    attempt(changed(tokens, 77, "<I"), "unknown kind 77")
    for n in (3, 100, 1000, len(gguf) // 2, len(gguf) - 1):
        path.write_bytes(gguf[:n])
        with pytest.raises((DamagedFile, CheckpointNotFound)):
            open_source(path)
    described = gguf.index(b"token_embd.weight") + len(b"token_embd.weight")
    attempt(changed(described, 9, "<I"), "has 9 dimensions")
    attempt(changed(described + 4, 2**61), "ends early")
    offset = described + 4 + 16 + 4
    attempt(changed(offset, 2**61), "ends early")
    second = gguf.index(b"blk.0.attn_norm.weight") + len(b"blk.0.attn_norm.weight") + 4 + 8 + 4
    attempt(changed(second, 0), "overlaps another tensor")
    architecture = gguf.index(b"general.architecture") + len(b"general.architecture") + 4 + 8
    path.write_bytes(gguf[:architecture] + b"xyz" + gguf[architecture + 3 :])
    with pytest.raises(MPTError, match="holds a `xyz`"):
        open_source(path)


def test_every_cut_of_a_header_is_an_error_of_ours(gguf: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    for n in range(4, 600, 7):
        path.write_bytes(gguf[:n])
        with pytest.raises(MPTError):
            open_source(path)


@pytest.fixture
def ft(tmp_path: Path) -> Path:
    source = make(tmp_path / "ft-source", "mpt-7b")
    convert(source, tmp_path / "ft", Options(to="fastertransformer", tensor_parallel=2, verify=False))
    return tmp_path / "ft"


def test_fastertransformer_files_that_are_missing_short_or_long(ft: Path, tmp_path: Path) -> None:
    path = ft / "2-gpu" / "model.layers.1.mlp.dense_h_to_4h.weight.1.bin"
    whole = path.read_bytes()
    for data in (whole[:-2], whole + b"\0\0", b""):
        path.write_bytes(data)
        with pytest.raises(DamagedFile, match=rf"{path.name}` has {len(data)} bytes"):
            convert(ft, tmp_path / "out", Options(to="hf"))
    path.unlink()
    with pytest.raises(DamagedFile, match=f"has no `{path.name}`"):
        convert(ft, tmp_path / "out", Options(to="hf"))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("[gpt]", "[llama]", "no FasterTransformer configuration"),
        ("weight_data_type = fp32", "weight_data_type = fp8", "weight_data_type `fp8`"),
        ("head_num = 4", "head_num = four", "head_num `four`"),
        ("num_layer = 2", "num_layer = -2", "num_layer -2"),
        ("num_layer = 2", "num_layer = 3", "n_layers 2"),
    ],
)
def test_fastertransformer_configurations_that_lie(ft: Path, tmp_path: Path, old: str, new: str, match: str) -> None:
    ini = ft / "2-gpu" / "config.ini"
    ini.write_text(ini.read_text().replace(old, new))
    with pytest.raises(DamagedFile, match=match):
        convert(ft, tmp_path / "out", Options(to="hf"))


def test_an_interrupted_conversion_leaves_nothing(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(done: int, of: int) -> None:
        if done > of // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(bare, tmp_path / "out", Options(to="hf"), interrupt)
    assert not list(tmp_path.glob("out*"))
