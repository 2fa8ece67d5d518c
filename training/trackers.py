"""Where a run's numbers go besides metrics.jsonl: TensorBoard and Weights & Biases, by name."""

import dataclasses
from collections.abc import Callable
from typing import Any

from mpt.errors import UserError
from training.run import Run

Track = Callable[[dict[str, Any]], None]


def open_all(run: Run) -> list[Track]:
    """One function per tracker, to be called with each step's numbers. Raises UserError for a missing package."""
    return [_OPEN[name](run) for name in run.trackers]


def _tensorboard(run: Run) -> Track:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise _missing("tensorboard") from error
    writer = SummaryWriter(f"{run.out}/tensorboard")

    def track(metrics: dict[str, Any]) -> None:
        for key, value in metrics.items():
            if key not in ("step", "steps"):
                writer.add_scalar(key, value, metrics["step"])
        if metrics["step"] == metrics["steps"]:
            writer.close()

    return track


def _wandb(run: Run) -> Track:
    try:
        import wandb
    except ImportError as error:
        raise _missing("wandb") from error
    wandb.init(project="mpt", name=run.name, dir=run.out, config=dataclasses.asdict(run), resume="allow")

    def track(metrics: dict[str, Any]) -> None:
        wandb.log({key: value for key, value in metrics.items() if key != "step"}, step=metrics["step"])

    return track


def _missing(name: str) -> UserError:
    return UserError(f"`{name}` is not installed; install it with `pip install -e '.[tracking]'`, or leave --track out")


_OPEN: dict[str, Callable[[Run], Track]] = {"tensorboard": _tensorboard, "wandb": _wandb}
