"""A quantised file served as it lies: seconds from a cold start to the first token, and the memory it takes.

    python benchmarks/as_they_lie.py [--small] [--kind Q4_0] [--folder WHERE]

A GGUF file of the 7B shape (--small: 1B) with random blocks is written by the `gguf` package, as llama.cpp's converter
and quantiser lay it out. `mpt generate` then runs on it in a process of its own. Cold: the system has dropped the
file's pages. Limits at 7B: 15 s to the first token, and resident memory of the file's size, the KV cache and 600 MB
more. Exit code 1 if one is passed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from conversion.formats import gguf_file
from conversion.open import open_source
from mpt.catalog import resolve
from mpt.config import MPTConfig
from mpt.gguf.ggml_types import BLOCK_TYPES
from mpt.gguf.model import gguf_name

SHAPES = {"7b": (4096, 32, 32), "1b": (2048, 24, 16)}  # width, layers, heads
VOCAB, CONTEXT, PROMPT = 50_432, 2048, "What is the capital of France? Answer in one word, please."
LIMIT_S, LIMIT_MB = 15.0, 600
_LATER_TOKENS = 32
_SCALES = {"Q4_0": 0.002, "Q8_0": 0.000125}  # of each block: random integers of either kind then spread by 0.009


def write(path: Path, shape: tuple[int, int, int], kind: str, context_length: int = CONTEXT) -> None:
    """A file of random blocks whose values are small, with the tiny family's tokenizer; llama.cpp reads it too."""
    d_model, n_layers, n_heads = shape
    config = MPTConfig(
        d_model=d_model, n_layers=n_layers, n_heads=n_heads, vocab_size=VOCAB, max_seq_len=context_length
    )
    described = replace(open_source(resolve("mpt-tiny")), config=config)
    assert described.tokenizer is not None
    writer: Any = gguf.GGUFWriter(str(path), "mpt")
    gguf_file.add_keys(writer, described, kind)
    gguf_file.add_tokenizer(writer, described, described.tokenizer)
    matrices = {"transformer.wte.weight": (VOCAB, d_model)}
    norms = ["transformer.norm_f.weight"]
    for n in range(n_layers):
        block = f"transformer.blocks.{n}"
        matrices |= {
            f"{block}.attn.Wqkv.weight": (3 * d_model, d_model), f"{block}.attn.out_proj.weight": (d_model, d_model),
            f"{block}.ffn.up_proj.weight": (4 * d_model, d_model),
            f"{block}.ffn.down_proj.weight": (d_model, 4 * d_model),
        }  # fmt: skip
        norms += [f"{block}.norm_1.weight", f"{block}.norm_2.weight"]
    block_type = BLOCK_TYPES[kind]
    for name, (n_out, n_in) in matrices.items():
        row = n_in // block_type.n_values * block_type.n_bytes
        writer.add_tensor_info(
            gguf_name(name), (n_out, row), np.dtype(np.uint8), n_out * row, gguf.GGMLQuantizationType[kind]
        )
    for name in norms:
        writer.add_tensor(gguf_name(name), np.ones(d_model, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    for n_out, n_in in matrices.values():
        blocks = rng.integers(0, 256, (n_out * n_in // block_type.n_values, block_type.n_bytes), dtype=np.uint8)
        blocks[:, :2] = np.frombuffer(np.float16(_SCALES[kind]).tobytes(), np.uint8)
        writer.write_tensor_data(blocks.reshape(n_out, -1))
    for _ in norms:
        writer.write_tensor_data(np.ones(d_model, np.float32))
    writer.close()


def drop_pages(path: Path) -> None:
    """Let the system forget what it has read of a file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(path: Path, n_tokens: int) -> tuple[float, dict[str, int]]:
    """Seconds from start to end, and the most memory of each kind, in kB."""
    command = [sys.executable, "-m", "mpt", "generate", PROMPT, "--model", str(path), "--max-tokens", str(n_tokens)]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    most: dict[str, int] = {}

    def watch() -> None:
        while process.poll() is None:
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except OSError:
                return
            for line in lines:
                name, _, value = line.partition(":")
                if name in ("VmRSS", "RssAnon", "RssFile"):
                    most[name] = max(most.get(name, 0), int(value.split()[0]))
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    seconds = time.perf_counter() - started
    watcher.join()
    if code:
        raise SystemExit(f"{' '.join(command)} failed")
    return seconds, most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="the 1B shape")
    parser.add_argument("--kind", default="Q4_0", choices=("Q4_0", "Q8_0"))
    parser.add_argument("--folder", type=Path, help="where the file is written; it stays there, and is used again")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp())
    shape = "1b" if arguments.small else "7b"
    path = folder / f"mpt-{shape}.{arguments.kind}.gguf"
    try:
        if not path.exists():
            write(path, SHAPES[shape], arguments.kind)
        n_bytes = path.stat().st_size
        drop_pages(path)
        cold, _ = run(path, 1)
        warm, _ = run(path, 1)
        longer, most = run(path, 1 + _LATER_TOKENS)
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder)
    d_model, n_layers, _ = SHAPES[shape]
    kv = 4 * d_model * n_layers * 512  # bytes: bfloat16 keys and values of the row's blocks
    beyond = most["VmRSS"] * 1024 - n_bytes - kv
    print(
        f"file {n_bytes / 1e9:.2f} GB; first token cold {cold:.1f} s, warm {warm:.1f} s, then "
        f"{(longer - warm) / _LATER_TOKENS:.3f} s each"
    )
    print(f"resident at most {most['VmRSS'] * 1024 / 1e9:.2f} GB ({most['RssAnon'] * 1024 / 1e6:.0f} MB not of files)")
    print(f"beyond file and KV cache: {beyond / 1e6:.0f} MB, the limit is {LIMIT_MB}")
    sys.exit(shape == "7b" and (cold > LIMIT_S or beyond > LIMIT_MB * 1e6))


if __name__ == "__main__":
    main()
