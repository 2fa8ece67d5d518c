"""A sweep runs each combination, stops the clearly worse ones, goes on where it was stopped, and names the best."""

import dataclasses
import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from mpt.errors import Interrupted, UserError
from training import cli, loop, sweep
from training.run import Lora, Run


def test_a_grid_is_every_combination_of_typed_values() -> None:
    assert sweep.grid(["lr=1e-4,3e-4", "schedule=linear", "--global-batch=8,16"]) == [
        {"lr": lr, "schedule": "linear", "global_batch": n} for lr in (1e-4, 3e-4) for n in (8, 16)
    ]
    assert sweep.grid(["lora=8", "compile=true"]) == [{"lora": Lora(rank=8), "compile": True}]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("leraning=1", "no setting `leraning`"), ("lr_flor=1", "did you mean `lr_floor`"), ("lr=", "`--set lr=1,2`"),
        ("lr=fast", "must be a number"), ("seed=1.5", "a whole number"), ("schedule=step", "constant, cosine, linear"),
        ("out=a,b", "no setting `out`"), ("betas=0.9", "has several"), ("lora=big", "a rank"),
        (f"seed={','.join(map(str, range(65)))}", "has 65 runs"),
    ],
)  # fmt: skip
def test_a_value_no_run_can_have_is_refused(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        sweep.grid([text])


def test_the_clearly_worse_are_over_the_median_and_over_the_best_by_a_margin() -> None:
    assert sweep._worse({"a": 1.0, "b": 1.01, "c": 1.015}) == []
    assert sweep._worse({"a": 1.0, "b": 1.01, "c": 1.5}) == ["c"]
    assert sweep._worse({"a": 1.0, "b": 2.0}) == ["b"]
    assert sweep._worse({"a": 1.0}) == []


def test_a_sweep_stops_the_worse_and_goes_on_after_a_signal(
    small_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate of nearly nothing learns nothing, which a quarter of the steps shows."""
    config = tmp_path / "config.json"
    config.write_text(dataclasses.replace(small_run, steps=16, max_seq_len=256).to_json())
    out = tmp_path / "sweep"
    real, n_steps = loop.fit, [0]

    def stopped_once(run: Run, report: Any = lambda _: None, **options: Any) -> Path:
        def count(metrics: loop.Metrics) -> None:
            n_steps[0] += 1
            if n_steps[0] == 6:
                signal.raise_signal(signal.SIGTERM)

        return real(run, count, **options)

    monkeypatch.setattr(loop, "fit", stopped_once)
    command = ["train", "sweep", "--config", str(config), "--set", "lr=1e-9,1e-2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == Interrupted.exit_code
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    assert n_steps[0] == 4 + 16  # no step twice, and none of the worse one's after its look
    table = json.loads((out / "table.json").read_text())
    assert [(row["lr"], row["steps"], row["state"]) for row in table] == [
        (1e-2, 16, "finished"),
        (1e-9, 4, "worse at 25%"),
    ]
    assert table[0]["loss"] < table[1]["loss"]
    assert (out / "curves.png").is_file() and (out / "lr=0.01" / "model" / "manifest.json").is_file()
    assert "worse at 25%" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*command, "--set", "seed=1,2"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2 and "holds another sweep" in capsys.readouterr().err


def test_a_sweep_remembers_what_diverged(small_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = dataclasses.replace(small_run, steps=8, max_seq_len=256, on_spike="stop", checkpoint_every=2)
    real = loop.train_step

    def nan(model: Any, optimizer: Any, run: Run, accumulate: Any) -> tuple[dict[str, float], float]:
        found, norm = real(model, optimizer, run, accumulate)
        return ({"loss": float("nan")}, norm) if run.seed == 2 else (found, norm)

    monkeypatch.setattr(loop, "train_step", nan)
    outcomes = sweep.sweep(run, ["seed=1,2"], tmp_path / "sweep")
    assert [(o.values["seed"], o.state) for o in outcomes] == [(1, "finished"), (2, "diverged")]
    monkeypatch.setattr(loop, "fit", lambda *_, **__: Path())
    again = sweep.sweep(run, ["seed=1,2"], tmp_path / "sweep")
    assert [o.state for o in again] == ["finished", "diverged"]
