"""Conversion: megabytes a second beside the disk's own copying, and peak memory beside the largest tensor.

    python benchmarks/convert.py [--small] [--folder WHERE]

A random bfloat16 checkpoint of the 1B shape (--small: 125M) is converted to every format, without verification, each in
a process of its own whose imports are not counted. The disk's speed is that of copying the same source, data synced,
between the conversions. Medians over rounds. Limits: half the disk's speed, the largest tensor and 500 MB more. Exit
code 1 if one is passed; quantising is arithmetic, not copying, and has no limit of speed.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPES = {
    "1b": {"d_model": 2048, "n_heads": 16, "n_layers": 24, "vocab_size": 50432},
    "125m": {"d_model": 768, "n_heads": 12, "n_layers": 12, "vocab_size": 50432},
}
TARGETS = (
    ("hf", "auto", 1), ("fastertransformer", "auto", 1), ("fastertransformer", "auto", 4), ("gguf", "auto", 1),
    ("hf", "float32", 1), ("onnx", "float32", 1), ("onnx", "int8", 1), ("gguf", "int8", 1), ("gguf", "int4", 1),
)  # fmt: skip

_MAKE = """
import json, sys
import torch
import mpt
from mpt.catalog import resolve
from mpt.tokenizer import Tokenizer
with torch.device("meta"):
    model = mpt.MPTForCausalLM(mpt.MPTConfig(**json.loads(sys.argv[2])))
model = model.to(torch.bfloat16).to_empty(device="cpu")
model.tie_weights()
with torch.no_grad():
    for parameter in model.parameters():
        parameter.uniform_(-0.05, 0.05)
mpt.save(model, sys.argv[1], tokenizer=Tokenizer.from_folder(resolve("mpt-tiny")))
"""

_CONVERT = """
import json, os, resource, sys, time
from pathlib import Path
from conversion import convert as conversion, onnx_graph
from conversion.formats import adapter, composer, fastertransformer, gguf_file, onnx_folder
import gguf
source, out, to, dtype, tp = sys.argv[1:]
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
allow = ("tokenizer",) if to == "gguf" else ()
os.sync()
started = time.perf_counter()
options = conversion.Options(to=to, dtype=dtype, tensor_parallel=int(tp), verify=False, allow=allow)
conversion.convert(source, Path(out), options)
os.sync()
seconds = time.perf_counter() - started
n = sum(path.stat().st_size for path in Path(out).rglob("*") if path.is_file())
print(json.dumps({"seconds": seconds, "bytes": n, "peak": peak() - before}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="the 125M shape")
    parser.add_argument("--folder", help="where to write; default: the temporary folder")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    shape = SHAPES["125m" if asked.small else "1b"]
    largest = 4 * shape["vocab_size"] * shape["d_model"]  # the embedding, in float32
    is_good = True
    with tempfile.TemporaryDirectory(dir=asked.folder) as work:
        source = f"{work}/source"
        run(_MAKE, source, json.dumps(shape))
        file = Path(source) / "model.safetensors"
        disk = [copy_speed(file, Path(work))]
        rounds: dict[str, list[dict[str, float]]] = {}
        for _ in range(asked.rounds):
            for to, dtype, tp in TARGETS:
                out = f"{work}/out"
                name = f"{to} {dtype}" + (f" tp {tp}" if tp > 1 else "")
                rounds.setdefault(name, []).append(json.loads(run(_CONVERT, source, out, to, dtype, str(tp))))
                shutil.rmtree(out)
                disk.append(copy_speed(file, Path(work)))
                print(name, rounds[name][-1], f"disk {disk[-1] / 1e6:.0f} MB/s", file=sys.stderr)
    speed = statistics.median(disk)
    print(f"copying the source: {speed / 1e6:.0f} MB/s (median of {len(disk)}, {min(disk) / 1e6:.0f} to "
          f"{max(disk) / 1e6:.0f})\n")  # fmt: skip
    print("| to | MB/s written | of the disk's | peak memory | largest tensor |\n|---|---|---|---|---|")
    for name, found in rounds.items():
        own = statistics.median(each["bytes"] / each["seconds"] for each in found)
        peak = max(each["peak"] for each in found)
        is_good &= ("int" in name or own >= 0.5 * speed) and peak <= largest + 500e6
        print(f"| {name} | {own / 1e6:.0f} | {own / speed:.0%} | {peak / 1e6:.0f} MB | {largest / 1e6:.0f} MB |")
    return 0 if is_good else 1


def run(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout.splitlines()[-1] if done.stdout else ""


def copy_speed(file: Path, work: Path) -> float:
    """Bytes a second of reading a file and writing it, synced."""
    os.sync()
    started = time.perf_counter()
    shutil.copyfile(file, work / "copy")
    os.sync()
    seconds = time.perf_counter() - started
    (work / "copy").unlink()
    return file.stat().st_size / seconds


if __name__ == "__main__":
    sys.exit(main())
