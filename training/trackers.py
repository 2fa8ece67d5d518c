"""Where a run's numbers and samples go besides its folder: TensorBoard, Weights & Biases, MLflow and Trackio, by name.

A resumed run goes on under the id that it began with there, which `<out>/trackers.json` keeps.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from mpt.errors import Interrupted, UserError
from mpt.extras import install
from mpt.files import read_optional_json, write_whole
from training.run import Run

Samples = Sequence[tuple[str, str]]  # prompt and continuation
_PROJECT = "mpt"
_COUNTS = ("step", "steps")  # of the line: where a number stands, not what it is


class Tracker(Protocol):
    """One place that numbers go to."""

    def track(self, step: int, numbers: dict[str, float]) -> None: ...

    def samples(self, step: int, samples: Samples) -> None: ...

    def close(self, has_failed: bool) -> None: ...


class Trackers:
    """All of a run's; none where is_open is false, on all ranks but the first."""

    def __init__(self, run: Run, is_open: bool = True) -> None:
        """Raises UserError for a missing package."""
        self._trackers = [_OPEN[name](run) for name in run.trackers] if is_open else []

    def track(self, line: dict[str, Any]) -> None:
        """Take the numbers of a step's line."""
        numbers = {key: value for key, value in line.items() if key not in _COUNTS}
        for tracker in self._trackers:
            tracker.track(int(line["step"]), numbers)

    def samples(self, step: int, samples: Samples) -> None:
        for tracker in self._trackers:
            tracker.samples(step, samples)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        has_failed = kind is not None and not issubclass(kind, Interrupted)
        for tracker in self._trackers:
            tracker.close(has_failed)


def _kept_id(run: Run, name: str, new: Callable[[], str]) -> str:
    """The id of the run at a tracker: what an earlier start kept, else a new one, kept from now on."""
    ids = _ids(run)
    if name not in ids:
        ids[name] = new()
        write_whole(_path(run), json.dumps(ids, indent=2) + "\n")
    return ids[name]


def _ids(run: Run) -> dict[str, str]:
    return read_optional_json(_path(run))


def _path(run: Run) -> Path:
    return Path(run.out) / "trackers.json"


class _TensorBoard:
    def __init__(self, run: Run) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard") from error
        self._writer = SummaryWriter(f"{run.out}/tensorboard")

    def track(self, step: int, numbers: dict[str, float]) -> None:
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, step)

    def samples(self, step: int, samples: Samples) -> None:
        for number, (prompt, text) in enumerate(samples):
            self._writer.add_text(f"sample_{number}", f"{prompt}\n\n---\n\n{text}", step)

    def close(self, has_failed: bool) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, run: Run) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb") from error
        self._wandb = wandb
        self._run = wandb.init(
            project=_PROJECT,
            name=run.name,
            dir=run.out,
            config=dataclasses.asdict(run),
            id=_ids(run).get("wandb"),
            resume="allow",
        )
        _kept_id(run, "wandb", lambda: self._run.id)

    def track(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=step)

    def samples(self, step: int, samples: Samples) -> None:
        table = self._wandb.Table(columns=["step", "prompt", "text"], data=[[step, *sample] for sample in samples])
        self._run.log({"samples": table}, step=step)

    def close(self, has_failed: bool) -> None:
        self._run.finish(exit_code=int(has_failed))


class _MLflow:
    def __init__(self, run: Run) -> None:
        try:
            from mlflow.exceptions import MlflowException
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise _missing("mlflow") from error
        self._client = client = MlflowClient()  # of MLFLOW_TRACKING_URI

        def new() -> str:
            try:
                experiment = client.create_experiment(_PROJECT)
            except MlflowException:  # it is there
                experiment = client.get_experiment_by_name(_PROJECT).experiment_id
            made = client.create_run(experiment, run_name=run.name)
            for key, value in dataclasses.asdict(run).items():
                client.log_param(made.info.run_id, key, value)
            return str(made.info.run_id)

        self._id = _kept_id(run, "mlflow", new)
        client.update_run(self._id, status="RUNNING")

    def track(self, step: int, numbers: dict[str, float]) -> None:
        for key, value in numbers.items():
            self._client.log_metric(self._id, key, value, step=step)

    def samples(self, step: int, samples: Samples) -> None:
        text = "\n\n".join(f"## {prompt}\n\n{text}" for prompt, text in samples)
        self._client.log_text(self._id, text, f"samples/step-{step:06d}.md")

    def close(self, has_failed: bool) -> None:
        self._client.set_terminated(self._id, "FAILED" if has_failed else "FINISHED")


class _Trackio:
    def __init__(self, run: Run) -> None:
        try:
            import trackio
        except ImportError as error:
            raise _missing("trackio") from error
        self._trackio = trackio
        name = _kept_id(run, "trackio", lambda: f"{run.name}-{Path(run.out).name}")
        self._run = trackio.init(project=_PROJECT, name=name, config=dataclasses.asdict(run), resume="allow")

    def track(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=step)

    def samples(self, step: int, samples: Samples) -> None:
        rows = [[step, *sample] for sample in samples]
        self._run.log({"samples": self._trackio.Table(columns=["step", "prompt", "text"], data=rows)}, step=step)

    def close(self, has_failed: bool) -> None:
        self._run.finish()


def _missing(name: str) -> UserError:
    return UserError(f"`{name}` is not installed; {install('tracking')}, or leave --track out")


_OPEN: dict[str, Callable[[Run], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}
