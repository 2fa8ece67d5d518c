"""Runs learn, are repeatable, and survive being stopped anywhere."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import mpt.checkpoint
import mpt.manifest
from mpt.attention import documents_kernel
from mpt.catalog import describe
from mpt.errors import Interrupted, MachineRefused, TrainingDiverged, UserError
from mpt.memory import Memory
from mpt.model import MPTMLP
from tests.training.conftest import SHAPE
from tests.training.killing import Killed, kill_at_eight
from training import adapters, batches, build, checkpoint, datasets, loop, memory, optimizer, step
from training.distributed import World
from training.logbook import Logbook
from training.run import Lora, Run

ROOT = Path(__file__).parents[2]
ALONE = World(0, 1, torch.device("cpu"))


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

    with pytest.raises(Killed):
        loop.fit(run, kill_at_eight)
    assert [path.name for path in checkpoint.steps(Path(run.out))] == ["step-000005"]
    found = weights(loop.fit(run))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert losses(run) == losses(whole)


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_a_killed_run_goes_on_on_a_gpu(small_run: Run, how: Any) -> None:
    loop.fit(dataclasses.replace(small_run, precision="bf16"))
    run = dataclasses.replace(elsewhere(small_run, "killed"), precision="bf16", activation_checkpointing=how)
    with pytest.raises(Killed):
        loop.fit(run, kill_at_eight)
    loop.fit(run)
    assert losses(run) == pytest.approx(losses(small_run), rel=1e-3)  # bfloat16's 4e-3 a product, in means of hundreds


_DIES_IN_A_SAVE = """
import os, sys, training.checkpoint
from pathlib import Path
from training import loop
from training.run import Run

def die(folder, entries):  # every shard is there, one of them cut short, and the manifest is not
    if entries["step"] == 10:
        os.truncate(next(folder.glob("*.safetensors")), 1000)
        os._exit(9)
    real(folder, entries)

real, training.checkpoint.write_manifest = training.checkpoint.write_manifest, die
loop.fit(Run.read(Path(sys.argv[1])))
"""


def test_a_kill_during_a_save_leaves_no_checkpoint_under_its_name(small_run: Run) -> None:
    expected = weights(loop.fit(small_run))
    run = elsewhere(small_run, "killed")
    description = Path(run.out).with_suffix(".json")
    description.write_text(run.to_json())
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as here: sums in the same order
    program = [sys.executable, "-c", _DIES_IN_A_SAVE, str(description)]
    died = subprocess.run(program, cwd=ROOT, env=one_thread, check=False)
    assert died.returncode == 9
    assert [path.name for path in checkpoint.steps(Path(run.out))] == ["step-000005"]
    found = weights(loop.fit(run))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    entries = Logbook(Path(run.out)).entries()
    assert [entry["event"] for entry in entries] == ["start", "resume", "finished"]
    kernel, _ = documents_kernel(torch.device("cpu"), torch.float32, 16)  # C, where it can be compiled
    assert [entry.get("attention") for entry in entries] == [kernel, kernel, None]


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[int], None]:
    """Takes a step of AdamW on a small model and saves it as the one of that number."""
    model = torch.nn.Linear(10, 10)
    opt = torch.optim.AdamW(model.parameters(), lr=0.1)
    saver = checkpoint.Saver(tmp_path, World(0, 1, torch.device("cpu")), keep=2)

    def save(step: int) -> None:
        model(torch.ones(10)).sum().backward()
        opt.step()
        saver.save(model, opt, checkpoint.Position(step, 7 * step, 0.5))
        saver.wait()

    return save


def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(
    tmp_path: Path, saved: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    saved(1)
    saved(2)
    newest = next((tmp_path / "step-000002").glob("*.safetensors"))
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    path = checkpoint.latest(tmp_path)
    assert path is not None
    assert path.name == "step-000001"
    assert "step-000002" in caplog.text
    model = torch.nn.Linear(10, 10)
    opt = torch.optim.AdamW(model.parameters(), lr=0.1)
    assert checkpoint.restore(path, model, opt) == checkpoint.Position(1, 7, 0.5)
    # AdamW's first step: exp_avg is a tenth of the gradient, here 1, and the counter stands at 1.
    assert torch.equal(opt.state[model.weight]["exp_avg"], torch.full((10, 10), 0.1))
    assert float(opt.state[model.weight]["step"]) == 1


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_what_an_optimizer_remembers_is_restored_where_a_step_leaves_it(
    small_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Any
) -> None:
    """On a GPU that is not there: torch's fake tensors have its name and no memory, so that nothing can be read."""

    def stepped(device: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = torch.nn.ParameterDict({"weight": torch.ones(10, 10, device=device)})
        opt = optimizer.build(dataclasses.replace(small_run, optimizer=name), model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        opt.step()
        opt.zero_grad()
        return model, opt

    def places(model: torch.nn.Module, opt: torch.optim.Optimizer) -> dict[str, Any]:
        found = checkpoint.tensors(model, opt).items()
        return {name: (tensor.device, tensor.dtype, tensor.shape) for name, tensor in found}

    saver = checkpoint.Saver(tmp_path, ALONE, keep=1)
    saver.save(*stepped("cpu"), checkpoint.Position(1))
    saver.wait()
    monkeypatch.setattr(checkpoint.dcp, "load", lambda *_, **__: None)
    with FakeTensorMode():
        model, opt = stepped("cuda")
        expected = places(model, opt)
        opt.param_groups[0]["lr"] = 0.25
        checkpoint.restore(tmp_path / "step-000001", model, opt)
        assert places(model, opt) == expected
        assert {str(device) for device, *_ in expected.values()} == {"cuda:0"}
    assert opt.param_groups[0]["lr"] == 0.25
    assert all(parameter.grad is None for parameter in model.parameters())


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path, saved: Callable[[int], None]) -> None:
    for number in range(5):
        saved(number)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000003", "step-000004"]


def test_a_full_disk_is_said_and_leaves_nothing(
    tmp_path: Path, saved: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_manifest", refuse)
    with pytest.raises(MachineRefused, match="No space left"):
        saved(1)
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
    real = step.backward
    calls: list[int] = []

    def poisoned(*args: Any) -> float:
        calls.append(1)
        return real(*args) if len(calls) < 8 else float("nan")

    monkeypatch.setattr(step, "backward", poisoned)
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


@pytest.mark.parametrize("start", [loop.fit, lambda run: loop.check(run, True)])
def test_a_mistake_leaves_no_folder_behind(small_run: Run, start: Callable[[Run], Any]) -> None:
    mistaken = dataclasses.replace(small_run, data="yaml_to_jsn")
    with pytest.raises(UserError, match="did you mean"):
        start(mistaken)
    assert not Path(small_run.out).exists()
    Path(small_run.out).mkdir()
    with pytest.raises(UserError, match="did you mean"):
        start(mistaken)
    assert list(Path(small_run.out).iterdir()) == []
    loop.fit(small_run)
    with pytest.raises(UserError, match="holds a run with data"):  # a finished one is not touched
        start(mistaken)
    assert (Path(small_run.out) / "model").is_dir()


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
    model = build.model(run, ALONE)
    assert model.config.max_seq_len == 4096
    assert model.config.attention["alibi_bias_max"] == 16 and model.config.attention["clip_qkv"] == 6
    assert model.config.d_model == 32
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights(base).items())


def test_the_manifest_holds_the_recipe(small_run: Run) -> None:
    folder = loop.fit(small_run)
    manifest = mpt.manifest.read_manifest(folder)
    assert manifest is not None
    assert Run.from_json(json.dumps(manifest["recipe"])) == small_run
    assert (manifest["prompt_style"], manifest["context_length"]) == ("instruct", 512)  # as long as its sequences
    assert mpt.checkpoint.read_config(folder).max_seq_len == 512


def test_a_finetune_at_more_tokens_than_its_base_had_records_them(small_run: Run, tmp_path: Path) -> None:
    """With ALiBi; a table of positions holds no more than it has. Adapters pass it on to what they are merged into."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "name: Ada"}\n' * 4)
    run = dataclasses.replace(small_run, max_seq_len=64, steps=1, data=str(rows), prompt_style="none")
    base = loop.fit(run)
    assert mpt.checkpoint.read_config(base).max_seq_len == 64
    run = dataclasses.replace(
        run, base=str(base), tokenizer=None, model={}, max_seq_len=256, lora=Lora(rank=2), out=str(tmp_path / "longer")
    )
    adapter = loop.fit(run)
    assert (mpt.manifest.read_manifest(adapter) or {})["context_length"] == 256
    assert mpt.checkpoint.read_config(adapters.merge(adapter, tmp_path / "merged")).max_seq_len == 256
    assert describe(tmp_path / "merged").context_length == 256
    learned = {"attn_config": {"alibi": False}, "learned_pos_emb": True}
    with pytest.raises(UserError, match="has learned 64 positions; give --max-seq-len 64"):
        build.model(dataclasses.replace(small_run, model={**SHAPE, **learned}), ALONE)


def test_running_out_of_memory_halves_the_microbatch_and_goes_on(
    small_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = dataclasses.replace(small_run, microbatch_tokens=2048)
    expected = weights(loop.fit(whole))
    run = elsewhere(whole, "short")
    real = step.backward

    def refuse(model: Any, batch: Any, *rest: Any) -> float:
        if batch.ids.numel() > 1100:
            raise torch.OutOfMemoryError("tried to allocate too much")
        return real(model, batch, *rest)

    monkeypatch.setattr(step, "backward", refuse)
    found = weights(loop.fit(run))
    assert json.loads((Path(run.out) / "microbatch.json").read_text()) == {"positions": 1024}
    for name, tensor in expected.items():  # the same sums in another order, through AdamW's division
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-4)
    assert [e["event"] for e in Logbook(Path(run.out)).entries()] == ["start", "memory", "finished"]


def test_a_sequence_that_does_not_fit_is_refused(small_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> float:
        raise torch.OutOfMemoryError("tried to allocate too much")

    monkeypatch.setattr(step, "backward", refuse)
    with pytest.raises(MachineRefused, match="one sequence of 512 tokens"):
        loop.fit(small_run)


def test_what_cannot_fit_is_refused_with_the_estimate(small_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda *_, **__: Memory(5_000_000, 10_000_000, "the container's"))
    # By hand, in MB: 28,832 parameters of 16 bytes 0.46, two layers' activations of 48 x 32 x 512 bytes 1.57, and
    # 4,096 positions of 384 logits 6.29, and once more while their loss is computed.
    said = r"512 tokens needs about 0\.0146 GB on each of 1 devices, .* free of the container's 0\.01 GB.*--max-seq-len"
    with pytest.raises(UserError, match=said):
        loop.fit(small_run)
    assert not list(Path(small_run.out).glob("step-*"))


@pytest.mark.parametrize("how", ["selective", "full"])
def test_recomputing_activations_changes_nothing(small_run: Run, how: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = weights(loop.fit(small_run))
    run = dataclasses.replace(elsewhere(small_run, how), activation_checkpointing=how)
    calls: list[int] = []
    real = MPTMLP.forward

    def counted(*args: Any) -> Any:
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(MPTMLP, "forward", counted)
    found = weights(loop.fit(run))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert len(calls) >= 2 * 2 * small_run.steps  # two blocks, forward and again for backward


def test_the_end_of_another_rank_reaches_the_logbook(tmp_path: Path) -> None:
    other = World(1, 2, torch.device("cpu"))
    with pytest.raises(MachineRefused), loop._told(tmp_path, other):
        raise MachineRefused("out of memory (CUDA)\nmore of it")
    with pytest.raises(ZeroDivisionError), loop._told(tmp_path, other):
        raise ZeroDivisionError("by zero")
    with pytest.raises(Interrupted), loop._told(tmp_path, other):  # which the first rank says for all
        raise Interrupted("stopped")
    first, second = Logbook(tmp_path).entries()
    assert (first["event"], first["rank"], first["error"], first["exit_code"]) == (
        "failed", 1, "out of memory (CUDA)", 5,
    )  # fmt: skip
    assert second["error"] == "ZeroDivisionError: by zero" and "exit_code" not in second


def test_a_line_that_a_full_disk_cut_short_hides_no_other(tmp_path: Path) -> None:
    book = Logbook(tmp_path)
    book.write("start")
    with (tmp_path / "logbook.jsonl").open("a") as file:
        file.write('{"time": "2026')
    book.write("resume", step=5)
    assert [entry["event"] for entry in book.entries()] == ["start", "resume"]


def test_two_processes_cannot_share_a_folder(small_run: Run) -> None:
    def start_another(metrics: loop.Metrics) -> None:
        with pytest.raises(UserError, match="another process"):
            loop.fit(small_run)
        raise Killed

    with pytest.raises(Killed):
        loop.fit(small_run, start_another)


def test_a_spike_is_rolled_back_and_passed_over(small_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run = dataclasses.replace(small_run, on_spike="skip")
    real = step.backward

    def spoiled(model: Any, batch: Any, total: int, run: Run, world: World) -> float:
        loss = real(model, batch, total, run, world)
        return float("nan") if batch.n_learned == bad else loss

    bad = _learned_of_step(run, 7)
    monkeypatch.setattr(step, "backward", spoiled)
    loop.fit(run)
    lines = [json.loads(line) for line in (Path(run.out) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["step"] for line in lines if "loss" not in line] == [8]
    assert [line["step"] for line in lines if "tokens_per_s" not in line] == [8]  # passing over data has no speed
    events = [(e["event"], e.get("step")) for e in Logbook(Path(run.out)).entries()]
    assert events == [("start", 0), ("spike", 8), ("resume", 5), ("finished", 12)]


def _learned_of_step(run: Run, number: int) -> int:
    data = batches.load_data(run, batches.load_tokenizer(run), run.data)
    return batches.Batches(run, data).get(number).n_learned


def test_a_spike_before_the_first_checkpoint_goes_back_to_the_start(
    small_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = dataclasses.replace(small_run, on_spike="skip")
    real = step.backward
    bad = _learned_of_step(run, 3)

    def spoiled(model: Any, batch: Any, total: int, run: Run, world: World) -> float:
        loss = real(model, batch, total, run, world)
        return float("nan") if batch.n_learned == bad else loss

    monkeypatch.setattr(step, "backward", spoiled)
    loop.fit(run)
    events = [(e["event"], e.get("step")) for e in Logbook(Path(run.out)).entries()]
    assert events == [("start", 0), ("spike", 4), ("resume", 0), ("finished", 12)]
    # The run that never took that step: its optimizer had forgotten what came before the roll back.
    alone = elsewhere(run, "alone")
    loop.check(alone, resume=True)
    (Path(alone.out) / "skipped.json").write_text("[3]")
    expected = weights(loop.fit(alone))
    assert all(torch.equal(expected[name], value) for name, value in weights(Path(run.out) / "model").items())


def test_a_spike_goes_back_past_checkpoints_taken_within_it(small_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run = dataclasses.replace(small_run, on_spike="skip", checkpoint_every=2, checkpoints_kept=4)
    seen: list[float] = []

    def spikes(self: Any, loss: float) -> bool:
        seen.append(loss)
        return len(seen) == 9  # of steps 6 to 9; checkpoints stand at 2, 4, 6 and 8

    monkeypatch.setattr(loop.SpikeRule, "update", spikes)
    loop.fit(run)
    events = [(e["event"], e.get("step")) for e in Logbook(Path(run.out)).entries()]
    assert events == [("start", 0), ("spike", 9), ("resume", 4), ("finished", 12)]
    assert json.loads((Path(run.out) / "skipped.json").read_text()) == [5, 6, 7, 8]


def test_a_spike_with_no_checkpoint_of_before_ends_the_run(small_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run = dataclasses.replace(small_run, on_spike="skip", checkpoint_every=1, checkpoints_kept=2)
    seen: list[float] = []
    monkeypatch.setattr(loop.SpikeRule, "update", lambda self, loss: bool(seen.append(loss)) or len(seen) == 9)
    with pytest.raises(TrainingDiverged, match=r"no checkpoint of .* is from before step 6"):
        loop.fit(run)


def test_a_steps_loss_is_the_mean_over_its_learned_tokens(small_run: Run) -> None:
    model = build.model(small_run, ALONE).eval()
    data = batches.load_data(small_run, batches.load_tokenizer(small_run), small_run.data)
    batch = batches.Batches(small_run, data).get(0)
    loss = step.accumulate(model, batch, small_run, ALONE, 512)
    with torch.no_grad():
        logits = model.unembed(model.hidden_states(batch.ids, batch.sequence_id))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    assert loss == pytest.approx(float(expected), rel=1e-6)


def test_the_last_step_of_an_epoch_takes_what_is_left(small_run: Run, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}", "response": "x" * n}) + "\n" for n in range(1, 11)))
    run = dataclasses.replace(small_run, data=str(path), steps=None, epochs=1.5)
    data = batches.load_data(run, batches.load_tokenizer(run), run.data)
    made = batches.Batches(run, data)
    assert made.n_steps == 4  # of 15 samples by fours
    assert [int(made.get(n).sequence_id.max(dim=1).values.add(1).sum()) for n in range(4)] == [4, 4, 4, 3]


def test_a_held_out_loss_is_the_loss_of_one_pass(small_run: Run) -> None:
    run = dataclasses.replace(small_run, eval_data="yaml_to_json", eval_every=6, eval_samples=5)
    folder = loop.fit(run)
    lines = [json.loads(line) for line in (Path(run.out) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "held_out_loss" in line] == [6, 12]
    model = mpt.checkpoint.load(folder)
    tokenizer = batches.load_tokenizer(run)
    data = datasets.load("yaml_to_json", tokenizer, "instruct", 512, run.seed)
    losses, n = 0.0, 0
    for number in range(5):  # each sample alone, unpacked
        ids, learned = (part[:512] for part in data.sample(number))
        labels = torch.tensor([t if keep else -100 for t, keep in zip(ids, learned, strict=True)])
        logits = model(torch.tensor([ids])).logits[0, :-1].detach()
        losses += float(torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum"))
        n += int((labels[1:] != -100).sum())
    assert lines[-1]["held_out_loss"] == pytest.approx(losses / n, rel=1e-5)


@pytest.mark.slow  # half a minute of compiling
def test_compiled_blocks_give_the_same_curve(small_run: Run) -> None:
    loop.fit(dataclasses.replace(small_run, steps=4))
    compiled = dataclasses.replace(elsewhere(small_run, "compiled"), steps=4, compile=True)
    loop.fit(compiled)
    assert losses(compiled) == pytest.approx(losses(small_run), rel=1e-5)
