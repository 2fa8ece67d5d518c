"""Our engine beside every peer that runs MPT on this machine: a ladder of prompt lengths and streams.

    python -m benchmarks.engine --short --out docs/images/ladder.png --models /tmp/ladder > section.md
    python -m benchmarks.engine --shapes 125m 1b 7b --json runs/ladder.json
    python -m benchmarks.engine --shapes 1b --sides "ours int4" "llama.cpp Q4_0" --prompts 128 --concurrency 1
    python -m benchmarks.engine --resume runs/ladder.json --shapes 125m 1b 7b      # goes on where a run was ended

What comes out: on stdout a section for docs/benchmarks.md, with this machine, a table a shape and what each side is; in
the JSON every raw time, kept after each cell; in the plot tokens a second over streams. Progress goes to stderr.

How it measures: random weights, greedy tokens. Every side is a process of its own with 2 threads. Sides take turns
within a round, and medians over rounds are reported. Before anything is timed, a side's first tokens are compared with
those of our float32 model. All streams of a cell begin at the same instant and no two prompts begin alike, so that no
cache of prefixes helps. A cell that takes, or must take, longer than --cell-seconds is shown as `over`, a side that
breaks or finds no memory as `failed`, and the run goes on. Run it where nothing else runs.

How long: --short about 13 minutes on two cores that nobody else uses, a third of it to make models of 19 GB, which
--models keeps; all of 125m and 1b some hours. The shape 7b has no bfloat16 checkpoint, only GGUF files of random
blocks: 3.7 GB of Q4_0, which the short form runs, and 7.1 GB of Q8_0.

Peers: `make llama` (llama.cpp) and `make peers` (CTranslate2, OpenVINO); transformers and onnxruntime come with
`make setup`. A side that is not installed is left out, and the section says so.
"""

import argparse
import itertools
import json
import os
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks import machine, speed
from benchmarks.peers.worker import LEAST_FREE_BYTES, Failed, Over, Refused, Worker, available_bytes

ROOT = Path(__file__).parents[1]
PEERS = ROOT / "benchmarks/peers"
LLAMA = ROOT / ".llama/node_modules/node-llama-cpp"
THEIR_PYTHON = ROOT / ".peers/bin/python"
SHAPES = {
    **speed.SHAPES,
    "7b": {"d_model": 4096, "n_heads": 32, "n_layers": 32},
    "toy": {"d_model": 64, "n_heads": 4, "n_layers": 2},
}
RANDOM_BLOCKS = {"7b": {"gguf int8": "Q8_0", "gguf int4": "Q4_0"}}  # shapes without a checkpoint: the files they have
VOCAB, THREADS = speed.VOCAB, speed.THREADS
CHECKED_TOKENS = 8  # compared with our float32 model's before anything is timed
CHECK_LIMIT_S = 120.0
CHECK_PROMPTS = [[*range(first, first + 30)] for first in (10, 1010)]
WARM_UP_PROMPT, WARM_UP_TOKENS = 512, 4  # at most; kernels are compiled and weights read in
MOST_READ_BYTES = 3 << 30  # to measure the read bandwidth; no cache holds a tenth of it


# -- the sides -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """One line of the plot. command: what answers cells, `{model}` in it is the folder of its model."""

    name: str
    model: str  # a key of `models`
    command: tuple[str, ...]
    absent: str | None = None  # why it cannot run here and what would change that


def sides() -> list[Side]:
    """Every side, in the order of the tables."""
    python = sys.executable
    no_llama = None if LLAMA.is_dir() and shutil.which("node") else "`make llama` (needs node) installs it"
    no_peers = None if THEIR_PYTHON.exists() else "`make peers` installs it"
    ours, stock = str(PEERS / "ours.py"), str(PEERS / "in_transformers.py")
    llama = ("node", str(PEERS / "llama.mjs"), str(LLAMA), "{model}/model.gguf")
    return [
        Side("ours bfloat16", "bfloat16", (python, ours, "{model}", "bfloat16")),
        Side("ours int8", "bfloat16", (python, ours, "{model}", "int8")),
        Side("ours int4", "bfloat16", (python, ours, "{model}", "int4")),
        Side("ours Q8_0 file", "gguf int8", (python, ours, "{model}/model.gguf", "auto")),
        Side("ours Q4_0 file", "gguf int4", (python, ours, "{model}/model.gguf", "auto")),
        Side("ours onnx float32", "onnx float32", (python, ours, "{model}", "auto")),
        Side("ours onnx int8", "onnx int8", (python, ours, "{model}", "auto")),
        Side("transformers generate", "bfloat16", (python, stock, "generate", "{model}", "bfloat16")),
        Side("transformers continuous", "bfloat16", (python, stock, "continuous", "{model}", "bfloat16")),
        *(
            Side(f"CTranslate2 {t}", f"ct2 {t}", (*_CONVERTERS["ct2"], "run", "{model}", t), no_peers)
            for t in ("float32", "int8")
        ),
        *(
            Side(f"OpenVINO {t}", f"openvino {t}", (*_CONVERTERS["openvino"], "run", "{model}"), no_peers)
            for t in ("int8", "int4")
        ),
        *(
            Side(f"llama.cpp {name}", f"gguf {dtype}", llama, no_llama)
            for name, dtype in (("BF16", "bfloat16"), ("F16", "float16"), ("Q8_0", "int8"), ("Q4_0", "int4"))
        ),
    ]


# Formats that a peer makes itself: what is asked to `convert` and to `run`.
_CONVERTERS = {
    "ct2": (str(THEIR_PYTHON), str(PEERS / "in_ctranslate2.py")),
    "openvino": (str(THEIR_PYTHON), str(PEERS / "in_openvino.py")),
}


def make_model(shape: str, model: str, folder: Path, context_length: int) -> Path:
    """The folder of a shape's model in a format, made when first asked for. Raises Refused, Failed."""
    made = folder / f"{shape} {model}".replace(" ", "-")
    if made.is_dir():
        return made
    _say(f"making {shape} {model}")
    if shape in RANDOM_BLOCKS:
        if model not in RANDOM_BLOCKS[shape]:
            bfloat16 = bfloat16_bytes(SHAPES[shape]) / 1e9
            raise Refused(f"no model: a bfloat16 checkpoint to convert takes {bfloat16:.0f} GB of disk and memory")
        _write_random_blocks(shape, RANDOM_BLOCKS[shape][model], made, context_length)
        return made
    if model == "bfloat16":
        speed.make_folder(SHAPES[shape], made, context_length)
        return made
    kind, dtype = model.split()
    rounds_export = kind == "openvino" and dtype != "bfloat16"  # exporting takes longer than rounding
    source = make_model(shape, "openvino bfloat16" if rounds_export else "bfloat16", folder, context_length)
    if kind in _CONVERTERS:
        command = [*_CONVERTERS[kind], "convert", str(source), str(made), dtype]
    else:
        command = [sys.executable, "-m", "mpt", "convert", str(source), str(made), "--to", kind, "--dtype", dtype]
        command.append("--no-verify")
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        shutil.rmtree(made, ignore_errors=True)
        raise Failed(f"no conversion: {(done.stderr.strip() or 'no word').splitlines()[-1][:200]}")
    return made


def _write_random_blocks(shape: str, kind: str, folder: Path, context_length: int) -> None:
    """A GGUF file of random blocks; the folder appears once it is whole. Raises Failed."""
    from benchmarks import as_they_lie

    config = SHAPES[shape]
    needed, free = bfloat16_bytes(config) * {"Q8_0": 8.5, "Q4_0": 4.5}[kind] / 16, shutil.disk_usage(folder.parent).free
    if needed > free:
        raise Failed(f"its file takes {needed / 1e9:.1f} GB, and `{folder.parent}` has {free / 1e9:.1f} GB left")
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(exist_ok=True)
    dimensions = (config["d_model"], config["n_layers"], config["n_heads"])
    as_they_lie.write(partial / "model.gguf", dimensions, kind, context_length)
    partial.rename(folder)


def bfloat16_bytes(shape: Mapping[str, int]) -> int:
    """Of the weights of a shape: its matrices, and the embedding that is also the head."""
    return 2 * (12 * shape["d_model"] ** 2 * shape["n_layers"] + VOCAB * shape["d_model"])


# -- the cells -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One measurement: `concurrency` prompts of `prompt` tokens at once."""

    shape: str
    round: int
    prompt: int
    side: str
    concurrency: int


@dataclass(frozen=True)
class Part:
    """Cells of one shape: every side with every prompt length and number of streams."""

    shape: str
    prompts: tuple[int, ...]
    concurrency: tuple[int, ...]
    rounds: int
    cell_seconds: float
    sides: tuple[str, ...] | None = None  # None: all


_SOME_SIDES = (
    *("ours bfloat16", "ours int8", "ours int4", "transformers generate", "OpenVINO int8", "OpenVINO int4"),
    *("llama.cpp BF16", "llama.cpp Q8_0", "llama.cpp Q4_0"),
)
SHORT_TOKENS = 16
SHORT = (
    Part("125m", (128, 1024), (1, 16), rounds=2, cell_seconds=12),
    Part("1b", (128,), (1, 16), rounds=1, cell_seconds=35, sides=_SOME_SIDES),
    Part("7b", (128,), (1,), rounds=1, cell_seconds=35, sides=("ours Q4_0 file", "llama.cpp Q4_0")),
)


def prompts_of(cell: Cell, what: str = "measured") -> list[list[int]]:
    """Random ids, drawn again for every cell; no two prompts share their first token."""
    generator = random.Random(f"{cell.round} {cell.prompt} {cell.concurrency} {what}")
    firsts = generator.sample(range(1, VOCAB), cell.concurrency)
    return [[first, *generator.choices(range(1, VOCAB), k=cell.prompt - 1)] for first in firsts]


def shortest_seconds(cell: Cell, results: Sequence[Mapping[str, Any]]) -> float:
    """What a cell must take at least, as its side's cells of fewer streams tell; 0 where there is none.

    Reading prompts takes as many times longer as there are more of them; a step of more streams takes no less.
    """
    seconds = [0.0]
    for result in results:
        if result["status"] == "ok" and _same_row(cell, result) and result["concurrency"] < cell.concurrency:
            read = max(times[0] for times in result["times"])
            total = max(times[-1] for times in result["times"])
            seconds.append(read * cell.concurrency / result["concurrency"] + total - read)
    return max(seconds)


def skip(cell: Cell, results: Sequence[Mapping[str, Any]], limit_s: float) -> dict[str, str] | None:
    """Why a cell needs no try: it, or one with less to do, took too long or broke, or it must take too long."""
    for result in results:
        same_side = (result["shape"], result["side"]) == (cell.shape, cell.side)
        less = result["prompt"] <= cell.prompt and result["concurrency"] <= cell.concurrency
        if same_side and less and result["status"] != "ok":
            return {"status": result["status"], "reason": result["reason"]}
    if shortest_seconds(cell, results) > limit_s:
        return {"status": "over", "reason": f"over {limit_s:.0f} s"}
    return None


def _same_row(cell: Cell, result: Mapping[str, Any]) -> bool:
    return (result["shape"], result["side"], result["prompt"]) == (cell.shape, cell.side, cell.prompt)


# -- what the times say --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """One cell in numbers; None where no part of it had all streams decoding."""

    ttft_s: float  # median over streams
    itl_s: float | None  # median over the gaps of all streams; None of a single token
    tokens_per_s: float  # all streams, from the start to the last token
    decode_tokens_per_s: float | None  # while every stream decodes
    prefill_tokens_per_s: float  # of all prompts, until the last stream has its first token
    prefill_of_peak: float  # of the measured bfloat16 matmul peak
    decode_of_read: float | None  # of the measured read bandwidth


def speed_of(
    result: Mapping[str, Any], about: Mapping[str, Any], ceiling: Mapping[str, float], shape: Mapping[str, int]
) -> Speed:
    """The numbers of one measured cell.

    Prefill: matrix products and causal attention until the last stream has its first token. Decode: a step reads the
    weights once and each stream's cache; for a side that reads weights per stream this is what it could have done.
    """
    times, prompt = result["times"], result["prompt"]
    d_model, n_layers, n_streams = shape["d_model"], shape["n_layers"], len(times)
    read_s = max(stream[0] for stream in times)
    flops = n_streams * n_layers * (24 * d_model**2 * prompt + 2 * prompt**2 * d_model)
    gaps = [b - a for stream in times for a, b in itertools.pairwise(stream)]
    rate, position = decode_rate(times)
    of_read = None
    if rate is not None:
        kv_bytes = 2 * d_model * n_layers * about["kv_item_bytes"] * (prompt + position)
        step_bytes = about["weight_bytes"] + n_streams * kv_bytes
        of_read = rate / n_streams * step_bytes / 1e9 / ceiling["read_gb_s"]
    return Speed(
        ttft_s=statistics.median(stream[0] for stream in times),
        itl_s=statistics.median(gaps) if gaps else None,
        tokens_per_s=sum(len(stream) for stream in times) / max(stream[-1] for stream in times),
        decode_tokens_per_s=rate,
        prefill_tokens_per_s=n_streams * prompt / read_s,
        prefill_of_peak=flops / read_s / 1e12 / ceiling["bf16_tflop_s"],
        decode_of_read=of_read,
    )


def decode_rate(times: Sequence[Sequence[float]]) -> tuple[float | None, float]:
    """Tokens a second between the last stream's first token and the first stream's last, and their mean place.

    None where no such time is long enough for two gaps of every stream: the first had ended before the last began.
    """
    start, end = max(stream[0] for stream in times), min(stream[-1] for stream in times)
    rate, places = 0.0, []
    for stream in times:
        inside = [place for place, t in enumerate(stream) if start <= t <= end]
        if len(inside) < 3:
            return None, 0.0
        rate += (len(inside) - 1) / (stream[inside[-1]] - stream[inside[0]])
        places += inside
    return rate, statistics.mean(places)


def medians(speeds: Sequence[Speed]) -> Speed:
    """The median of each number over rounds; None where no round has it."""
    found: dict[str, Any] = {}
    for name in Speed.__dataclass_fields__:
        values = [value for value in (getattr(speed, name) for speed in speeds) if value is not None]
        found[name] = statistics.median(values) if values else None
    return Speed(**found)


# -- the run -------------------------------------------------------------------------------------------------------


class Ladder:
    """A run. `data` is all it found, kept in a file after each cell."""

    def __init__(self, asked: argparse.Namespace, parts: Sequence[Part], chosen: Sequence[Side], models: Path) -> None:
        self._asked, self._parts, self._models = asked, {part.shape: part for part in parts}, models
        self._sides = [side for side in chosen if not side.absent]
        self._path: Path = asked.resume or asked.json
        self._started = time.monotonic()
        self.data: dict[str, Any] = {
            "command": shlex.join(["python", "-m", "benchmarks.engine", *sys.argv[1:]]),
            "tokens": asked.tokens,
            "machine": {"date": date.today().isoformat(), "threads": THREADS, **machine.describe()},
            "ceilings": {},  # shape: one measurement a round
            "expected": {},  # shape: the first tokens of our float32 model after CHECK_PROMPTS; file: of its first side
            "sides": {},  # shape: side: what it says of itself, or {"refused": why}
            "cells": [],
        }
        if asked.resume:
            kept = json.loads(self._path.read_text())
            self.data |= {**kept, "machine": self.data["machine"] | kept["machine"]}
            if self.data["tokens"] != asked.tokens:
                raise SystemExit(f"`{self._path}` was measured with --tokens {self.data['tokens']}; say the same")
            for found in self.data["sides"].values():
                for name in [name for name, about in found.items() if "refused" in about]:
                    del found[name]  # it may have learnt it since
        self._todo = [cell for _, row in self._rows() for cell in row if not self._is_done(cell)]
        self._n_all = len(self._todo)

    def run(self) -> None:
        for side, row in self._rows():
            todo = [cell for cell in row if cell in self._todo]
            if not todo:
                continue
            try:
                self._run_row(side, todo)
            except Refused as refusal:
                self.data["sides"].setdefault(todo[0].shape, {})[side.name] = {"refused": str(refusal)}
                self._todo = [c for c in self._todo if (c.shape, c.side) != (todo[0].shape, side.name)]
                self._keep()
                _say(f"{todo[0].shape}, {side.name}: {refusal}")

    def _rows(self) -> Iterator[tuple[Side, list[Cell]]]:
        """A side's cells of one round, which share a process; sides take turns."""
        for part in self._parts.values():
            for number, side in itertools.product(range(part.rounds), sides_of(part, self._sides)):
                lengths = itertools.product(sorted(part.prompts), sorted(part.concurrency))
                yield side, [Cell(part.shape, number, prompt, side.name, n) for prompt, n in lengths]

    def _is_done(self, cell: Cell) -> bool:
        return any(all(result[key] == value for key, value in asdict(cell).items()) for result in self.data["cells"])

    def _run_row(self, side: Side, cells: Sequence[Cell]) -> None:
        """Raises Refused."""
        worker: Worker | None = None
        try:
            for cell in cells:
                started = time.monotonic()
                result: dict[str, Any] | None = skip(cell, self.data["cells"], self._limit_s(cell.shape))
                if result is None:
                    try:
                        self._measure_ceilings(cell)
                        worker = worker or self._start(side, cell)
                        self._check_memory(cell, worker.about)
                        answer = worker.ask(prompts_of(cell), self._asked.tokens, self._limit_s(cell.shape))
                        result = {"status": "ok", "times": answer["times"], "peak_bytes": worker.peak_bytes()}
                    except (Over, Failed) as reason:
                        result = {"status": "over" if isinstance(reason, Over) else "failed", "reason": str(reason)}
                        if worker is not None:
                            worker.close()  # it may have been ended
                            worker = None
                self.data["cells"].append({**asdict(cell), **result, "seconds": round(time.monotonic() - started, 3)})
                self._todo.remove(cell)
                self._keep()
                self._tell(cell)
        finally:
            if worker is not None:
                worker.close()

    def _start(self, side: Side, cell: Cell) -> Worker:
        """A side's process, its tokens compared once, warm. Raises Refused, Failed, Over."""
        folder = self._make_model(cell.shape, side.model)
        needed, free = sum(file.stat().st_size for file in folder.iterdir()), available_bytes() - LEAST_FREE_BYTES
        if needed > free:
            raise Failed(f"its model takes {needed / 1e9:.1f} GB, and {max(free, 0) / 1e9:.1f} GB of memory are left")
        about = self.data["sides"].setdefault(cell.shape, {})
        started = time.monotonic()
        worker = Worker([word.format(model=folder) for word in side.command], THREADS)
        ready_s = time.monotonic() - started
        try:
            if side.name not in about:
                tokens = worker.ask(CHECK_PROMPTS, CHECKED_TOKENS, CHECK_LIMIT_S)["tokens"]
                expected = self._expected(cell.shape, side.model, tokens)
                pairs = zip(itertools.chain(*tokens), itertools.chain(*expected), strict=True)
                equal = [found == right for found, right in pairs]
                about[side.name] = {**worker.about, "checked": len(equal), "equal": sum(equal), "ready_s": []}
            about[side.name].setdefault("ready_s", []).append(round(ready_s, 3))
            warm_up = prompts_of(replace(cell, prompt=min(cell.prompt, WARM_UP_PROMPT), concurrency=1), "warm-up")
            worker.ask(warm_up, WARM_UP_TOKENS, self._limit_s(cell.shape))
        except BaseException:
            worker.close()
            raise
        return worker

    def _limit_s(self, shape: str) -> float:
        return self._parts[shape].cell_seconds

    def _check_memory(self, cell: Cell, about: Mapping[str, Any]) -> None:
        """Raises Failed where the cache of all streams cannot fit and the side does not queue."""
        shape, free = SHAPES[cell.shape], available_bytes()
        n_tokens = cell.concurrency * (cell.prompt + self._asked.tokens)
        kv_bytes = n_tokens * 2 * shape["d_model"] * shape["n_layers"] * about["kv_item_bytes"]
        if kv_bytes > free and not about.get("queues"):
            raise Failed(f"needs {kv_bytes / 1e9:.0f} GB of KV cache, {free / 1e9:.0f} GB are free")

    def _make_model(self, shape: str, model: str) -> Path:
        return make_model(shape, model, self._models, max(self._parts[shape].prompts) + self._asked.tokens)

    def _expected(self, shape: str, model: str, tokens: list[list[int]]) -> list[list[int]]:
        """What a side's first tokens should be; of a file that no float32 model fits beside, the first side's."""
        if shape in RANDOM_BLOCKS:
            return self.data["expected"].setdefault(f"{shape} {model}", tokens)
        if shape not in self.data["expected"]:
            command = [sys.executable, str(PEERS / "ours.py"), str(self._make_model(shape, "bfloat16")), "float32"]
            with Worker(command, THREADS) as worker:
                self.data["expected"][shape] = worker.ask(CHECK_PROMPTS, CHECKED_TOKENS, CHECK_LIMIT_S)["tokens"]
        return self.data["expected"][shape]

    def _measure_ceilings(self, cell: Cell) -> None:
        """Once a round and shape, reading as many bytes as the bfloat16 weights have."""
        found = self.data["ceilings"].setdefault(cell.shape, {})
        if str(cell.round) in found:
            return
        n_bytes = min(bfloat16_bytes(SHAPES[cell.shape]), MOST_READ_BYTES)
        command = [sys.executable, str(ROOT / "benchmarks/ceilings.py"), str(n_bytes)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS)}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        found[str(cell.round)] = json.loads(done.stdout)

    def _keep(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_name(f"{self._path.name}.partial")
        partial.write_text(json.dumps(self.data) + "\n")
        partial.replace(self._path)

    def _tell(self, cell: Cell) -> None:
        result = self.data["cells"][-1]
        if result["status"] == "ok":
            about, ceiling = self.data["sides"][cell.shape][cell.side], ceiling_of(self.data, cell.shape)
            found = speed_of(result, about, ceiling, SHAPES[cell.shape])
            what = f"TTFT {_ms(found.ttft_s)} ms, ITL {_ms(found.itl_s)} ms, {found.tokens_per_s:.1f} tok/s"
        else:
            what = result["reason"]
        so_far, to_go = (time.monotonic() - self._started) / 60, self._seconds_to_go() / 60
        _say(
            f"[{self._n_all - len(self._todo)}/{self._n_all}] {cell.shape}, round {cell.round + 1}, {cell.prompt:,} x "
            f"{cell.concurrency}, {cell.side}: {what} ({so_far:.1f} min so far, about {to_go:.0f} to go)"
        )

    def _seconds_to_go(self) -> float:
        """A cell takes what it took in an earlier round, else what it must, else the mean of those measured."""
        results = self.data["cells"]
        mean = statistics.mean(result["seconds"] for result in results)
        known = {(r["shape"], r["side"], r["prompt"], r["concurrency"]): r["seconds"] for r in results}
        total = 0.0
        for cell in self._todo:
            seconds = known.get((cell.shape, cell.side, cell.prompt, cell.concurrency))
            if seconds is None:
                at_least = shortest_seconds(cell, results)
                seconds = 0.0 if at_least > self._limit_s(cell.shape) else at_least or mean
            total += seconds
        return total


# -- the report ----------------------------------------------------------------------------------------------------


def ceiling_of(data: Mapping[str, Any], shape: str) -> dict[str, float]:
    """The medians of a shape's ceilings over rounds."""
    rounds = list(data["ceilings"][shape].values())
    return {key: statistics.median(found[key] for found in rounds) for key in rounds[0]}


def summary(data: Mapping[str, Any], shape: str) -> dict[tuple[int, int, str], Speed | str]:
    """By prompt, streams and side: the medians over rounds, or why there are none."""
    found: dict[tuple[int, int, str], Speed | str] = {}
    by_cell: dict[tuple[int, int, str], list[Any]] = {}
    for result in data["cells"]:
        if result["shape"] == shape:
            by_cell.setdefault((result["prompt"], result["concurrency"], result["side"]), []).append(result)
    for key, results in by_cell.items():
        good = [result for result in results if result["status"] == "ok"]
        about = data["sides"][shape].get(key[2], {})
        speeds = [speed_of(result, about, ceiling_of(data, shape), SHAPES[shape]) for result in good]
        last = results[-1]
        why = f"failed: {last['reason']}" if last["status"] == "failed" else last.get("reason", "")
        found[key] = medians(speeds) if speeds else why
    return found


def section(data: Mapping[str, Any], parts: Sequence[Part], chosen: Sequence[Side], picture: Path | None) -> str:
    """The whole run in Markdown, as docs/benchmarks.md has it: this machine, then a table a shape."""
    about = data["machine"]
    rounds = ", ".join(f"{part.rounds} of {part.shape}" for part in parts)
    blocks = [
        f"### On {about['cores']} cores of {about['processor']}",
        f"`{data['command']}`, {about['date']}: {machine.sentence(about)}. {about['threads']} threads, "
        f"{data['tokens']} tokens a stream; rounds whose median is given: {rounds}.",
        *(report(data, part.shape, sides_of(part, chosen)) for part in parts),
    ]
    absent = [f"- {side.name} is not here: {side.absent}" for side in chosen if side.absent]
    if absent:
        blocks.append("\n".join(absent))
    if picture:
        blocks.append(f"![tokens a second over streams](images/{picture.name})")
    return "\n\n".join(blocks)


def sides_of(part: Part, chosen: Sequence[Side]) -> list[Side]:
    """The sides that a part asks for, of those chosen."""
    return [side for side in chosen if part.sides is None or side.name in part.sides]


def report(data: Mapping[str, Any], shape: str, chosen: Sequence[Side]) -> str:
    """One shape's tables in Markdown: its cells, then what each side is, takes and needs."""
    found, about = summary(data, shape), data["sides"].get(shape, {})
    names = [side.name for side in chosen]
    lines = [f"#### {shape} shape", ""]
    if data["ceilings"].get(shape):
        ceiling = ceiling_of(data, shape)
        lines += [
            f"Ceilings of the machine in the same run: {ceiling['read_gb_s']:.1f} GB/s read, "
            f"{ceiling['bf16_tflop_s']:.2f} TFLOP/s bfloat16 matmul.",
            "",
        ]
    lines += [
        "| prompt | streams | side | TTFT, ms | ITL, ms | tok/s | decode only, tok/s | prefill, tok/s "
        "| prefill, of the matmul peak | decode, of the read bandwidth |",
        "|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for prompt, streams, name in sorted(
        (key for key in found if key[2] in names), key=lambda k: (*k[:2], names.index(k[2]))
    ):
        one = found[prompt, streams, name]
        head = f"| {prompt:,} | {streams} | {name} |"
        if isinstance(one, str):
            lines.append(f"{head} {one} | | | | | | |")
        else:
            decode = "-" if one.decode_tokens_per_s is None else f"{one.decode_tokens_per_s:,.1f}"
            of_read = "-" if one.decode_of_read is None else f"{one.decode_of_read:.0%}"
            lines.append(
                f"{head} {_ms(one.ttft_s)} | {_ms(one.itl_s)} | {one.tokens_per_s:,.1f} | {decode} "
                f"| {one.prefill_tokens_per_s:,.0f} | {one.prefill_of_peak:.0%} | {of_read} |"
            )
    reference = "the first side's of the same file" if shape in RANDOM_BLOCKS else "our float32 model's"
    lines += [
        "",
        f"Ready: from the start of the process until it takes prompts. The first greedy tokens are compared with "
        f"{reference}.",
        "",
        "| side | what runs | weights, MB | ready after, s | resident at most, MB | first tokens |",
        "|---|---|---:|---:|---:|---|",
    ]
    for name in (name for name in names if name in about):
        it = about[name]
        if "refused" in it:
            lines.append(f"| {name} | {it['refused']} | | | | |")
            continue
        peaks = [cell["peak_bytes"] for cell in data["cells"]
                 if (cell["shape"], cell["side"]) == (shape, name) and "peak_bytes" in cell]  # fmt: skip
        ready = f"{statistics.median(it['ready_s']):.1f}" if it.get("ready_s") else "-"
        peak = f"{max(peaks) / 1e6:,.0f}" if peaks else "-"
        lines.append(
            f"| {name} | {it['version']} | {it['weight_bytes'] / 1e6:,.0f} | {ready} | {peak} "
            f"| {it['equal']} of {it['checked']} |"
        )
    return "\n".join(lines)


def plot(data: Mapping[str, Any], parts: Sequence[Part], chosen: Sequence[Side], path: Path) -> None:
    """Tokens a second over streams: a row a shape, a panel a prompt length, a line a side.

    Shapes with one number of streams are left to the tables: a scale that fits points alone makes much of nothing.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogFormatter

    parts = [part for part in parts if len(part.concurrency) > 1] or parts
    n_columns = max(len(part.prompts) for part in parts)
    legend_height = 0.2 * -(-len(chosen) // (2 * n_columns)) + 0.1  # inches
    size = (4.6 * n_columns, 3.6 * len(parts) + 0.4 + legend_height)
    figure, panels = pyplot.subplots(len(parts), n_columns, figsize=size, squeeze=False, sharey="row")
    styles = _styles([side.name for side in chosen])
    lines: dict[str, Any] = {}
    for row, part in enumerate(parts):
        shape, found = part.shape, summary(data, part.shape)
        for panel in panels[row][len(part.prompts) :]:
            panel.set_axis_off()
        for panel, prompt in zip(panels[row], sorted(part.prompts), strict=False):
            for name, style in styles.items():
                points = [(n, one.tokens_per_s) for (p, n, side), one in sorted(found.items(), key=lambda pair: pair[0])
                          if (p, side) == (prompt, name) and isinstance(one, Speed)]  # fmt: skip
                if points:
                    (lines[name],) = panel.plot(*zip(*points, strict=True), label=name, **style)
            streams = sorted({n for _, n, _ in found})
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(streams, [str(n) for n in streams])
            for set_formatter in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
                set_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
            panel.set_title(f"{shape}, prompts of {prompt:,} tokens", fontsize=10)
            panel.set_xlabel("streams at once")
            panel.grid(which="both", color="#e6e6e6", linewidth=0.6)
            panel.spines[["top", "right"]].set_visible(False)
        panels[row][0].set_ylabel(f"tokens/s, all streams ({data['tokens']} each)")
    named = [name for name in styles if name in lines]
    figure.legend(
        [lines[name] for name in named], named, loc="lower center", ncols=2 * n_columns, frameon=False, fontsize=9
    )
    about = data["machine"]
    title = f"{about['processor']}, {about['cores']} cores, {about['threads']} threads, {about['date']}"
    figure.suptitle(title, fontsize=9, color="#666666")
    figure.tight_layout(rect=(0, legend_height / size[1], 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, facecolor="white")
    pyplot.close(figure)


def _styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour for each engine, a marker and dashes for each of its precisions; ours on top and thick."""
    engines = {"ours onnx": "#d97706", "ours": "#c8102e", "transformers": "#6b7280", "CTranslate2": "#2563eb",
               "OpenVINO": "#7c3aed", "llama.cpp": "#15803d"}  # fmt: skip
    looks = [("o", "-"), ("s", "--"), ("^", "-."), ("D", ":"), ("v", (0, (6, 1, 1, 1)))]
    counts: dict[str, int] = {}
    styles = {}
    for name in names:
        engine = next((engine for engine in engines if name.startswith(engine)), name)
        marker, dashes = looks[counts.get(engine, 0) % len(looks)]
        counts[engine] = counts.get(engine, 0) + 1
        styles[name] = {
            "color": engines.get(engine, "#000000"),
            "marker": marker,
            "linestyle": dashes,
            "markersize": 5,
            "linewidth": 2.4 if engine == "ours" else 1.4,
            "zorder": 3 if engine == "ours" else 2,
        }
    return styles


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:,.1f}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def parts_of(asked: argparse.Namespace) -> list[Part]:
    """The cells that the options ask for. Raises SystemExit where they contradict each other."""
    if not asked.short:
        prompts, concurrency = asked.prompts or [128, 1024, 8192], asked.concurrency or [1, 4, 16, 32]
        rounds, cell_seconds = asked.rounds or 3, asked.cell_seconds or 120.0
        shapes = asked.shapes or ["125m"]
        return [Part(shape, tuple(prompts), tuple(concurrency), rounds, cell_seconds) for shape in shapes]
    if asked.prompts or asked.concurrency:
        raise SystemExit("`--short` has prompts and streams of its own; leave out --prompts and --concurrency")
    return [
        replace(part, rounds=asked.rounds or part.rounds, cell_seconds=asked.cell_seconds or part.cell_seconds)
        for part in SHORT
        if not asked.shapes or part.shape in asked.shapes
    ]


def main() -> None:
    known = sides()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true",
                        help="the comparison in less than 15 minutes: two rounds of 125m with all sides, one of 1b "
                        "with some, one stream of 7b in 4 bits")  # fmt: skip
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), help="default 125m; with --short all three")
    parser.add_argument("--concurrency", nargs="+", type=int, metavar="STREAMS", help="default 1 4 16 32")
    parser.add_argument("--prompts", nargs="+", type=int, metavar="TOKENS", help="default 128 1024 8192")
    parser.add_argument("--tokens", type=int, help="generated by each stream (default 64; short: 16)")
    parser.add_argument("--rounds", type=int, help="rounds whose median is reported (default 3)")
    parser.add_argument("--sides", nargs="+", choices=[side.name for side in known], metavar="SIDE",
                        help=f"default: all, {', '.join(side.name for side in known)}")  # fmt: skip
    parser.add_argument("--cell-seconds", type=float, help="limit of one measurement (default 120)")
    parser.add_argument("--out", type=Path, help="the plot, as PNG")
    parser.add_argument("--json", type=Path, default=ROOT / "runs/ladder.json", help="every raw time; must not exist")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="go on from this JSON, and into it")
    parser.add_argument("--models", type=Path, metavar="FOLDER", help="keep the random models here for another run")
    asked = parser.parse_args()
    asked.tokens = asked.tokens or (SHORT_TOKENS if asked.short else 64)
    if not asked.resume and asked.json.exists():
        raise SystemExit(f"`{asked.json}` exists; go on with --resume {asked.json}, or name another --json")
    parts = parts_of(asked)
    chosen = [side for side in known if not asked.sides or side.name in asked.sides]
    # Whoever asks how many cores there are, as onnxruntime does, is told as many as the others get threads.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    with tempfile.TemporaryDirectory() as scratch:
        if asked.models:
            asked.models.mkdir(parents=True, exist_ok=True)
        ladder = Ladder(asked, parts, chosen, asked.models or Path(scratch))
        ladder.run()
    print(section(ladder.data, parts, chosen, asked.out))
    if asked.out:
        plot(ladder.data, parts, chosen, asked.out)


if __name__ == "__main__":
    main()
