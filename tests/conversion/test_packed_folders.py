"""Folders packed by AWQ, GPTQ and bitsandbytes are inspected, converted and served with their real values' answers."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mpt.checkpoint
from conversion.convert import convert
from conversion.options import Options
from mpt import cli
from mpt.engine.local import LocalModel
from mpt.options import ModelOptions
from tests import packers
from tests.conversion.conftest import make, random_ids

AWQ = {"bits": 4, "group_size": 32, "quant_method": "awq", "version": "gemm", "zero_point": True}
GPTQ = {"bits": 4, "group_size": 32, "quant_method": "gptq", "desc_act": True, "sym": False}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
# What `mpt inspect` says of each: packing, bits, group size, tool.
SAID = {
    "awq": "8 matrices are packed as AWQ gemm, 4 bits in groups of 32 inputs (AutoAWQ); unpacked to float16",
    "gptq": "packed as GPTQ gptq, 4 bits in groups of 32 inputs, in act-order (AutoGPTQ's layout)",
    "int8": "packed as bitsandbytes int8, 8 bits, a scale for each row (bitsandbytes)",
    "nf4": "packed as bitsandbytes nf4, 4 bits in blocks of 64 values, scales quantised too (bitsandbytes)",
}
ACT_SCALES = {0: torch.linspace(0.5, 2, 256).half(), 1: torch.linspace(3, 0.25, 256).half()}


def write(folder: Path, kind: str) -> dict[str, Tensor]:
    """A packed folder at `folder`, AutoAWQ's activation scales in its layers; the real values in float64."""
    source = make(folder.with_name("source"), "mpt-7b")
    if kind == "awq":
        real = packers.write_packed(source, folder, AWQ, packers.awq_weight)
        stored = load_file(folder / "model.safetensors")
        names = {f"transformer.blocks.{layer}.ffn.act.scales": scales for layer, scales in ACT_SCALES.items()}
        save_file({**stored, **names}, folder / "model.safetensors")
        return real
    if kind == "gptq":
        return packers.write_packed(source, folder, GPTQ, packers.gptq_weight)
    if kind == "int8":
        return packers.write_packed(source, folder, INT8, lambda weight, _: packers.eight_bits(weight))
    return packers.write_packed(source, folder, NF4, lambda weight, _: packers.four_bits(weight, "nf4", 64, True))


def inspect(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["mpt", "inspect", str(folder), "--json"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("kind", list(SAID))
def test_a_packed_folder_is_inspected_converted_and_served(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "packed"
    real = write(packed, kind)
    real = {name: value.half().double() for name, value in real.items()}  # as the packages round them
    ids = random_ids(1, 40)[0]
    expected = packers.forward(real, ids, 4, ACT_SCALES if kind == "awq" else None)

    facts = inspect(packed, monkeypatch, capsys)
    assert SAID[kind] in facts["note"] and facts["dtype"] == "float16"

    report = convert(packed, tmp_path / "hf", Options(to="hf", dtype="float32"))
    assert report.is_good, report.render()
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())
    with torch.inference_mode():
        logits = mpt.checkpoint.load(tmp_path / "hf")(input_ids=ids[None]).logits[0].double()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * float(expected.std()))
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))

    with LocalModel(ModelOptions(str(packed), dtype="float32", device="cpu")) as served:
        answer = [token for delta in served.stream(ids.tolist(), 12) for token in delta.token_ids]
    text = ids.tolist()
    for token in answer:
        assert token == int(
            packers.forward(real, torch.tensor(text), 4, ACT_SCALES if kind == "awq" else None)[-1].argmax()
        )
        text.append(token)
    assert len(answer) >= 1


@pytest.mark.parametrize("to", ["gguf", "onnx", "fastertransformer"])
def test_a_packed_folder_converts_to_every_format_in_its_own_precision(to: str, tmp_path: Path) -> None:
    write(tmp_path / "packed", "awq")
    report = convert(tmp_path / "packed", tmp_path / "out", Options(to=to))
    assert report.is_good, report.render()
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["dtype"] == "float16"
