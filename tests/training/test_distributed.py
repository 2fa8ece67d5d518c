"""Several ranks give the curve of one, and a run of several survives what kills a rank. Two gloo ranks on the CPU."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import mpt.checkpoint
from tests.training import one_step
from tests.training.killing import Killed, kill_at_eight
from tests.warm_ranks import Ranks
from training import cli, launch, loop
from training.logbook import Logbook
from training.run import ActivationCheckpointing, Lora, Run

ROOT = Path(__file__).parents[2]
_FIT = """
import os, sys
from pathlib import Path
from training import loop
from training.run import Run

def die(metrics):
    if metrics["step"] == int(os.environ.get("DIE_AT", "0")) and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), 9)

loop.fit(Run.read(Path(sys.argv[1])), die)
"""
_DIE_ON_THE_OTHER = """
import os, sys
import time
from pathlib import Path
from training import loop, step
from training.run import Run

run = Run.read(Path(sys.argv[1]))
real, calls = step.backward, []
def backward(*args):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 18 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        while not (Path(run.out) / "step-000005" / "manifest.json").is_file():  # written in the background
            time.sleep(0.01)
        os.kill(os.getpid(), 9)
    return real(*args)

step.backward = backward
loop.fit(run)
"""


def torchrun(ranks: Ranks, run: Run, script: str = _FIT, n_ranks: int = 2, **environment: str) -> None:
    """The run on so many ranks, restarted once if a rank dies."""
    described, program = (Path(f"{run.out}{suffix}") for suffix in (".json", ".py"))
    described.write_text(run.to_json())
    program.write_text(script)
    ranks.run(program, str(described), n_ranks=n_ranks, **environment)


def elsewhere(run: Run, name: str) -> Run:
    return dataclasses.replace(run, out=str(Path(run.out).with_name(name)))


def losses(run: Run) -> list[float]:
    return [json.loads(line)["loss"] for line in (Path(run.out) / "metrics.jsonl").read_text().splitlines()]


def weights(run: Run) -> dict[str, torch.Tensor]:
    return dict(mpt.checkpoint.load(Path(run.out) / "model").state_dict())


@pytest.fixture
def three_rows(small_run: Run) -> Run:
    """Rows that two ranks cannot share evenly, one at a time."""
    return dataclasses.replace(small_run, global_batch=6, microbatch_tokens=512)


def test_two_ranks_with_four_bit_matrices_give_the_curve_of_one(ranks: Ranks, three_rows: Run, tmp_path: Path) -> None:
    model = {**three_rows.model, "d_model": 64}
    base = loop.fit(dataclasses.replace(three_rows, model=model, out=str(tmp_path / "base"), steps=2))
    one = dataclasses.replace(
        three_rows, base=str(base), tokenizer=None, model={}, lora=Lora(rank=4, dropout=0.0, bits=4), lr=1e-2
    )
    loop.fit(one)
    two = elsewhere(one, "two")
    torchrun(ranks, two)
    assert losses(two) == pytest.approx(losses(one), rel=2e-4)


def test_two_ranks_give_the_curve_of_one_and_survive_kill_9(ranks: Ranks, three_rows: Run) -> None:
    loop.fit(three_rows)
    two, killed = elsewhere(three_rows, "two"), elsewhere(three_rows, "killed")
    torchrun(ranks, two)
    # The same sums in another order: float32's rounding, through 12 steps of AdamW.
    assert losses(two) == pytest.approx(losses(three_rows), rel=2e-5)
    one = weights(three_rows)
    for name, tensor in weights(two).items():
        torch.testing.assert_close(tensor, one[name], rtol=0, atol=2e-4)
    torchrun(ranks, killed, _DIE_ON_THE_OTHER)
    assert losses(killed) == losses(two)
    assert all(torch.equal(tensor, weights(two)[name]) for name, tensor in weights(killed).items())
    entries = Logbook(Path(killed.out)).entries()
    by_event = {entry["event"]: entry for entry in entries}
    assert [entry["event"] for entry in entries if entry["event"] in ("start", "resume", "finished")] == [
        "start", "resume", "finished",
    ]  # fmt: skip
    assert by_event["resume"]["step"] == 5
    assert by_event["lost"]["rank"] == 1  # killed without a word
    assert by_event["failed"]["rank"] == 0  # whose peer was gone
    assert by_event["preflight"]["ranks"] == 2


_STEP = """
import sys
from pathlib import Path
from tests.training import one_step
from training.run import Run

one_step.write(Run.read(Path(sys.argv[1])))
"""
_DROPOUT = {"emb_pdrop": 0.1, "resid_pdrop": 0.2}
_ATTENTION = {"alibi": True, "qk_ln": True, "attn_pdrop": 0.1}


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_in_bf16_two_ranks_compute_what_one_does_dropout_included(
    ranks: Ranks, three_rows: Run, checkpointing: ActivationCheckpointing
) -> None:
    run = dataclasses.replace(
        three_rows, precision="bf16", activation_checkpointing=checkpointing,
        model={**three_rows.model, **_DROPOUT, "attn_config": _ATTENTION, "no_bias": False},
    )  # fmt: skip
    two_ranks_are_one(ranks, run)


@pytest.mark.parametrize("dora", [False, True])
def test_in_bf16_two_ranks_with_adapters_compute_what_one_does(
    ranks: Ranks, three_rows: Run, tmp_path: Path, dora: bool
) -> None:
    base = loop.fit(dataclasses.replace(three_rows, out=str(tmp_path / "base"), steps=2))
    lora = Lora(rank=4, dropout=0.3, dora=dora)
    run = dataclasses.replace(three_rows, base=str(base), tokenizer=None, model={}, lora=lora, precision="bf16")
    two_ranks_are_one(ranks, run)


@pytest.mark.parametrize(("alibi", "checkpointing"), [(True, "full"), (False, "none")])
def test_ranks_that_share_each_row_compute_what_one_does(
    ranks: Ranks, three_rows: Run, alibi: bool, checkpointing: ActivationCheckpointing
) -> None:
    model = {**three_rows.model, **_DROPOUT, "max_seq_len": 512, "attn_config": {"alibi": alibi}}
    run = dataclasses.replace(three_rows, model=model, max_seq_len=511, activation_checkpointing=checkpointing)
    two_ranks_are_one(ranks, run, context_parallel=2)


def test_replicas_of_a_split_model_give_the_curve_of_one_also_after_kill_9(ranks: Ranks, three_rows: Run) -> None:
    run = dataclasses.replace(
        three_rows, model={**three_rows.model, **_DROPOUT}, eval_data="yaml_to_json", eval_every=5, steps=8
    )
    loop.fit(run)
    four = dataclasses.replace(elsewhere(run, "four"), replicas=2)
    torchrun(ranks, four, n_ranks=4, DIE_AT="7")
    assert losses(four) == pytest.approx(losses(run), rel=2e-5)  # float32's rounding, through 8 steps of AdamW
    resumed = next(entry for entry in Logbook(Path(four.out)).entries() if entry["event"] == "resume")
    assert resumed["step"] == 5


def two_ranks_are_one(ranks: Ranks, run: Run, **how: int) -> None:
    """In loss and in every gradient. Each microbatch is a row, so the same products are rounded in the same way; what
    is added in another order is float32: a few of its epsilons of the largest element."""
    two = dataclasses.replace(elsewhere(run, "two"), **how)
    torchrun(ranks, two, _STEP)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each rank has: others would cut a product's sums in other pieces
    try:
        one_step.write(run)
    finally:
        torch.set_num_threads(n_threads)
    one, found = one_step.read(run), one_step.read(two)
    assert found.keys() == one.keys()
    for name, expected in one.items():
        close = 8 * torch.finfo(torch.float32).eps * float(expected.abs().max())
        torch.testing.assert_close(found[name], expected, rtol=0, atol=close, msg=lambda m, name=name: f"{name}: {m}")


def test_a_run_goes_on_with_another_number_of_ranks(ranks: Ranks, three_rows: Run) -> None:
    whole, run = elsewhere(three_rows, "whole"), three_rows
    loop.fit(whole)
    with pytest.raises(Killed):
        loop.fit(run, kill_at_eight)
    torchrun(ranks, run)
    assert losses(run)[:5] == losses(whole)[:5]
    assert losses(run) == pytest.approx(losses(whole), rel=2e-5)


def pretrain(run: Run) -> list[str]:
    """What `train` is told for the run on two ranks."""
    description = Path(run.out).with_suffix(".config.json")
    description.write_text(run.to_json())
    return ["pretrain", "--config", str(description), "--gpus", "2"]


def start(run: Run) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "training.cli", *pretrain(run)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def test_a_signal_to_the_launcher_saves_and_the_same_command_goes_on(three_rows: Run) -> None:
    run = dataclasses.replace(three_rows, steps=60, checkpoint_every=50)
    process = start(run)
    metrics = Path(run.out) / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while not metrics.is_file() or metrics.read_text().count("\n") < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=100)[1]
    assert process.returncode == 75
    assert "the same command goes on" in error.splitlines()[-1]
    stopped_at = len(losses(run))
    assert 3 <= stopped_at < 60
    process = start(run)
    process.communicate(timeout=100)
    assert process.returncode == 0
    assert len(losses(run)) == 60
    entries = Logbook(Path(run.out)).entries()
    assert [entry["event"] for entry in entries] == ["start", "stopped", "resume", "finished"]
    assert entries[2]["step"] == stopped_at and "lost_steps" not in entries[2]


def test_a_mistake_is_found_before_ranks_are_started(
    three_rows: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: two of the command's own would import torch only to say a line each."""
    started: list[Run] = []
    monkeypatch.setattr(launch, "start", lambda run, _: started.append(run))

    def refused(run: Run) -> str:
        monkeypatch.setattr(sys, "argv", ["train", *pretrain(run)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 2 and started == []
        return capsys.readouterr().err

    error = refused(dataclasses.replace(three_rows, data="yaml_to_jsn"))
    assert error == "train: no dataset `yaml_to_jsn`; did you mean `yaml_to_json`?\n"
    assert "one sequence of 1000000000 tokens needs about" in refused(
        dataclasses.replace(three_rows, max_seq_len=10**9)
    )
    assert not Path(three_rows.out).exists()
