"""The training loop: from a Run to a checkpoint folder, on one process or many ranks, resumable at any step.

`<out>/run.json` is the whole configuration, `metrics.jsonl` a line per step, `logbook.txt` the run's story,
`step-NNNNNN/` the state to resume from, `model/` the finished checkpoint. Resumed on the same number of ranks of one
machine, a run ends bit for bit as if it had never stopped.
"""

import contextlib
import json
import logging
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import mpt.checkpoint
import mpt.manifest
from mpt.errors import Interrupted, MPTError, TrainingDiverged
from training import batches, build, checkpoint, curves, distributed, export, folder, memory, optimizer, packing, plan
from training.batches import Batches
from training.checkpoint import Position
from training.distributed import World
from training.folder import Skipped
from training.logbook import Logbook, where
from training.mirror import Mirror
from training.objective import of_run
from training.run import Run
from training.spikes import SpikeRule
from training.step import Metrics, train_step
from training.trackers import open_all

log = logging.getLogger(__name__)


def fit(run: Run, report: Callable[[Metrics], None] = lambda _: None, *, resume: bool = True) -> Path:
    """Train to the end, from wherever an earlier start got to, and return the finished checkpoint's folder.

    report: called on the first rank after every step with its numbers. Raises UserError when `out` holds another run
    or is in use, TrainingDiverged, MachineRefused, and Interrupted when a signal stopped it after saving.
    """
    finished = Path(run.out) / "model"
    with distributed.join() as world, folder.own(run, world, resume):
        if (finished / mpt.manifest.MANIFEST).is_file():
            log.info("`%s` is finished", finished)
            return finished
        try:
            _Training(run, world).go(report)
        except MPTError as error:
            event = "stopped" if isinstance(error, Interrupted) else "failed"
            Logbook(Path(run.out), world.is_first).write(event, error=str(error), exit_code=error.exit_code)
            raise
    return finished


def check(run: Run, resume: bool, n_ranks: int = 1) -> None:
    """Find a user's mistakes before ranks are started: folder, memory, tokenizer and data. Raises UserError."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with folder.claimed(run, resume):
        plan.check_memory(run, n_ranks, memory.available_gb(device, n_ranks))
        batches.count_steps(run, of_run(run, batches.load_tokenizer(run)).load(run.data))


class _Training:
    """One start of a run: what is loaded, and how far it has got."""

    def __init__(self, run: Run, world: World) -> None:
        self.run, self.world, self.out = run, world, Path(run.out)
        self.logbook = Logbook(self.out, world.is_first)
        self.tokenizer = batches.load_tokenizer(run)
        self.objective = of_run(run, self.tokenizer)
        self.batches = Batches(run, self.objective.load(run.data), self.objective.pack)
        self.held_out = None if run.eval_data is None else batches.held_out(run, self.objective.load(run.eval_data))
        self.held_out_batch: Any = None  # packed when the objective knows what it needs of the base
        self.n_steps = self.batches.n_steps
        if run.warmup_steps >= self.n_steps:
            log.warning(
                "the warm-up takes %d steps, the run has %d; --lr is never reached", run.warmup_steps, self.n_steps
            )
        n_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        plan.check_memory(run, world.size, memory.available_gb(world.device, n_local))
        self.model = build.model(run, world)
        self.shape = plan.Shape.of(self.model.config)
        is_gpu = world.device.type == "cuda"
        self.peak_tflops = plan.peak_tflops(torch.cuda.get_device_name(world.device)) if is_gpu else None
        self.optimizer = optimizer.build(run, [p for p in self.model.parameters() if p.requires_grad])
        self.mirror = None if run.mirror is None else Mirror(run.mirror)
        self.saver = checkpoint.Saver(self.out, world, run.checkpoints_kept, self.mirror)
        self.microbatch = memory.Microbatch(run, world)
        self.skipped = Skipped(self.out / "skipped.json")
        self.position, self.started = Position(), time.monotonic()
        self.rule = SpikeRule(self.n_steps)  # the first rank's counts

    def go(self, report: Callable[[Metrics], None]) -> None:
        self.prepare()
        self.restore()
        if self.run.on_spike == "skip" and checkpoint.latest(self.out) is None:
            self.saver.save(self.model, self.optimizer, self.position)  # something to roll back to
        with _signals() as stopped, (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            try:
                with contextlib.closing(self.batches):
                    self.take_steps(file, report, stopped)
                self.saver.wait()
            finally:
                self.saver.join()
        self.finish()

    def prepare(self) -> None:
        """Ask of the base what the objective needs, while the model still is the base."""

        def upcoming() -> Iterator[list[Any]]:
            yield from map(self.batches.samples, range(self.n_steps))
            if self.held_out is not None:
                yield self.held_out

        self.microbatch.shrink_to_fit(
            lambda positions: self.objective.prepare(self.model, upcoming(), self.world, positions), self.logbook
        )
        if self.held_out is not None:
            self.held_out_batch = self.objective.pack(self.held_out)

    def restore(self, last_step: int | None = None) -> None:
        """Go on from the newest whole checkpoint, of last_step or before, and note what stopping has cost.

        Raises TrainingDiverged when the run is to go back to last_step and has no checkpoint of before.
        """
        world = self.world
        if world.is_first and self.mirror is not None and not checkpoint.steps(self.out):
            self.mirror.fetch_latest(self.out)
        path = checkpoint.latest(self.out, last_step) if world.is_first else None
        step = world.from_first(-1 if path is None else checkpoint.step_of(path))
        if last_step is not None:
            if step < 0:
                raise TrainingDiverged(
                    f"no checkpoint of `{self.out}` is from before step {last_step + 1}, where its loss left its "
                    "course; lower --lr, or keep more checkpoints"
                )
            if world.is_first:  # newer ones hold what the bad steps made
                for newer in [path for path in checkpoint.steps(self.out) if checkpoint.step_of(path) > step]:
                    shutil.rmtree(newer)
        self.position = Position()
        if step >= 0:
            self.position = checkpoint.restore(self.out / f"step-{step:06d}", self.model, self.optimizer)
        self.started = time.monotonic()
        facts: dict[str, Any] = {"step": self.position.step, "steps": self.n_steps, "ranks": world.size, "on": where()}
        self.rule = SpikeRule(self.n_steps)
        if world.is_first:
            losses, n_lost = folder.cut_metrics(self.out / "metrics.jsonl", self.position.step)
            for loss in losses:
                self.rule.update(loss)
            if n_lost:
                facts["lost_steps"] = n_lost
        resumes = bool(self.logbook.entries())
        if step >= 0:
            log.info("resuming `%s` at step %d of %d", self.out, step, self.n_steps)
        self.logbook.write("resume" if resumes else "start", **facts)

    def take_steps(self, file: Any, report: Callable[[Metrics], None], stopped: list[int]) -> None:
        run, world = self.run, self.world
        trackers = open_all(run) if world.is_first else []
        while self.position.step < self.n_steps:
            step, began = self.position.step, time.monotonic()
            batch = self.batches.get(step)
            used = int((batch.sequence_id >= 0).sum())
            lr = run.lr * optimizer.multiplier(run, step, self.n_steps, self.position.tokens)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            line: dict[str, Any] = {"step": step + 1, "steps": self.n_steps}
            torch.manual_seed(
                (run.seed * self.n_steps + step) * world.size + world.rank
            )  # dropout, also after a resume
            if step not in self.skipped:
                found, norm = self.microbatch.shrink_to_fit(partial(self.take_step, batch), self.logbook)
                if self.is_off_course(step, found["loss"], norm):
                    continue
                line |= {**found, "lr": lr, "gradient_norm": norm}
            now = time.monotonic()
            seconds = self.position.seconds + now - self.started
            self.started = now
            self.position = Position(step + 1, self.position.tokens + used, seconds)
            line |= {
                "tokens": self.position.tokens,
                "tokens_per_s": used / (now - began),
                "useful": used / batch.ids.numel(),
                "tflops": plan.step_flops(self.shape, used, packing.squared_lengths(batch)) / (now - began) / 1e12,
                "memory_gb": memory.used_gb(world.device),
                "seconds": seconds,
            }
            if self.peak_tflops is not None:  # of useful tokens: padding is not work
                line["mfu"] = line["tflops"] / (self.peak_tflops * world.size)
            is_last = step + 1 == self.n_steps
            if self.held_out is not None and ((step + 1) % run.eval_every == 0 or is_last):
                line |= self.scores_held_out()
            if world.is_first:
                file.write(json.dumps(line) + "\n")
                file.flush()
                for tell in (report, *trackers):
                    tell(line)
            if world.sum(len(stopped))[0] and not is_last:
                self.saver.save(self.model, self.optimizer, self.position)
                self.saver.wait()
                raise Interrupted(
                    f"stopped after step {step + 1} of {self.n_steps} and saved; the same command goes on"
                )
            if (step + 1) % run.checkpoint_every == 0 and not is_last:
                self.saver.save(self.model, self.optimizer, self.position)

    def take_step(self, batch: Any, positions: int) -> tuple[Metrics, float]:
        """A step's numbers and its gradient's norm, with so many positions at a time."""
        accumulate = partial(self.objective.accumulate, self.model, batch, self.world, positions)
        return train_step(self.model, self.optimizer, self.run, accumulate)

    def is_off_course(self, step: int, loss: float, norm: float) -> bool:
        """Whether this step is undone: then the run stands at an earlier one and will pass over the bad ones."""
        is_finite = math.isfinite(loss) and math.isfinite(norm)
        spikes = is_finite and bool(self.world.from_first(self.world.is_first and self.rule.update(loss)))
        if is_finite and not spikes:
            return False
        what = f"loss {loss:.4g} over its course" if spikes else f"loss {loss}, gradient norm {norm}"
        bad = range(step - self.rule.patience + 1, step + 1) if spikes else range(step, step + 1)
        self.logbook.write("spike", step=step + 1, what=what, then=self.run.on_spike)
        if self.run.on_spike == "skip" and not any(number in self.skipped for number in bad):
            self.saver.wait()
            self.skipped.add(bad, self.world)
            self.restore(bad.start)
            return True
        if spikes and self.run.on_spike == "log":
            log.warning("step %d: %s", step + 1, what)
            return False
        raise TrainingDiverged(
            f"step {step + 1}: {what}; the last whole checkpoint stays in `{self.out}`; lower --lr, look at the data "
            "of this step, or take --on-spike skip"
        )

    def scores_held_out(self) -> Metrics:
        """The objective's numbers over the held-out set, each under its name behind `held_out_`."""
        self.model.eval()
        found = self.objective.evaluate(self.model, self.held_out_batch, self.world, self.microbatch.positions)
        self.model.train()
        return {f"held_out_{name}": value for name, value in found.items()}

    def finish(self) -> None:
        """Write the finished checkpoint, drop the ones it was made from, and draw the curves."""
        self.model.eval()
        values = export.values(self.run, self.model, self.world)
        if self.world.is_first:
            export.write(self.run, self.model, values, self.tokenizer, self.out / "model")
            for path in checkpoint.steps(self.out):
                shutil.rmtree(path)
            curves.plot(self.out)
            if self.mirror is not None:
                self.mirror.put(self.out / "model")
        self.logbook.write("finished", step=self.position.step, seconds=round(self.position.seconds, 1))
        self.world.barrier()


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that gets the number of a SIGTERM or SIGINT instead of the signal ending the process."""
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: signals go elsewhere
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
