"""LoRA runs: what is trained, what is saved, and that peft and the merge agree."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import mpt.checkpoint
from mpt.errors import UnsupportedConfig, UserError
from mpt.lora import open_lora
from mpt.prompts import INSTRUCT_TEMPLATE
from tests.training.killing import Killed, kill_at_eight
from training import adapters, build, checkpoint, export, loop
from training.distributed import World
from training.run import Lora, Run


@pytest.fixture
def lora_run(small_run: Run, tmp_path: Path) -> Run:
    base = loop.fit(dataclasses.replace(small_run, out=str(tmp_path / "base"), steps=4))
    lora = Lora(rank=4, alpha=8, dropout=0.1, targets=("Wqkv", "down_proj"))
    return dataclasses.replace(small_run, base=str(base), tokenizer=None, model={}, lora=lora, lr=1e-2)


def test_the_saved_adapter_is_pefts_and_merges_to_the_same_logits(lora_run: Run, tmp_path: Path) -> None:
    folder = loop.fit(lora_run)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (4, 8, ["Wqkv", "down_proj"])
    assert not (folder / "model.safetensors").exists()
    ids = torch.randint(0, 384, (1, 40), generator=torch.Generator().manual_seed(0))
    base = mpt.checkpoint.load(str(lora_run.base))
    with torch.no_grad():
        before = base(ids).logits
        tuned = PeftModel.from_pretrained(base, str(folder))(ids).logits
        merged = mpt.checkpoint.load(adapters.merge(folder, tmp_path / "merged", torch.float32))(ids).logits
    assert (tuned - before).abs().max() > 0.1
    torch.testing.assert_close(merged, tuned, rtol=0, atol=1e-4)


def test_a_merge_is_as_precise_as_the_adapter_and_rounds_once(
    lora_run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By hand: W + (alpha / rank) B A in float64, whose nearest bfloat16 a merge in bfloat16 must have."""
    folder = loop.fit(lora_run)
    found = {key: value.double() for key, value in load_file(folder / "adapter_model.safetensors").items()}
    prefix = "base_model.model.transformer.blocks.0.attn.Wqkv.lora_"
    base = mpt.checkpoint.load(str(lora_run.base), dtype=torch.float32).transformer.blocks[0].attn.Wqkv.weight
    exact = base.detach().double() + 8 / 4 * found[f"{prefix}B.weight"] @ found[f"{prefix}A.weight"]
    whole = mpt.checkpoint.load(adapters.merge(folder, tmp_path / "whole"))
    wide = whole.transformer.blocks[0].attn.Wqkv.weight.detach()
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide.double(), exact, rtol=0, atol=1e-7)
    with caplog.at_level("INFO"):
        rounded = mpt.checkpoint.load(adapters.merge(folder, tmp_path / "rounded", torch.bfloat16))
    narrow = rounded.transformer.blocks[0].attn.Wqkv.weight.detach()
    assert torch.equal(narrow, wide.bfloat16())
    largest = max(
        float((value.bfloat16().double() - value.double()).abs().max()) for value in whole.state_dict().values()
    )
    with torch.no_grad():
        ids = torch.arange(64)[None]
        change = float((rounded.float()(ids).logits - whole(ids).logits).abs().max())
    assert change > 0
    assert f"bfloat16 changes a weight by at most {largest:.2g}, a logit by at most {change:.2g}" in caplog.text


@pytest.mark.parametrize("lora", [None, Lora(rank=4)])
def test_what_a_run_makes_tells_others_its_chat_template(small_run: Run, tmp_path: Path, lora: Lora | None) -> None:
    """transformers renders, from the file alone, what training saw."""
    from transformers import AutoTokenizer

    base = loop.fit(dataclasses.replace(small_run, out=str(tmp_path / "base"), steps=1))
    run = dataclasses.replace(small_run, base=str(base), tokenizer=None, model={}, lora=lora, steps=1)
    folder = loop.fit(run)
    if lora is not None:
        folder = adapters.merge(folder, tmp_path / "merged")
    text = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": "Say yes."}], tokenize=False, add_generation_prompt=True
    )
    assert text == INSTRUCT_TEMPLATE.format(instruction="Say yes.")


def test_a_finished_run_is_exported_as_precisely_as_it_was_trained(small_run: Run, tmp_path: Path) -> None:
    run = dataclasses.replace(small_run, precision="bf16", steps=3)
    rounded = mpt.checkpoint.load(loop.fit(run)).state_dict()
    whole = mpt.checkpoint.load(export.latest(Path(run.out), tmp_path / "whole", torch.float32)).state_dict()
    assert {value.dtype for value in whole.values()} == {torch.float32}
    assert all(torch.equal(value.bfloat16(), rounded[name]) for name, value in whole.items())
    assert any(not torch.equal(value, value.bfloat16().float()) for value in whole.values())


@pytest.mark.parametrize("kind", ["dora", "rslora"])
def test_other_kinds_of_adapters_are_pefts_too(lora_run: Run, kind: str, tmp_path: Path) -> None:
    assert lora_run.lora is not None
    lora = dataclasses.replace(lora_run.lora, dropout=0.0, **{kind: True})
    run = dataclasses.replace(lora_run, lora=lora, precision="bf16")
    folder = loop.fit(run)
    assert json.loads((folder / "adapter_config.json").read_text())[f"use_{kind}"] is True
    ids = torch.randint(0, 384, (1, 40), generator=torch.Generator().manual_seed(0))
    base = mpt.checkpoint.load(str(run.base), dtype=torch.float32)
    whole = mpt.checkpoint.load(adapters.merge(folder, tmp_path / "merged", torch.float32))
    with torch.no_grad():
        plain, merged = base(ids).logits, whole(ids).logits
        tuned = PeftModel.from_pretrained(base, str(folder))(ids).logits
    assert (tuned - plain).abs().max() > 0.1
    torch.testing.assert_close(merged, tuned, rtol=0, atol=1e-4)
    # By the papers: V = W + alpha / r B A; rsLoRA's scale is alpha / sqrt(r); DoRA's rows of V get the lengths m.
    stored, place = load_file(folder / "adapter_model.safetensors"), "transformer.blocks.0.ffn.down_proj"
    a, b = (stored[f"base_model.model.{place}.lora_{x}.weight"] for x in "AB")
    weight = mpt.checkpoint.load(str(run.base)).get_submodule(place).weight.detach().float()
    expected = weight + (8 / 4**0.5 if kind == "rslora" else 8 / 4) * b @ a
    if kind == "dora":
        m = stored[f"base_model.model.{place}.lora_magnitude_vector"]
        assert (m - weight.norm(dim=1)).abs().max() > 1e-3  # it has been trained
        expected = m[:, None] * expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(whole.get_submodule(place).weight.detach(), expected)


@pytest.mark.parametrize("bits", [4, 16])
def test_dora_begins_as_its_base(qlora_run: Run, bits: Literal[4, 16]) -> None:
    losses = []
    for dora in (False, True):
        lora = Lora(rank=4, dropout=0.0, bits=bits, dora=dora)
        run = dataclasses.replace(qlora_run, lora=lora, steps=1, out=f"{qlora_run.out}-{dora}")
        loop.fit(run)
        losses.append(json.loads((Path(run.out) / "metrics.jsonl").read_text())["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_a_dora_adapter_is_not_served_beside_its_base(lora_run: Run) -> None:
    assert lora_run.lora is not None
    folder = loop.fit(dataclasses.replace(lora_run, lora=dataclasses.replace(lora_run.lora, dora=True), steps=1))
    with pytest.raises(UnsupportedConfig, match=r"use_dora.*train export .* --merge"):
        open_lora(folder)


def test_a_resumed_lora_run_ends_bitwise_equal_dropout_included(lora_run: Run) -> None:
    expected = (loop.fit(lora_run) / "adapter_model.safetensors").read_bytes()
    killed = dataclasses.replace(lora_run, out=lora_run.out + "-killed")
    with pytest.raises(Killed):
        loop.fit(killed, kill_at_eight)
    # Per layer A (4, 32) and B (96, 4), A (4, 64) and B (32, 4), each with AdamW's two moments and its count.
    stored = checkpoint.latest(Path(killed.out))
    assert stored is not None
    n_bytes = sum(path.stat().st_size for path in stored.glob("*.safetensors"))
    n_values = 2 * (4 * 32 + 96 * 4 + 4 * 64 + 32 * 4)
    assert 3 * 4 * n_values < n_bytes < 3 * 4 * n_values + 10_000
    assert (loop.fit(killed) / "adapter_model.safetensors").read_bytes() == expected


@pytest.fixture
def qlora_run(small_run: Run, tmp_path: Path) -> Run:
    model = {**small_run.model, "d_model": 64}
    base = loop.fit(dataclasses.replace(small_run, model=model, out=str(tmp_path / "base"), steps=4))
    lora = Lora(rank=4, dropout=0.0, bits=4)
    return dataclasses.replace(small_run, base=str(base), tokenizer=None, model={}, lora=lora, lr=1e-2)


# The 16 values of NormalFloat4, from the QLoRA paper's appendix E.
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # fmt: skip


def test_four_bit_matrices_hold_the_nearest_nf4_values_of_the_base(qlora_run: Run) -> None:
    run = dataclasses.replace(qlora_run, precision="fp32")
    model = build.model(run, World(0, 1, torch.device("cpu"))).eval()
    base = mpt.checkpoint.load(str(run.base), dtype=torch.float32)
    for block in base.transformer.blocks:
        for linear in (block.attn.Wqkv, block.attn.out_proj, block.ffn.up_proj, block.ffn.down_proj):
            groups = linear.weight.detach().reshape(-1, 64)
            scale = groups.abs().amax(1, keepdim=True)  # itself kept in 8 bits: within about one part in a hundred
            nearest = (groups / scale)[..., None].sub(torch.tensor(NF4)).abs().argmin(-1)
            linear.weight.data = (torch.tensor(NF4)[nearest] * scale).view_as(linear.weight)
    ids = torch.randint(0, 384, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = model(ids).logits, base(ids).logits
    assert float((found - expected).norm() / expected.norm()) < 0.02
    n_bytes = sum(p.numel() * p.element_size() for p in model.transformer.blocks.parameters() if not p.requires_grad)
    n_values = sum(p.numel() for p in base.transformer.blocks.parameters() if p.dim() == 2)
    assert n_bytes < 0.5 * n_values + 10_000  # half a byte each, and the norms


def test_a_four_bit_run_learns_and_merges_into_the_whole_base(qlora_run: Run, tmp_path: Path) -> None:
    run = qlora_run
    folder = loop.fit(run)
    losses = [json.loads(line)["loss"] for line in (Path(run.out) / "metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-3:]) < 0.97 * sum(losses[:3])
    looked = dataclasses.replace(run, out=run.out + "-looked", eval_data="yaml_to_json", eval_every=3, eval_samples=5)
    same = (loop.fit(looked) / "adapter_model.safetensors").read_bytes()  # looking at it changes nothing
    assert same == (folder / "adapter_model.safetensors").read_bytes()
    merged = mpt.checkpoint.load(adapters.merge(folder, tmp_path / "merged", torch.float32))
    base = mpt.checkpoint.load(str(run.base)).state_dict()
    pair = {
        name: tensor for name, tensor in load_file(folder / "adapter_model.safetensors").items() if ".0.ffn.up" in name
    }
    a, b = (pair[f"base_model.model.transformer.blocks.0.ffn.up_proj.lora_{x}.weight"] for x in "AB")
    expected = base["transformer.blocks.0.ffn.up_proj.weight"].float() + 32 / 4 * b @ a
    torch.testing.assert_close(merged.transformer.blocks[0].ffn.up_proj.weight.detach(), expected)


def test_frozen_bfloat16_matrices_give_the_curve_of_float32_ones(
    lora_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = dataclasses.replace(lora_run, precision="bf16")
    loop.fit(run)
    wide = dataclasses.replace(run, out=run.out + "-wide")
    monkeypatch.setattr(adapters, "compress", lambda *_: None)  # autocast rounds float32 at every use instead
    loop.fit(wide)
    found, expected = (
        [json.loads(line)["loss"] for line in (Path(each.out) / "metrics.jsonl").read_text().splitlines()]
        for each in (run, wide)
    )
    assert found == expected


def test_matrices_that_four_bits_do_not_fit_are_refused(lora_run: Run) -> None:
    with pytest.raises(UserError, match="multiple of 64 columns, here are 32"):
        loop.fit(dataclasses.replace(lora_run, lora=Lora(bits=4)))


def test_lora_without_a_base_and_merging_no_adapter_are_refused(small_run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs a `base`"):
        dataclasses.replace(small_run, lora=Lora())
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        adapters.merge(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="rank"):
        Lora(rank=0)
    with pytest.raises(UserError, match="bits"):
        Lora(bits=8)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="q_proj"):
        Lora(targets=("q_proj",))
