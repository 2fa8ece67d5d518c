"""Prefill, decode and concurrency beside transformers' in-tree MPT and the machine's ceilings, in one run.

    python benchmarks/speed.py --shape 125m --shape 1b --out docs/benchmarks.json

Each measurement runs in a process of its own with the same random bfloat16 folder, prompts and threads; rounds
alternate between the two sides and medians are reported, because machines are noisy. Progress goes to stderr, the
tables of docs/benchmarks.md to stdout.
"""

import argparse
import itertools
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.ceilings import bf16_tflop_s, median_of, read_gb_s

SHAPES = {
    "125m": {"d_model": 768, "n_heads": 12, "n_layers": 12},
    "1b": {"d_model": 2048, "n_heads": 16, "n_layers": 24},
}
VOCAB, CONTEXT, THREADS = 50432, 8192, 2
PREFILL_TOKENS, DECODE_CONTEXTS, DECODE_TOKENS = 4096, (128, 1024, 4096), 32
STREAMS, STREAM_PROMPT, STREAM_TOKENS = 16, 128, 64


def make_folder(shape: dict[str, int], folder: Path, context_length: int = CONTEXT) -> None:
    """A random checkpoint of a shape, with a byte tokenizer so that the server can serve it."""
    import torch
    from tokenizers import Tokenizer as Raw
    from tokenizers import decoders, models, pre_tokenizers

    import mpt
    from mpt.tokenizer import Tokenizer

    torch.manual_seed(0)
    config = mpt.MPTConfig(**shape, vocab_size=VOCAB, max_seq_len=context_length)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = ["<|endoftext|>", *letters, "Ġt"]  # one merge: llama.cpp loads no vocabulary without any
    raw = Raw(models.BPE(vocab={token: n for n, token in enumerate(known)}, merges=[("Ġ", "t")]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.add_special_tokens(["<|endoftext|>"])
    path = folder.with_suffix(".tokenizer.json")
    raw.save(str(path))
    mpt.save(mpt.MPTForCausalLM(config).to(torch.bfloat16), folder, tokenizer=Tokenizer.from_file(path))


def prompt_ids(n: int) -> list[int]:
    import random

    return random.Random(n).choices(range(1, 257), k=n)


# -- what runs inside a measuring process; each returns numbers ----------------------------------------------------


def ceilings(_: Path) -> dict[str, float]:
    """What this machine can read per second (1 GB, too large for a cache share) and multiply in bfloat16."""
    return {"read_gb_s": read_gb_s(1 << 30), "bf16_tflop_s": bf16_tflop_s()}


def prefill_ours(folder: Path) -> dict[str, float]:
    import mpt
    from mpt.backends.backend import Work
    from mpt.backends.torch_backend import TorchBackend

    backend = TorchBackend(mpt.load(folder, verify=False))
    row = backend.reserve(None, PREFILL_TOKENS)
    return {"seconds": median_of(1, lambda: backend.forward([Work(row, prompt_ids(PREFILL_TOKENS), 1)]))}


def prefill_stock(folder: Path) -> dict[str, float]:
    import torch

    model, ids = _stock(folder), torch.tensor([prompt_ids(PREFILL_TOKENS)])
    with torch.inference_mode():
        return {"seconds": median_of(1, lambda: model(ids, use_cache=True, logits_to_keep=1), warm_up=0)}


def decode_ours(folder: Path) -> dict[str, float]:
    """Seconds per token through the whole engine, one request, at each context."""
    import asyncio

    out = {}
    engine = _engine(folder)
    for context in DECODE_CONTEXTS:
        out[str(context)] = asyncio.run(_engine_seconds_per_token(engine, context, 1))
    engine.close()
    return out


def decode_stock(folder: Path) -> dict[str, float]:
    """Median seconds between the tokens of transformers' `generate`, at each context."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Clock(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    model, out = _stock(folder), {}
    n = 1 + DECODE_TOKENS
    for context in DECODE_CONTEXTS:
        times: list[float] = []
        model.generate(
            torch.tensor([prompt_ids(context)]),
            max_new_tokens=n,
            min_new_tokens=n,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([Clock()]),
        )
        out[str(context)] = statistics.median(b - a for a, b in itertools.pairwise(times))
    return out


def overhead(folder: Path) -> dict[str, float]:
    """Share of the wall time at 16 streams that is not the model's own step, engine and event loop together."""
    import asyncio

    engine = _engine(folder)
    seconds = asyncio.run(_engine_seconds_per_token(engine, STREAM_PROMPT, STREAMS))
    before = engine.stats()
    started = time.perf_counter()
    asyncio.run(_engine_seconds_per_token(engine, STREAM_PROMPT, STREAMS))
    wall, after = time.perf_counter() - started, engine.stats()
    engine.close()
    return {"share": 1 - (after.step_seconds - before.step_seconds) / wall, "seconds_per_token": seconds}


def http(folder: Path) -> dict[str, float]:
    """Tokens per second through HTTP streams, one alone and 16 at once, and what of the latter's time is not the model.

    `share` is what a user of this machine sees: the 16 clients run on the server's cores. `event_loop_share` is the CPU
    time of the server's HTTP thread alone, from Linux' /proc.
    """
    server = Server(folder)
    with server as base_url:
        _stream_tokens(base_url, 8)
        one = _streams_tokens_per_second(base_url, 1)
        before, loop_before, started = _model_seconds(base_url), server.event_loop_seconds(), time.perf_counter()
        many = _streams_tokens_per_second(base_url, STREAMS)
        wall = time.perf_counter() - started
        share = 1 - (_model_seconds(base_url) - before) / wall
        event_loop_share = (server.event_loop_seconds() - loop_before) / wall
    return {"one": one, "many": many, "share": share, "event_loop_share": event_loop_share}


def _stock(folder: Path) -> Any:
    import torch
    from transformers import MptForCausalLM

    return MptForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def _engine(folder: Path) -> Any:
    import mpt
    from mpt.backends.torch_backend import TorchBackend
    from mpt.engine.engine import Engine
    from mpt.tokenizer import Tokenizer

    backend = TorchBackend(mpt.load(folder, verify=False))
    engine = Engine(backend, Tokenizer.from_folder(folder), context_length=CONTEXT, kv_bytes=4 << 30)
    engine.start()
    return engine


async def _engine_seconds_per_token(engine: Any, context: int, n_streams: int) -> float:
    """Median time between steps while n_streams requests decode, prompts read before."""
    import asyncio

    from mpt.engine.request import Delta, Sampling

    n = STREAM_TOKENS if n_streams > 1 else DECODE_TOKENS
    times: list[float] = []

    async def one(k: int) -> None:
        sampling = Sampling(max_tokens=n, temperature=0.0, ignore_eos=True)
        async for event in engine.generate(prompt_ids(context + k)[:context], sampling, request_id=str(k)):
            if isinstance(event, Delta) and k == 0:
                times.append(time.perf_counter())

    await asyncio.gather(*(one(k) for k in range(n_streams)))
    return statistics.median(b - a for a, b in itertools.pairwise(times))


class Server:
    """`mpt serve` on one folder, in a process of its own; gives its base URL."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, "-m", "mpt", "serve", "--model", f"bench={folder}", "--port", str(self.port)]
        self._process = subprocess.Popen(command, stdout=sys.stderr, stderr=subprocess.DEVNULL)

    def event_loop_seconds(self) -> float:
        """CPU time of the process's first thread, which runs the event loop."""
        fields = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def __enter__(self) -> str:
        import httpx

        url = f"http://127.0.0.1:{self.port}"
        for _ in range(600):
            try:
                if httpx.get(f"{url}/ready").status_code == 200:
                    return url
            except httpx.HTTPError:
                pass
            time.sleep(0.1)
        raise SystemExit("the server did not become ready in 60 s")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)


def _stream_tokens(base_url: str, n: int, k: int = 0) -> None:
    import httpx

    body = {
        "model": "bench", "prompt": prompt_ids(STREAM_PROMPT + k)[:STREAM_PROMPT], "max_tokens": n, "temperature": 0,
        "stream": True, "ignore_eos": True,
    }  # fmt: skip
    with httpx.stream("POST", f"{base_url}/v1/completions", json=body, timeout=600) as response:
        response.raise_for_status()
        last = ""
        for line in response.iter_lines():
            last = line or last
        assert last == "data: [DONE]", last


def _model_seconds(base_url: str) -> float:
    import httpx

    name = "mpt_model_step_seconds_total{"
    lines = httpx.get(f"{base_url}/metrics").text.splitlines()
    return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def _streams_tokens_per_second(base_url: str, n_streams: int) -> float:
    threads = [
        threading.Thread(target=_stream_tokens, args=(base_url, STREAM_TOKENS, 100 + k)) for k in range(n_streams)
    ]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return n_streams * STREAM_TOKENS / (time.perf_counter() - started)


# -- the report ----------------------------------------------------------------------------------------------------

MEASUREMENTS = {
    f.__name__: f for f in (ceilings, prefill_ours, prefill_stock, decode_ours, decode_stock, overhead, http)
}


def measure(name: str, folder: Path) -> dict[str, float]:
    """Run one measurement in a fresh process with THREADS threads."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(THREADS),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    command = [sys.executable, __file__, "--measure", name, "--folder", str(folder)]
    print(f"  {name} ...", file=sys.stderr, flush=True)
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def bench(shape: str, rounds: int) -> dict[str, Any]:
    """Every measurement of one shape: medians over alternating rounds."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / shape
        make_folder(SHAPES[shape], folder)
        weight_bytes = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        collected: dict[str, list[dict[str, float]]] = {name: [] for name in MEASUREMENTS}
        for n in range(rounds):
            print(f"{shape}: round {n + 1} of {rounds}", file=sys.stderr, flush=True)
            for name in MEASUREMENTS:
                collected[name].append(measure(name, folder))
    medians = {
        name: {key: statistics.median(result[key] for result in results) for key in results[0]}
        for name, results in collected.items()
    }
    return {"shape": shape, "weight_bytes": weight_bytes, **medians}


def report(result: dict[str, Any]) -> str:
    """One shape's table in Markdown, each speed beside its peer and its ceiling."""
    shape = SHAPES[result["shape"]]
    read, peak = result["ceilings"]["read_gb_s"], result["ceilings"]["bf16_tflop_s"]
    layer_parameters = 12 * shape["d_model"] ** 2 * shape["n_layers"]
    flops = 2 * layer_parameters * PREFILL_TOKENS + 2 * PREFILL_TOKENS**2 * shape["d_model"] * shape["n_layers"]
    ours, stock = result["prefill_ours"]["seconds"], result["prefill_stock"]["seconds"]
    lines = [
        f"### {result['shape']} shape, bfloat16, {THREADS} threads",
        "",
        f"Ceilings of the machine in the same run: {read:.1f} GB/s read, {peak:.2f} TFLOP/s bfloat16 matmul.",
        "",
        "| what | ours | transformers in-tree | ratio | of the ceiling |",
        "|---|---|---|---|---|",
        f"| prefill of {PREFILL_TOKENS:,} tokens | {ours:.2f} s | {stock:.2f} s | {stock / ours:.1f} x "
        f"| {flops / ours / 1e12 / peak:.0%} of the matmul peak |",
    ]
    kv_per_token = 4 * shape["d_model"] * shape["n_layers"]
    for context in DECODE_CONTEXTS:
        a, b = result["decode_ours"][str(context)], result["decode_stock"][str(context)]
        of_ceiling = (result["weight_bytes"] + kv_per_token * context) / a / 1e9 / read
        lines.append(
            f"| decode, 1 stream, {context:,} tokens of context | {1 / a:.1f} tok/s | {1 / b:.1f} tok/s "
            f"| {b / a:.1f} x | {of_ceiling:.0%} of the read bandwidth |"
        )
    one, many = result["http"]["one"], result["http"]["many"]
    step = result["overhead"]["seconds_per_token"]
    lines += [
        f"| {STREAMS} streams through HTTP, {STREAM_PROMPT} + {STREAM_TOKENS} tokens | {many:.1f} tok/s "
        f"| (ours, 1 stream: {one:.1f} tok/s) | {many / one:.1f} x "
        f"| {result['weight_bytes'] / step / 1e9 / read:.0%} of the read bandwidth per step |",
        f"| engine beside the model's step, {STREAMS} streams "
        f"| {result['overhead']['share']:.1%} of the wall time | | | |",
        f"| HTTP beside it: CPU time of the event loop | {result['http']['event_loop_share']:.1%} of the wall time "
        f"| | | |",
        f"| all but the model's step, {STREAMS} streams, their clients on the same cores "
        f"| {result['http']['share']:.1%} of the wall time | | | |",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=sorted(SHAPES), help="default: 125m")
    parser.add_argument("--rounds", type=int, default=3, help="rounds whose median is reported (default 3)")
    parser.add_argument("--out", type=Path, help="also write the numbers as JSON")
    parser.add_argument("--measure", choices=sorted(MEASUREMENTS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(MEASUREMENTS[options.measure](options.folder)))
        return
    results = [bench(shape, options.rounds) for shape in options.shape or ["125m"]]
    machine = {"date": date.today().isoformat(), "cpu": platform.processor() or platform.machine(), "threads": THREADS}
    if options.out:
        options.out.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")
    print("\n\n".join(report(result) for result in results))


if __name__ == "__main__":
    main()
