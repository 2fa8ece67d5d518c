"""A cold start: seconds from the process to the first token, and the longest step while concurrency goes from 1 to 64.

The part begins with empty caches of compiled kernels, so what a request waits for here is what it waits for after an
update. Steps are timed one by one, those that read prompts apart from those that only write. Kernels compiled before
and after the engine was ready are counted by the files in the caches. Weights are random, not read from a disk.
"""

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.gpu_parts.bench import Bench, make_tokenizer, pool, prefill_chunk, random_text
from benchmarks.gpu_parts.parts import CACHES
from mpt.backends.backend import Work
from mpt.backends.paged_attention import PAGE
from mpt.backends.paged_backend import PagedBackend
from mpt.engine.engine import Engine
from mpt.engine.request import Delta, Sampling

KERNELS = ("*.cubin", "*.so")
N_TOLD = 5  # of the longest steps


@dataclass(frozen=True)
class Step:
    """One step of the backend."""

    seconds: float
    rows: int
    prompt_tokens: int  # of rows that read more than one token
    longest: int  # tokens that the longest row had

    def words(self) -> str:
        read = f", {self.prompt_tokens:,} prompt tokens" if self.prompt_tokens else ""
        return f"{self.seconds * 1e3:,.0f} ms ({self.rows} rows{read}, up to {self.longest:,} tokens)"


class TimedBackend(PagedBackend):
    """Notes how long each step takes, to its end on the GPU."""

    steps: list[Step]

    def watch(self, bench: Bench) -> None:
        self._bench, self.steps = bench, []

    def forward(self, work: Sequence[Work]) -> Tensor:
        started = time.perf_counter()
        logits = super().forward(work)
        self._bench.sync()
        read = sum(len(item.tokens) for item in work if len(item.tokens) > 1)
        longest = max(item.row.length + len(item.tokens) for item in work)
        self.steps.append(Step(time.perf_counter() - started, len(work), read, longest))
        return logits


def run(bench: Bench) -> None:
    bench.measure("cold start", lambda: start(bench))


def start(bench: Bench) -> None:
    """From the start of the process to an engine that answers, and on to the most streams."""
    n, most = bench.scale.stream_tokens, max(bench.scale.streams)
    imported = time.time() - bench.started
    model = bench.model()
    backend = TimedBackend(model)
    backend.watch(bench)
    n_tokens = most * (2 * n + PAGE) + 2 * bench.scale.long_stream + PAGE
    made = time.time() - bench.started
    pool(backend, n_tokens)
    engine = Engine(
        backend, make_tokenizer(300), context_length=8192, kv_bytes=n_tokens * backend.bytes_per_token,
        max_running=most + 1, prefill_chunk=prefill_chunk(bench.is_cuda),
    )  # fmt: skip
    engine.start()
    try:
        while not engine.ready:
            assert engine.failed is None, engine.failed
            time.sleep(0.005)
        ready, at_ready = time.time() - bench.started, n_kernels()
        bench.note(imported_s=imported, model_s=made, ready_s=ready, kernels_at_ready=at_ready)
        asyncio.run(_one(engine, bench, n, 1, "first"))
        first = time.time() - bench.started
        bench.note(first_token_s=first)
        bench.row("from process start to the first token", f"{first:,.1f} s",
                  f"imports {imported:,.1f}, model {made - imported:,.1f}, ready after {ready:,.1f}")  # fmt: skip
        backend.steps.clear()
        asyncio.run(_rise(engine, bench, most))
        asyncio.run(_one(engine, bench, bench.scale.long_stream, bench.scale.stream_tokens, "long"))
    finally:
        engine.close()
    tell(bench, backend.steps, n_kernels() - at_ready)


async def _one(engine: Engine, bench: Bench, n_read: int, n_written: int, name: str) -> None:
    sampling = Sampling(max_tokens=n_written, temperature=0.0, ignore_eos=True)
    prompt = random_text(n_read, bench.scale.model["vocab_size"], name)
    async for _ in engine.generate(prompt, sampling, request_id=name, salt=name):
        pass


async def _rise(engine: Engine, bench: Bench, most: int) -> None:
    """Each stream begins when the one before has its first token, so that every number of rows is met once."""
    n = bench.scale.stream_tokens
    streams = []
    for number in range(most):
        begun = asyncio.Event()
        streams.append(asyncio.create_task(_until_all_run(engine, bench, n, f"rise {number}", begun)))
        await begun.wait()
    await asyncio.gather(*streams)


async def _until_all_run(engine: Engine, bench: Bench, n: int, name: str, begun: asyncio.Event) -> None:
    sampling = Sampling(max_tokens=n, temperature=0.0, ignore_eos=True)
    prompt = random_text(n, bench.scale.model["vocab_size"], name)
    try:
        async for event in engine.generate(prompt, sampling, request_id=name, salt=name):
            if isinstance(event, Delta):
                begun.set()
    finally:
        begun.set()


def tell(bench: Bench, steps: list[Step], n_compiled: int) -> None:
    """Note the longest steps of both kinds, and how many kernels were compiled while they ran."""
    found: dict[str, Any] = {"steps": len(steps), "kernels_after_ready": n_compiled, "most_rows": 0}
    found["most_rows"] = max(step.rows for step in steps)
    kinds = {
        "writing only": [step for step in steps if not step.prompt_tokens],
        "with prompts": [step for step in steps if step.prompt_tokens],
    }
    for kind, of_kind in kinds.items():
        longest = sorted(of_kind, key=lambda step: -step.seconds)[:N_TOLD]
        found[kind] = [vars(step) for step in longest]
        if longest:
            bench.row(f"longest steps after ready, {kind}", longest[0].words(),
                      "then " + ", ".join(step.words() for step in longest[1:]))  # fmt: skip
    bench.note(**found)
    bench.row(
        "kernels compiled after ready", f"{n_compiled}", f"in {len(steps):,} steps of 1 to {found['most_rows']} rows"
    )


def n_kernels() -> int:
    """Compiled files in the part's caches."""
    folders = {Path(os.environ[name]) for name in CACHES if name in os.environ}
    return sum(1 for folder in folders for pattern in KERNELS for _ in folder.rglob(pattern))
