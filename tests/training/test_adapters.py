"""LoRA runs: what is trained, what is saved, and that peft and the merge agree."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import mpt.checkpoint
from mpt.errors import UserError
from training import adapters, checkpoint, loop
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


def test_a_resumed_lora_run_ends_bitwise_equal_dropout_included(lora_run: Run) -> None:
    class Killed(BaseException):
        pass

    def kill_at_eight(metrics: loop.Metrics) -> None:
        if metrics["step"] == 8:
            raise Killed

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


def test_lora_without_a_base_and_merging_no_adapter_are_refused(small_run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs a `base`"):
        dataclasses.replace(small_run, lora=Lora())
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        adapters.merge(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="rank"):
        Lora(rank=0)
    with pytest.raises(UserError, match="q_proj"):
        Lora(targets=("q_proj",))
