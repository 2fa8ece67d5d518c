"""Does training run on this device, and does a resumed run end where one that never stopped does?

A small model, six steps: in one go, twice, for what the device itself varies; stopped after four and resumed from the
third, whose optimizer state then comes from a disk; and sharded by FSDP2 on a mesh of one rank, in each way of
checkpointing, compiled and not. Sharded runs compute in bfloat16 where the others autocast, so their losses are near,
not equal.
"""

import contextlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.gpu_parts.bench import Bench
from training import distributed, loop, vocabulary
from training.distributed import World
from training.run import Run

STEPS, STOPPED_AFTER, SAVED_EVERY, WARMUP = 6, 4, 3, 2
# Of a compiled run. On CPU each step's documents are compiled anew, so there are as few as can be compared: up to the
# first step behind the warm-up the learning rate is the same however long the run is.
COMPILED_STEPS = {"cuda": STEPS, "cpu": WARMUP + 1}
SIZES = {"cuda": (256, 4, 512), "cpu": (64, 2, 256)}  # d_model, blocks, tokens of a sequence
SHARDED_TOLERANCE = 0.02  # of a loss of about 6; bfloat16 has 3 digits
TEXTS = ["name: Ada\nage: 36\n", '{"name": "Ada", "age": 36}', "Below is an instruction"] * 3


class Stopped(Exception):
    """What ends a run between two steps."""


def run(bench: Bench) -> None:
    with tempfile.TemporaryDirectory() as name, without_matplotlib():
        folder = Path(name)
        (folder / "tokenizer").mkdir()
        vocabulary.train(TEXTS, 384).save(folder / "tokenizer")
        whole: list[float] = []
        bench.measure("six steps", lambda: whole.extend(six_steps(bench, folder)))
        if not whole:
            return  # the rest is compared with them
        bench.measure("the same again", lambda: again(bench, folder, whole))
        bench.measure("stopped and resumed", lambda: resumed(bench, folder, whole))
        for how in ("none", "full", "selective"):
            bench.measure(f"FSDP2, checkpointing {how}", lambda how=how: sharded(bench, folder, whole, how))
        if bench.scale.compiles:
            for how in ("none", "full", "selective"):
                what = f"FSDP2, compiled, checkpointing {how}"
                bench.measure(what, lambda how=how: sharded(bench, folder, whole, how, compiled=True))


@contextlib.contextmanager
def without_matplotlib() -> Iterator[None]:
    """A run draws its curves in the end; a machine that is lent for minutes may lack what draws them."""
    if importlib.util.find_spec("matplotlib") is not None:
        yield
        return
    with mock.patch.object(loop.curves, "plot"):
        yield


def small_run(bench: Bench, folder: Path, name: str, **more: Any) -> Run:
    d_model, n_layers, n = SIZES[bench.device.type]
    shape = {
        "d_model": d_model,
        "n_heads": 4,
        "n_layers": n_layers,
        "vocab_size": 384,
        "max_seq_len": n,
        "no_bias": True,
    }
    settings: dict[str, Any] = {
        "name": "small", "base": None, "data": "yaml_to_json", "out": str(folder / name),
        "tokenizer": str(folder / "tokenizer"), "model": shape | {"attn_config": {"alibi": True}},
        "max_seq_len": n, "global_batch": 8, "epochs": None, "steps": STEPS, "lr": 1e-3, "warmup_steps": WARMUP,
        "prompt_style": "instruct", "checkpoint_every": SAVED_EVERY,
    }  # fmt: skip
    return Run(**settings | more)


def losses(run: Run) -> list[float]:
    return [json.loads(line)["loss"] for line in (Path(run.out) / "metrics.jsonl").read_text().splitlines()]


def six_steps(bench: Bench, folder: Path) -> list[float]:
    whole = small_run(bench, folder, "whole")
    loop.fit(whole)
    found = losses(whole)
    bench.note(losses=found)
    bench.row("six steps of a small model", "ran", f"loss {found[0]:.3f} to {found[-1]:.3f}")
    assert found[-1] < found[0], f"the loss did not fall: {found}"
    return found


def again(bench: Bench, folder: Path, whole: list[float]) -> None:
    other = small_run(bench, folder, "again")
    loop.fit(other)
    difference = farthest(losses(other), whole)
    bench.note(varies_by=difference, weights_vary=not same_weights(folder, "again"))
    bench.row("the same run again", f"losses {difference:.1e} apart", "what the device itself varies")


def resumed(bench: Bench, folder: Path, whole: list[float]) -> None:
    other = small_run(bench, folder, "resumed")

    def stop(line: dict[str, float]) -> None:
        if line["step"] == STOPPED_AFTER:
            raise Stopped

    with contextlib.suppress(Stopped):
        loop.fit(other, stop)
    loop.fit(other)
    difference, same = farthest(losses(other), whole), same_weights(folder, "resumed")
    bench.note(resume_difference=difference, resume_same_weights=same)
    bench.row(
        f"stopped after step {STOPPED_AFTER}, resumed from step {SAVED_EVERY}", f"losses {difference:.1e} apart",
        "the same weights to the bit" if same else "other weights",
    )  # fmt: skip


def sharded(bench: Bench, folder: Path, whole: list[float], how: Any, compiled: bool = False) -> None:
    name = f"sharded-{how}" + ("-compiled" if compiled else "")
    steps = COMPILED_STEPS[bench.device.type] if compiled else STEPS
    other = small_run(bench, folder, name, activation_checkpointing=how, compile=compiled, steps=steps)
    with mock.patch.object(distributed, "join", return_value=mesh_of_one(bench.device, folder)):
        loop.fit(other)
    difference = farthest(losses(other), whole[:steps])
    bench.note(**{name: difference})
    what = f"FSDP2 on a mesh of one, checkpointing {how}" + (", compiled" if compiled else "")
    bench.row(what, f"losses {difference:.1e} apart", "from the run in one process")
    assert difference < SHARDED_TOLERANCE, f"{what}: losses are {difference} apart"


@contextlib.contextmanager
def mesh_of_one(device: torch.device, folder: Path) -> Iterator[World]:
    """What `training.distributed.join` gives several ranks, for a single one."""
    store = f"file://{folder}/store-{os.urandom(4).hex()}"
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=store, rank=0, world_size=1)
    try:
        yield World(0, 1, device, init_device_mesh(device.type, (1,)), dist.new_group(backend="gloo"))
    finally:
        dist.destroy_process_group()


def farthest(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def same_weights(folder: Path, name: str) -> bool:
    """Whether a finished run has the weights of the first one, bit by bit."""
    first, other = (
        [path.read_bytes() for path in sorted((folder / each / "model").glob("*.safetensors"))]
        for each in ("whole", name)
    )
    return bool(first) and first == other
