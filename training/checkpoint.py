"""The state a run goes on from: parameters, optimizer state and position, written whole or not at all.

`<out>/step-000500/` holds every rank's shards as safetensors and a manifest with their sha256, written last; it is
`step-000500.partial` until then. Written by `torch.distributed.checkpoint` in the background, and readable by any
number of ranks. Resuming takes the newest whole one and skips a damaged one with a warning. Not here: the finished
checkpoint that others load (`mpt/checkpoint.py`).
"""

import logging
import os
import shutil
import threading
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from mpt.errors import DamagedFile, MachineRefused, UserError
from mpt.manifest import MANIFEST, read_manifest, verify_manifest, write_manifest
from training.distributed import World
from training.mirror import Mirror

log = logging.getLogger(__name__)

_PARAMETER = "parameter"
# torch says so at every save of a world of one, from whatever thread saves.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)


@dataclass(frozen=True)
class Position:
    """Where a run stands; everything else of its future follows from its configuration."""

    step: int = 0  # steps taken
    tokens: int = 0  # seen in them
    seconds: float = 0.0  # spent in them, without what a crash lost


class Saver:
    """Writes checkpoints in the background, one at a time; every rank makes the same calls."""

    def __init__(self, folder: Path, world: World, keep: int, mirror: Mirror | None = None) -> None:
        self._folder, self._world, self._keep, self._mirror = folder, world, keep, mirror
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, position: Position) -> None:
        """Copy the state and begin to write it as folder/step-NNNNNN; older ones beyond `keep` are removed after.

        Raises MachineRefused when this one or the one before cannot be written.
        """
        self.wait()
        final = self._folder / f"step-{position.step:06d}"
        partial = final.with_name(final.name + ".partial")
        try:
            if self._world.is_first:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            self._world.barrier()
            writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
            written: Future[object] = dcp.async_save(  # type: ignore[assignment]
                {name: tensor.detach() for name, tensor in tensors(model, optimizer).items()},
                storage_writer=writer,
                process_group=self._world.background,
                no_dist=self._world.size == 1,
            )
        except (OSError, RuntimeError, dcp.CheckpointException) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise _cannot_write(final, error) from error

        def finish() -> None:
            try:
                written.result()
                if self._world.background is not None:
                    torch.distributed.barrier(self._world.background)
                if self._world.is_first:
                    self._publish(partial, final, position)
            except BaseException as error:  # told by `wait`, in the run's own thread
                shutil.rmtree(partial, ignore_errors=True)
                self._error = error

        self._thread = threading.Thread(target=finish, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until the last save is whole and under its name. Raises MachineRefused when it could not be written."""
        self.join()
        if self._world.sum(float(self._error is not None))[0]:
            error, self._error = self._error, None
            raise _cannot_write(self._folder, error or RuntimeError("another rank failed"))

    def join(self) -> None:
        """Until the writing thread has ended, whatever came of it; for a run that ends by an error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _publish(self, partial: Path, final: Path, position: Position) -> None:
        write_manifest(partial, asdict(position))
        shutil.rmtree(final, ignore_errors=True)  # a damaged one that was skipped on resume
        partial.rename(final)
        for old in steps(self._folder)[: -self._keep]:
            shutil.rmtree(old)
        if self._mirror is not None:
            try:
                self._mirror.put(final, self._keep)
            except MachineRefused as error:  # the local copy is whole: go on training, and try with the next one
                log.warning("`%s` has no copy: %s", final.name, error)


def _cannot_write(path: Path, error: BaseException) -> MachineRefused:
    cause: BaseException = error.__cause__ or error
    if isinstance(error, dcp.CheckpointException) and error.failures:  # its own text names the ranks alone
        cause = next(iter(error.failures.values()))[0]
    reason = (str(cause) or type(cause).__name__).splitlines()[0]
    return MachineRefused(f"cannot write `{path}` ({reason}); free some space, then run the same command")


def steps(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step-*") if is_step(path))


def is_step(path: Path) -> bool:
    """Whether a folder is a complete checkpoint."""
    return path.name.startswith("step-") and path.suffix != ".partial" and (path / MANIFEST).is_file()


def adopt(state: Path, out: Path) -> Path:
    """Another run's checkpoint as this one's first; on one file system it takes no space.

    Raises UserError when it is gone, DamagedFile.
    """
    if not is_step(state):
        raise UserError(f"`{state}`, from which the run goes on, is gone; give --from another state, and another --out")
    verify_manifest(state)
    final = out / state.name
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(state, partial, copy_function=_link)
    partial.rename(final)
    return final


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)  # nobody writes into a complete checkpoint
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def latest(folder: Path, last_step: int | None = None) -> Path | None:
    """The newest undamaged checkpoint, of last_step or before; None where there is none."""
    for path in reversed(steps(folder)):
        if last_step is not None and step_of(path) > last_step:
            continue
        try:
            verify_manifest(path)
        except DamagedFile as error:
            log.warning("skipped `%s`: %s", path.name, error)
            continue
        return path
    return None


def step_of(path: Path) -> int:
    """How many steps had been taken, by the folder's name."""
    return int(path.name.rpartition("-")[2])


def restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Position:
    """Fill model and optimizer from a checkpoint, whatever number of ranks wrote it; nothing of before stays."""
    _make_state(optimizer)
    reader = HuggingFaceStorageReader(str(path))
    stored = reader.read_metadata().state_dict_metadata
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        for key in [key for key in state if f"{key}.{name}" not in stored]:  # from before the first step
            del state[key]
    wanted: Mapping[str, Tensor] = {name: tensor.detach() for name, tensor in tensors(model, optimizer).items()}
    if missing := wanted.keys() ^ stored.keys():
        raise DamagedFile(f"`{path}` and the run differ in `{min(missing)}`; it belongs to another run")
    for name, tensor in wanted.items():
        if (found := tuple(stored[name].size)) != tuple(tensor.shape):  # type: ignore[union-attr]
            raise DamagedFile(
                f"`{path}` has {name} of {found}, the run {tuple(tensor.shape)}; it belongs to another run"
            )
    dcp.load(dict(wanted), storage_reader=reader, no_dist=not torch.distributed.is_initialized())
    manifest = read_manifest(path) or {}
    return Position(manifest["step"], manifest["tokens"], manifest["seconds"])


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """Empty what the optimizer remembers, in tensors as it makes them itself: by a step at a learning rate of zero.

    Where each lies only it knows. AdamW counts its steps on the CPU, but beside the parameter where it is `fused`.
    """
    optimizer.state.clear()
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What is learned and what the optimizer remembers of it, by name; frozen parameters come from the base."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[f"{_PARAMETER}.{name}"] = parameter
            for key, value in optimizer.state.get(parameter, {}).items():
                found[f"{key}.{name}"] = value
    return found
