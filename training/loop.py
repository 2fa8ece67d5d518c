"""The training loop: from a Run to a checkpoint folder, on one process or many ranks, resumable at any step.

`<out>/run.json` is the whole configuration, `metrics.jsonl` a line per step, `logbook.txt` the run's story,
`step-NNNNNN/` the state to resume from, `model/` the finished checkpoint. Resumed on the same number of ranks of one
machine, a run ends bit for bit as if it had never stopped. The last state stays, so that a finished run can go on.
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

import mpt.manifest
from mpt.errors import Interrupted, MPTError, TrainingDiverged, UserError
from mpt.files import disk_refusals
from training import (
    batches,
    build,
    checkpoint,
    curves,
    distributed,
    export,
    folder,
    machine,
    memory,
    optimizer,
    packing,
    plan,
)
from training import heartbeat as heartbeats
from training.batches import Batches
from training.checkpoint import Position
from training.distributed import World
from training.during import During
from training.folder import Changed, Skipped
from training.heartbeat import Heartbeat
from training.logbook import Logbook, where
from training.mirror import Mirror
from training.objective import of_run
from training.run import Run
from training.spikes import SpikeRule
from training.step import Metrics, autocast, train_step
from training.trackers import Trackers

log = logging.getLogger(__name__)

_LONG = 1000  # steps: so many on several ranks are worth the seconds of a check
_PROBED_EVERY = 20  # steps: 5 ms of a GPU


def fit(
    run: Run, report: Callable[[Metrics], None] = lambda _: None, *, resume: bool = True, share: float = 1.0
) -> Path:
    """Train to the end, from wherever an earlier start got to, and return the finished checkpoint's folder.

    report: called on the first rank after every step with its numbers. share: of the steps, after which it is
    Interrupted; the schedule is the whole run's. Raises UserError when `out` holds another run
    or is in use, TrainingDiverged, MachineRefused, and Interrupted when a signal stopped it after saving.
    """
    out = Path(run.out)
    finished = out / "model"
    with distributed.join(run) as world, disk_refusals(out), folder.own(run, world, resume) as changed:
        if (finished / mpt.manifest.MANIFEST).is_file() and not world.from_first(folder.changes_length(changed)):
            log.info("`%s` is finished", finished)
            _mirror_finished(run, world)
            return finished
        _say_lost(out, world)
        with _told(out, world), disk_refusals(out), Heartbeat(out, world, run.hang_timeout) as heartbeat:
            _Training(run, world, changed, heartbeat, share).go(report)
    return finished


def check(run: Run, resume: bool, n_ranks: int = 1) -> None:
    """Find a user's mistakes before ranks are started: folder, memory, tokenizer and data. Raises UserError."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run.check_ranks(n_ranks)
    with disk_refusals(Path(run.out)), folder.claimed(run, resume):
        plan.check_memory(run, n_ranks, memory.available(device, n_ranks))
        batches.count_steps(run, of_run(run, batches.load_tokenizer(run)).load(run.data))


def _say_lost(out: Path, world: World) -> None:
    """Have the logbook name the ranks of the start before this one that ended without a word."""
    if world.is_first:
        for sign in heartbeats.ended_without_a_word(heartbeats.signs(out)):
            seen = f"{sign.doing} of step {sign.step + 1}"
            Logbook(out).write("lost", rank=sign.rank, last_sign=seen, on=f"{sign.host}:{sign.pid}")
        for path in (out / "ranks").glob("rank-*.json"):  # the stacks of a hang stay
            path.unlink()
    world.barrier()


def _mirror_finished(run: Run, world: World) -> None:
    """Copy what an earlier start finished and could not copy."""
    if run.mirror is not None and world.is_first:
        mirror = Mirror(run.mirror)
        if not mirror.has("model"):
            mirror.put(Path(run.out) / "model")


@contextlib.contextmanager
def _told(out: Path, world: World) -> Iterator[None]:
    """Have the logbook say what ends a run, and which rank it ended on."""
    try:
        yield
    except Exception as error:
        is_everywhere = isinstance(error, Interrupted | TrainingDiverged)  # then the first rank says it
        facts: dict[str, Any] = {} if world.size == 1 or is_everywhere else {"rank": world.rank, "on": where()}
        said = str(error).partition("\n")[0] or type(error).__name__
        if isinstance(error, MPTError):
            facts |= {"error": said, "exit_code": error.exit_code}
        else:
            facts |= {"error": f"{type(error).__name__}: {said}"}
        event = "stopped" if isinstance(error, Interrupted) else "failed"
        with contextlib.suppress(OSError):  # a full disk, which the error says already
            Logbook(out, world.is_first or not is_everywhere).write(event, **facts)
        raise


class _Training:
    """One start of a run: what is loaded, and how far it has got."""

    def __init__(self, run: Run, world: World, changed: Changed, heartbeat: Heartbeat, share: float) -> None:
        self.run, self.world, self.out, self.changed = run, world, Path(run.out), changed
        self.logbook, self.heartbeat = Logbook(self.out, world.is_first), heartbeat
        self.tokenizer = batches.load_tokenizer(run)
        self.objective = of_run(run, self.tokenizer)
        self.batches = Batches(run, self.objective.load(run.data), self.objective.pack)
        self.held_out = None if run.eval_data is None else batches.held_out(run, self.objective.load(run.eval_data))
        self.held_out_batch: Any = None  # packed when the objective knows what it needs of the base
        self.n_steps = self.batches.n_steps
        self.last_step = max(1, round(share * self.n_steps))
        self.warmup = _warmup(run, self.n_steps)
        self.trackers = Trackers(run, is_open=world.is_first)
        self.during = During(
            run, world, self.tokenizer, self.objective, self.batches.data, self.logbook, self.trackers, heartbeat.beat
        )
        n_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        plan.check_memory(run, world.size, memory.available(world.device, n_local, are_here=True))
        if world.device.type == "cpu":
            memory.keep_freed_memory()
        self.model = build.model(run, world)
        self.shape = plan.Shape.of(self.model.config)
        is_gpu = world.device.type == "cuda"
        self.peak_tflops = plan.peak_tflops(torch.cuda.get_device_name(world.device)) if is_gpu else None
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = optimizer.build(run, trained, optimizer.embeddings(self.model))
        self.mirror = None if run.mirror is None else Mirror(run.mirror)
        self.saver = checkpoint.Saver(self.out, world, run.checkpoints_kept, self.mirror)
        self.microbatch = memory.Microbatch(run, world)
        self.skipped = Skipped(self.out / "skipped.json")
        self.position, self.started = Position(), time.monotonic()
        self.rule = SpikeRule(self.n_steps)  # the first rank's counts

    def go(self, report: Callable[[Metrics], None]) -> None:
        is_restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        is_long = self.world.size > 1 and self.n_steps >= _LONG
        if self.run.preflight or is_restart or is_long:
            machine.preflight(self.world, self.out, self.logbook.write)
        self.prepare()
        self.adopt()
        self.restore()
        if self.run.on_spike == "skip" and checkpoint.latest(self.out) is None:
            self.saver.save(self.model, self.optimizer, self.position)  # something to roll back to
        with _signals() as stopped, (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            try:
                with contextlib.closing(self.batches), self.trackers:
                    self.take_steps(file, report, stopped)
                self.saver.wait()
            finally:
                self.saver.join()
        self.finish()

    def adopt(self) -> None:
        """Have a state to begin from where this run has none of its own: the mirror's, or the other run's."""
        if self.world.is_first and not checkpoint.steps(self.out):
            fetched = None if self.mirror is None else self.mirror.fetch_latest(self.out)
            if fetched is None and self.run.start_from is not None:
                checkpoint.adopt(Path(self.run.start_from), self.out)
                self.logbook.write("from", state=self.run.start_from)
        self.world.barrier()

    def prepare(self) -> None:
        """Ask of the base what the objective needs, while the model still is the base."""

        def upcoming() -> Iterator[list[Any]]:
            for step in range(self.n_steps):
                self.heartbeat.beat("asking the base")
                yield self.batches.samples(step)
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
        self.heartbeat.beat("restoring")
        path = checkpoint.latest(self.out, last_step) if world.is_first else None
        step = world.from_first(-1 if path is None else checkpoint.step_of(path))
        if last_step is None:
            self.settle(step)
        elif step < 0:
            raise TrainingDiverged(
                f"no checkpoint of `{self.out}` is from before step {last_step + 1}, where its loss left its "
                "course; lower --lr, or keep more checkpoints"
            )
        elif world.is_first:  # newer ones hold what the bad steps made
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
        resumes = any(entry["event"] == "start" for entry in self.logbook.entries())
        if step >= 0:
            log.info("resuming `%s` at step %d of %d", self.out, step, self.n_steps)
        if not resumes and self.warmup:
            facts["warmup"] = self.warmup
        facts["attention"] = self.attention()
        self.logbook.write("resume" if resumes else "start", **facts)

    def attention(self) -> str:
        """Which kernel attends within packed documents, and why nothing faster does; on a GPU the log has it too."""
        with autocast(self.world.device, self.run):
            kernel, why_not = self.model.transformer.documents_kernel()
        words = kernel + (f" ({why_not})" if why_not else "")
        if self.world.device.type == "cuda":
            log.info("attention within packed documents runs through %s", words)
        return words

    def settle(self, step: int) -> None:
        """Take what this start changes of the run. step: where it stands, -1 without a checkpoint. Raises UserError."""
        model = self.out / "model"
        is_finished = self.world.from_first((model / mpt.manifest.MANIFEST).is_file())
        if is_finished and step < 0:
            raise UserError(
                f"`{self.out}` is finished and its last state is gone; go on from its weights with --base {model}, in "
                "another --out"
            )
        if step > self.n_steps:
            raise UserError(
                f"`{self.out}` has taken {step} steps, and the run is to have {self.n_steps}; give --steps of "
                f"{step} or more, or --epochs that come to more"
            )
        if not self.world.is_first:
            return
        if is_finished and step < self.n_steps:
            folder.move_finished(self.out, step)
        if self.changed:
            folder.write_run(self.run)
        for name, (before, now) in self.changed.items():
            log.info("%s: %s, before %s", name, now, before)
            self.logbook.write("changed", setting=name, before=before, now=now)
        self.changed = {}

    def take_steps(self, file: Any, report: Callable[[Metrics], None], stopped: list[int]) -> None:
        run, world = self.run, self.world
        if self.position.step >= self.last_step < self.n_steps:
            raise Interrupted(f"`{self.out}` has taken {self.position.step} steps already", is_planned=True)
        while self.position.step < self.n_steps:
            step, began = self.position.step, time.monotonic()
            batch = self.batches.get(step)
            used = int((batch.sequence_id >= 0).sum())
            lr = run.lr * optimizer.multiplier(run, step, self.n_steps, self.position.tokens)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            line: dict[str, Any] = {"step": step + 1, "steps": self.n_steps}
            self.heartbeat.beat("step", step)
            self.heartbeat.own_share()
            torch.manual_seed((run.seed << 32) + step & (1 << 63) - 1)  # for dropout: the same on all ranks
            is_taken = step not in self.skipped
            if is_taken:
                found, norm = self.microbatch.shrink_to_fit(partial(self.take_step, batch), self.logbook)
                if self.is_off_course(step, found["loss"], norm):
                    continue
                line |= {**found, "lr": lr, "gradient_norm": norm}
            now = time.monotonic()
            self.heartbeat.beat("between steps")
            seconds = self.position.seconds + now - self.started
            self.started = now
            self.position = Position(step + 1, self.position.tokens + used, seconds)
            line |= {"tokens": self.position.tokens, "seconds": seconds}
            if is_taken:  # passing over data has no speed
                line |= self.speed(batch, used, now - began) | self.straggler(step, now - began)
            is_last = step + 1 == self.n_steps
            if self.held_out is not None and ((step + 1) % run.eval_every == 0 or is_last):
                line |= self.scores_held_out()
            line |= self.during.after(step + 1, is_last, self.model)
            if world.is_first:
                file.write(json.dumps(line) + "\n")
                file.flush()
                for tell in (report, self.trackers.track):
                    tell(line)
            self.heartbeat.beat("saving")
            is_signalled = bool(world.sum(len(stopped))[0])
            if (is_signalled or step + 1 == self.last_step) and not is_last:
                self.saver.save(self.model, self.optimizer, self.position)
                self.saver.wait()
                raise Interrupted(
                    f"stopped after step {step + 1} of {self.n_steps} and saved; the same command goes on",
                    is_planned=not is_signalled,
                )
            if (step + 1) % run.checkpoint_every == 0 or is_last:
                self.saver.save(self.model, self.optimizer, self.position)

    def take_step(self, batch: Any, positions: int) -> tuple[Metrics, float]:
        """A step's numbers and its gradient's norm, with so many positions at a time."""
        accumulate = partial(self.objective.accumulate, self.model, batch, self.world, positions)
        return train_step(self.model, self.optimizer, self.run, accumulate)

    def speed(self, batch: packing.Batch, used: int, seconds: float) -> Metrics:
        """What a step's line says of its speed. used: positions that hold a token."""
        tflops = plan.step_flops(self.shape, used, packing.squared_lengths(batch)) / seconds / 1e12
        line = {
            "tokens_per_s": used / seconds,
            "useful": used / batch.ids.numel(),
            "tflops": tflops,
            "memory_gb": memory.used_gb(self.world.device),
        }
        if self.peak_tflops is not None:  # of useful tokens: padding is not work
            line["mfu"] = tflops / (self.peak_tflops * self.world.size)
        return line

    def straggler(self, step: int, seconds: float) -> Metrics:
        """How much longer the slowest rank's own work took than the median's: without waiting for other ranks.

        On a GPU, where a rank waits inside its own kernels, of a fixed piece of work every 20 steps.
        """
        world = self.world
        is_gpu = world.device.type == "cuda"
        if world.size == 1 or (is_gpu and step % _PROBED_EVERY):
            return {}
        own = machine.probe(world.device) if is_gpu else self.heartbeat.own_share() * seconds
        ratio, rank = heartbeats.slowest_over_median(
            world.sum(*(own if rank == world.rank else 0.0 for rank in range(world.size)))
        )
        return {"slowest_over_median": ratio, "slowest_rank": rank}

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
        """Write the finished checkpoint, keep the last state alone of those it was made from, and draw the curves."""
        self.heartbeat.beat("finishing")
        self.model.eval()
        values = export.values(self.run, self.model, self.world)
        if self.world.is_first:
            for path in checkpoint.steps(self.out)[:-1]:
                shutil.rmtree(path)
            if not (self.out / "model").is_dir():  # a finished run of the same length has it
                export.write(self.run, self.model, values, self.tokenizer, self.out / "model")
            curves.plot(self.out)
            if self.mirror is not None:
                self.mirror.put(self.out / "model")
        self.logbook.write("finished", step=self.position.step, seconds=round(self.position.seconds, 1))
        self.world.barrier()


def _warmup(run: Run, n_steps: int) -> int:
    """The steps in which the learning rate rises; said where they are not those that the run asks for."""
    steps = optimizer.warmup(run, n_steps)
    if run.warmup_steps > steps:
        log.info("warm-up: %d of %d steps, for %d would be most of this run", steps, n_steps, run.warmup_steps)
    if steps >= n_steps > 1:
        log.warning("the warm-up takes %d steps, the run has %d; give a shorter --warmup", steps, n_steps)
    return steps


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
