"""A base that AWQ packed is finetuned from its real values."""

import dataclasses
from pathlib import Path

import torch

import mpt.checkpoint
from mpt.config import MPTConfig
from mpt.model import MPTForCausalLM
from tests import packers
from training import build
from training.distributed import World
from training.run import Run


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
