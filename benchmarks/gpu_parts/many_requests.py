"""Many requests at once through the engine, scheduling and sampling included, and transformers' `generate` beside it.

Every storm has prompts of its own, so that the prefix cache helps with none: the rows say how many prompt tokens were
read, not found. The weights are random, and the last norm is scaled until the model's entropy is a trained one's, so
that top-p keeps as many tokens as it would there; a row says what share of draws looks among more than the best 1,024.
"""

import asyncio
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_parts.bench import (
    Bench,
    entropies,
    make_tokenizer,
    pool,
    prefill_chunk,
    random_text,
    sharpen,
    short_of,
    transformers_model,
)
from mpt.backends.paged_attention import PAGE
from mpt.backends.paged_backend import PagedBackend
from mpt.engine.engine import Engine
from mpt.engine.request import Delta, Sampling
from mpt.sampling import N_BEST
from mpt.transformers_model import MPTForCausalLM

GREEDY: dict[str, Any] = {"temperature": 0.0}
KINDS: dict[str, dict[str, Any]] = {
    "top-p 0.95": {"temperature": 1.0, "top_p": 0.95},
    "penalties": {"temperature": 0.0, "presence_penalty": 0.5, "frequency_penalty": 0.5},
}


def run(bench: Bench) -> None:
    model, most = bench.model(), max(bench.scale.streams)
    ours(bench, model)
    bench.free()
    for rows in (most, 1):
        bench.measure(f"transformers, {rows} rows", lambda rows=rows: peer(bench, model, rows))


def ours(bench: Bench, model: MPTForCausalLM) -> None:
    """All storms through one engine."""
    n, most = bench.scale.stream_tokens, max(bench.scale.streams)
    n_tokens = most * (2 * n + PAGE)
    backend = pool(PagedBackend(model), n_tokens)
    tell_entropy(bench, sharpen(model, backend))
    engine = Engine(
        backend, make_tokenizer(300), context_length=8192, kv_bytes=n_tokens * backend.bytes_per_token,
        max_running=most, max_waiting=4 * most, prefill_chunk=prefill_chunk(bench.is_cuda),
    )  # fmt: skip
    engine.start()
    try:
        for streams in sorted(bench.scale.streams, reverse=True):  # the goal's first
            bench.measure(f"{streams} requests", lambda streams=streams: storms(bench, engine, streams))
        for kind, wanted in KINDS.items():
            bench.measure(f"{most} requests, {kind}", lambda k=kind, w=wanted: storms(bench, engine, most, k, w))
    finally:
        engine.close()


def tell_entropy(bench: Bench, logits: Tensor) -> None:
    top_p = KINDS["top-p 0.95"]["top_p"]
    nats, short = float(entropies(logits).mean()), short_of(logits, top_p)
    bench.note(mean_entropy=nats, short_rows=short)
    bench.row(
        "entropy of what the model says next", f"{nats:.1f} nats",
        f"for {short:.0%} of draws with top-p {top_p:g} the best {N_BEST[0]:,} tokens are too few",
    )  # fmt: skip


@dataclass
class Storm:
    """What came back of requests that began at one instant."""

    started: float
    n_tokens: int = 0
    firsts: list[float] = field(default_factory=list)  # seconds until each stream's first token
    gaps: list[float] = field(default_factory=list)  # seconds between a stream's deliveries
    seconds: float = 0.0

    @property
    def tok_s(self) -> float:
        return self.n_tokens / self.seconds


def storms(
    bench: Bench, engine: Engine, streams: int, kind: str = "greedy", wanted: dict[str, Any] | None = None
) -> None:
    """One storm that compiles and captures, then the median of three."""
    n = bench.scale.stream_tokens
    n_vocab = bench.scale.model["vocab_size"]
    wanted = GREEDY if wanted is None else wanted
    found, read = [], 0
    for number in range(4):
        before = engine.stats()
        prompts = [random_text(n, n_vocab, f"{kind} {streams} {number} {k}") for k in range(streams)]
        storm = asyncio.run(_storm(engine, prompts, Sampling(max_tokens=n, ignore_eos=True, **wanted)))
        assert storm.n_tokens == streams * n, f"{storm.n_tokens} tokens instead of {streams * n}"
        after = engine.stats()
        read = (after.prefix_queries_tokens - before.prefix_queries_tokens) - (
            after.prefix_hits_tokens - before.prefix_hits_tokens
        )
        steps = after.n_steps - before.n_steps
        in_model = after.step_seconds - before.step_seconds
        if number:
            found.append((storm, steps, in_model))
        if number and bench.left_s < 2 * storm.seconds:
            break
    storm, steps, in_model = sorted(found, key=lambda each: each[0].tok_s)[len(found) // 2]
    numbers = {
        "tok_s": storm.tok_s, "seconds": storm.seconds, "prompt_tokens_read": read, "steps": steps,
        "backend_seconds": in_model, "first_token_median_s": statistics.median(storm.firsts),
        "first_token_worst_s": max(storm.firsts), "gap_median_s": statistics.median(storm.gaps or [0.0]),
        "gap_worst_s": max(storm.gaps, default=0.0), "storms": [each.tok_s for each, *_ in found],
    }  # fmt: skip
    all_found = bench.found.get("requests", {})
    all_found.setdefault(kind, {})[str(streams)] = numbers
    bench.note(requests=all_found)
    bench.row(
        f"{streams} requests at once, {n} read and {n} written each, {kind}", f"{storm.tok_s:,.0f} tok/s",
        f"prompt tokens read: {read:,} of {streams * n:,}; first token after "
        f"{numbers['first_token_median_s'] * 1e3:,.0f} ms (median), longest gap {numbers['gap_worst_s'] * 1e3:,.0f} ms",
    )  # fmt: skip


async def _storm(engine: Engine, prompts: list[list[int]], sampling: Sampling) -> Storm:
    storm = Storm(time.perf_counter())

    async def one(k: int, prompt: list[int]) -> None:
        last: float | None = None
        async for event in engine.generate(prompt, sampling, request_id=str(k), salt=str(k)):
            if isinstance(event, Delta):
                now = time.perf_counter()
                (storm.firsts if last is None else storm.gaps).append(now - (storm.started if last is None else last))
                last = now
                storm.n_tokens += len(event.token_ids)

    await asyncio.gather(*(one(k, prompt) for k, prompt in enumerate(prompts)))
    storm.seconds = time.perf_counter() - storm.started
    return storm


def peer(bench: Bench, model: MPTForCausalLM, rows: int) -> None:
    """transformers' `generate` on the same weights, one batch of the same size."""
    theirs, n = transformers_model(model), bench.scale.stream_tokens
    ids = torch.tensor([random_text(n, model.config.vocab_size, f"peer {k}") for k in range(rows)], device=bench.device)

    def generate() -> None:
        theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, do_sample=False,
            use_cache=True, pad_token_id=0,
        )  # fmt: skip

    generate()
    bench.sync()
    started = time.perf_counter()
    generate()
    bench.sync()
    tok_s = rows * n / (time.perf_counter() - started)
    found = bench.found.get("transformers", {})
    found[str(rows)] = tok_s
    bench.note(transformers=found)
    ours = bench.found.get("requests", {}).get("greedy", {}).get(str(rows), {}).get("tok_s")
    bench.row(
        f"transformers' generate, batch {rows}, {n} + {n} tokens", f"{tok_s:,.1f} tok/s",
        f"ours: {ours / tok_s:.1f} x" if ours else "",
    )  # fmt: skip
