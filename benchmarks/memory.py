"""Peak memory of loading a checkpoint and of reading a very long prompt, each beside its limit.

    python benchmarks/memory.py --json memory.json

Loading may take the model, its largest tensor and 10 %; a long prompt its KV cache and 1 GB beside the model. Each
measurement runs in a process of its own, whose imports are not counted. Loading is measured on random bfloat16 weights
of the 1B shape (or the 125M one with --small), prompts on the tiny storywriter's shape. Progress goes to stderr, the
table to stdout; exit code 1 if a limit is passed.
"""

import argparse
import asyncio
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOADED = {"d_model": 2048, "n_heads": 16, "n_layers": 24, "vocab_size": 50432}
LOADED_SMALL = {"d_model": 768, "n_heads": 12, "n_layers": 12, "vocab_size": 50432}
STORYWRITER: dict[str, Any] = {
    "d_model": 256, "n_heads": 8, "n_layers": 4, "vocab_size": 2048, "max_seq_len": 65_536,
    "attn_config": {"alibi_bias_max": 16, "clip_qkv": 6},
}  # fmt: skip
NEW_TOKENS = 4
GB = 1e9


# -- what runs inside a measuring process; each returns its row of the table -----------------------------------------


def write(folder: str, shape: dict[str, Any]) -> dict[str, Any]:
    """A random bfloat16 checkpoint, as safetensors in `folder` and as .bin in `folder`.bin."""
    import torch

    import mpt

    with torch.device("meta"):
        model = mpt.MPTForCausalLM(mpt.MPTConfig(**shape))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.05, 0.05)
    mpt.save(model, folder)
    shutil.copytree(folder, f"{folder}.bin", ignore=shutil.ignore_patterns("*.safetensors", "manifest.json"))
    torch.save(dict(model.named_parameters()), f"{folder}.bin/pytorch_model.bin")
    return {}


def load(folder: str) -> dict[str, Any]:
    import mpt
    import mpt.checkpoint

    before = resident_bytes()
    model = mpt.load(folder)
    sizes = [parameter.nbytes for parameter in model.parameters()]
    return {"least": sum(sizes), "peak": peak_bytes() - before, "limit": int(1.1 * (sum(sizes) + max(sizes)))}


def naive(n_tokens: int, dtype: str) -> dict[str, Any]:
    """`mpt.generate`, which holds transformers' cache."""
    import mpt

    model = storywriter(dtype)
    before = resident_bytes()
    mpt.generate(model, prompt(n_tokens), NEW_TOKENS)
    least = kv_bytes(model, n_tokens)
    return {"least": least, "peak": peak_bytes() - before, "limit": least + int(GB)}


def engine(n_tokens: int, dtype: str) -> dict[str, Any]:
    """The server's engine: the prompt in chunks, into a cache with a budget."""
    from mpt.backends.torch_backend import TorchBackend
    from mpt.engine.engine import Engine

    model, tokenizer = storywriter(dtype), byte_tokenizer()
    backend = TorchBackend(model)
    before = resident_bytes()
    budget = backend.bytes_per_token * backend.capacity_for(n_tokens + NEW_TOKENS)
    running = Engine(backend, tokenizer, context_length=n_tokens + NEW_TOKENS, kv_bytes=budget)
    running.start()
    asyncio.run(read_all(running, prompt(n_tokens)))
    running.close()
    least = kv_bytes(model, n_tokens)
    return {"least": least, "peak": peak_bytes() - before, "limit": least + int(GB)}


async def read_all(running: Any, ids: list[int]) -> None:
    from mpt.engine.request import Sampling

    sampling = Sampling(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    n = 0
    async for event in running.generate(ids, sampling, request_id="long"):
        n += len(getattr(event, "token_ids", ()))
    assert n == NEW_TOKENS, n


def storywriter(dtype: str) -> Any:
    import torch

    import mpt

    torch.manual_seed(0)
    return mpt.MPTForCausalLM(mpt.MPTConfig(**STORYWRITER)).to(getattr(torch, dtype)).eval()


def byte_tokenizer() -> Any:
    from tokenizers import Tokenizer as Raw
    from tokenizers import decoders, models, pre_tokenizers

    from mpt.tokenizer import Tokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Raw(models.BPE(vocab={t: i for i, t in enumerate(["<|endoftext|>", *letters])}, merges=[]))
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<|endoftext|>"])
    return Tokenizer(raw)


def prompt(n_tokens: int) -> list[int]:
    return random.Random(0).choices(range(1, 257), k=n_tokens)


def kv_bytes(model: Any, n_tokens: int) -> int:
    """Keys and values of every layer, the least a prompt can cost."""
    config = model.config
    return 2 * config.n_layers * config.n_kv_heads * config.d_head * model.dtype.itemsize * n_tokens


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# -- the report ------------------------------------------------------------------------------------------------------

MEASUREMENTS: dict[str, Callable[..., dict[str, Any]]] = {f.__name__: f for f in (write, load, naive, engine)}


def measure(what: str, name: str, **arguments: Any) -> dict[str, Any]:
    """One measurement in a fresh process."""
    print(f"{what} ...", file=sys.stderr, end=" ", flush=True)
    started = time.perf_counter()
    command = [sys.executable, __file__, "--measure", json.dumps([name, arguments])]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    seconds = time.perf_counter() - started
    print(f"{seconds:.0f} s", file=sys.stderr)
    return {"what": what, **json.loads(done.stdout.splitlines()[-1]), "seconds": round(seconds, 1)}


def measure_loading(shape: dict[str, Any]) -> list[dict[str, Any]]:
    n_parameters = shape["vocab_size"] * shape["d_model"] + 12 * shape["n_layers"] * shape["d_model"] ** 2
    needed = 2 * 2 * n_parameters + int(GB)  # safetensors and .bin, 2 bytes each, and some air
    with tempfile.TemporaryDirectory() as scratch:
        free = shutil.disk_usage(scratch).free
        if free < needed:
            raise SystemExit(f"{needed / GB:.1f} GB of disk needed in {scratch}, {free / GB:.1f} GB free; set TMPDIR")
        folder = str(Path(scratch) / "random")
        size = f"{2 * n_parameters / GB:.1f} GB"
        measure(f"write {size} twice", "write", folder=folder, shape=shape)
        return [
            measure(f"load {size} of safetensors", "load", folder=folder),
            measure(f"load {size} of .bin", "load", folder=f"{folder}.bin"),
        ]


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| what | weights or KV cache | peak | limit | |", "|---|---|---|---|---|"]
    for row in rows:
        sizes = " | ".join(f"{row[key] / GB:.2f} GB" for key in ("least", "peak", "limit"))
        lines.append(f"| {row['what']} | {sizes} | {'within' if row['peak'] <= row['limit'] else '**over**'} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="load the 125M shape instead of the 1B")
    parser.add_argument("--tokens", type=int, nargs="*", default=[65_536, 84_000], help="lengths of the long prompts")
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"], help="precisions of the long prompts")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        name, arguments = json.loads(options.measure)
        print(json.dumps(MEASUREMENTS[name](**arguments)))
        return
    rows = measure_loading(LOADED_SMALL if options.small else LOADED)
    for dtype in options.dtype:
        for n_tokens in options.tokens:
            for how in ("naive", "engine"):
                what = f"{n_tokens:,} tokens in {dtype}, {'mpt.generate' if how == 'naive' else 'the engine'}"
                rows.append(measure(what, how, n_tokens=n_tokens, dtype=dtype))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    print(table(rows))
    raise SystemExit(any(row["peak"] > row["limit"] for row in rows))


if __name__ == "__main__":
    main()
