"""One stream alone: tokens a second at several contexts, steps that check guesses, a prompt of 2,048 tokens, and a book
read and written on.
"""

import time
from typing import Any

import torch

from benchmarks.gpu_parts.bench import Bench, pool, random_text, read, reading_flop, weight_bytes
from mpt.backends.backend import FEW_TOKENS, Row, Work
from mpt.backends.paged_attention import DROP
from mpt.backends.paged_backend import PagedBackend, Steps
from mpt.config import MPTConfig
from mpt.transformers_model import MPTForCausalLM

WORDS_PER_TOKEN = 0.75
STORYWRITER = {"alibi": True, "alibi_bias_max": 16, "clip_qkv": 6.0}


def run(bench: Bench) -> None:
    model = bench.model()
    bench.measure("decode", lambda: decode(bench, model))
    bench.measure("guesses", lambda: guesses(bench, model))
    bench.measure("prefill", lambda: prefill(bench, model))
    longest = bench.scale.book + bench.scale.n_decoded + 8
    storyteller = with_attention(model, STORYWRITER, longest)
    chunks = bench.scale.chunks
    for name, drop, chunk in (("pages of no weight left out", DROP, chunks[0]), ("all keys read", 0.0, chunks[-1])):
        bench.measure(
            f"the book, {name}", lambda name=name, drop=drop, chunk=chunk: book(bench, storyteller, name, drop, chunk)
        )


def decode(bench: Bench, model: MPTForCausalLM) -> None:
    found: dict[str, Any] = {}
    n = bench.scale.n_decoded
    backend = pool(PagedBackend(model), max(bench.scale.contexts) + n + 8)
    for context in bench.scale.contexts:
        row = backend.reserve(None, context + n + 8)
        read(backend, row, random_text(context, backend.vocab_size), bench.scale.chunks[0])
        taken = seconds_a_token(bench, backend, row, n)
        gb_s = (weight_bytes(model) + (context + n / 2) * backend.bytes_per_token) / taken / 1e9
        found[str(context)] = {"tok_s": 1 / taken, "gb_s": gb_s}
        bench.note(decode=found)
        share = bench.share(gb_s, "copy_gb_s", "the copy bandwidth, if all keys were read")
        bench.row(f"decode, 1 stream, {context:,} tokens of context", f"{1 / taken:,.1f} tok/s", share)
        del row


def guesses(bench: Bench, model: MPTForCausalLM) -> None:
    """Steps that check guesses beside steps of one token: so many tokens a step must be right for guesses to pay.

    Random weights repeat no text, so what lookup finds cannot be measured with them; what it asks of a step can.
    """
    context, n = bench.scale.contexts[0], bench.scale.n_decoded
    steps = Steps(n_rows=2, n_prompt=bench.scale.chunks[0], context=context + FEW_TOKENS, guesses=True)
    backend = pool(PagedBackend(model, steps=steps), 2 * (context + FEW_TOKENS))
    rows = [backend.reserve(None, context + FEW_TOKENS) for _ in range(2)]
    for number, row in enumerate(rows):
        read(backend, row, random_text(context, backend.vocab_size, number), bench.scale.chunks[0])
    found: dict[str, float] = {}
    for n_rows, n_tokens in ((1, 1), (1, 2), (1, FEW_TOKENS), (2, 1), (2, FEW_TOKENS)):
        tokens = random_text(n_tokens, backend.vocab_size)
        work = [Work(row, tokens, n_tokens) for row in rows[:n_rows]]  # the rows end where they began: all is rejected
        taken = bench.seconds(lambda work=work: backend.forward(work).argmax(-1).tolist(), n)
        found[f"{n_rows} x {n_tokens}"] = taken
        bench.note(guesses=found)
        name = f"a step of {n_rows} row{'s' * (n_rows > 1)} with {n_tokens} token{'s' * (n_tokens > 1)} each"
        plain = found[f"{n_rows} x 1"]
        bench.row(name, f"{taken * 1e3:.2f} ms", f"{taken / plain:.2f} times a step of one" if n_tokens > 1 else "")


def prefill(bench: Bench, model: MPTForCausalLM) -> None:
    n = bench.scale.prefill
    backend = pool(PagedBackend(model), n)
    row = backend.reserve(None, n)
    work = [Work(row, random_text(n, backend.vocab_size), 1)]
    taken = bench.seconds(lambda: backend.forward(work))
    tflop_s = reading_flop(model, n) / taken / 1e12
    bench.note(prefill={"seconds": taken, "tok_s": n / taken, "tflop_s": tflop_s})
    bench.row(
        f"prefill of {n:,} tokens", f"{taken * 1000:,.1f} ms, {n / taken:,.0f} tok/s",
        f"{tflop_s:,.0f} TFLOP/s " + bench.share(tflop_s, "matmul_tflop_s", "the matmul peak"),
    )  # fmt: skip


def book(bench: Bench, model: MPTForCausalLM, name: str, drop: float, chunk: int) -> None:
    """Read a book in chunks of one size and write on, leaving out pages of no weight or none."""
    n, n_decoded = bench.scale.book, bench.scale.n_decoded
    backend = pool(PagedBackend(model, drop=drop), n + n_decoded + 8)
    tokens = random_text(n, backend.vocab_size)
    first = backend.reserve(None, chunk)  # a first chunk, for kernels that are not compiled yet
    read(backend, first, tokens[:chunk], chunk)
    del first
    row = backend.reserve(None, n + n_decoded + 8)
    bench.sync()
    started = time.perf_counter()
    read(backend, row, tokens, chunk)
    bench.sync()
    taken = time.perf_counter() - started
    tflop_s = reading_flop(model, n) / taken / 1e12
    found = bench.found.get("book", {})
    found[name] = {"chunk": chunk, "read_s": taken, "read_tok_s": n / taken, "read_tflop_s": tflop_s}
    bench.note(book=found)
    bench.row(
        f"reading {n:,} tokens in chunks of {chunk:,}", f"{taken:,.2f} s, {n / taken:,.0f} tok/s",
        f"{tflop_s:,.0f} TFLOP/s " + bench.share(tflop_s, "matmul_tflop_s", "the matmul peak"),
    )  # fmt: skip
    each = seconds_a_token(bench, backend, row, n_decoded)
    words = 60 * WORDS_PER_TOKEN / each
    gb_s = (weight_bytes(model) + n * backend.bytes_per_token) / each / 1e9
    found[name] |= {"tok_s": 1 / each, "words_per_minute": words, "gb_s": gb_s}
    bench.note(book=found)
    bench.row(
        f"writing after them, {name}", f"{1 / each:,.1f} tok/s, {words:,.0f} words a minute",
        bench.share(gb_s, "copy_gb_s", "the copy bandwidth, if all keys were read"),
    )  # fmt: skip


def seconds_a_token(bench: Bench, backend: PagedBackend, row: Row, n: int) -> float:
    """The next token is chosen from each step's logits; the row ends where it began."""
    token, length = 5, row.length
    for step in range(n + 3):
        if step == 3:
            bench.sync()
            started = time.perf_counter()
        logits = backend.forward([Work(row, [token], 1)])
        row.length += 1
        token = int(logits[0].argmax())
    taken = time.perf_counter() - started
    row.length = length
    return taken / n


def with_attention(model: MPTForCausalLM, attn_config: dict[str, Any], max_seq_len: int) -> MPTForCausalLM:
    """The same weights, in the same memory, under another attention's settings."""
    config = model.config.to_dict() | {"attn_config": attn_config, "max_seq_len": max_seq_len}
    with torch.device("meta"):
        other = MPTForCausalLM(MPTConfig(**config))
    other.load_state_dict(model.state_dict(), assign=True)
    other.tie_weights()
    return other.eval()
