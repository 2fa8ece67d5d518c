"""GGML `.bin` files, written here by the published rules of ggml's MPT example, rustformers' llm and gpt4all.

Blocks of today's version are quantised by the `gguf` package. Those of versions 0 and 1 are packed here, by the
layouts of ggml in May 2023. Expected logits are a float64 forward of the values that were packed.
"""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import mpt.checkpoint
from conversion.convert import convert
from conversion.open import open_source
from conversion.options import Options
from mpt.cli import app
from mpt.errors import DamagedFile
from tests.conversion import float64
from tests.conversion.conftest import make, random_ids

NUMBERS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8}  # of tensors
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9}
MAGICS = {"ggml": 0x67676D6C, "ggmf": 0x67676D66, "ggjt": 0x67676A74, "gpt4all": 0x67676D6D}


def packed(values: np.ndarray, kind: str, version: int) -> tuple[bytes, np.ndarray]:
    """A matrix as bytes, and the values that they stand for."""
    if kind in ("F32", "F16"):
        array = values.astype({"F32": "<f4", "F16": "<f2"}[kind])
        return array.tobytes(), array.astype(np.float32)
    if version == 2:
        data = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
        return data.tobytes(), gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    found, stands_for = b"", []
    for block in values.reshape(-1, 32):
        data, numbers = packed_block(block, kind, version)
        found += data
        stands_for.append(numbers)
    return found, np.array(stands_for, np.float32).reshape(values.shape)


def packed_block(x: np.ndarray, kind: str, version: int) -> tuple[bytes, np.ndarray]:
    """32 values: scales in float32 but for Q5, and of version 0 neighbours in a byte."""
    scale = "<f2" if kind.startswith("Q5") else "<f4"
    if kind == "Q8_0":
        d = np.float32(np.abs(x).max() / 127)
        q = np.rint(x / d).astype(np.int8)
        return d.astype(scale).tobytes() + q.tobytes(), d * q.astype(np.float32)
    n_bits, middle = int(kind[1]), 2 ** (int(kind[1]) - 1)
    has_minimum = kind.endswith("_1")
    m = np.float32(x.min() if has_minimum else 0).astype(scale).astype(np.float32)
    d = np.float32((x.max() - x.min()) / (2**n_bits - 1) if has_minimum else np.abs(x).max() / (middle - 1))
    d = d.astype(scale).astype(np.float32)
    q = np.clip(np.rint((x - m) / d) + (0 if has_minimum else middle), 0, 2**n_bits - 1).astype(np.uint8)
    data = d.astype(scale).tobytes() + (m.astype(scale).tobytes() if has_minimum else b"")
    if n_bits == 5:
        data += sum(int(bit) << i for i, bit in enumerate(q >> 4)).to_bytes(4, "little")
    low = q & 15
    first, second = (low[0::2], low[1::2]) if version == 0 else (low[:16], low[16:])
    data += (first | second << 4).astype(np.uint8).tobytes()
    numbers = q.astype(np.float32) - (0 if has_minimum else middle)
    return data, d * numbers + m


def write(
    path: Path, folder: Path, layout: str = "ggml", kind: str = "F16", version: int = 2, says_version: bool = True
) -> dict[str, torch.Tensor]:
    """Writes a file; the values that its tensors stand for."""
    config = mpt.checkpoint.read_config(folder)
    attention = config.attention
    clip = attention["clip_qkv"] or 0.0
    ints = [config.d_model, config.max_seq_len, config.n_heads, config.n_layers, config.vocab_size]
    if layout == "gpt4all":
        ints = [config.vocab_size, config.max_seq_len, config.n_layers, config.n_heads, config.d_model]
    file_type = FILE_TYPES[kind] + 1000 * (version if says_version and kind[0] == "Q" else 0)
    data = struct.pack("<I", MAGICS[layout])
    if layout in ("ggmf", "ggjt"):
        data += struct.pack("<I", 1 if layout == "ggmf" else version + 1)
    data += struct.pack("<5i2fi", *ints, attention["alibi_bias_max"], clip, file_type)
    if layout == "gpt4all":
        data += struct.pack("<I", config.vocab_size)
    for n in range(config.vocab_size):
        token = f"token {n}".encode()
        is_special = layout == "gpt4all" and n < 2
        data += struct.pack("<I", len(token) | (1 << 31 if is_special else 0)) + token
        data += struct.pack("<f", 0.0) if layout in ("ggmf", "ggjt") else b""
    stands_for = {}
    for name, tensor in mpt.checkpoint.load(folder, dtype=torch.float32).state_dict().items():
        if name == "lm_head.weight":
            continue
        its_kind = kind if tensor.dim() == 2 and not (layout == "gpt4all" and "wte" in name) else "F32"
        body, values = packed(tensor.numpy(), its_kind, version)
        stands_for[name] = torch.from_numpy(values.astype(np.float32).copy())
        shape = tensor.shape[::-1]
        data += struct.pack(f"<3i{len(shape)}i", len(shape), len(name), NUMBERS[its_kind], *shape) + name.encode()
        data += b"\0" * (-len(data) % 32) if layout == "ggjt" else b""
        data += body
    path.write_bytes(data)
    return stands_for


CASES = [("ggml", kind, 2) for kind in NUMBERS] + [
    ("ggml", "Q4_0", 1), ("ggmf", "Q5_1", 2), ("ggjt", "Q4_0", 2), ("ggjt", "Q8_0", 1), ("ggjt", "Q5_0", 0),
    ("gpt4all", "F16", 0), ("gpt4all", "Q4_0", 0), ("gpt4all", "Q4_1", 0), ("gpt4all", "Q5_1", 0),
    ("gpt4all", "Q8_0", 0),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "kind", "version"), CASES)
def test_every_layout_and_type_has_its_values(layout: str, kind: str, version: int, tmp_path: Path) -> None:
    attention = {"alibi_bias_max": 16, "clip_qkv": 0.7} if kind == "Q4_0" else {"alibi_bias_max": 8}
    source = make(tmp_path / "source", "mpt-7b", attn_config=attention)
    values = write(tmp_path / "model.bin", source, layout, kind, version)
    convert(tmp_path / "model.bin", tmp_path / "out", Options(to="hf", dtype="float32", verify=False))
    ids = random_ids(1, 40)
    with torch.no_grad():
        found = mpt.checkpoint.load(tmp_path / "out")(ids).logits[0].double()
    clip = attention.get("clip_qkv")
    expected = float64.logits(values, ids[0].tolist(), 4, float(attention["alibi_bias_max"]), clip)
    assert (found - expected).abs().max() < 1e-4 * max(1.0, float(expected.std()))


def test_inspect_and_convert_need_no_other_argument(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "mpt-7b")
    write(tmp_path / "model.bin", source, "ggjt", "Q4_0")
    said = CliRunner().invoke(app, ["inspect", str(tmp_path / "model.bin")])
    assert said.exit_code == 0, said.output
    assert "rustformers' llm (`ggjt`), tensors in F32, Q4_0, quantisation version 2" in said.output
    assert "has no tokenizer; give --tokenizer FOLDER" in said.output
    command = ["convert", str(tmp_path / "model.bin"), str(tmp_path / "out"), "--to", "hf"]
    assert CliRunner().invoke(app, command).exit_code == 0
    opened = open_source(tmp_path / "model.bin", source)
    assert opened.tokenizer is not None and not any("tokenizer" in note for note in opened.notes)


def test_a_file_without_a_version_is_read_only_where_its_sizes_tell(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "mpt-7b")
    path = tmp_path / "model.bin"
    write(path, source, "ggml", "Q4_0", 2, says_version=False)
    open_source(path)
    for kind, version in (("Q4_0", 0), ("Q5_0", 2)):
        write(path, source, "ggml", kind, version, says_version=False)
        with pytest.raises(DamagedFile, match="does not say the version of its quantisation"):
            open_source(path)


def test_what_is_damaged_is_refused_in_one_line(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "mpt-7b")
    path = tmp_path / "model.bin"
    write(path, source)
    whole = path.read_bytes()
    name = b"transformer.blocks.0.norm_1.weight"
    at = whole.index(name)

    def refused(data: bytes, match: str) -> None:
        path.write_bytes(data)
        with pytest.raises(DamagedFile, match=match) as caught:
            convert(path, tmp_path / "out", Options(to="hf"))
        assert "\n" not in str(caught.value) and not list(tmp_path.glob("out*"))

    def changed(position: int, value: int) -> bytes:
        return whole[:position] + struct.pack("<i", value) + whole[position + 4 :]

    refused(changed(at - 8, 5), r"norm_1\.weight` in .* has GGML's type 5 \(Q4_3\)")
    refused(changed(at - 8, 99), "has GGML's type 99; supported: F32")
    refused(changed(at - 4, 1 << 30), "ends early")
    refused(changed(at - 16, 7), "a tensor of 7 dimensions")
    refused(changed(36, 1 << 30), "ends early")  # the first token's length
    refused(changed(4, -64), "is no GGML file of an MPT")
    refused(changed(16, 1 << 23), "says it has 8388608 layers")
    refused(changed(24, 1), "is of the first layout of ggml's example")
    refused(changed(20, 99), "is damaged|ends early|holds|misses")  # fewer tokens than there are
    refused(whole.replace(name, name[:-1] + b"x", 1), "misses|holds")
    tensor = whole[at - 16 : at + len(name) + 256]
    refused(whole + tensor, "holds `transformer.blocks.0.norm_1.weight` twice")
    write(path, source, "ggjt", "Q4_0")
    data = path.read_bytes()
    refused(
        data[:36] + struct.pack("<i", 1002) + data[40:], "has version 1 of the quantisation in a layout of version 2"
    )


@pytest.mark.parametrize("layout", ["ggml", "ggjt", "gpt4all"])
def test_every_cut_is_an_error_of_ours(layout: str, tmp_path: Path) -> None:
    write(tmp_path / "whole.bin", make(tmp_path / "source", "mpt-7b"), layout)
    whole = (tmp_path / "whole.bin").read_bytes()
    for n in [*range(4, 200, 3), *range(200, len(whole), len(whole) // 25), len(whole) - 1]:
        (tmp_path / "cut.bin").write_bytes(whole[:n])
        with pytest.raises(DamagedFile):
            open_source(tmp_path / "cut.bin")
