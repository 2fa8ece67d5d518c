"""Folders that AutoAWQ, GPTQ tools and bitsandbytes packed load with their real values; broken ones are refused."""

import contextlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mpt
from mpt import checkpoint
from mpt.config import MPTConfig
from mpt.errors import DamagedFile, MPTError
from mpt.transformers_model import MPTForCausalLM
from tests import packers
from tests.mpt.conftest import DataFile

AWQ = {"bits": 4, "group_size": 32, "quant_method": "awq", "version": "gemm", "zero_point": True}
GPTQ = {"bits": 4, "group_size": 32, "quant_method": "gptq", "desc_act": True, "sym": False}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
NF4 = {"quant_method": "bitsandbytes", "load_in_8bit": False, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FIRST = "transformer.blocks.0.attn.Wqkv"


def eight_bits(weight: Tensor, number: int) -> tuple[packers.Parts, Tensor]:
    return packers.eight_bits(weight)


def nf4(weight: Tensor, number: int) -> tuple[packers.Parts, Tensor]:
    return packers.four_bits(weight, "nf4", 64, nested=True)


KINDS: dict[str, tuple[dict[str, Any], Any]] = {
    "awq": (AWQ, packers.awq_weight), "gptq": (GPTQ, packers.gptq_weight), "int8": (INT8, eight_bits), "nf4": (NF4, nf4)
}  # fmt: skip


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = MPTConfig(d_model=64, n_heads=4, n_layers=2, vocab_size=97, max_seq_len=64)
    return mpt.save(MPTForCausalLM(config), tmp_path_factory.mktemp("source") / "model")


def write(source: Path, folder: Path, kind: str) -> dict[str, Tensor]:
    return packers.write_packed(source, folder, *KINDS[kind])


@pytest.mark.parametrize("kind", list(KINDS))
def test_packed_folders_load_with_their_real_values(
    source: Path, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    real = write(source, tmp_path / "packed", kind)
    with caplog.at_level(logging.INFO, "mpt"):
        model = mpt.load(tmp_path / "packed")
    assert model.dtype == torch.float16
    found = dict(model.named_parameters())
    assert found.keys() == real.keys()
    for name, values in real.items():
        assert torch.equal(found[name].detach(), values.half()), name
    # 2 layers of 64 x (192 + 64 + 256 + 256) weights, 2 bytes each.
    assert "8 matrices are packed" in caplog.text and "unpacked to float16 they take 0.000 GB" in caplog.text
    wider = dict(mpt.load(tmp_path / "packed", dtype=torch.bfloat16).named_parameters())
    assert torch.equal(wider[f"{FIRST}.weight"].detach(), real[f"{FIRST}.weight"].half().bfloat16())


def test_bin_files_and_other_prefixes_load_too(source: Path, tmp_path: Path) -> None:
    real = write(source, tmp_path / "packed", "gptq")
    file = tmp_path / "packed" / "model.safetensors"
    torch.save({f"model.{name}": value for name, value in load_file(file).items()}, file.with_name("pytorch_model.bin"))
    file.unlink()
    found = dict(mpt.load(tmp_path / "packed").named_parameters())
    assert torch.equal(found[f"{FIRST}.weight"].detach(), real[f"{FIRST}.weight"].half())


def test_a_folder_of_autogptq_loads(source: Path, tmp_path: Path) -> None:
    """Its own file names, no `quantization_config`, biases of zeros, and from before act-order no g_idx."""

    def pack(weight: Tensor, number: int) -> tuple[packers.Parts, Tensor]:
        groups = [i // 32 for i in range(weight.shape[1])]
        codes, zeros, scales = packers.rounded(weight, 8, groups)
        parts = packers.gptq(codes, zeros, scales, None, 8, minus_one=True)
        parts["bias"] = torch.zeros(len(weight)).half()
        return parts, packers.real_values(codes, zeros, scales, groups)

    folder = tmp_path / "packed"
    real = packers.write_packed(source, folder, {}, pack)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MPTError, match=r"Wqkv.qweight.*is packed, but nothing says how"):
        mpt.load(folder)
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 8, "group_size": 32, "desc_act": False}))
    file = (folder / "model.safetensors").rename(folder / "gptq_model-8bit-32g.safetensors")
    found = dict(mpt.load(folder).named_parameters())
    assert torch.equal(found[f"{FIRST}.weight"].detach(), real[f"{FIRST}.weight"].half())
    save_file({**load_file(file), f"{FIRST}.bias": torch.ones(192).half()}, file)
    with pytest.raises(DamagedFile, match=r"holds 1 bias that its config denies, `.*Wqkv\.bias`"):
        mpt.load(folder)


def test_autoawqs_scaled_activation_is_folded_exactly(source: Path, tmp_path: Path) -> None:
    """down_proj(gelu(x) / s): its columns are divided by s, in float32."""
    real = write(source, tmp_path / "packed", "awq")
    file = tmp_path / "packed" / "model.safetensors"
    stored = load_file(file)
    scales = torch.linspace(0.3, 3, 256).half()
    save_file({**stored, "transformer.blocks.1.ffn.act.scales": scales}, file)
    found = dict(mpt.load(tmp_path / "packed", dtype=torch.float32).named_parameters())
    name = "transformer.blocks.{}.ffn.down_proj.weight"
    assert torch.equal(found[name.format(0)].detach().double(), real[name.format(0)].half().double())
    exact = real[name.format(1)].half().double() / scales.double()
    torch.testing.assert_close(found[name.format(1)].detach().double(), exact, rtol=2**-24, atol=0)
    save_file({**stored, "transformer.blocks.1.ffn.act.scales": torch.zeros(256)}, file)
    with pytest.raises(DamagedFile, match=r"blocks.1.ffn.act.scales.*holds 0"):
        mpt.load(tmp_path / "packed")
    save_file({**stored, "transformer.blocks.1.ffn.act.scales": torch.ones(64)}, file)
    with pytest.raises(DamagedFile, match=r"blocks.1.ffn.act.scales.*\[64\].*\[256\]"):
        mpt.load(tmp_path / "packed")


def test_the_published_awq_config_opens(data_file: DataFile) -> None:
    raw = json.loads(data_file("copies/mpt-7b-8k-chat-awq.config.json").read_text())
    config = MPTConfig.from_dict(raw)
    assert config.dtype == torch.bfloat16 and "quantization_config" not in config.to_dict()


def change(name: str, to: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda stored: {**stored, name: to(stored[name])}


def drop(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda stored: {key: value for key, value in stored.items() if key != name}


STATE = f"{FIRST}.weight.quant_state.bitsandbytes__nf4"


def state(**changes: Any) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def changed(value: Tensor) -> Tensor:
        text = json.dumps({**json.loads(bytes(value.tolist())), **changes})
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    return change(STATE, changed)


@pytest.mark.parametrize(
    ("kind", "damage", "words"),
    [
        ("awq", drop(f"{FIRST}.scales"), r"`transformer.blocks.0.attn.Wqkv.scales` is missing"),
        ("awq", drop(f"{FIRST}.qweight"), r"Wqkv.(qzeros|scales)` in `model.safetensors` belongs to no packed weight"),
        ("awq", change(f"{FIRST}.qweight", lambda t: t[:32].clone()), r"Wqkv.scales.*\[2, 192\].*\[1, 192\]"),
        ("awq", change(f"{FIRST}.qweight", lambda t: t.long()), r"Wqkv.qweight.*int64.*matrix of int32"),
        ("awq", change(f"{FIRST}.qzeros", lambda t: t.float()), r"Wqkv.qzeros.*float32.*int32"),
        ("awq", lambda s: {**s, f"{FIRST}.weight": torch.ones(192, 64)}, r"Wqkv.weight` is stored packed and also"),
        ("awq", change(f"{FIRST}.scales", lambda t: t[:, :16].clone()), r"Wqkv.scales.*\[2, 16\].*\[2, 192\]"),
        ("gptq", drop(f"{FIRST}.qzeros"), r"`transformer.blocks.0.attn.Wqkv.qzeros` is missing"),
        ("gptq", change(f"{FIRST}.qweight", lambda t: t[:, :-1].clone()), r"Wqkv.qweight.*\[8, 191\], no whole codes"),
        ("gptq", change(f"{FIRST}.g_idx", lambda t: t + 7), r"Wqkv.g_idx.*outside 0 to 1"),
        ("gptq", change(f"{FIRST}.g_idx", lambda t: t[:9].clone()), r"Wqkv.g_idx.*\[9\].*\[64\]"),
        ("int8", drop(f"{FIRST}.SCB"), r"`transformer.blocks.0.attn.Wqkv.SCB` is missing"),
        ("int8", change(f"{FIRST}.SCB", lambda t: t[1:].clone()), r"Wqkv.SCB.*\[191\].*\[192\]"),
        ("int8", change(f"{FIRST}.weight", lambda t: t[1:].clone()), r"Wqkv.SCB.*\[192\].*\[191\]"),
        ("int8", change(f"{FIRST}.weight_format", lambda t: t + 2), r"Wqkv.weight_format.*tiles"),
        ("nf4", drop(STATE), r"Wqkv.weight"),
        ("nf4", drop(f"{FIRST}.weight.absmax"), r"Wqkv.weight.absmax` is missing"),
        ("nf4", drop(f"{FIRST}.weight.nested_quant_map"), r"Wqkv.weight.nested_quant_map` is missing"),
        ("nf4", change(f"{FIRST}.weight", lambda t: t[1:].clone()), r"Wqkv.weight.*6143 bytes.*6144"),
        ("nf4", state(shape=[1 << 40, 64]), r"Wqkv.weight.*6144 bytes"),
        ("nf4", state(shape=[64, 192]), r"Wqkv.weight.*\[64, 192\].*\[192, 64\]"),
        ("nf4", state(blocksize=0), r"quant_state.*says nothing usable"),
        ("nf4", state(blocksize=32), r"Wqkv.weight.absmax"),
        ("nf4", state(dtype="os.system"), r"quant_state.*says nothing usable"),
        ("nf4", state(nested_offset=float("nan")), r"quant_state.*says nothing usable"),
        ("nf4", change(STATE, lambda t: t[3:].clone()), r"quant_state.*is no readable quant_state"),
    ],
)  # fmt: skip
def test_a_broken_packed_folder_is_refused_by_its_tensor(
    source: Path, tmp_path: Path, kind: str, damage: Any, words: str
) -> None:
    write(source, tmp_path / "packed", kind)
    file = tmp_path / "packed" / "model.safetensors"
    save_file(damage(load_file(file)), file)
    with pytest.raises(MPTError, match=words) as caught:
        mpt.load(tmp_path / "packed")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == (2 if "weight_format" in words else 3)


def test_garbled_packed_headers_raise_nothing_but_our_errors(source: Path, tmp_path: Path) -> None:
    write(source, tmp_path / "packed", "nf4")
    file = tmp_path / "packed" / "model.safetensors"
    whole = bytearray(file.read_bytes())
    n_header = int.from_bytes(whole[:8], "little")
    random = torch.Generator().manual_seed(0)
    for at in range(8, 8 + n_header, 29):
        garbled = bytearray(whole)
        garbled[at] = int(torch.randint(256, (), generator=random))
        file.write_bytes(garbled)
        with contextlib.suppress(MPTError):
            checkpoint.stored_tensors(tmp_path / "packed")
