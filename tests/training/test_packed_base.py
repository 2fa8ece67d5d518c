"""A base that AWQ packed is finetuned from its real values; beside a LoRA it stays packed."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import mpt.checkpoint
from mpt.config import MPTConfig
from mpt.packed.layers import packed_bytes
from mpt.tokenizer import Tokenizer
from mpt.transformers_model import MPTForCausalLM
from tests import packers
from training import adapters, build, loop, plan
from training.distributed import World
from training.run import Lora, Precision, Run


def test_a_packed_base_is_trained_from_its_real_values(tmp_path: Path, small_run: Run) -> None:
    torch.manual_seed(0)
    config = MPTConfig(d_model=32, n_heads=2, n_layers=2, expansion_ratio=2, vocab_size=384, max_seq_len=64)
    source = mpt.checkpoint.save(MPTForCausalLM(config), tmp_path / "source")
    quantization = {"bits": 4, "group_size": 32, "quant_method": "awq", "version": "gemm"}
    real = packers.write_packed(source, tmp_path / "packed", quantization, packers.awq_weight)
    run = dataclasses.replace(small_run, base=str(tmp_path / "packed"), model={})
    built = build.model(run, World(0, 1, torch.device("cpu")))
    found = dict(built.named_parameters())
    assert found.keys() == real.keys()
    for name, values in real.items():
        assert torch.equal(found[name].detach(), values.half().float()), name


def lora_losses(run: Run, base: Path, out: Path) -> list[float]:
    """Of each step of a LoRA over a base, without dropout."""
    lora = Lora(rank=4, alpha=8, dropout=0.0, targets=("Wqkv", "up_proj", "down_proj"))
    loop.fit(dataclasses.replace(run, base=str(base), out=str(out), tokenizer=None, model={}, lora=lora, lr=1e-2))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_lora_learns_over_packed_matrices_what_it_learns_over_their_real_values(
    precision: Precision, tmp_path: Path, small_run: Run, tokenizer: Tokenizer
) -> None:
    """AdamW makes much of small gradients' signs, so that the last bits grow over the steps."""
    run = dataclasses.replace(small_run, precision=precision, steps=8)
    torch.manual_seed(0)
    config = MPTConfig(d_model=32, n_heads=2, n_layers=2, vocab_size=384, max_seq_len=512)
    source = mpt.checkpoint.save(MPTForCausalLM(config), tmp_path / "source", tokenizer=tokenizer)
    quantization = {"bits": 4, "group_size": 32, "quant_method": "awq", "version": "gemm"}
    packers.write_packed(source, tmp_path / "packed", quantization, packers.awq_weight)
    real = mpt.checkpoint.load(tmp_path / "packed", dtype=torch.float32)
    plain = mpt.checkpoint.save(real, tmp_path / "plain", tokenizer=tokenizer)
    found = lora_losses(run, tmp_path / "packed", tmp_path / "over packed")
    expected = lora_losses(run, plain, tmp_path / "over plain")
    assert len(found) == 8 and found[-1] < found[0] - 0.1
    assert found == pytest.approx(expected, abs=2e-5 if precision == "fp32" else 0.02)
    merged = adapters.merge(tmp_path / "over packed" / "model", tmp_path / "merged", torch.float32)
    values = mpt.checkpoint.load(merged).state_dict()
    name = "transformer.blocks.0.attn.out_proj.weight"  # which has no adapter
    assert torch.equal(values[name], real.state_dict()[name])


def test_the_matrices_of_a_loras_base_stay_packed(tmp_path: Path, small_run: Run) -> None:
    config = MPTConfig(d_model=32, n_heads=2, n_layers=2, vocab_size=384, max_seq_len=64)
    source = mpt.checkpoint.save(MPTForCausalLM(config), tmp_path / "source")
    quantization = {"bits": 4, "group_size": 32, "quant_method": "awq", "version": "gemm"}
    packers.write_packed(source, tmp_path / "packed", quantization, packers.awq_weight)
    run = dataclasses.replace(small_run, base=str(tmp_path / "packed"), model={}, lora=Lora(rank=4))
    built = build.model(run, World(0, 1, torch.device("cpu")))
    assert packed_bytes(built) == 2 * 12 * 32 * 32 * (16 + 2.5) / 32
    trained = {name for name, parameter in built.named_parameters() if parameter.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    frozen = [name for name, p in built.named_parameters() if not p.requires_grad and p.dim() == 2]
    assert frozen == ["transformer.wte.weight"]


def test_the_memory_of_a_packed_base_is_planned_as_it_lies(tmp_path: Path, small_run: Run) -> None:
    """A base of 7B in 4 bits must not be refused for the 14 GB that it never takes."""
    config = MPTConfig(d_model=32, n_heads=2, n_layers=2, vocab_size=384, max_seq_len=64)
    source = mpt.checkpoint.save(MPTForCausalLM(config), tmp_path / "source")
    quantization = {"bits": 4, "group_size": 32, "quant_method": "awq", "version": "gemm"}
    packers.write_packed(source, tmp_path / "packed", quantization, packers.awq_weight)
    run = dataclasses.replace(small_run, base=str(tmp_path / "packed"), model={}, lora=Lora(rank=4, targets=("Wqkv",)))
    in_blocks, outside = 2 * 12 * 32 * 32, 384 * 32 + 5 * 32  # matrices; embedding and norms
    adapters_ = 2 * 4 * (32 + 96)
    found = plan.memory(plan.shape_of_run(run), run, 1).parameters
    assert found == in_blocks * (16 + 2.5) / 32 + 4 * (outside + adapters_)
    full = dataclasses.replace(run, lora=None)
    assert plan.memory(plan.shape_of_run(full), full, 1).parameters == 4 * (in_blocks + outside)
