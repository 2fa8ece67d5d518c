"""The training loop: from a Run to a checkpoint folder, on one process or many ranks, resumable at any step.

`<out>/run.json` is the whole configuration, `metrics.jsonl` a line per step, `logbook.txt` the run's story,
`step-NNNNNN/` the state to resume from, `model/` the finished checkpoint. Resumed on the same number of ranks of one
machine, a run ends bit for bit as if it had never stopped.
"""

import contextlib
import fcntl
import json
import logging
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import mpt.checkpoint
from mpt.catalog import describe, resolve
from mpt.config import MPTConfig
from mpt.errors import Interrupted, MPTError, TrainingDiverged, UserError
from mpt.model import MPTForCausalLM
from mpt.tokenizer import Tokenizer
from training import adapters, checkpoint, curves, datasets, distributed, memory, optimizer, packing, plan
from training.checkpoint import Position
from training.distributed import World
from training.logbook import Logbook, where
from training.mirror import Mirror
from training.packing import Batch
from training.run import Run
from training.spikes import SpikeRule
from training.step import mean_loss, train_step
from training.trackers import open_all

log = logging.getLogger(__name__)

Metrics = dict[str, float]
_SAVED_DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32}


def fit(run: Run, report: Callable[[Metrics], None] = lambda _: None, *, resume: bool = True) -> Path:
    """Train to the end, from wherever an earlier start got to, and return the finished checkpoint's folder.

    report: called on the first rank after every step with its numbers. Raises UserError when `out` holds another run
    or is in use, TrainingDiverged, MachineRefused, and Interrupted when a signal stopped it after saving.
    """
    finished = Path(run.out) / "model"
    with distributed.join() as world, _own(run, world, resume):
        if (finished / mpt.checkpoint.MANIFEST).is_file():
            log.info("`%s` is finished", finished)
            return finished
        try:
            _Training(run, world).go(report)
        except MPTError as error:
            event = "stopped" if isinstance(error, Interrupted) else "failed"
            Logbook(Path(run.out), world.is_first).write(event, error=str(error), exit_code=error.exit_code)
            raise
    return finished


def check(run: Run, resume: bool) -> None:
    """Find a user's mistakes before ranks are started: folder, tokenizer and data. Raises UserError."""
    _claim(run, Path(run.out), resume)
    count_steps(run, load_data(run, load_tokenizer(run), run.data))


class _Training:
    """One start of a run: what is loaded, and how far it has got."""

    def __init__(self, run: Run, world: World) -> None:
        self.run, self.world, self.out = run, world, Path(run.out)
        self.logbook = Logbook(self.out, world.is_first)
        torch.manual_seed(run.seed)
        self.tokenizer = load_tokenizer(run)
        self.data = load_data(run, self.tokenizer, run.data)
        self.held_out = self._held_out()
        self.n_steps = count_steps(run, self.data)
        if run.warmup_steps >= self.n_steps:
            log.warning(
                "the warm-up takes %d steps, the run has %d; --lr is never reached", run.warmup_steps, self.n_steps
            )
        n_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        plan.check_memory(run, world.size, memory.available_gb(world.device, n_local))
        self.model = new_model(run)
        if run.lora is not None:
            adapters.add(self.model, run.lora)
        self.model.to(world.device).train()
        memory.checkpoint_activations(self.model, run.activation_checkpointing)
        distributed.shard(self.model, run, world)
        if run.compile:
            for block in self.model.transformer.blocks:
                block.compile()
        self.shape = plan.Shape.of(self.model.config)
        is_gpu = world.device.type == "cuda"
        self.peak_tflops = plan.peak_tflops(torch.cuda.get_device_name(world.device)) if is_gpu else None
        self.optimizer = optimizer.build(run, [p for p in self.model.parameters() if p.requires_grad])
        self.mirror = None if run.mirror is None else Mirror(run.mirror)
        self.saver = checkpoint.Saver(self.out, world, run.checkpoints_kept, self.mirror)
        self.microbatch = memory.Microbatch(run, world)
        self.skipped = _Skipped(self.out / "skipped.json")
        self.position, self.started = Position(), time.monotonic()
        self.rule = SpikeRule(self.n_steps)  # the first rank's counts

    def go(self, report: Callable[[Metrics], None]) -> None:
        self.restore()
        if self.run.on_spike == "skip" and checkpoint.latest(self.out) is None:
            self.saver.save(self.model, self.optimizer, self.position)  # something to roll back to
        with _signals() as stopped, (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            try:
                with contextlib.closing(_Batches(self._batch, self.n_steps)) as batches:
                    self.take_steps(batches, file, report, stopped)
                self.saver.wait()
            finally:
                self.saver.join()
        self.finish()

    def restore(self) -> None:
        """Go on from the newest whole checkpoint, and note what stopping has cost."""
        world = self.world
        if world.is_first and self.mirror is not None and not checkpoint.steps(self.out):
            self.mirror.fetch_latest(self.out)
        path = checkpoint.latest(self.out) if world.is_first else None
        step = world.from_first(-1 if path is None else int(path.name.rpartition("-")[2]))
        self.position = Position()
        if step >= 0:
            self.position = checkpoint.restore(self.out / f"step-{step:06d}", self.model, self.optimizer)
        self.started = time.monotonic()
        facts: dict[str, Any] = {"step": self.position.step, "steps": self.n_steps, "ranks": world.size, "on": where()}
        self.rule = SpikeRule(self.n_steps)
        if world.is_first:
            losses, n_lost = _cut_metrics(self.out / "metrics.jsonl", self.position.step)
            for loss in losses:
                self.rule.update(loss)
            if n_lost:
                facts["lost_steps"] = n_lost
        resumes = bool(self.logbook.entries())
        if step >= 0:
            log.info("resuming `%s` at step %d of %d", self.out, step, self.n_steps)
        self.logbook.write("resume" if resumes else "start", **facts)

    def take_steps(self, batches: "_Batches", file: Any, report: Callable[[Metrics], None], stopped: list[int]) -> None:
        run, world = self.run, self.world
        trackers = open_all(run) if world.is_first else []
        while self.position.step < self.n_steps:
            step, began = self.position.step, time.monotonic()
            batch = batches.get(step)
            used = int((batch.sequence_id >= 0).sum())
            lr = run.lr * optimizer.multiplier(run, step, self.n_steps, self.position.tokens)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            line: dict[str, Any] = {"step": step + 1, "steps": self.n_steps}
            torch.manual_seed(
                (run.seed * self.n_steps + step) * world.size + world.rank
            )  # dropout, also after a resume
            if step not in self.skipped:
                loss, norm = self.microbatch.shrink_to_fit(
                    lambda positions, batch=batch: train_step(  # type: ignore[misc]
                        self.model, self.optimizer, batch, run, world, positions
                    ),
                    self.logbook,
                )
                if self.is_off_course(step, loss, norm):
                    continue
                line |= {"loss": loss, "lr": lr, "gradient_norm": norm}
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
                line["held_out_loss"] = self.held_out_loss()
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
            self.restore()
            return True
        if spikes and self.run.on_spike == "log":
            log.warning("step %d: %s", step + 1, what)
            return False
        raise TrainingDiverged(
            f"step {step + 1}: {what}; the last whole checkpoint stays in `{self.out}`; lower --lr, look at the data "
            "of this step, or take --on-spike skip"
        )

    def held_out_loss(self) -> float:
        """The mean loss over the held-out set."""
        assert self.held_out is not None
        self.model.eval()
        loss = mean_loss(self.model, self.held_out, self.run, self.world, self.microbatch.positions)
        self.model.train()
        return loss

    def finish(self) -> None:
        """Write the finished checkpoint, drop the ones it was made from, and draw the curves."""
        self.model.eval()
        values = distributed.gather(self.model, self.world)
        if self.world.is_first:
            export(self.run, self.model, values, self.tokenizer, self.out / "model")
            for folder in checkpoint.steps(self.out):
                shutil.rmtree(folder)
            curves.plot(self.out)
            if self.mirror is not None:
                self.mirror.put(self.out / "model")
        self.logbook.write("finished", step=self.position.step, seconds=round(self.position.seconds, 1))
        self.world.barrier()

    def _batch(self, step: int) -> Batch:
        """A step's samples, packed. Every rank packs all of them and takes its share of the rows."""
        first, last = step * self.run.global_batch, (step + 1) * self.run.global_batch
        if self.data.n_samples is not None:  # the last step of the last epoch may be short
            last = min(last, _total_samples(self.run, self.data, self.n_steps))
        return packing.pack([self.data.sample(number) for number in range(first, last)], self.run.max_seq_len)

    def _held_out(self) -> Batch | None:
        run = self.run
        if run.eval_data is None:
            return None
        data = load_data(run, self.tokenizer, run.eval_data)
        n = run.eval_samples if data.n_samples is None else min(run.eval_samples, data.n_samples)
        return packing.pack([data.sample(number) for number in range(n)], run.max_seq_len)


class _Batches:
    """Packs the next step's batch while this one is computed."""

    def __init__(self, make: Callable[[int], Batch], n_steps: int) -> None:
        self._make, self._n_steps = make, n_steps
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: tuple[int, Future[Batch]] | None = None

    def get(self, step: int) -> Batch:
        if self._next is not None and self._next[0] == step:
            batch = self._next[1].result()
        else:  # the first, or the run was rolled back
            batch = self._pool.submit(self._make, step).result()
        self._next = (step + 1, self._pool.submit(self._make, step + 1)) if step + 1 < self._n_steps else None
        return batch

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


class _Skipped:
    """The steps whose data are passed over, counted from 0; on disk, so that a resumed run passes over them too."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._steps: set[int] = set(json.loads(path.read_text())) if path.is_file() else set()

    def __contains__(self, step: int) -> bool:
        return step in self._steps

    def add(self, steps: range, world: World) -> None:
        self._steps |= set(steps)
        if world.is_first:
            partial = self._path.with_suffix(".partial")
            partial.write_text(json.dumps(sorted(self._steps)))
            partial.rename(self._path)
        world.barrier()


def export_latest(folder: Path, out: Path) -> Path:
    """An unfinished run's newest checkpoint as a Hugging Face folder, or peft's for LoRA.

    Raises UserError when there is none.
    """
    run = Run.read(folder / "run.json")
    path = checkpoint.latest(folder)
    if path is None:
        raise UserError(f"`{folder}` has no whole checkpoint yet; its first comes after {run.checkpoint_every} steps")
    model = new_model(run)
    if run.lora is not None:
        adapters.add(model, run.lora)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    position = checkpoint.restore(path, model, optimizer.build(run, trained))
    values = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return export(run, model, values, load_tokenizer(run), out, step=position.step)


def new_model(run: Run) -> MPTForCausalLM:
    """The run's starting point in float32: the base's weights under the changed config, or new weights."""
    if run.base is None:
        return MPTForCausalLM(MPTConfig(**run.model))
    base = mpt.checkpoint.load(run.base, dtype=torch.float32)
    if not run.model:
        return base
    values = base.config.to_dict()
    attention = {**values["attn_config"], **run.model.get("attn_config", {})}
    model = MPTForCausalLM(MPTConfig.from_dict({**values, **run.model, "attn_config": attention}))
    model.load_state_dict(base.state_dict())
    return model


def load_tokenizer(run: Run) -> Tokenizer:
    """The tokenizer the run names, or its base's."""
    return Tokenizer.from_folder(run.tokenizer if run.tokenizer is not None else resolve(str(run.base)))


def load_data(run: Run, tokenizer: Tokenizer, name: str) -> datasets.Dataset:
    """A set as the run reads it."""
    return datasets.load(name, tokenizer, run.prompt_style, run.max_seq_len, run.seed, run.learn)


def count_steps(run: Run, data: datasets.Dataset) -> int:
    """How many optimizer steps the run takes. Raises UserError for epochs of a set that never ends."""
    if run.steps is not None:
        return run.steps
    assert run.epochs is not None
    if data.n_samples is None:
        raise UserError(f"`{run.data}` is generated and never ends; give --steps instead of --epochs")
    return max(1, math.ceil(run.epochs * data.n_samples / run.global_batch))


def export(
    run: Run, model: MPTForCausalLM, values: dict[str, torch.Tensor], tokenizer: Tokenizer, folder: Path, **entries: Any
) -> Path:
    """Write a Hugging Face folder, or peft's for a LoRA run, whose manifest holds the recipe; entries go there too.

    values: every parameter, whole, by name.
    """
    manifest = {
        "name": run.name,
        "recipe": json.loads(run.to_json()),
        "prompt_style": run.prompt_style,
        "context_length": run.context_length or model.config.max_seq_len,
        "licence": run.licence if run.base is None else _licence(run),
        **entries,
    }
    if run.lora is not None:
        return adapters.save(model, values, str(run.base), tokenizer, folder, manifest)
    with torch.device("meta"):
        whole = MPTForCausalLM(model.config)
    whole.load_state_dict(
        {name: value.to(_SAVED_DTYPE[run.precision]) for name, value in values.items()}, assign=True, strict=False
    )
    whole.tie_weights()
    return mpt.checkpoint.save(whole, folder, tokenizer=tokenizer, manifest=manifest)


def _licence(run: Run) -> str:
    return run.licence if run.licence != "unknown" else describe(str(run.base)).licence


def _total_samples(run: Run, data: datasets.Dataset, n_steps: int) -> int:
    if run.epochs is None or data.n_samples is None:
        return n_steps * run.global_batch
    return max(1, round(run.epochs * data.n_samples))


@contextlib.contextmanager
def _own(run: Run, world: World, resume: bool) -> Iterator[None]:
    """Hold the run's folder while it runs. Raises UserError when it is another run's, or a process works on it."""
    out = Path(run.out)
    if not world.is_first:
        world.barrier()
        yield
        return
    _claim(run, out, resume)
    with (out / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another process is training in `{out}`; wait for it, or choose another --out") from None
        world.barrier()
        yield
    (out / "lock").unlink(missing_ok=True)


def _claim(run: Run, out: Path, resume: bool) -> None:
    """Make the run's folder its own, or see that it already is. Raises UserError when it is another's."""
    path = out / "run.json"
    if not path.is_file():
        if out.is_dir() and any(out.iterdir()):
            raise UserError(f"`{out}` is not empty and holds no run; choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(run.to_json(), encoding="utf-8")
        partial.rename(path)
        return
    if not resume:
        raise UserError(f"`{out}` already holds a run; leave --no-resume out to go on with it, or choose another --out")
    old, new = json.loads(Run.read(path).to_json()), json.loads(run.to_json())
    changed = [key for key in new if old[key] != new[key] and key != "out"]
    if changed:
        key = changed[0]
        raise UserError(
            f"`{out}` holds a run with {key} {old[key]!r}, now {new[key]!r}; a changed run needs another --out"
        )


def _cut_metrics(path: Path, last_step: int) -> tuple[list[float], int]:
    """Drop the lines of steps that will be taken again, and one the kill cut short.

    Returns the losses that stay, and how many whole steps went.
    """
    if not path.is_file():
        return [], 0
    kept, losses, n_lost = [], [], 0
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            values = json.loads(line)
            if values["step"] > last_step:
                n_lost += 1
                continue
            kept.append(line)
            if "loss" in values:
                losses.append(values["loss"])
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    return losses, n_lost


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


def n_parameters(model: MPTForCausalLM) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
