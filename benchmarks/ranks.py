"""How many times as fast as one rank several gloo ranks take the same steps, beside what their bandwidth predicts.

    python benchmarks/ranks.py --ranks 2 --rounds 3

Each rank has one thread, so that two ranks on two cores stand for two nodes that share nothing but the network. A step
reads the same rows on any number of ranks. The prediction is that of `train plan`: one rank's time divided by the
ranks, and what FSDP sends (`training/nodes.py`) at the bandwidth that gloo reached here; gloo's collectives run on the
cores that compute, so nothing is hidden. Progress goes to stderr, the table to stdout.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES = {
    "tiny": {"d_model": 256, "n_heads": 8, "n_layers": 4},
    "30m": {"d_model": 512, "n_heads": 8, "n_layers": 8},
}
VOCAB, SEQUENCE, BATCH, STEPS = 2048, 512, 8, 8
WARM_UP = 3  # steps left out of the median
SENT_MB = 32  # of the tensor whose gathering is timed
MAIN = Path(__file__).resolve()


# -- what runs in each rank ------------------------------------------------------------------------------------------


def bandwidth() -> float:
    """GB/s that a rank receives while all gather SENT_MB of bfloat16 from each."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        return 0.0
    mine = torch.zeros(SENT_MB * 500_000, dtype=torch.bfloat16)
    whole = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    seconds = []
    for _ in range(6):
        dist.barrier()
        began = time.perf_counter()
        dist.all_gather(whole, mine)
        seconds.append(time.perf_counter() - began)
    return (len(whole) - 1) * mine.nbytes / statistics.median(seconds[1:]) / 1e9


def run_of(shape: str, folder: Path) -> Any:
    """The run whose steps are timed; its data are random words, cut into whole sequences."""
    import random

    from mpt.catalog import resolve
    from training.run import Run

    data = folder / "words.txt"
    if not data.is_file():
        rng = random.Random(0)
        words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(20 * BATCH * SEQUENCE)]
        data.write_text(" ".join(words), encoding="utf-8")
    model = {**SHAPES[shape], "vocab_size": VOCAB, "max_seq_len": SEQUENCE, "no_bias": True}
    return Run(
        name=shape, base=None, data=str(data), out=str(folder / "run"), tokenizer=str(resolve("mpt-tiny")),
        model={**model, "attn_config": {"alibi": True}}, max_seq_len=SEQUENCE, global_batch=BATCH, steps=STEPS,
        epochs=None, lr=6e-4, microbatch_tokens=BATCH * SEQUENCE,
    )  # fmt: skip


def rank(shape: str, folder: Path) -> None:
    """Trains under torchrun, or alone, and leaves its times in a file."""
    import torch

    torch.set_num_threads(1)
    from training import build, distributed, optimizer, plan
    from training.batches import Batches, load_data, load_tokenizer
    from training.step import train_step

    run = run_of(shape, folder)
    with distributed.join() as world:
        gb_s = bandwidth()
        model = build.model(run, world)
        opt = optimizer.build(run, model.parameters())
        batches = Batches(run, load_data(run, load_tokenizer(run), run.data))
        seconds = []
        for step in range(STEPS):
            batch = batches.get(step)
            world.barrier()
            began = time.perf_counter()
            train_step(model, opt, batch, run, world, run.microbatch_tokens)
            world.barrier()
            seconds.append(time.perf_counter() - began)
        batches.close()
        parameters = plan.shape_of_model(run.model).n_parameters
        if world.is_first:
            found = {"seconds": statistics.median(seconds[WARM_UP:]), "gb_s": gb_s, "parameters": parameters}
            (folder / "found.json").write_text(json.dumps(found))


# -- what starts them ------------------------------------------------------------------------------------------------


def measure(shape: str, n_ranks: int) -> dict[str, float]:
    print(f"  {n_ranks} ranks ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        run_of(shape, Path(folder))  # writes the words before several ranks would
        command = [sys.executable]
        if n_ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_ranks}"]
        command += [str(MAIN), "--rank", folder, "--shape", shape]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(MAIN.parents[1])}
        subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
        found: dict[str, float] = json.loads((Path(folder) / "found.json").read_text())
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank(options.shape, options.rank)
        return
    alone, together = [], []
    for number in range(options.rounds):
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
        alone.append(measure(options.shape, 1))
        together.append(measure(options.shape, options.ranks))
    one_s = statistics.median(found["seconds"] for found in alone)
    many_s = statistics.median(found["seconds"] for found in together)
    gb_s = statistics.median(found["gb_s"] for found in together)
    n = options.ranks
    sent_s = 3 * 2 * alone[0]["parameters"] * (n - 1) / n / (gb_s * 1e9)
    print(f"{options.shape} shape, {BATCH} rows of {SEQUENCE} tokens a step; gloo gathers {gb_s:.2f} GB/s\n")
    print("| ranks | seconds a step | times one rank | predicted |\n|---|---|---|---|")
    print(f"| 1 | {one_s:.3f} | 1 | |")
    print(f"| {n} | {many_s:.3f} | {one_s / many_s:.2f} | {one_s / (one_s / n + sent_s):.2f} |")


if __name__ == "__main__":
    main()
