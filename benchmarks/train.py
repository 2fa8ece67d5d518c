"""Training speed beside transformers' Trainer with its in-tree MPT, and the cost of our loop over a bare one.

    python benchmarks/train.py --shape 125m --rounds 3

The same random weights' shape, the same sequences, bfloat16 autocast over float32 masters, AdamW, 2 threads; each
measurement in a process of its own, rounds alternating, medians reported. Progress goes to stderr, the table to stdout.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

SHAPES = {
    "tiny": {"d_model": 256, "n_heads": 8, "n_layers": 4},
    "125m": {"d_model": 768, "n_heads": 12, "n_layers": 12},
}
VOCAB, SEQUENCE, BATCH, STEPS, THREADS = 50432, 1024, 4, 8, 2
WARM_UP = 2  # steps left out of the median
MAIN = Path(__file__).resolve()


def run_of(shape: str, folder: Path) -> Any:
    """The measured run; its data are random words, cut into whole sequences."""
    import random

    from mpt.catalog import resolve
    from training.run import Run

    rng = random.Random(0)
    data = folder / "words.txt"
    if not data.is_file():
        words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(40 * BATCH * SEQUENCE // 4)]
        data.write_text(" ".join(words))
    return Run(
        name=shape,
        base=None,
        data=str(data),
        out=str(folder / "run"),
        tokenizer=str(resolve("mpt-tiny")),
        model={**SHAPES[shape], "vocab_size": VOCAB, "max_seq_len": SEQUENCE, "no_bias": True,
               "attn_config": {"alibi": True}},
        max_seq_len=SEQUENCE,
        global_batch=BATCH,
        steps=STEPS,
        epochs=None,
        lr=6e-4,
        microbatch_tokens=BATCH * SEQUENCE,
    )  # fmt: skip


def samples(run: Any) -> Any:
    from training import batches, datasets

    data = datasets.load(run.data, batches.load_tokenizer(run), "none", run.max_seq_len, run.seed)
    return [data.sample(number) for number in range(STEPS * BATCH)]


# -- what runs inside a measuring process; each returns seconds per step ---------------------------------------------


def ours(shape: str, folder: Path) -> list[float]:
    """`train pretrain`'s own loop, everything it writes included."""
    from training import loop

    times: list[float] = []
    loop.fit(run_of(shape, folder), lambda _: times.append(time.perf_counter()))
    return between(times)


def bare(shape: str, folder: Path) -> list[float]:
    """Our model and step in the plainest loop there can be."""
    import torch

    from training import build, memory, optimizer, packing
    from training.distributed import World
    from training.step import accumulate, train_step

    run = run_of(shape, folder)
    world = World(0, 1, torch.device("cpu"))
    memory.keep_freed_memory()  # as the loop does
    model = build.model(run, world)
    opt = optimizer.build(run, model.parameters())
    rows = samples(run)
    batches = [packing.pack(rows[i : i + BATCH], SEQUENCE) for i in range(0, len(rows), BATCH)]

    def measured(batch: packing.Batch) -> dict[str, float]:
        return {"loss": accumulate(model, batch, run, world, run.microbatch_tokens)}

    times = []
    for batch in batches:
        train_step(model, opt, run, partial(measured, batch))
        times.append(time.perf_counter())
    return between(times)


def trainer(shape: str, folder: Path) -> list[float]:
    """transformers' Trainer with its in-tree MPT."""
    import torch
    from transformers import MptConfig, MptForCausalLM, Trainer, TrainerCallback, TrainingArguments

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    config = MptConfig(**SHAPES[shape], vocab_size=VOCAB, max_seq_len=SEQUENCE, no_bias=True, use_cache=False)
    rows = [{"input_ids": torch.tensor(s.ids), "labels": torch.tensor(s.ids)} for s in samples(run_of(shape, folder))]
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        learning_rate=6e-4,
        bf16=True,
        use_cpu=True,
        optim="adamw_torch_fused",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        dataloader_drop_last=True,
    )
    Trainer(model=MptForCausalLM(config), args=arguments, train_dataset=rows, callbacks=[Clock()]).train()
    return between(times)


def between(times: list[float]) -> list[float]:
    return [b - a for a, b in zip(times[WARM_UP - 1 :], times[WARM_UP:], strict=False)]


MEASUREMENTS: dict[str, Callable[[str, Path], list[float]]] = {f.__name__: f for f in (ours, bare, trainer)}


def peak_tflops() -> float:
    """The machine's own bfloat16 matmul."""
    import torch

    torch.set_num_threads(THREADS)
    a = torch.randn(2048, 2048).bfloat16()
    times = []
    for _ in range(12):
        started = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - started)
    return 2 * 2048**3 / statistics.median(times) / 1e12


def measure(name: str, shape: str) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "TRANSFORMERS_VERBOSITY": "error"}
    print(f"  {name} ...", file=sys.stderr, flush=True)
    command = [sys.executable, str(MAIN), "--measure", name, "--shape", shape]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="125m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", choices=sorted(MEASUREMENTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        import resource

        with tempfile.TemporaryDirectory() as folder:
            seconds = statistics.median(MEASUREMENTS[options.measure](options.shape, Path(folder)))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(json.dumps({"seconds": seconds, "memory_gb": memory}))
        return
    collected: dict[str, list[dict[str, float]]] = {name: [] for name in MEASUREMENTS}
    peaks = []
    for number in range(options.rounds):
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
        peaks.append(peak_tflops())
        for name in MEASUREMENTS:
            collected[name].append(measure(name, options.shape))
    shape = SHAPES[options.shape]
    n_parameters = 12 * shape["d_model"] ** 2 * shape["n_layers"] + VOCAB * shape["d_model"]
    flops = 6 * n_parameters + 6 * shape["n_layers"] * shape["d_model"] * SEQUENCE  # a token; causal attention
    peak = statistics.median(peaks)
    median = {name: statistics.median(r["seconds"] for r in results) for name, results in collected.items()}
    print(
        f"{options.shape} shape, {BATCH} sequences of {SEQUENCE} a step, {THREADS} threads; "
        f"ceiling {peak:.2f} TFLOP/s\n"
    )
    print("| | seconds a step | tokens/s | MFU of the ceiling | memory |\n|---|---|---|---|---|")
    for name, label in (("ours", "ours"), ("bare", "our step in a bare loop"), ("trainer", "transformers' Trainer")):
        speed = BATCH * SEQUENCE / median[name]
        memory = statistics.median(r["memory_gb"] for r in collected[name])
        print(f"| {label} | {median[name]:.2f} | {speed:,.0f} | {speed * flops / 1e12 / peak:.0%} | {memory:.1f} GB |")
    print(f"\n{median['trainer'] / median['ours']:.2f} x the Trainer's speed; ", end="")
    print(f"the loop costs {median['ours'] / median['bare'] - 1:+.1%} over a bare one")


if __name__ == "__main__":
    main()
