"""Prefixes on disk: a prompt of 65,536 tokens read, and started again after a restart, each in a process of its own.

    python -m benchmarks.prefix_files [--shape tiny] [--tokens 65536] [--rounds 2]

Two storywriters in bfloat16, random tokens, one request at a time: mpt-tiny-storywriter, and random weights of the 125M
shape with its attention (`--shape 125m`). A start is from the prompt's token ids to the first token; the process, its
weights and its first step come before. The files lie in $TMPDIR, which should be a disk. "from memory" has them in the
system's page cache, "from disk" not: they are written back and dropped from it first.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import mpt
from benchmarks import machine
from benchmarks.one_stream import N_WRITTEN, Stream, stream
from mpt.backends.torch_backend import TorchBackend
from mpt.catalog import resolve
from mpt.engine.engine import Engine
from mpt.engine.prefix_files import BLOCK, PrefixFiles
from mpt.tokenizer import Tokenizer

THREADS = 2
SHAPES = {"tiny": "mpt-tiny-storywriter", "125m": "random weights, 12 layers of 768, 12 heads"}


@dataclass(frozen=True)
class Start(Stream):
    n_bytes: int  # of the files then


def storywriter(shape: str) -> mpt.MPTForCausalLM:
    if shape == "tiny":
        return mpt.load(resolve("mpt-tiny-storywriter"), dtype=torch.bfloat16)
    torch.manual_seed(0)
    attention = {"alibi": True, "alibi_bias_max": 16, "clip_qkv": 6.0}
    sizes = {"d_model": 768, "n_heads": 12, "n_layers": 12, "vocab_size": 50432, "max_seq_len": 65536}
    return mpt.MPTForCausalLM(mpt.MPTConfig(**sizes, attn_config=attention)).bfloat16().eval()


def child(shape: str, n_tokens: int, folder: Path | None) -> Start:
    """One process's request. Ends when all that it read is on disk."""
    torch.set_num_threads(THREADS)
    backend = TorchBackend(storywriter(shape))
    assert backend.native is not None
    files = None if folder is None else PrefixFiles(folder, 100 * 10**9, shape)
    kv_bytes = backend.bytes_per_token * backend.capacity_for(n_tokens + N_WRITTEN)
    tokenizer = Tokenizer.from_folder(resolve("mpt-tiny-storywriter"))
    prompt = random.Random(0).choices(range(300, 1500), k=n_tokens)
    engine = Engine(backend, tokenizer, context_length=2 * n_tokens, kv_bytes=kv_bytes, prefix_files=files)
    engine.start()
    try:
        while not engine.ready:
            time.sleep(0.01)
        found = asyncio.run(stream(engine, prompt))
        n_written = 0 if files is None or found.n_cached else n_tokens // BLOCK * BLOCK
        while engine.stats().prefix_disk_written_tokens < n_written:
            time.sleep(0.01)
        return Start(**asdict(found), n_bytes=engine.stats().prefix_disk_bytes)
    finally:
        engine.close()


def run(shape: str, n_tokens: int, folder: Path | None) -> Start:
    command = [sys.executable, "-m", "benchmarks.prefix_files", "--child", "--shape", shape, "--tokens", str(n_tokens)]
    command += ["--folder", str(folder)] if folder is not None else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Start(**json.loads(done.stdout))


def drop(folder: Path) -> None:
    """Have the system forget what it holds of the files in memory."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        with contextlib.closing(os.fdopen(os.open(path, os.O_RDONLY))) as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(shape: str, n_tokens: int) -> dict[str, Start]:
    with tempfile.TemporaryDirectory(prefix="mpt-prefixes-") as name:
        folder = Path(name)
        found = {"read, no folder": run(shape, n_tokens, None), "read and kept": run(shape, n_tokens, folder)}
        found["from memory"] = run(shape, n_tokens, folder)
        drop(folder)
        found["from disk"] = run(shape, n_tokens, folder)
    assert found["from memory"].n_cached == found["from disk"].n_cached == min(n_tokens // BLOCK * BLOCK, n_tokens - 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(asdict(child(asked.shape, asked.tokens, asked.folder))))
        return
    rounds = [measure(asked.shape, asked.tokens) for _ in range(asked.rounds)]
    print(f"{machine.sentence(machine.describe())}\n\n{SHAPES[asked.shape]}, {asked.tokens:,} tokens\n")
    print("| | first token, s | sooner | a token after it, ms | files, MB |\n|---|---|---|---|---|")
    read = statistics.median(found["read, no folder"].first for found in rounds)
    for what in rounds[0]:
        seconds = statistics.median(found[what].first for found in rounds)
        between = statistics.median(found[what].between for found in rounds)
        sooner = f"{read / seconds:.0f} times" if what.startswith("from") else ""
        print(f"| {what} | {seconds:.2f} | {sooner} | {1000 * between:.1f} | {rounds[0][what].n_bytes / 1e6:,.0f} |")


if __name__ == "__main__":
    main()
