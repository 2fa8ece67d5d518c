"""The KV cache in int8 beside bfloat16: what it costs in answers, and what a step of decoding gains.

    python benchmarks/kv_cache.py [--rounds 25] [--only quality|speed]

Quality: mpt-tiny and its storywriter on a novel of $MPT_TEST_DATA: perplexity over 4,000 tokens read 16 and 512 at a
time, the likeliest tokens that stay the same, and 30 greedy answers of 100 tokens. Speed: the 125M shape with random
weights and without ALiBi, so that every key is read; a step of one token a row, alternating.
"""

import argparse
import math
import os
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import mpt
from mpt.backends.backend import Row, Work
from mpt.backends.int8_cache import Int8Layer
from mpt.backends.torch_backend import TorchBackend
from mpt.catalog import resolve
from mpt.tokenizer import Tokenizer

DATA = Path(os.environ.get("MPT_TEST_DATA") or Path(__file__).parents[2] / "shared/data")
CACHES = ("bfloat16", "int8")
THREADS = 2


def read(backend: TorchBackend, tokens: list[int], at_once: int) -> Tensor:
    """Logits of all tokens, (T, V)."""
    row, found = backend.reserve(None, len(tokens)), []
    for start in range(0, len(tokens), at_once):
        part = tokens[start : start + at_once]
        found.append(backend.forward([Work(row, part, len(part))]))
        row.length += len(part)
    return torch.cat(found)


def greedy(backend: TorchBackend, prompt: list[int], n: int) -> list[int]:
    row, said, unread = backend.reserve(None, len(prompt) + n), [], prompt
    for _ in range(n):
        logits = backend.forward([Work(row, unread, 1)])
        row.length += len(unread)
        said.append(int(logits[-1].argmax()))
        unread = said[-1:]
    return said


def quality(name: str, novel: str) -> None:
    folder = resolve(name)
    tokens = Tokenizer.from_folder(folder).encode(novel)[:4000]
    targets = torch.tensor(tokens[1:])
    with torch.inference_mode():
        exact = mpt.load(folder, dtype=torch.float32)(torch.tensor([tokens])).logits[0, :-1]
    print(f"{name}: perplexity {math.exp(F.cross_entropy(exact, targets)):.3f} in float32")
    model = mpt.load(folder, dtype=torch.bfloat16)
    backends = [TorchBackend(model, int8_cache=cache == "int8") for cache in CACHES]
    for at_once in (16, 512):
        logits = [read(backend, tokens, at_once)[:-1] for backend in backends]
        for cache, each in zip(CACHES, logits, strict=True):
            print(f"  {cache}, {at_once} at once: {math.exp(F.cross_entropy(each, targets)):.3f}")
        same = (logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean()
        print(f"  the likeliest token is the same at {same:.2%} of the positions")
    prompts = [tokens[120 * k : 120 * k + 100] for k in range(30)]
    answers = [[greedy(backend, prompt, 100) for prompt in prompts] for backend in backends]
    n_same = sum(a == b for a, b in zip(*answers, strict=True))
    print(f"  {n_same} of {len(prompts)} greedy answers of 100 tokens are the same to the last one")


def filled(backend: TorchBackend, n_tokens: int) -> Row:
    """A row of random keys and values."""
    row = backend.reserve(None, n_tokens + 1)
    for layer in row.kv:
        fresh = torch.randn(*layer.shape[:2], n_tokens, layer.shape[3])
        if isinstance(layer, Int8Layer):
            layer.write(0, fresh)
        else:
            layer[:, :, :n_tokens] = fresh
    row.length = n_tokens
    return row


def speed(rounds: int) -> None:
    config = mpt.MPTConfig(
        d_model=768, n_heads=12, n_layers=12, max_seq_len=16384, attn_config={"alibi": False}, learned_pos_emb=True
    )
    model = mpt.MPTForCausalLM(config).to(torch.bfloat16).eval()
    backends = [TorchBackend(model, int8_cache=cache == "int8") for cache in CACHES]
    for n_rows, n_tokens in ((1, 128), (1, 1024), (1, 8192), (16, 128), (16, 1024)):
        works = [[Work(filled(backend, n_tokens), [5], 1) for _ in range(n_rows)] for backend in backends]
        times: list[list[float]] = [[], []]
        for _ in range(rounds + 3):  # the first three warm up
            for backend, work, taken in zip(backends, works, times, strict=True):
                started = time.perf_counter()
                backend.forward(work)
                taken.append(time.perf_counter() - started)
        wide, int8 = (1000 * statistics.median(taken[3:]) for taken in times)
        print(f"{n_rows} x {n_tokens}: bfloat16 {wide:.2f} ms, int8 {int8:.2f} ms, {wide / int8:.2f} x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--only", choices=("quality", "speed"))
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    if args.only != "speed":
        for name in ("mpt-tiny", "mpt-tiny-storywriter"):
            quality(name, (DATA / "novels/the-call-of-the-wild.txt").read_text(encoding="utf-8"))
    if args.only != "quality":
        speed(args.rounds)


if __name__ == "__main__":
    main()
