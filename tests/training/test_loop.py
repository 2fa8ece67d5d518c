"""Runs learn, are repeatable, and survive being stopped anywhere."""

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import mpt.checkpoint
from mpt.errors import Interrupted, MachineRefused, TrainingDiverged, UserError
from training import checkpoint, loop
from training.run import Run


class Killed(BaseException):
    """Stands for kill -9: nothing in the program handles it."""


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(mpt.checkpoint.load(folder).state_dict())


def losses(run: Run) -> list[float]:
    lines = (Path(run.out) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [json.loads(line)["loss"] for line in lines]


def elsewhere(run: Run, name: str) -> Run:
    return dataclasses.replace(run, out=str(Path(run.out).with_name(name)))


def test_twenty_steps_lower_the_loss(small_run: Run) -> None:
    run = dataclasses.replace(small_run, steps=20, lr=1e-2)
    loop.fit(run)
    curve = losses(run)
    assert len(curve) == 20
    assert sum(curve[-3:]) / 3 < 0.8 * curve[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_killed_run_ends_bitwise_equal(small_run: Run, precision: Any) -> None:
    whole = dataclasses.replace(small_run, precision=precision)
    expected = weights(loop.fit(whole))
    run = elsewhere(whole, "killed")

    def kill_at_eight(metrics: loop.Metrics) -> None:
        if metrics["step"] == 8:
            raise Killed

    with pytest.raises(Killed):
        loop.fit(run, kill_at_eight)
    assert [path.name for path in checkpoint.steps(Path(run.out))] == ["step-000005"]
    found = weights(loop.fit(run))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert losses(run) == losses(whole)


def test_a_kill_during_a_save_leaves_no_checkpoint_under_its_name(
    small_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = weights(loop.fit(small_run))
    run = elsewhere(small_run, "killed")
    real_save = torch.save

    def half(state: Any, file: Any) -> None:
        real_save(state, file)
        if state["step"] == 10:
            file.truncate(1000)
            raise Killed

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(Killed):
        loop.fit(run)
    assert [path.name for path in checkpoint.steps(Path(run.out))] == ["step-000005"]
    monkeypatch.undo()
    found = weights(loop.fit(run))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        checkpoint.save({"step": step, "x": torch.arange(100)}, step, tmp_path, keep=2)
    newest = tmp_path / "step-000002" / "state.pt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    state = checkpoint.latest(tmp_path)
    assert state is not None and state["step"] == 1
    assert "step-000002" in caplog.text


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in range(5):
        checkpoint.save({"step": step}, step, tmp_path, keep=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000003", "step-000004"]


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(state: Any, file: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", refuse)
    with pytest.raises(MachineRefused, match="No space left"):
        checkpoint.save({"step": 1}, 1, tmp_path, keep=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(small_run: Run, number: int) -> None:
    expected = weights(loop.fit(small_run))
    run = elsewhere(small_run, "stopped")

    def stop(metrics: loop.Metrics) -> None:
        if metrics["step"] == 3:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted, match="after step 3 of 12") as caught:
        loop.fit(run, stop)
    assert caught.value.exit_code == 75
    found = weights(loop.fit(run))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_loss_that_is_no_number_stops_before_it_is_saved(small_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loop.backward
    calls: list[int] = []

    def poisoned(*args: Any) -> float:
        calls.append(1)
        return real(*args) if len(calls) < 8 else float("nan")

    monkeypatch.setattr(loop, "backward", poisoned)
    with pytest.raises(TrainingDiverged, match="step 8") as caught:
        loop.fit(small_run)
    assert caught.value.exit_code == 4
    assert len(losses(small_run)) == 7


def test_a_changed_run_does_not_touch_the_old_ones_folder(small_run: Run) -> None:
    loop.fit(small_run)
    with pytest.raises(UserError, match=r"lr 0\.003, now 0\.5"):
        loop.fit(dataclasses.replace(small_run, lr=0.5))
    with pytest.raises(UserError, match="already holds a run"):
        loop.fit(small_run, resume=False)


def test_a_folder_with_other_things_is_refused(small_run: Run) -> None:
    Path(small_run.out).mkdir()
    (Path(small_run.out) / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no run"):
        loop.fit(small_run)
    assert (Path(small_run.out) / "thesis.txt").read_text() == "mine"


def test_a_finetune_starts_from_its_base_under_a_changed_config(small_run: Run) -> None:
    base = loop.fit(small_run)
    changes = {"max_seq_len": 4096, "attn_config": {"alibi_bias_max": 16, "clip_qkv": 6}}
    run = dataclasses.replace(small_run, base=str(base), tokenizer=None, model=changes)
    model = loop.new_model(run)
    assert model.config.max_seq_len == 4096
    assert model.config.attention["alibi_bias_max"] == 16 and model.config.attention["clip_qkv"] == 6
    assert model.config.d_model == 32
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights(base).items())


def test_the_manifest_holds_the_recipe(small_run: Run) -> None:
    folder = loop.fit(small_run)
    manifest = mpt.checkpoint.read_manifest(folder)
    assert manifest is not None
    assert Run.from_json(json.dumps(manifest["recipe"])) == small_run
    assert (manifest["prompt_style"], manifest["context_length"]) == ("instruct", 64)
