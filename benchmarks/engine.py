"""Our engine beside every peer that runs MPT on this machine: a ladder of prompt lengths and streams.

    python -m benchmarks.engine --shapes 125m 1b --out docs/images/ladder.png --json runs/ladder.json

Random bfloat16 weights, greedy tokens. Every side is a process of its own with 2 threads; sides alternate within a
round and medians over rounds are reported. All streams of a cell begin at the same instant and no two prompts begin
alike, so that no cache of prefixes helps. A cell that takes, or must take, longer than --cell-seconds is shown as
`over`, a side that breaks as `failed`, and the run goes on. The JSON has every raw time and grows with each cell;
--resume goes on from it. Progress goes to stderr, tables to stdout.

Peers: `make llama` (llama.cpp) and `make peers` (CTranslate2); transformers and onnxruntime come with `make setup`.
"""

import argparse
import itertools
import json
import os
import platform
import random
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

from benchmarks import speed
from benchmarks.peers.worker import Failed, Over, Refused, Worker, available_bytes

ROOT = Path(__file__).parents[1]
PEERS = ROOT / "benchmarks/peers"
LLAMA = ROOT / ".llama/node_modules/node-llama-cpp"
CTRANSLATE2 = ROOT / ".peers/bin/python"
SHAPES = {**speed.SHAPES, "toy": {"d_model": 64, "n_heads": 4, "n_layers": 2}}
VOCAB, THREADS = speed.VOCAB, speed.THREADS
CHECKED_TOKENS = 8  # compared with our float32 model's before anything is timed
CHECK_PROMPTS = [[*range(first, first + 30)] for first in (10, 1010)]
WARM_UP_PROMPT, WARM_UP_TOKENS = 512, 4  # at most; kernels are compiled and weights read in


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
    no_ctranslate2 = None if CTRANSLATE2.exists() else "`make peers` installs it"
    ours, stock, ctranslate2 = (str(PEERS / name) for name in ("ours.py", "in_transformers.py", "in_ctranslate2.py"))
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
            Side(f"CTranslate2 {t}", f"ct2 {t}", (str(CTRANSLATE2), ctranslate2, "run", "{model}", t), no_ctranslate2)
            for t in ("float32", "int8")
        ),
        *(
            Side(f"llama.cpp {name}", f"gguf {dtype}", llama, no_llama)
            for name, dtype in (("BF16", "bfloat16"), ("F16", "float16"), ("Q8_0", "int8"), ("Q4_0", "int4"))
        ),
    ]


def make_model(shape: str, model: str, folder: Path, context_length: int) -> Path:
    """The folder of a shape's model in a format, made when first asked for. Raises Failed."""
    made = folder / f"{shape} {model}".replace(" ", "-")
    if made.is_dir():
        return made
    if model == "bfloat16":
        speed.make_folder(SHAPES[shape], made, context_length)
        return made
    source = make_model(shape, "bfloat16", folder, context_length)
    kind, dtype = model.split()
    if kind == "ct2":
        command = [str(CTRANSLATE2), str(PEERS / "in_ctranslate2.py"), "convert", str(source), str(made), dtype]
    else:
        command = [sys.executable, "-m", "mpt", "convert", str(source), str(made), "--to", kind, "--dtype", dtype]
        command.append("--no-verify")
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        shutil.rmtree(made, ignore_errors=True)
        raise Failed(f"no conversion: {(done.stderr.strip() or 'no word').splitlines()[-1][:200]}")
    return made


# -- the cells -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One measurement: `concurrency` prompts of `prompt` tokens at once."""

    shape: str
    round: int
    prompt: int
    side: str
    concurrency: int


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

    def __init__(self, asked: argparse.Namespace, chosen: Sequence[Side], models: Path) -> None:
        self._asked, self._sides, self._models = asked, [side for side in chosen if not side.absent], models
        self._path: Path = asked.resume or asked.json
        self._started = time.monotonic()
        self.data: dict[str, Any] = {
            "tokens": asked.tokens,
            "machine": {"date": date.today().isoformat(), "cpu": _cpu(), "threads": THREADS},
            "ceilings": {},  # shape: one measurement a round
            "expected": {},  # shape: the first tokens of our float32 model after CHECK_PROMPTS
            "sides": {},  # shape: side: what it says of itself, or {"refused": why}
            "cells": [],
        }
        if asked.resume:
            self.data = json.loads(self._path.read_text())
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
                self.data["sides"][todo[0].shape][side.name] = {"refused": str(refusal)}
                self._todo = [c for c in self._todo if (c.shape, c.side) != (todo[0].shape, side.name)]
                self._keep()
                _say(f"{todo[0].shape}, {side.name}: {refusal}")

    def _rows(self) -> Iterator[tuple[Side, list[Cell]]]:
        """A side's cells of one prompt length in one round, which share a process; sides take turns."""
        asked = self._asked
        for shape, number, prompt in itertools.product(asked.shapes, range(asked.rounds), sorted(asked.prompts)):
            for side in self._sides:
                yield side, [Cell(shape, number, prompt, side.name, n) for n in sorted(asked.concurrency)]

    def _is_done(self, cell: Cell) -> bool:
        return any(all(result[key] == value for key, value in asdict(cell).items()) for result in self.data["cells"])

    def _run_row(self, side: Side, cells: Sequence[Cell]) -> None:
        """Raises Refused."""
        worker: Worker | None = None
        try:
            for cell in cells:
                started = time.monotonic()
                result: dict[str, Any] | None = skip(cell, self.data["cells"], self._asked.cell_seconds)
                if result is None:
                    try:
                        self._measure_ceilings(cell)
                        worker = worker or self._start(side, cell)
                        self._check_memory(cell, worker.about)
                        result = {"status": "ok", **self._ask(worker, prompts_of(cell), self._asked.tokens)}
                        del result["tokens"]
                    except Over as over:
                        result = {"status": "over", "reason": str(over)}
                    except Failed as failure:
                        result = {"status": "failed", "reason": str(failure)}
                self.data["cells"].append({**asdict(cell), **result, "seconds": round(time.monotonic() - started, 3)})
                self._todo.remove(cell)
                self._keep()
                self._tell(cell)
        finally:
            if worker is not None:
                worker.close()

    def _start(self, side: Side, cell: Cell) -> Worker:
        """A side's process, its tokens compared once, warm. Raises Refused, Failed, Over."""
        about = self.data["sides"].setdefault(cell.shape, {})
        folder = self._make_model(cell.shape, side.model)
        worker = Worker([word.format(model=folder) for word in side.command], THREADS)
        try:
            if side.name not in about:
                tokens = self._ask(worker, CHECK_PROMPTS, CHECKED_TOKENS)["tokens"]
                found, expected = [list(itertools.chain(*all_)) for all_ in (tokens, self._expected(cell.shape))]
                n_equal = sum(a == b for a, b in zip(found, expected, strict=True))
                about[side.name] = {**worker.about, "checked": len(expected), "equal": n_equal}
            warm_up = prompts_of(replace(cell, prompt=min(cell.prompt, WARM_UP_PROMPT), concurrency=1), "warm-up")
            self._ask(worker, warm_up, WARM_UP_TOKENS)
        except BaseException:
            worker.close()
            raise
        return worker

    def _ask(self, worker: Worker, prompts: list[list[int]], n_tokens: int) -> dict[str, Any]:
        return worker.ask(prompts, n_tokens, self._asked.cell_seconds)

    def _check_memory(self, cell: Cell, about: Mapping[str, Any]) -> None:
        """Raises Failed where the cache of all streams cannot fit and the side does not queue."""
        shape, free = SHAPES[cell.shape], available_bytes()
        n_tokens = cell.concurrency * (cell.prompt + self._asked.tokens)
        kv_bytes = n_tokens * 2 * shape["d_model"] * shape["n_layers"] * about["kv_item_bytes"]
        if kv_bytes > free and not about.get("queues"):
            raise Failed(f"needs {kv_bytes / 1e9:.0f} GB of KV cache, {free / 1e9:.0f} GB are free")

    def _make_model(self, shape: str, model: str) -> Path:
        return make_model(shape, model, self._models, max(self._asked.prompts) + self._asked.tokens)

    def _expected(self, shape: str) -> list[list[int]]:
        if shape not in self.data["expected"]:
            command = [sys.executable, str(PEERS / "ours.py"), str(self._make_model(shape, "bfloat16"))]
            with Worker([*command, "float32"], THREADS) as worker:
                self.data["expected"][shape] = self._ask(worker, CHECK_PROMPTS, CHECKED_TOKENS)["tokens"]
        return self.data["expected"][shape]

    def _measure_ceilings(self, cell: Cell) -> None:
        """Once a round and shape, reading as many bytes as the bfloat16 weights have."""
        found = self.data["ceilings"].setdefault(cell.shape, {})
        if str(cell.round) in found:
            return
        folder = self._make_model(cell.shape, "bfloat16")
        n_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
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
                at_least = shortest_seconds(cell, results) or mean
                seconds = at_least if at_least <= self._asked.cell_seconds else 0.0
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


def report(data: Mapping[str, Any], shape: str, chosen: Sequence[Side]) -> str:
    """One shape's table in Markdown."""
    found, about = summary(data, shape), data["sides"].get(shape, {})
    names = [side.name for side in chosen]
    lines = [f"### {shape} shape, {data['tokens']} tokens a stream, {data['machine']['threads']} threads", ""]
    if data["ceilings"].get(shape):
        ceiling = ceiling_of(data, shape)
        lines += [
            f"Ceilings of the machine in the same run: {ceiling['read_gb_s']:.1f} GB/s read, "
            f"{ceiling['bf16_tflop_s']:.2f} TFLOP/s bfloat16 matmul.",
            "",
        ]
    lines += [
        "| prompt | streams | side | TTFT, ms | ITL, ms | tok/s | decode only, tok/s | prefill, of the matmul peak "
        "| decode, of the read bandwidth |",
        "|---:|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for prompt, streams, name in sorted(found, key=lambda key: (key[0], key[1], names.index(key[2]))):
        one = found[prompt, streams, name]
        head = f"| {prompt:,} | {streams} | {name} |"
        if isinstance(one, str):
            lines.append(f"{head} {one} | | | | | |")
        else:
            decode = "-" if one.decode_tokens_per_s is None else f"{one.decode_tokens_per_s:,.1f}"
            of_read = "-" if one.decode_of_read is None else f"{one.decode_of_read:.0%}"
            lines.append(
                f"{head} {_ms(one.ttft_s)} | {_ms(one.itl_s)} | {one.tokens_per_s:,.1f} | {decode} "
                f"| {one.prefill_of_peak:.0%} | {of_read} |"
            )
    refused = {name: about[name]["refused"] for name in names if "refused" in about.get(name, {})}
    lines += [f"| | | {name} | {why} | | | | | |" for name, why in refused.items()]
    lines.append("")
    lines += [
        f"- {name}: {it['version']}, {it['weight_bytes'] / 1e6:,.0f} MB of weights; {it['equal']} of {it['checked']} "
        "first greedy tokens are those of our float32 model"
        for name in names
        if "version" in (it := about.get(name, {}))
    ]
    lines += [f"- {side.name} is not here: {side.absent}" for side in chosen if side.absent]
    return "\n".join(lines)


def plot(data: Mapping[str, Any], shapes: Sequence[str], chosen: Sequence[Side], path: Path) -> None:
    """Tokens a second over streams: a row a shape, a panel a prompt length, a line a side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    prompts = sorted({result["prompt"] for result in data["cells"]})
    figure, panels = pyplot.subplots(
        len(shapes), len(prompts), figsize=(4.6 * len(prompts), 3.6 * len(shapes) + 1.2), squeeze=False, sharey="row"
    )
    styles = _styles([side.name for side in chosen])
    lines: dict[str, Any] = {}
    for row, shape in enumerate(shapes):
        found = summary(data, shape)
        for panel, prompt in zip(panels[row], prompts, strict=True):
            for name, style in styles.items():
                points = [(n, one.tokens_per_s) for (p, n, side), one in sorted(found.items(), key=lambda pair: pair[0])
                          if (p, side) == (prompt, name) and isinstance(one, Speed)]  # fmt: skip
                if points:
                    (lines[name],) = panel.plot(*zip(*points, strict=True), label=name, **style)
            streams = sorted({n for _, n, _ in found})
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(streams, [str(n) for n in streams])
            panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            panel.set_title(f"{shape}, prompts of {prompt:,} tokens", fontsize=10)
            panel.set_xlabel("streams at once")
            panel.grid(which="both", color="#e6e6e6", linewidth=0.6)
            panel.spines[["top", "right"]].set_visible(False)
        panels[row][0].set_ylabel(f"tokens/s, all streams ({data['tokens']} each)")
    named = [name for name in styles if name in lines]
    figure.legend([lines[name] for name in named], named, loc="lower center", ncols=5, frameon=False, fontsize=9)
    machine = data["machine"]
    figure.suptitle(f"{machine['cpu']}, {machine['threads']} threads, {machine['date']}", fontsize=9, color="#666666")
    figure.tight_layout(rect=(0, 0.7 / figure.get_figheight(), 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, facecolor="white")
    pyplot.close(figure)


def _styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour for each engine, a marker and dashes for each of its precisions; ours on top and thick."""
    engines = {"ours onnx": "#d97706", "ours": "#c8102e", "transformers": "#6b7280", "CTranslate2": "#2563eb",
               "llama.cpp": "#15803d"}  # fmt: skip
    looks = [("o", "-"), ("s", "--"), ("^", "-."), ("D", ":")]
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


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores"


def main() -> None:
    known = sides()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=["125m"])
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 4, 16, 32], metavar="STREAMS")
    parser.add_argument("--prompts", nargs="+", type=int, default=[128, 1024, 8192], metavar="TOKENS")
    parser.add_argument("--tokens", type=int, default=64, help="generated by each stream (default 64)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds whose median is reported (default 3)")
    parser.add_argument("--sides", nargs="+", choices=[side.name for side in known], metavar="SIDE",
                        help=f"default: all, {', '.join(side.name for side in known)}")  # fmt: skip
    parser.add_argument("--cell-seconds", type=float, default=120.0, help="limit of one measurement (default 120)")
    parser.add_argument("--out", type=Path, help="the plot, as PNG")
    parser.add_argument("--json", type=Path, default=ROOT / "runs/ladder.json", help="every raw time; must not exist")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="go on from this JSON, and into it")
    parser.add_argument("--models", type=Path, metavar="FOLDER", help="keep the random models here for another run")
    asked = parser.parse_args()
    if not asked.resume and asked.json.exists():
        raise SystemExit(f"`{asked.json}` exists; go on with --resume {asked.json}, or name another --json")
    chosen = [side for side in known if not asked.sides or side.name in asked.sides]
    # Whoever asks how many cores there are, as onnxruntime does, is told as many as the others get threads.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    with tempfile.TemporaryDirectory() as scratch:
        if asked.models:
            asked.models.mkdir(parents=True, exist_ok=True)
        ladder = Ladder(asked, chosen, asked.models or Path(scratch))
        ladder.run()
    print("\n\n".join(report(ladder.data, shape, chosen) for shape in asked.shapes))
    if asked.out:
        plot(ladder.data, asked.shapes, chosen, asked.out)


if __name__ == "__main__":
    main()
