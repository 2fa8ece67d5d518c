"""What a resume may change, what goes on from an old state in a new folder, and what a finished run can still do."""

import dataclasses
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mpt.checkpoint
from mpt.errors import UserError
from tests.training.killing import Killed, kill_at_eight
from training import checkpoint, cli, folder, loop
from training.logbook import Logbook
from training.run import Run, declarations


def weights(run: Run) -> dict[str, torch.Tensor]:
    return dict(mpt.checkpoint.load(Path(run.out) / "model").state_dict())


def lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run.out) / "metrics.jsonl").read_text().splitlines()]


def events(run: Run) -> list[dict[str, Any]]:
    return Logbook(Path(run.out)).entries()


def elsewhere(run: Run, name: str, **changes: Any) -> Run:
    return dataclasses.replace(run, out=str(Path(run.out).with_name(name)), **changes)


@pytest.fixture
def killed(small_run: Run) -> Run:
    """A run that was killed in step 8, with a checkpoint of step 5."""
    with pytest.raises(Killed):
        loop.fit(small_run, kill_at_eight)
    return small_run


def test_every_field_says_what_another_value_changes() -> None:
    """By hand: a checkpoint's tensors depend on these four, and the steps on none of the second list."""
    by = {kind: {d.name for d in declarations() if d.setting.changes == kind} for kind in ("state", "nothing")}
    assert by["state"] == {"base", "optimizer", "lora", "model"}
    assert by["nothing"] == {
        "name", "out", "epochs", "steps", "microbatch_tokens", "eval_data", "eval_every", "eval_samples", "eval_tasks",
        "eval_rows", "sample_every", "sample_prompts", "activation_checkpointing", "on_spike", "compile", "mirror",
        "trackers", "checkpoint_every", "checkpoints_kept", "preflight", "hang_timeout", "context_length", "licence",
        "max_bad_rows",
        "context_parallel", "replicas",
    }  # fmt: skip


def test_what_changes_no_result_changes_at_a_resume_and_is_logged(small_run: Run, killed: Run) -> None:
    whole = elsewhere(small_run, "whole")
    loop.fit(whole)
    changed = dataclasses.replace(
        killed, on_spike="stop", activation_checkpointing="full", checkpoint_every=3, microbatch_tokens=512,
        eval_data="yaml_to_json", eval_every=6, eval_samples=2, mirror="memory://changed",
    )  # fmt: skip
    loop.fit(changed)
    assert Run.read(Path(changed.out) / "run.json") == changed
    logged = {entry["setting"]: (entry["before"], entry["now"]) for entry in events(changed) if "setting" in entry}
    assert logged["on_spike"] == ("log", "stop") and logged["microbatch_tokens"] == (8192, 512)
    assert set(logged) == {
        "on_spike", "activation_checkpointing", "checkpoint_every", "microbatch_tokens", "eval_data", "eval_every",
        "eval_samples", "mirror",
    }  # fmt: skip
    # The same sums in smaller microbatches.
    assert [line["loss"] for line in lines(changed)] == pytest.approx([line["loss"] for line in lines(whole)], rel=1e-4)


def test_the_cure_that_a_refusal_prints_works(
    killed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "changed.json"
    config.write_text(dataclasses.replace(killed, lr=0.004, warmup_steps=4).to_json())

    def train(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["train", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0)

    assert train("pretrain", "--config", str(config)) == 2
    error = capsys.readouterr().err
    assert "lr 0.003, now 0.004" in error
    command = re.search(r"train (pretrain --from .* --out) FOLDER", error)
    assert command is not None, error
    out = tmp_path / "cured"
    assert train(*shlex.split(command[1]), str(out)) == 0
    run = Run.read(out / "run.json")
    assert (run.lr, run.warmup_steps, run.steps) == (0.004, 4, 12)
    assert run.start_from == f"{killed.out}/step-000005"
    assert [line["step"] for line in lines(run)] == list(range(6, 13))
    assert events(run)[0] | {"time": ""} == {"time": "", "event": "from", "state": run.start_from}
    assert events(run)[1]["step"] == 5
    capsys.readouterr()
    assert train(*shlex.split(command[1]), str(out)) == 0  # the same command again: it is finished


def test_the_cure_for_a_setting_without_a_flag_works_too(
    killed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"betas .*--config COPY --from .*/run --out FOLDER"):
        loop.fit(dataclasses.replace(killed, betas=(0.8, 0.9)))
    copy = tmp_path / "copy.json"
    copy.write_text(json.dumps({**json.loads(killed.to_json()), "betas": [0.8, 0.9]}))
    out = tmp_path / "cured"
    arguments = ["pretrain", "--config", str(copy), "--from", killed.out, "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    assert Run.read(out / "run.json").betas == (0.8, 0.9)
    assert [line["step"] for line in lines(Run.read(out / "run.json"))] == list(range(6, 13))


def test_from_an_old_state_nothing_changed_is_a_resume(killed: Run) -> None:
    """The optimizer comes along: the moments decide the next steps, so both go on bit for bit alike."""
    before = (Path(killed.out) / "step-000005" / "manifest.json").read_bytes()
    other = elsewhere(killed, "other", start_from=f"{killed.out}/step-000005")
    loop.fit(other)
    assert (Path(killed.out) / "step-000005" / "manifest.json").read_bytes() == before
    loop.fit(killed)
    assert all(torch.equal(weights(other)[name], value) for name, value in weights(killed).items())
    slower = elsewhere(killed, "slower", start_from=f"{killed.out}/step-000012", steps=20, lr=1e-9, schedule="constant")
    loop.fit(slower)
    for name, value in weights(killed).items():
        torch.testing.assert_close(weights(slower)[name], value, rtol=0, atol=1e-7)


def test_a_state_of_other_tensors_is_refused(killed: Run, tmp_path: Path) -> None:
    state = f"{killed.out}/step-000005"
    with pytest.raises(UserError, match="optimizer 'adamw', now 'lion'"):
        loop.fit(elsewhere(killed, "lion", start_from=state, optimizer="lion"))
    with pytest.raises(UserError, match="no whole checkpoint"):
        loop.fit(elsewhere(killed, "gone", start_from=f"{killed.out}/step-000006"))
    assert not (tmp_path / "lion").exists() and not (tmp_path / "gone").exists()
    with pytest.raises(UserError, match="begins anew, in another --out"):
        loop.fit(dataclasses.replace(killed, optimizer="lion"))
    with pytest.raises(UserError, match="needs --out"):
        folder.start_state(killed.out, None)
    with pytest.raises(UserError, match="folder of its own"):
        folder.start_state(killed.out, killed.out)
    with pytest.raises(UserError, match="holds no run"):
        folder.start_state(str(tmp_path), str(tmp_path / "new"))


def test_a_finished_run_keeps_one_state_and_is_extended(small_run: Run) -> None:
    """Under a constant rate the longer run takes the steps that it would have taken from the start."""
    short = dataclasses.replace(small_run, schedule="constant")
    longer = elsewhere(short, "longer", steps=18)
    loop.fit(longer)
    loop.fit(short)
    assert [path.name for path in checkpoint.steps(Path(short.out))] == ["step-000012"]
    first = weights(short)
    loop.fit(dataclasses.replace(short, steps=18))
    assert [line["loss"] for line in lines(short)] == [line["loss"] for line in lines(longer)]
    assert all(torch.equal(weights(longer)[name], value) for name, value in weights(short).items())
    kept = mpt.checkpoint.load(Path(short.out) / "model-step-000012").state_dict()
    assert all(torch.equal(kept[name], value) for name, value in first.items())
    names = [entry["event"] for entry in events(short)]
    assert names == ["start", "finished", "changed", "resume", "finished"]


def test_a_finished_run_is_left_alone_by_what_asks_for_no_more(small_run: Run) -> None:
    loop.fit(small_run)
    before = sorted(path.name for path in Path(small_run.out).iterdir())
    loop.fit(dataclasses.replace(small_run, on_spike="stop"))
    with pytest.raises(UserError, match="has taken 12 steps, and the run is to have 6"):
        loop.fit(dataclasses.replace(small_run, steps=6))
    assert sorted(path.name for path in Path(small_run.out).iterdir()) == before
    (state,) = checkpoint.steps(Path(small_run.out))
    for file in state.iterdir():
        file.unlink()
    state.rmdir()
    with pytest.raises(UserError, match=r"its last state is gone.*--base"):
        loop.fit(dataclasses.replace(small_run, steps=24))
    assert (Path(small_run.out) / "model").is_dir()


def test_a_short_run_learns_and_says_how_long_it_warms_up(small_run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """A tenth of 20 steps; with the recipe's 50 the rate of the last step would be 20/50 of a falling one."""
    run = dataclasses.replace(small_run, steps=20, warmup_steps=50, warmup_share=0.1, schedule="constant")
    with caplog.at_level("INFO"):
        loop.fit(run)
    assert "warm-up: 2 of 20 steps" in caplog.text
    rates = [line["lr"] / run.lr for line in lines(run)]
    assert rates == pytest.approx([0.5, *[1.0] * 19])
    assert events(run)[0]["warmup"] == 2
