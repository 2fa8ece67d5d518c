"""Muon beside AdamW and Lion at equal time: the tiny base's shape, a novel's text, the same batches for all.

    python benchmarks/optimizers.py [--seconds 45] [--novel FILE.txt]

Each optimizer is run at several learning rates for so many seconds of its own steps, and its loss on the novel's last
tenth is printed; the best of each is compared.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import mpt
from mpt.catalog import resolve
from mpt.config import MPTConfig
from mpt.tokenizer import Tokenizer
from training.optimizer import Lion, Muon
from training.recipes import TINY_SHAPE

DATA = Path(os.environ.get("MPT_TEST_DATA") or Path(__file__).parents[2] / "shared/data")
ROWS, T, WARMUP = 16, 256, 20
RATES = {"adamw": (4e-3, 8e-3, 16e-3), "lion": (6e-4, 12e-4, 24e-4), "muon": (8e-3, 16e-3, 32e-3)}


def adamw(model: mpt.MPTForCausalLM, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def lion(model: mpt.MPTForCausalLM, lr: float) -> torch.optim.Optimizer:
    return Lion(list(model.parameters()), lr=lr, betas=(0.9, 0.95))


def muon(model: mpt.MPTForCausalLM, lr: float) -> torch.optim.Optimizer:
    matrices = [p for p in model.transformer.blocks.parameters() if p.ndim == 2]
    taken = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in taken]
    return Muon(matrices, others, lr, (0.9, 0.95), 1e-8, weight_decay=0.0)


MAKE: dict[str, Callable[[mpt.MPTForCausalLM, float], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "lion": lion,
    "muon": muon,
}


def loss_of(model: mpt.MPTForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids[:, :-1]).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


def run(kind: str, lr: float, text: torch.Tensor, held_out: torch.Tensor, seconds: float) -> tuple[float, int]:
    """The held-out loss after so many seconds, and the steps they were."""
    torch.manual_seed(17)
    model = mpt.MPTForCausalLM(MPTConfig(**TINY_SHAPE)).train()
    optimizer, generator = MAKE[kind](model, lr), torch.Generator().manual_seed(17)
    began, n = time.perf_counter(), 0
    while (used := time.perf_counter() - began) < seconds:
        starts = torch.randint(len(text) - T - 1, (ROWS,), generator=generator)
        loss_of(model, torch.stack([text[s : s + T + 1] for s in starts.tolist()])).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:  # falls with the time, to nothing at its end
            group["lr"] = lr * min(1.0, (n + 1) / WARMUP) * (1 - used / seconds)
        optimizer.step()
        optimizer.zero_grad()
        n += 1
    with torch.no_grad():
        return float(loss_of(model.eval(), held_out)), n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=45.0)
    parser.add_argument("--novel", type=Path, default=DATA / "novels/the-great-gatsby.txt")
    asked = parser.parse_args()
    if not asked.novel.is_file():
        raise SystemExit(f"`{asked.novel}` is not there; give --novel FILE.txt")
    tokenizer = Tokenizer.from_folder(resolve("mpt-tiny"))
    ids = torch.tensor(tokenizer.encode(asked.novel.read_text(encoding="utf-8")))
    n = len(ids) * 9 // 10
    held_out = ids[n : n + 16 * (T + 1)].view(16, T + 1)
    print(f"{len(ids):,} tokens, {ROWS} rows of {T}, {asked.seconds:g} s each, {torch.get_num_threads()} threads\n")
    print("| optimizer | lr | steps | held-out loss |\n|---|---|---|---|")
    for kind, rates in RATES.items():
        for lr in rates:
            loss, steps = run(kind, lr, ids[:n], held_out, asked.seconds)
            print(f"| {kind} | {lr:g} | {steps} | {loss:.3f} |", flush=True)


if __name__ == "__main__":
    main()
