"""How long a server takes until it answers, with its weights on disk or in memory, and what a node's notice leaves.

    python -m benchmarks.cold_start [--sizes tiny,125m,1b] [--rounds 3] [--streams 8] [--json out.json]

Random weights of each size in bfloat16, with the tiny family's tokenizer, as `mpt.save` writes them (safetensors with
sha256). `mpt serve` is started as a process; "ready" is from there to its line in the log, the first step included.
Cold: every file of the checkpoint is dropped from the page cache before (the program's own files are not); warm: it has
been read before. Reading is the files in pieces of 8 MiB; hashing is reading them warm and their sha256, on one core.

Then streams run, and SIGTERM comes as from a node that is taken away: how many streams end well, and the seconds until
the process has left. The files lie in $TMPDIR, which should be a disk.
"""

import argparse
import asyncio
import hashlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import torch

import mpt
from benchmarks import machine
from mpt.catalog import resolve
from mpt.tokenizer import Tokenizer

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"d_model": 192, "n_heads": 4, "n_layers": 6, "vocab_size": 2048},
    "125m": {"d_model": 768, "n_heads": 12, "n_layers": 12, "vocab_size": 50_432},
    "1b": {"d_model": 2048, "n_heads": 16, "n_layers": 24, "vocab_size": 50_432},
}
_PIECE = 8 << 20
_TOKENS = 1800  # of each stream that SIGTERM meets: more than it gets before
NOTICE_S = 120  # what AWS gives a spot instance before it is taken


@dataclass
class Start:
    """One start of a server."""

    cache: str  # cold or warm
    ready_s: float
    said_s: float  # what its log says, without the interpreter's own start
    answered_s: float  # the first request of one token, after that


@dataclass
class Size:
    name: str
    gb: float
    read_cold_gbs: float
    read_warm_gbs: float
    hash_gbs: float
    starts: list[Start]


@dataclass
class Drain:
    """SIGTERM under load."""

    streams: int
    finished: int  # streams that ended with [DONE]
    left_s: float


def make(name: str, folder: Path) -> Path:
    """A checkpoint of random weights."""
    with torch.device("meta"):
        model = mpt.MPTForCausalLM(mpt.MPTConfig(**SHAPES[name], max_seq_len=2048))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    model.tie_weights()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.02, 0.02)
    return mpt.save(model, folder / name, tokenizer=Tokenizer.from_folder(resolve("mpt-tiny")))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def drop(folder: Path) -> None:
    """Take a folder's files out of the page cache, as after a start of the machine."""
    for path in files(folder):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)  # what is not written yet cannot be dropped
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def read(folder: Path, *, hashed: bool = False) -> float:
    """Seconds to read a folder's files, and to hash them."""
    began, piece = time.perf_counter(), bytearray(_PIECE)
    for path in files(folder):
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            while n := file.readinto(piece):
                if hashed:
                    digest.update(memoryview(piece)[:n])
    return time.perf_counter() - began


def launch(folder: Path, *options: str) -> tuple[subprocess.Popen[str], str, float, float]:
    """A server that is ready: its process, URL, seconds since it was started, and what it says itself."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "mpt", "serve", "--port", "0", "--model", f"m={folder}", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"ready after ([\d.]+) s on (http://[^\s,]+)", line):
            return process, found[2], time.perf_counter() - began, float(found[1])
    raise SystemExit(f"cold_start: the server left with {process.wait()}")


def start(folder: Path, cache: str) -> Start:
    """One start, with the page cache as it is to be."""
    if cache == "cold":
        drop(folder)
    else:
        read(folder)
    process, url, ready_s, said_s = launch(folder)
    began = time.perf_counter()
    httpx.post(
        f"{url}/v1/completions", json={"model": "m", "prompt": "a", "max_tokens": 1}, timeout=60
    ).raise_for_status()
    answered_s = time.perf_counter() - began
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    print(f"{folder.name} {cache}: ready after {ready_s:.1f} s", file=sys.stderr)
    return Start(cache, ready_s, said_s, answered_s)


def measure(name: str, folder: Path, rounds: int) -> Size:
    """One size: the disk's speed, then starts, cold and warm in turn."""
    n_bytes = sum(path.stat().st_size for path in files(folder))
    drop(folder)
    cold_s, warm_s, hash_s = read(folder), read(folder), read(folder, hashed=True)
    gb = n_bytes / 1e9
    starts = [start(folder, cache) for _ in range(rounds) for cache in ("cold", "warm")]
    return Size(name, gb, gb / cold_s, gb / warm_s, gb / hash_s, starts)


async def drained(folder: Path, n_streams: int) -> Drain:
    """SIGTERM when every stream has its first token."""
    process, url, _, _ = launch(folder, "--drain-seconds", str(NOTICE_S - 20))
    running, finished = asyncio.Semaphore(0), 0

    async def stream(client: httpx.AsyncClient, n: int) -> None:
        nonlocal finished
        body = {"model": "m", "prompt": f"stream {n}", "max_tokens": _TOKENS, "ignore_eos": True, "stream": True}
        async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            begun = False
            async for line in response.aiter_lines():
                if not begun:
                    begun = True
                    running.release()
                finished += line == "data: [DONE]"

    async with httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None)) as client:
        tasks = [asyncio.create_task(stream(client, n)) for n in range(n_streams)]
        for _ in tasks:
            await running.acquire()
        began = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        await asyncio.gather(*tasks)
    await asyncio.to_thread(process.communicate, timeout=60)
    return Drain(n_streams, finished, time.perf_counter() - began)


_HEAD = (
    "weights",
    "GB",
    "read cold, warm (GB/s)",
    "read and sha256 (GB/s)",
    "ready cold (s)",
    "ready warm (s)",
    "first answer (s)",
)


def table(sizes: list[Size], drains: dict[str, Drain]) -> str:
    """Markdown: medians of each size, and how SIGTERM ended."""
    rows = [f"| {' | '.join(_HEAD)} |", "|---" * len(_HEAD) + "|"]
    for size in sizes:
        ready = [[each.ready_s for each in size.starts if each.cache == cache] for cache in ("cold", "warm")]
        speed = f"{size.read_cold_gbs:.2f}, {size.read_warm_gbs:.1f} | {size.hash_gbs:.2f}"
        times = " | ".join(f"{statistics.median(each):.1f}" for each in ready)
        first = statistics.median(each.answered_s for each in size.starts)
        rows.append(f"| {size.name} | {size.gb:.2f} | {speed} | {times} | {first:.2f} |")
    for name, drain in drains.items():
        rows.append(
            f"\n{name}: SIGTERM under {drain.streams} streams; {drain.finished} ended with [DONE], and the process "
            f"left after {drain.left_s:.1f} s"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="tiny,125m,1b", help="of tiny, 125m, 1b")
    parser.add_argument("--rounds", type=int, default=3, help="starts of each kind")
    parser.add_argument("--streams", type=int, default=8, help="that SIGTERM meets; 0 leaves that out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything there")
    given = parser.parse_args()
    here: dict[str, Any] = machine.describe()
    print(f"{date.today()}, {machine.sentence(here)}", file=sys.stderr)
    sizes, drains = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for name in given.sizes.split(","):
            made = make(name, Path(folder))
            sizes.append(measure(name, made, given.rounds))
            if given.streams:
                drains[name] = asyncio.run(drained(made, given.streams))
            print(table(sizes[-1:], {name: drains[name]} if name in drains else {}), flush=True)
    if given.json:
        found = {"machine": here, "sizes": [asdict(each) for each in sizes]}
        found["drains"] = {name: asdict(drain) for name, drain in drains.items()}
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
