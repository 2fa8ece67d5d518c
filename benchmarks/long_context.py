"""A book of 64,000 tokens: reading it, writing on, and a second question about it.

    python benchmarks/long_context.py [--tokens 64000] [--rounds 2]

mpt-tiny-storywriter in bfloat16 through the engine, one request at a time, on The Great Gatsby of $MPT_TEST_DATA (from
its beginning again where it is too short). With and without leaving out the keys that ALiBi leaves no weight, and with
an int8 KV cache. A question starts when its text does: becoming tokens is in its time.
"""

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import mpt
from benchmarks.ceilings import read_gb_s
from benchmarks.one_stream import N_WRITTEN, stream
from mpt.backends.native.step import NativeStep
from mpt.backends.torch_backend import TorchBackend
from mpt.catalog import resolve
from mpt.engine.engine import Engine
from mpt.tokenizer import Tokenizer

DATA = Path(os.environ.get("MPT_TEST_DATA") or Path(__file__).parents[2] / "shared/data")
THREADS = 2


@dataclass(frozen=True)
class Answer:
    started: float  # seconds from the text to the first token
    between: float  # seconds between tokens, the median
    n_keys: int  # a head would read if it read them all


async def ask(engine: Engine, tokenizer: Tokenizer, text: str) -> Answer:
    asked = time.perf_counter()
    prompt = tokenizer.encode(text)
    tokenized = time.perf_counter()
    found = await stream(engine, prompt)
    n_keys = sum(position + 1 for position in range(found.n_cached, len(prompt) + N_WRITTEN - 1))
    return Answer(tokenized - asked + found.first, found.between, n_keys)


def all_keys(model: mpt.MPTForCausalLM) -> TorchBackend:
    backend = TorchBackend(model)
    backend.native = NativeStep(model, drop=0.0)
    return backend


def measure(make: Callable[[], TorchBackend], tokenizer: Tokenizer, book: str, n_tokens: int) -> tuple[float, ...]:
    """Seconds to read the book, between tokens, to start the second answer; keys read while writing; cache bytes."""
    backend = make()
    assert backend.native is not None
    kv_bytes = 2 * backend.bytes_per_token * backend.capacity_for(n_tokens + 512)
    engine = Engine(backend, tokenizer, context_length=2 * n_tokens, kv_bytes=kv_bytes, prefill_chunk=2048)
    engine.start()
    try:
        first = asyncio.run(ask(engine, tokenizer, book))
        n_before = backend.native.keys_read
        again = asyncio.run(ask(engine, tokenizer, book + "\n\nWho is the man in the library?"))
        n_read = backend.native.keys_read - n_before
    finally:
        engine.close()
    config = backend.model.config
    share = n_read / (config.n_layers * config.n_heads * again.n_keys)
    return first.started, statistics.mean((first.between, again.between)), again.started, share, kv_bytes / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64_000)
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(THREADS)
    path = DATA / "novels/the-great-gatsby.txt"
    if not path.is_file():
        raise SystemExit(f"`{path}` is not there; set MPT_TEST_DATA to the folder of test data that holds it")
    tokenizer = Tokenizer.from_folder(resolve("mpt-tiny-storywriter"))
    model = mpt.load(resolve("mpt-tiny-storywriter"), dtype=torch.bfloat16)
    text = path.read_text(encoding="utf-8")
    tokens = tokenizer.encode(text)
    book = tokenizer.decode((tokens * (asked.tokens // len(tokens) + 1))[: asked.tokens])
    sides: dict[str, Callable[[], TorchBackend]] = {
        "all keys": lambda: all_keys(model),
        "keys within reach": lambda: TorchBackend(model),
        "keys within reach, int8 cache": lambda: TorchBackend(model, int8_cache=True),
    }
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in sides}
    for _ in range(asked.rounds):
        for name, make in sides.items():
            found[name].append(measure(make, tokenizer, book, asked.tokens))
    gb_s = read_gb_s(1 << 30)
    print(f"{asked.tokens:,} tokens; memory is read at {gb_s:.1f} GB/s\n")
    print("| | read, s | a token, ms | keys read | cache over bandwidth, ms | second question, s | sooner |")
    print("|---|---|---|---|---|---|---|")
    for name, results in found.items():
        read, between, again, share, kv_bytes = (statistics.median(column) for column in zip(*results, strict=True))
        print(
            f"| {name} | {read:.1f} | {1000 * between:.1f} | {share:.0%} | {kv_bytes / gb_s / 1e6:.1f} "
            f"| {again:.2f} | {read / again:.0f} times |"
        )


if __name__ == "__main__":
    main()
