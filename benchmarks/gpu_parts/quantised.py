"""Weights in int8 and 4 bits, and a KV cache in int8, beside bfloat16: how fast are steps with them, and are the
kernels of the weights right on this card? Those of the cache are `right.py`'s.

Rounded by the product's own loader: one block and the embedding, from a checkpoint of one layer. The other layers have
copies of that block, so that every step reads as many bytes as it would of a real model. Rows are at a short context;
both caches are compared at a longer one.
"""

import copy
import tempfile
import time
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import nn
from torch.nn import functional as F

import mpt
from benchmarks.gpu_parts.bench import Bench, make_model, pool, random_text, read, weight_bytes
from mpt.backends import quantized
from mpt.backends.backend import Work
from mpt.backends.paged_attention import PAGE, Pages, uses_triton
from mpt.backends.paged_backend import PagedBackend, Steps
from mpt.command_line import Quantization
from mpt.model import MPTBlock
from mpt.packed.layers import PackedEmbedding, PackedLinear, packed_bytes
from mpt.transformers_model import MPTForCausalLM

CACHES = ("bfloat16 cache", "int8 cache")
N_ROWS = (1, 3, 16, 40, 100)  # of inputs, one for each kernel and more
TOLERANCE = 2**-6  # of the largest output: weights, where they are unpacked, and outputs are rounded to bfloat16


def run(bench: Bench) -> None:
    bench.measure("bfloat16", lambda: speed(bench, "bfloat16", bench.model()))
    for name in get_args(Quantization):
        bench.measure(name, lambda name=name: speed(bench, name, rounded(bench, name)))
    for name in CACHES:
        bench.measure(name, lambda name=name: cache(bench, name))


def rounded(bench: Bench, name: Quantization) -> MPTForCausalLM:
    """A model of the scale's shape with rounded weights, its products checked."""
    shape = bench.scale.model
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        place = mpt.save(make_model(shape | {"n_layers": 1}, bench.device, bench.dtype), f"{folder}/model")
        bench.free()
        model = quantized.load(place, name, bench.dtype, bench.device.type)
    bench.note(**{f"{name} loading of one layer": time.perf_counter() - started})
    first = model.transformer.blocks[0]
    if uses_triton(model.transformer.norm_f.weight):
        quantized.use_kernels(model)
    check(bench, name, model)
    for layer in range(1, shape["n_layers"]):
        block = copy.deepcopy(first)
        assert isinstance(block, MPTBlock)
        block.attn.layer = layer
        model.transformer.blocks.append(block)
    model.config.n_layers = shape["n_layers"]
    return model


def check(bench: Bench, name: str, model: nn.Module) -> None:
    """Every packed matrix of a model beside its real values in float32."""
    worst = 0.0
    for module in [each for each in model.modules() if isinstance(each, PackedLinear)]:
        real = module.matrix.values()
        for n in N_ROWS:
            x = torch.randn(n, module.in_features, device=bench.device).to(bench.dtype)
            with torch.inference_mode():
                found, expected = module(x).float(), F.linear(x.float(), real)
            worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    bench.note(off=bench.found.get("off", {}) | {name: worst})
    bench.row(f"{name}, products", f"{worst:.1e} of the largest off those of the real values", f"{N_ROWS} rows")
    assert worst < TOLERANCE, f"{name}: products are {worst} of the largest off, at most {TOLERANCE} was expected"


def cache(bench: Bench, name: str) -> None:
    """Steps over rows at the second context, and how many tokens a gigabyte of the cache holds."""
    shape = bench.scale.model
    heads = shape["n_heads"], shape["d_model"] // shape["n_heads"]
    n_bytes = shape["n_layers"] * Pages.position_bytes(*heads, torch.int8 if name == "int8 cache" else bench.dtype)
    bench.row(f"{name}, tokens in 1 GB", f"{10**9 // n_bytes:,}")
    speed(
        bench, name, bench.model(), context=bench.scale.contexts[1], counts=bench.scale.streams[:2], baseline=CACHES[0]
    )


def speed(
    bench: Bench,
    name: str,
    model: MPTForCausalLM,
    *,
    context: int | None = None,
    counts: Sequence[int] | None = None,
    baseline: str = "bfloat16",
) -> None:
    """Steps of one row and of several, and a prompt. name, baseline: of what is measured, and of what it is beside."""
    n, prefill = bench.scale.n_decoded, bench.scale.prefill
    context, counts = context or bench.scale.contexts[0], counts or bench.scale.streams
    steps = Steps(max(counts), prefill, max(prefill, context + n + 4))
    backend = PagedBackend(model, steps=steps, int8_cache=name == "int8 cache")
    pool(backend, max(counts) * (context + n + PAGE) + prefill)
    read_bytes = weight_bytes(model) + packed_bytes(model)
    if isinstance(model.lm_head, PackedLinear) and not isinstance(model.transformer.wte, PackedEmbedding):
        read_bytes -= model.transformer.wte.weight.nbytes  # of which a step reads a row
    found: dict[str, Any] = {"bytes": read_bytes}
    for count in counts:
        rows = [backend.reserve(None, context + n + 4) for _ in range(count)]
        for number, row in enumerate(rows):
            read(backend, row, random_text(context, backend.vocab_size, number), bench.scale.chunks[0])
        for step in range(n + 3):
            if step == 3:
                bench.sync()
                started = time.perf_counter()
            backend.forward([Work(row, [5], 1) for row in rows])
            for row in rows:
                row.length += 1
        bench.sync()
        taken = (time.perf_counter() - started) / n
        found[str(count)] = {"seconds": taken, "tok_s": count / taken, "gb_s": read_bytes / taken / 1e9}
        plain = bench.found.get("speeds", {}).get(baseline, {}).get(str(count))
        beside = ""
        if plain is not None and name != baseline:
            found[str(count)]["times_bfloat16"] = plain["seconds"] / taken
            beside = f"{plain['seconds'] / taken:.2f} times {baseline}; "
        share = bench.share(found[str(count)]["gb_s"], "copy_gb_s", "the copy bandwidth, in weights alone")
        bench.row(f"{name}, {count} rows", f"{taken * 1e3:.2f} ms a step, {count / taken:,.1f} tok/s", beside + share)
        bench.note(speeds=bench.found.get("speeds", {}) | {name: found})
        del rows
    row = backend.reserve(None, prefill)
    work = [Work(row, random_text(prefill, backend.vocab_size), 1)]
    found["prefill_s"] = bench.seconds(lambda: backend.forward(work))
    bench.note(speeds=bench.found.get("speeds", {}) | {name: found})
    bench.row(f"{name}, prefill of {prefill:,} tokens", f"{found['prefill_s'] * 1e3:,.1f} ms")
