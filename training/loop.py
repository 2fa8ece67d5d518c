"""The training loop: from a Run to a checkpoint folder, resumable at any step with the same result bit for bit.

`<out>/run.json` is the whole configuration, `metrics.jsonl` a line per step, `step-NNNNNN/` the state to resume from,
`model/` the finished checkpoint. The loss of a step is the sum over its learned tokens divided by their number, however
the step is cut into microbatches.
"""

import contextlib
import json
import logging
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.nn import functional as F

import mpt.checkpoint
from mpt.catalog import describe, resolve
from mpt.config import MPTConfig
from mpt.errors import Interrupted, TrainingDiverged, UserError
from mpt.model import MPTForCausalLM
from mpt.tokenizer import Tokenizer
from training import checkpoint, datasets, optimizer, packing
from training.packing import IGNORED, Batch
from training.run import Run

log = logging.getLogger(__name__)

Metrics = dict[str, float]
_LOSS_CHUNK = 2048  # positions whose logits exist at a time: 400 MB in float32 at MPT-7B's vocabulary
_SAVED_DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32}


def fit(run: Run, report: Callable[[Metrics], None] = lambda _: None, *, resume: bool = True) -> Path:
    """Train to the end, from wherever an earlier start got to, and return the finished checkpoint's folder.

    report: called after every step with its numbers. Raises UserError when `out` holds another run, TrainingDiverged,
    and Interrupted when a signal stopped it after saving.
    """
    out = Path(run.out)
    finished = out / "model"
    _claim(run, out, resume)
    if (finished / mpt.checkpoint.MANIFEST).is_file():
        log.info("`%s` is finished", finished)
        return finished
    torch.manual_seed(run.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(run)
    data = datasets.load(run.data, tokenizer, run.prompt_style, run.max_seq_len, run.seed)
    n_steps = count_steps(run, data)
    model = new_model(run).to(device).train()
    opt = optimizer.build(run, model.parameters())
    first, tokens_before, seconds_before = 0, 0, 0.0
    if state := checkpoint.latest(out):
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["optimizer"])
        first, tokens_before, seconds_before = state["step"], state["tokens"], state["seconds"]
        log.info("resuming `%s` at step %d of %d", out, first, n_steps)
    _cut_metrics(out / "metrics.jsonl", first)
    n_tokens, started = tokens_before, time.monotonic()

    def save(step: int) -> None:
        seconds = seconds_before + time.monotonic() - started
        state = {"model": model.state_dict(), "optimizer": opt.state_dict()}
        checkpoint.save(
            {**state, "step": step, "tokens": n_tokens, "seconds": seconds}, step, out, run.checkpoints_kept
        )

    with _signals() as stopped, (out / "metrics.jsonl").open("a", encoding="utf-8") as metrics_file:
        for step in range(first, n_steps):
            began = time.monotonic()
            numbers = range(step * run.global_batch, (step + 1) * run.global_batch)
            if data.n_samples is not None:  # the last step of the last epoch may be short
                numbers = range(numbers.start, min(numbers.stop, _total_samples(run, data, n_steps)))
            batch = packing.pack([data.sample(number) for number in numbers], run.max_seq_len)
            lr = run.lr * optimizer.multiplier(run, step, n_steps)
            for group in opt.param_groups:
                group["lr"] = lr
            loss, norm = train_step(model, opt, batch, run)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise TrainingDiverged(
                    f"step {step + 1}: loss {loss}, gradient norm {norm}; the last whole checkpoint stays in `{out}`; "
                    "lower --lr or look at the data of this step"
                )
            used = int((batch.sequence_id >= 0).sum())
            n_tokens += used
            now = time.monotonic()
            metrics = {
                "step": step + 1,
                "steps": n_steps,
                "loss": loss,
                "lr": lr,
                "gradient_norm": norm,
                "tokens": n_tokens,
                "tokens_per_s": used / (now - began),
                "useful": used / batch.ids.numel(),
                "seconds": seconds_before + now - started,
            }
            metrics_file.write(json.dumps(metrics) + "\n")
            metrics_file.flush()
            report(metrics)
            is_last = step + 1 == n_steps
            if stopped and not is_last:
                save(step + 1)
                raise Interrupted(f"stopped after step {step + 1} of {n_steps} and saved; the same command goes on")
            if (step + 1) % run.checkpoint_every == 0 and not is_last:
                save(step + 1)
    model.eval().to(_SAVED_DTYPE[run.precision])
    export(model, tokenizer, run, finished)
    for folder in checkpoint.steps(out):
        shutil.rmtree(folder)
    return finished


def train_step(model: MPTForCausalLM, opt: torch.optim.Optimizer, batch: Batch, run: Run) -> tuple[float, float]:
    """One optimizer step on a packed batch; the mean loss over its learned tokens and the gradient's norm."""
    total = batch.n_learned
    loss = 0.0
    for micro in packing.microbatches(batch, run.microbatch_tokens):
        loss += backward(model, micro, total, run)
    limit = run.clip if run.clip is not None else math.inf
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit, foreach=True))
    if math.isfinite(norm):
        opt.step()
    opt.zero_grad()
    return loss, norm


def backward(model: MPTForCausalLM, batch: Batch, total: int, run: Run) -> float:
    """Add the gradient of (sum of losses / total) to the parameters' and return that quotient.

    Only learned positions are unembedded, a chunk at a time: each chunk goes backward to the hidden states before the
    next one's logits exist, and then the hidden states go backward once.
    """
    device = model.transformer.wte.weight.device
    ids, labels, sequence_id = (x.to(device) for x in batch)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=run.precision == "bf16")
    with autocast:
        hidden = model.transformer(ids, sequence_id=sequence_id, use_cache=False).last_hidden_state
    learned = labels != IGNORED
    targets = labels[learned]
    if not len(targets):
        return 0.0
    selected = hidden[learned]  # (N, C)
    leaf = selected.detach().requires_grad_()
    loss = 0.0
    for start in range(0, len(targets), _LOSS_CHUNK):
        part = slice(start, start + _LOSS_CHUNK)
        with autocast:
            logits = model.unembed(leaf[part])
        chunk = F.cross_entropy(logits.float(), targets[part], reduction="sum") / total
        chunk.backward()
        loss += float(chunk.detach())
    selected.backward(leaf.grad)
    return loss


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


def count_steps(run: Run, data: datasets.Dataset) -> int:
    """How many optimizer steps the run takes. Raises UserError for epochs of a set that never ends."""
    if run.steps is not None:
        return run.steps
    assert run.epochs is not None
    if data.n_samples is None:
        raise UserError(f"`{run.data}` is generated and never ends; give --steps instead of --epochs")
    return max(1, math.ceil(run.epochs * data.n_samples / run.global_batch))


def export(model: MPTForCausalLM, tokenizer: Tokenizer, run: Run, folder: Path, **entries: Any) -> Path:
    """Write a Hugging Face folder whose manifest holds the recipe; entries go there too (scores ...)."""
    manifest = {
        "name": run.name,
        "recipe": json.loads(run.to_json()),
        "prompt_style": run.prompt_style,
        "context_length": run.context_length or model.config.max_seq_len,
        "licence": run.licence if run.base is None else _licence(run),
        **entries,
    }
    return mpt.checkpoint.save(model, folder, tokenizer=tokenizer, manifest=manifest)


def _licence(run: Run) -> str:
    return run.licence if run.licence != "unknown" else describe(str(run.base)).licence


def _total_samples(run: Run, data: datasets.Dataset, n_steps: int) -> int:
    if run.epochs is None or data.n_samples is None:
        return n_steps * run.global_batch
    return max(1, round(run.epochs * data.n_samples))


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


def _cut_metrics(path: Path, last_step: int) -> None:
    """Drop the lines of steps that will be taken again, and a line the kill cut short."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] <= last_step:
                kept.append(line)
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


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
