"""A run's curves as a picture: loss, held-out loss, learning rate, gradient norm and speed over the tokens seen."""

import contextlib
import json
from pathlib import Path
from typing import Any

from mpt.errors import UserError
from mpt.files import whole_file

_PANELS = (("loss", "loss"), ("gradient_norm", "gradient norm"), ("lr", "learning rate"), ("tokens_per_s", "tokens/s"))


def plot(*folders: Path, to: Path | None = None) -> Path:
    """Draw the metrics.jsonl of one run or several over each other; by default to <first folder>/curves.png.

    Raises UserError for a folder without steps.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2).flatten()
    for folder in folders:
        steps = read(folder)
        for axis, (key, label) in zip(axes, _PANELS, strict=True):
            known = [step for step in steps if key in step]
            name = folder.name if len(folders) > 1 else label
            axis.plot([s["tokens"] for s in known], [s[key] for s in known], linewidth=1, label=name)
            axis.set(title=label, xlabel="tokens")
            axis.grid(alpha=0.3)
        held_out = [step for step in steps if "held_out_loss" in step]
        if held_out:
            axes[0].plot(
                [s["tokens"] for s in held_out], [s["held_out_loss"] for s in held_out], "o-", label="held out"
            )
            axes[0].legend()
    if len(folders) > 1:
        axes[0].legend()
    to = to or folders[0] / "curves.png"
    return save(figure, to)


def save(figure: Any, path: Path) -> Path:
    """Write a picture whole or not at all, as a PNG where its name says nothing else. Raises UserError."""
    path = path if path.suffix else path.with_suffix(".png")
    known = figure.canvas.get_supported_filetypes()
    kind = path.suffix.removeprefix(".").lower()
    if kind not in known:
        raise UserError(f"`{path}` is no picture's name; end it in .{', .'.join(known)}")
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=110, format=kind)
    return path


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl. Raises UserError where there are none."""
    path = folder / "metrics.jsonl"
    steps = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):  # the last line of a run that was cut short
            steps.append(json.loads(line))
    if not steps:
        raise UserError(f"`{folder}` has no steps in metrics.jsonl; give the folder of a run that has begun")
    return steps
