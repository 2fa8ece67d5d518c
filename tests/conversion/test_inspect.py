"""`mpt inspect` says of a descendant's copy what it is and comes from, what is left out, and what to do with it.

The expected numbers are counted by hand from the shapes that are written here.
"""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from mpt.cli import app
from mpt.config import MPTConfig
from mpt.tokenizer import Tokenizer
from mpt.transformers_model import MPTForCausalLM

C, HEADS, LAYERS, VOCAB = 32, 4, 2, 2048
SIZES = {"d_model": C, "n_heads": HEADS, "n_layers": LAYERS, "vocab_size": VOCAB, "max_seq_len": 64}
N_PARAMETERS = VOCAB * C + LAYERS * (12 * C * C + 2 * C) + C


def folder_of(
    folder: Path, raw: dict[str, Any], tokenizer: Tokenizer, beside: dict[str, torch.Tensor] | None = None
) -> Path:
    """A copy in bfloat16, with config.json as it is given and more tensors beside the model's."""
    model = MPTForCausalLM(MPTConfig(**SIZES)).to(torch.bfloat16)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    folder.mkdir()
    save_file({**weights, **(beside or {})}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "mpt", **SIZES, "torch_dtype": "bfloat16", **raw}))
    tokenizer.save(folder)
    return folder


def inspected(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["inspect", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture
def tokenizer() -> Tokenizer:
    from mpt.catalog import resolve

    return Tokenizer.from_folder(resolve("mpt-tiny"))


def test_a_descendants_copy_is_told_with_its_memory_and_the_next_commands(tokenizer: Tokenizer, tmp_path: Path) -> None:
    raw = {
        "_name_or_path": "vinai/PhoGPT-4B-Chat", "architectures": ["MPTForCausalLM"], "transformers_version": "4.37.2",
        "z_loss": 1e-4, "rope_scaling": None,
    }  # fmt: skip
    folder = folder_of(tmp_path / "a copy", raw, tokenizer)
    found = inspected(str(folder))
    said = "PhoGPT of VinAI, published under BSD-3-Clause: _name_or_path has `vinai/PhoGPT-4B-Chat`"
    assert found["descends from"] == said
    assert found["made by"] == "class MPTForCausalLM, transformers 4.37.2"
    assert found["licence"] == "unknown"  # the copy's own is not told anywhere
    assert set(found["dropped"]) == {"z_loss", "rope_scaling"} and "0.0001" in found["dropped"]["z_loss"]
    kv = 1000 * 2 * LAYERS * C * 2  # keys and values, 2 bytes each
    weights = 2 * N_PARAMETERS
    assert found["memory to serve"] == (
        f"{weights / 1e9:.3g} GB of weights in bfloat16, {kv / 1e9:.3g} GB of KV cache per 1,000 tokens"
    )
    commands = {what: shlex.split(command) for what, command in found["next"].items()}
    assert commands["serve"] == ["mpt", "serve", "--model", f"mine={folder}"]  # a name may not hold a space
    assert commands["convert"][:3] == ["mpt", "convert", str(folder)] and "hf" in commands["convert"][-1]
    assert commands["finetune"] == ["train", "finetune", "--base", str(folder), "--data", "FILE.jsonl"]


def test_the_next_commands_repeat_the_name_that_was_given() -> None:
    commands = inspected("mpt-tiny")["next"]
    assert commands["serve"] == "mpt serve --model mpt-tiny"
    assert commands["finetune"] == "train finetune --base mpt-tiny --data FILE.jsonl"
    assert commands["convert"].startswith("mpt convert mpt-tiny TARGET --to ")


def test_a_descendant_without_names_is_known_by_its_shape() -> None:
    from mpt.catalog import descendant

    found = descendant(Path("/nowhere/model"), (4096, 32, 32, 256000))  # the published config's numbers
    assert found is not None and found[0].name == "SEA-LION-7B" and "vocabulary" in found[1]
    assert descendant(Path("/nowhere/model"), (4096, 32, 32, 50432)) is None  # mpt-7b itself


def test_of_a_llava_it_is_said_what_is_left_out(tokenizer: Tokenizer, tmp_path: Path) -> None:
    raw = {"model_type": "llava_mpt", "architectures": ["LlavaMPTForCausalLM"], "mm_vision_tower": "openai/clip"}
    beside = {
        "transformer.mm_projector.weight": torch.ones(8, 8),
        "transformer.mm_projector.bias": torch.ones(8),
        "transformer.vision_tower.position_ids": torch.arange(5),
    }
    found = inspected(str(folder_of(tmp_path / "copy", raw, tokenizer, beside)))
    assert found["descends from"].startswith("LLaVA-MPT")
    assert found["parameters"] == N_PARAMETERS
    assert found["note"] == (
        "opened as the language model inside; left out: `mm_projector` (2 tensors), `vision_tower` (1 tensor)"
    )
    assert "mm_vision_tower" in found["dropped"]


def test_a_written_llava_is_an_mpt_alone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    raw = {"model_type": "llava_mpt", "mm_hidden_size": 8}
    folder = folder_of(tmp_path / "copy", raw, tokenizer, {"transformer.mm_projector.weight": torch.ones(8, 8)})
    result = CliRunner().invoke(app, ["convert", str(folder), str(tmp_path / "out"), "--to", "hf"])
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["model_type"] == "mpt" and not any(key.startswith("mm_") for key in written)
    assert inspected(str(tmp_path / "out"))["parameters"] == N_PARAMETERS


@pytest.mark.parametrize("has_config", [True, False])
def test_a_ctranslate2_folder_is_refused_by_its_name(
    has_config: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    from mpt import cli

    (tmp_path / "model.bin").write_bytes(bytes(8))
    (tmp_path / "shared_vocabulary.json").write_text('["a"]')
    if has_config:
        (tmp_path / "config.json").write_text('{"bos_token": "<|endoftext|>"}')
    monkeypatch.setattr(sys, "argv", ["mpt", "inspect", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    error = capsys.readouterr().err
    assert caught.value.code == 2 and "CTranslate2" in error and error.count("\n") == 1
