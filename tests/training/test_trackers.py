"""Numbers reach the trackers that were asked for; a missing package is said before training."""

import dataclasses
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from mpt.errors import UserError
from training import loop
from training.run import Run


def test_every_step_reaches_weights_and_biases(small_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[dict[str, Any]] = []
    logged: list[tuple[int, dict[str, float]]] = []
    fake = SimpleNamespace(
        init=lambda **options: begun.append(options), log=lambda metrics, step: logged.append((step, metrics))
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    loop.fit(dataclasses.replace(small_run, trackers=("wandb",)))
    assert begun[0]["config"]["lr"] == small_run.lr
    assert [step for step, _ in logged] == list(range(1, 13))
    assert {"loss", "lr", "gradient_norm", "tokens_per_s", "tflops"} <= logged[0][1].keys()


def test_a_missing_tracker_is_said(small_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="tracking"):
        loop.fit(dataclasses.replace(small_run, trackers=("wandb",)))
    with pytest.raises(UserError, match="tensorboard, wandb"):
        dataclasses.replace(small_run, trackers=("mlflow",))  # type: ignore[arg-type]
