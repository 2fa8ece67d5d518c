"""The script for a GPU runs from end to end on a CPU, and measures nothing where a kernel is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import gpu


def test_every_measurement_runs_on_a_small_model(tmp_path):
    path = tmp_path / "gpu.json"
    command = [sys.executable, gpu.__file__, "--shape", "tiny", "--device", "cpu", "--out", str(path)]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=100)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads(path.read_text())
    assert {measure.__name__ for measure in gpu.MEASUREMENTS} <= found.keys()
    assert found["check_backend"]["logits"] < 1e-4  # beside transformers'
    rows = [line for line in ran.stdout.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 11 and all(line.count("|") == 4 for line in rows)
    assert Path(gpu.__file__).is_relative_to(Path(__file__).parents[2])


def test_a_wrong_kernel_ends_the_run(tmp_path, monkeypatch, capsys):
    right = gpu.paged_decode
    monkeypatch.setattr(gpu, "paged_decode", lambda *args: right(*args) * 1.1)
    monkeypatch.setattr(sys, "argv", ["gpu", "--shape", "tiny", "--device", "cpu", "--out", str(tmp_path / "gpu.json")])
    assert gpu.main() == 1
    assert "not measured" in capsys.readouterr().err
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert "decode torch.float32" in found["wrong"] and "ceilings" not in found


def test_operations_are_counted_as_by_hand():
    """7B: 12.885 GFLOP a token in products; causal attention over 2,048 tokens."""
    with torch.device("meta"):
        model = gpu.MPTForCausalLM(gpu.MPTConfig(**gpu.SCALES["7b"].model, max_seq_len=8192))
    expected = 12.885e9 * 2048 + 2 * 50432 * 4096 + 4 * 4096 * 32 * (2048 * 2049 / 2)
    assert abs(gpu.flop(model, 2048) / expected - 1) < 1e-3
