"""The state a run goes on from: model, optimizer and step, written whole or not at all.

`<out>/step-000500/` holds `state.pt` and a manifest with its sha256; it is written as `step-000500.partial` and renamed
once complete. Resuming takes the newest whole one and skips a damaged one with a warning. Not here: the finished
checkpoint that others load (`mpt/checkpoint.py`).
"""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from mpt.checkpoint import MANIFEST, verify_manifest, write_manifest
from mpt.errors import DamagedFile, MachineRefused

log = logging.getLogger(__name__)

_STATE = "state.pt"


def save(state: dict[str, Any], step: int, folder: Path, keep: int) -> Path:
    """Write folder/step-NNNNNN and return it; older ones beyond the newest `keep` are removed."""
    final = folder / f"step-{step:06d}"
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        with (partial / _STATE).open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        write_manifest(partial, {"step": step})
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        shutil.rmtree(partial, ignore_errors=True)
        raise MachineRefused(f"cannot write `{final}` ({error}); free some space, then run the same command") from error
    shutil.rmtree(final, ignore_errors=True)  # a damaged one that was skipped on resume
    partial.rename(final)
    for old in steps(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def steps(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".partial" and (path / MANIFEST).is_file())


def latest(folder: Path) -> dict[str, Any] | None:
    """The state of the newest undamaged checkpoint, on the CPU; None where there is none."""
    for path in reversed(steps(folder)):
        try:
            verify_manifest(path)
        except DamagedFile as error:
            log.warning("skipped `%s`: %s", path.name, error)
            continue
        state: dict[str, Any] = torch.load(path / _STATE, map_location="cpu", weights_only=True)
        return state
    return None
