"""Numbers and samples reach the trackers that were asked for, under one id over resumes; a missing package is said.

With the real packages where they are installed (`pip install -e '.[tracking]'`), which write to this machine alone.
"""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mpt.errors import UserError
from tests.training.killing import Killed, kill_at_eight
from training import loop
from training.run import Run


def test_every_step_and_sample_reaches_weights_and_biases(small_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[dict[str, Any]] = []
    logged: list[tuple[int, dict[str, Any]]] = []
    ends: list[int] = []

    def init(**options: Any) -> SimpleNamespace:
        begun.append(options)
        log = lambda metrics, step: logged.append((step, metrics))  # noqa: E731
        finish = lambda exit_code: ends.append(exit_code)  # noqa: E731
        return SimpleNamespace(id=options["id"] or f"id{len(begun)}", log=log, finish=finish)

    fake = SimpleNamespace(init=init, Table=lambda columns, data: data)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run = dataclasses.replace(small_run, trackers=("wandb",), sample_every=6)
    with pytest.raises(Killed):
        loop.fit(run, kill_at_eight)
    loop.fit(run)
    assert [options["id"] for options in begun] == [None, "id1"]
    assert ends == [1, 0]  # the first was killed
    assert begun[0]["config"]["lr"] == small_run.lr
    numbers = [(step, metrics) for step, metrics in logged if "loss" in metrics]
    assert [step for step, _ in numbers] == [1, 2, 3, 4, 5, 6, 7, 6, 7, 8, 9, 10, 11, 12]
    assert {"loss", "lr", "gradient_norm", "tokens_per_s", "tflops"} <= numbers[0][1].keys()
    samples = [(step, len(metrics["samples"])) for step, metrics in logged if "samples" in metrics]
    assert samples == [(6, 4), (6, 4), (12, 4)]


def test_a_missing_tracker_is_said(small_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "mlflow", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
        if name == "mlflow":
            monkeypatch.setitem(sys.modules, "mlflow.exceptions", None)
        with pytest.raises(UserError, match=rf"`{name}` is not installed; `.*install .*{name}"):
            loop.fit(dataclasses.replace(small_run, trackers=(name,)))  # type: ignore[arg-type]
        assert not Path(small_run.out).exists()
    with pytest.raises(UserError, match="tensorboard, wandb, mlflow, trackio"):
        dataclasses.replace(small_run, trackers=("comet",))  # type: ignore[arg-type]


def twice(run: Run) -> dict[str, Any]:
    """Two starts of a run, killed in between; the ids it has at its trackers."""
    run = dataclasses.replace(run, sample_every=6)
    with pytest.raises(Killed):
        loop.fit(run, kill_at_eight)
    path = Path(run.out) / "trackers.json"
    before = json.loads(path.read_text())
    loop.fit(run)
    after: dict[str, Any] = json.loads(path.read_text())
    assert after == before
    return after


def installed(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is not installed: pip install -e '.[tracking]'")


def test_a_resumed_run_keeps_its_id_at_weights_and_biases(small_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    installed("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = twice(dataclasses.replace(small_run, trackers=("wandb",)))
    folders = sorted(path.name for path in (Path(small_run.out) / "wandb").glob("offline-run-*"))
    assert folders and all(name.endswith(f"-{ids['wandb']}") for name in folders)


def test_mlflow_has_every_step_of_one_run(small_run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tracking = installed("mlflow.tracking")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    ids = twice(dataclasses.replace(small_run, trackers=("mlflow",)))
    client = tracking.MlflowClient(f"file://{tmp_path}/mlruns")
    found = client.get_run(ids["mlflow"])
    assert found.info.status == "FINISHED" and found.data.params["lr"] == "0.003"
    history = client.get_metric_history(ids["mlflow"], "loss")
    assert sorted({metric.step for metric in history}) == list(range(1, 13))
    assert [file.path for file in client.list_artifacts(ids["mlflow"], "samples")] == [
        "samples/step-000006.md", "samples/step-000012.md",
    ]  # fmt: skip


def test_trackio_has_every_step_of_one_run(small_run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    installed("trackio")
    storage = installed("trackio.sqlite_storage").SQLiteStorage
    ids = twice(dataclasses.replace(small_run, trackers=("trackio",)))
    steps = {row["step"] for row in storage.get_logs("mpt", ids["trackio"]) if "loss" in row}
    assert steps == set(range(1, 13))


def test_tensorboard_has_every_step(small_run: Run) -> None:
    reader = installed("tensorboard.backend.event_processing.event_accumulator")
    loop.fit(dataclasses.replace(small_run, trackers=("tensorboard",), sample_every=12))
    events = reader.EventAccumulator(f"{small_run.out}/tensorboard")
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 13))
    assert any(tag.startswith("sample_0") for tag in events.Tags()["tensors"])
