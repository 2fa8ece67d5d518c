"""What Ray Serve costs: the same model through `mpt cluster` and through `mpt serve`, tokens per second and TTFT.

    python benchmarks/cluster.py --model mpt-tiny --rounds 5

Both servers run one after the other in each round, in alternating order, each with the one model and the same threads;
the client is a process of its own and the same for both. Reported are medians over the rounds and the differences.
"""

import argparse
import asyncio
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from speed import SHAPES, make_folder

PORT, PROMPT_TOKENS, ANSWER_TOKENS, STREAMS = 8731, 64, 128, (1, 32)


def start(kind: str, model: str, folder: Path) -> subprocess.Popen[str]:
    """`mpt serve` or `mpt cluster` with one model, ready."""
    if kind == "serve":
        command = ["serve", "--model", f"m={model}", "--port", str(PORT), "--no-speculate"]  # answers repeat themselves
    else:
        config = folder / "cluster.yaml"
        models = {"m": {"root": model, "max_running": 32, "speculate": False}}
        application = {"name": "mpt", "import_path": "serving.cluster.deployment:app", "args": {"models": models}}
        logging_config = {"enable_access_log": False}
        config.write_text(yaml.safe_dump({"applications": [application], "logging_config": logging_config}))
        command = ["cluster", "--config", str(config), "--port", str(PORT)]
    process = subprocess.Popen(
        [sys.executable, "-m", "mpt", *command], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if re.search(r"INFO ready after", line):
            break
    else:
        raise RuntimeError(f"`mpt {' '.join(command)}` left with {process.wait()}")

    threading.Thread(target=lambda: process.stderr and process.stderr.read(), daemon=True).start()
    return process


async def measure() -> dict[str, float]:
    """TTFT (median of the streams) and tokens per second, one stream and many at once; one token alone, too."""
    import aiohttp

    found: dict[str, float] = {}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def stream(seed: int, n_tokens: int) -> float:
            """Seconds to the first event with text."""
            body = {
                "model": "m", "prompt": [100 + (seed * 7 + k) % 400 for k in range(PROMPT_TOKENS)], "seed": seed,
                "max_tokens": n_tokens, "stream": True, "ignore_eos": True, "temperature": 0,
                "logit_bias": {"100": 100},  # a token with a text, so that each is a chunk
            }  # fmt: skip
            started, first = time.perf_counter(), 0.0
            async with session.post(f"http://127.0.0.1:{PORT}/v1/completions", json=body) as answer:
                async for line in answer.content:
                    if line.startswith(b"data: {"):
                        first = first or time.perf_counter() - started
                        assert b'"error"' not in line, line
                        last = line
                assert line.startswith(b"data: [DONE]") or last, line
            return first

        for seed in range(10):
            await stream(seed, 4)
        for n in STREAMS:
            alone, rates, n_repeats = [], [], 12 if n == 1 else 4
            for repeat in range(n_repeats):
                seeds = [1000 * repeat + 10 * k + n for k in range(n)]
                started = time.perf_counter()
                firsts = await asyncio.gather(*(stream(seed, ANSWER_TOKENS) for seed in seeds))
                rates.append(n * ANSWER_TOKENS / (time.perf_counter() - started))
                alone.append(statistics.median(firsts))
                await asyncio.sleep(0.05)
            found[f"ttft_ms_{n}"] = 1e3 * statistics.median(alone)
            found[f"tokens_per_s_{n}"] = statistics.median(rates)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mpt-tiny", help="a checkpoint, or a shape of random weights: 125m, 1b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--client", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        print(json.dumps(asyncio.run(measure())))
        return
    results: dict[str, list[dict[str, float]]] = {"serve": [], "cluster": []}
    with tempfile.TemporaryDirectory() as folder:
        model = options.model
        if model in SHAPES:
            model = str(Path(folder) / model)
            make_folder(SHAPES[options.model], Path(model))
        for number in range(options.rounds):
            for kind in ("serve", "cluster") if number % 2 else ("cluster", "serve"):
                process = start(kind, model, Path(folder))
                try:
                    done = subprocess.run(
                        [sys.executable, __file__, "--client"], capture_output=True, text=True, check=True
                    )
                    results[kind].append(json.loads(done.stdout))
                finally:
                    process.send_signal(signal.SIGTERM)
                    process.wait(120)
                print(f"round {number + 1}, {kind}: {results[kind][-1]}", file=sys.stderr)
    print(report(options.model, results))


def report(model: str, results: dict[str, list[dict[str, float]]]) -> str:
    def median(kind: str, key: str) -> float:
        return statistics.median(found[key] for found in results[kind])

    lines = [
        f"`{model}`, {len(results['serve'])} rounds, {date.today()}, {os.cpu_count()} cores of {_cpu()}, Python "
        f"{platform.python_version()}; {PROMPT_TOKENS} tokens read and {ANSWER_TOKENS} written per stream.\n",
        "| | `mpt serve` | `mpt cluster` | |",
        "|---|---|---|---|",
    ]
    for n in STREAMS:
        ours, theirs = (median(kind, f"tokens_per_s_{n}") for kind in ("serve", "cluster"))
        lines.append(f"| {n} streams | {ours:,.0f} tok/s | {theirs:,.0f} tok/s | {theirs / ours:.0%} |")
        ours, theirs = (median(kind, f"ttft_ms_{n}") for kind in ("serve", "cluster"))
        lines.append(f"| {n} streams, TTFT | {ours:.1f} ms | {theirs:.1f} ms | {theirs - ours:+.1f} ms |")
    return "\n".join(lines)


def _cpu() -> Any:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.processor()


if __name__ == "__main__":
    main()
