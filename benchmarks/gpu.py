"""One GPU: what it can read and multiply, how near decoding and prefill come, long texts, and many requests at once.

    python benchmarks/gpu.py --out gpu.json              # MPT-7B's shape, random weights, one H200, under 8 minutes
    python benchmarks/gpu.py --shape tiny --device cpu   # the same steps on a small model; its figures mean nothing

First the kernels are checked against float64 on this GPU, and a wrong one ends the run. Then each measurement prints
its row of a Markdown table when it is done; one that fails prints why and leaves the others alone. Progress goes to
stderr. The peer is transformers' in-tree MPT on the same weights.
"""

import argparse
import asyncio
import gc
import json
import platform
import random
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a checkout that is not installed

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from mpt import attention  # noqa: E402
from mpt.backends.backend import Row, Work  # noqa: E402
from mpt.backends.paged_attention import PAGE, Pages, Part, Prompts, has_triton, paged_decode, store  # noqa: E402
from mpt.backends.paged_backend import PagedBackend  # noqa: E402
from mpt.config import MPTConfig  # noqa: E402
from mpt.model import MPTForCausalLM  # noqa: E402

PEAK_TFLOP_S = 790  # bfloat16 without sparsity that an H200 reaches in practice; 989 on paper
WORDS_PER_TOKEN = 0.75
STORYWRITER = {"alibi": True, "alibi_bias_max": 16, "clip_qkv": 6.0}


@dataclass(frozen=True)
class Scale:
    """A model's shape, and how much of everything is measured with it."""

    model: dict[str, int]
    prefill: int
    contexts: tuple[int, ...]  # at which one stream decodes
    book: int  # tokens of the long text
    chunk: int  # read at once
    n_decoded: int
    streams: int
    stream_tokens: int  # read, and written, by each
    square: int  # side of the product that measures the ceiling
    read_bytes: int


SCALES = {
    "7b": Scale(
        {"d_model": 4096, "n_heads": 32, "n_layers": 32, "vocab_size": 50432},
        2048, (128, 2048, 8192), 67_835, 2048, 64, 64, 128, 8192, 8 << 30,
    ),
    "1b": Scale(
        {"d_model": 2048, "n_heads": 16, "n_layers": 24, "vocab_size": 50432},
        2048, (128, 2048, 8192), 67_835, 2048, 64, 64, 128, 8192, 8 << 30,
    ),
    "tiny": Scale(
        {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 512},
        300, (20, 300), 700, 300, 4, 5, 12, 256, 1 << 22,
    ),
}  # fmt: skip


@dataclass
class Run:
    """Where and on what it all happens, and what was found."""

    scale: Scale
    device: torch.device
    dtype: torch.dtype
    model: MPTForCausalLM
    found: dict[str, Any] = field(default_factory=dict)

    def row(self, what: str, measured: str, beside: str) -> None:
        print(f"| {what} | {measured} | {beside} |", flush=True)

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object], n: int = 5) -> float:
        """Median of n times, after two that are not counted."""
        times = []
        for _ in range(n + 2):
            self.sync()
            started = time.perf_counter()
            work()
            self.sync()
            times.append(time.perf_counter() - started)
        return statistics.median(times[2:])

    def backend(self, n_tokens: int, **options: Any) -> PagedBackend:
        backend = PagedBackend(self.model, **options)
        backend.allocate((n_tokens + 2 * PAGE) * backend.bytes_per_token)
        return backend

    @property
    def weight_bytes(self) -> int:
        """Read by a decoding step: all of them, the tied embedding as the head."""
        return sum(weight.nbytes for weight in self.model.parameters())

    @property
    def read_gb_s(self) -> float:
        return float(self.found["ceilings"]["read_gb_s"])


def make_model(scale: Scale, device: torch.device, dtype: torch.dtype) -> MPTForCausalLM:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = MPTForCausalLM(MPTConfig(**scale.model, max_seq_len=8192, attn_config={"alibi": True}))
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def with_attention(model: MPTForCausalLM, attn_config: dict[str, Any]) -> MPTForCausalLM:
    """The same weights, in the same memory, under another attention's settings."""
    config = model.config.to_dict() | {"attn_config": attn_config}
    with torch.device("meta"):
        other = MPTForCausalLM(MPTConfig(**config))
    other.load_state_dict(model.state_dict(), assign=True)
    other.tie_weights()
    return other.eval()


def text(n: int, n_vocab: int) -> list[int]:
    return random.Random(n).choices(range(4, min(n_vocab, 50_000)), k=n)


def read(run: Run, backend: PagedBackend, row: Row, tokens: list[int], chunk: int) -> None:
    """Prefill, as the engine does it for a prompt that is alone."""
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        backend.forward([Work(row, part, int(start + chunk >= len(tokens)))])
        row.length += len(part)
    run.sync()


def decode(run: Run, backend: PagedBackend, row: Row, n: int) -> float:
    """Seconds a token, the next one chosen from each step's logits; the row ends where it began."""
    token, length = 5, row.length
    for step in range(n + 3):
        if step == 3:
            run.sync()
            started = time.perf_counter()
        logits = backend.forward([Work(row, [token], 1)])
        row.length += 1
        token = int(logits[0].argmax())
    taken = time.perf_counter() - started
    row.length = length
    return taken / n


# -- are the kernels right here? -------------------------------------------------------------------------------------


def formula(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, scale: float) -> Tensor:
    """(T, H, D) float64 of q (T, H, D) over k, v (S, KV heads, D)."""
    T, S, groups = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, 1).transpose(0, 1) for x in (k, v))
    distance = torch.arange(S - T, S, device=q.device)[:, None] - torch.arange(S, device=q.device)
    scores = q.double().transpose(0, 1) @ k.transpose(-1, -2) * scale
    if slopes is not None:
        scores = scores - slopes.double()[:, None, None] * distance
    return (scores.masked_fill(distance < 0, -torch.inf).softmax(-1) @ v).transpose(0, 1)


def check_kernels(run: Run) -> dict[str, float]:
    """Largest error of each kernel in each dtype. Raises AssertionError where one is wrong."""
    worst: dict[str, float] = {}
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
    for dtype, allowed in tolerance.items():
        for H, n_kv, D, alibi in ((4, 4, 64, True), (4, 2, 80, True), (8, 1, 112, False), (2, 2, 128, True)):
            slopes = attention.alibi_slopes(H).to(run.device) if alibi else None
            lengths = [1000, 1, 257, 600]
            pages = Pages.empty(1, 20, n_kv, D, dtype, run.device)
            pages.kv.fill_(torch.nan)  # what was not written must not be read
            numbers = torch.randperm(19).add(1).tolist()
            table = torch.zeros(len(lengths), 4, dtype=torch.int32, device=run.device)
            keys = []
            for row, n in enumerate(lengths):
                n_pages = -(-n // PAGE)
                table[row, :n_pages] = torch.tensor(numbers[:n_pages])
                mine, numbers = torch.tensor(numbers[:n_pages]), numbers[n_pages:]
                k, v = torch.randn(2, n, n_kv, D).to(run.device, dtype)
                slots = (mine[torch.arange(n) // PAGE] * PAGE + torch.arange(n) % PAGE).to(run.device)
                store(pages.kv[0], pages.key_norms[0], k, v, slots)
                keys.append((k, v))
            length = torch.tensor(lengths, dtype=torch.int32, device=run.device)
            for T in (1, 16):
                q = torch.randn(len(lengths), T, H, D).to(run.device, dtype)
                out = paged_decode(q, pages.kv[0], pages.key_norms[0], table, length, slopes, D**-0.5)
                for row, (k, v) in enumerate(keys):
                    real = min(T, lengths[row])
                    expected = formula(q[row, -real:], k, v, slopes, D**-0.5)
                    note(worst, f"decode {dtype}", out[row, -real:], expected, allowed)
            if dtype == torch.float16 or D not in (80, 128):
                continue  # each compilation of FlexAttention takes seconds
            q = torch.randn(300, H, D).to(run.device, dtype)
            part = Part(0, 300, lengths[0], table[0, : -(-lengths[0] // PAGE)].tolist())
            prompts = Prompts([part], slopes, D**-0.5, run.device)
            out = prompts.attend(q.transpose(0, 1), pages.kv[0], pages.key_norms[0])
            note(worst, f"prefill {dtype}", out, formula(q, *keys[0], slopes, D**-0.5), allowed)
    return worst


def note(worst: dict[str, float], what: str, found: Tensor, expected: Tensor, allowed: float) -> None:
    error = float((found.double() - expected).abs().max())
    assert error < allowed, f"{what}: {error} off, at most {allowed} was expected"
    worst[what] = max(worst.get(what, 0.0), error)


def check_backend(run: Run) -> dict[str, float]:
    """A small float32 model beside transformers': prefill in chunks, decoding with and without graphs."""
    scale = SCALES["tiny"]
    model = make_model(scale, run.device, torch.float32)
    peer = transformers_model(model)
    tokens = text(600, scale.model["vocab_size"])
    worst = 0.0
    for graphs in (False, True) if run.device.type == "cuda" else (False,):
        backend = PagedBackend(model, graphs=graphs)
        backend.allocate(1 << 24)
        row = backend.reserve(None, len(tokens) + 16)
        read(run, backend, row, tokens[:590], 200)
        for token in tokens[590:]:
            logits = backend.forward([Work(row, [token], 1)])[0]
            row.length += 1
        assert not graphs or backend._graphs, "a decoding step could not be captured; see the error above"
        with torch.inference_mode():
            expected = peer(torch.tensor([tokens], device=run.device)).logits[0, -1].float()
        worst = max(worst, float((logits - expected).abs().max()))
    assert worst < 5e-3, f"logits are {worst} off transformers'"
    return {"logits": worst}


# -- measurements; each leaves its numbers in run.found --------------------------------------------------------------


def ceilings(run: Run) -> dict[str, float]:
    buffer = torch.ones(run.scale.read_bytes // 4, device=run.device)
    other = torch.empty_like(buffer)
    summed = run.seconds(lambda: buffer.sum())
    copied = run.seconds(lambda: other.copy_(buffer)) / 2  # reads and writes
    best = min(summed, copied)
    n = run.scale.square
    a = torch.randn(n, n, device=run.device).to(run.dtype)
    multiplied = run.seconds(lambda: a @ a)
    result = {"read_gb_s": buffer.nbytes / best / 1e9, "tflop_s": 2 * n**3 / multiplied / 1e12}
    run.row("memory read", f"{result['read_gb_s']:,.0f} GB/s", "")
    run.row(f"matmul, {n:,} square", f"{result['tflop_s']:,.0f} TFLOP/s", f"{PEAK_TFLOP_S} expected")
    return result


def decode_one_stream(run: Run) -> dict[str, Any]:
    result = {}
    backend = run.backend(max(run.scale.contexts) + run.scale.n_decoded + 8)
    for context in run.scale.contexts:
        row = backend.reserve(None, context + run.scale.n_decoded + 8)
        read(run, backend, row, text(context, backend.vocab_size), run.scale.chunk)
        taken = decode(run, backend, row, run.scale.n_decoded)
        n_bytes = run.weight_bytes + (context + run.scale.n_decoded / 2) * backend.bytes_per_token
        share = n_bytes / taken / 1e9 / run.read_gb_s
        result[context] = {"tok_s": 1 / taken, "share_of_bandwidth": share}
        run.row(
            f"decode, 1 stream, {context:,} tokens of context", f"{1 / taken:,.1f} tok/s",
            f"{share:.0%} of the read bandwidth, if all keys were read",
        )  # fmt: skip
        del row
    return result


def prefill(run: Run) -> dict[str, float]:
    n = run.scale.prefill
    backend = run.backend(n)
    row = backend.reserve(None, n)
    work = [Work(row, text(n, backend.vocab_size), 1)]
    taken = run.seconds(lambda: backend.forward(work))
    tflop = flop(run.model, n) / 1e12
    share, of_measured = tflop / taken / PEAK_TFLOP_S, tflop / taken / run.found["ceilings"]["tflop_s"]
    run.row(
        f"prefill of {n:,} tokens", f"{taken * 1000:,.1f} ms, {n / taken:,.0f} tok/s",
        f"{tflop / taken:,.0f} TFLOP/s: {share:.0%} of {PEAK_TFLOP_S}, {of_measured:.0%} of the matmul above",
    )  # fmt: skip
    return {"seconds": taken, "tflop_s": tflop / taken, "share_of_790": share, "share_of_matmul": of_measured}


def flop(model: MPTForCausalLM, n: int) -> float:
    """Of reading n tokens: products with the blocks' matrices, the head once, attention over the causal half."""
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and ".blocks." in name)
    config = model.config
    pairs = n * (n + 1) / 2
    return (
        2.0 * matrices * n + 2.0 * config.vocab_size * config.d_model + 4.0 * config.d_model * config.n_layers * pairs
    )


def book(run: Run) -> dict[str, Any]:
    """StoryWriter's settings: read a book, then write on, leaving out pages of no weight and reading everything."""
    n, result = run.scale.book, dict[str, Any]()
    short, run.model = run.model, with_attention(run.model, STORYWRITER)
    try:
        backend = run.backend(n + run.scale.n_decoded + 8)
        row = backend.reserve(None, n + run.scale.n_decoded + 8)
        started = time.perf_counter()
        read(run, backend, row, text(n, backend.vocab_size), run.scale.chunk)
        taken = time.perf_counter() - started
        tflop_s = flop(run.model, n) / taken / 1e12
        result["read"] = {"seconds": taken, "tok_s": n / taken, "tflop_s": tflop_s}
        run.row(f"reading {n:,} tokens", f"{taken:,.1f} s, {n / taken:,.0f} tok/s", f"{tflop_s:,.0f} TFLOP/s")
        n_bytes = run.weight_bytes + n * backend.bytes_per_token
        for name, drop in (("pages of no weight left out", backend._drop), ("all keys read", 0.0)):
            backend._drop = drop
            backend._graphs.clear()  # it is recorded in them
            taken = decode(run, backend, row, run.scale.n_decoded)
            words = 60 * WORDS_PER_TOKEN / taken
            share = n_bytes / taken / 1e9 / run.read_gb_s
            result[name] = {"tok_s": 1 / taken, "words_per_minute": words, "share_of_bandwidth": share}
            run.row(
                f"writing after them, {name}", f"{1 / taken:,.1f} tok/s, {words:,.0f} words a minute",
                f"{share:.0%} of the read bandwidth, if all keys were read",
            )  # fmt: skip
    finally:
        run.model = short
    return result


def many(run: Run) -> dict[str, float]:
    """As many requests at once through the engine, sampling and scheduling included."""
    from mpt.engine.engine import Engine
    from mpt.engine.request import Delta, Sampling

    n, streams = run.scale.stream_tokens, run.scale.streams
    backend = run.backend(streams * (2 * n + PAGE))
    n_vocab = backend.vocab_size
    engine = Engine(
        backend, byte_tokenizer(), context_length=8192, kv_bytes=streams * (2 * n + PAGE) * backend.bytes_per_token,
        max_running=streams, max_waiting=4 * streams,
    )  # fmt: skip
    engine.start()
    first: list[float] = []

    async def one(k: int, started: float) -> int:
        got = 0
        sampling = Sampling(max_tokens=n, temperature=0.0, ignore_eos=True)
        async for event in engine.generate([4 + k, *text(n - 1, n_vocab)], sampling, request_id=str(k), salt=str(k)):
            if isinstance(event, Delta):
                if not got:
                    first.append(time.perf_counter() - started)
                got += len(event.token_ids)
        return got

    async def storm() -> tuple[int, float]:
        started = time.perf_counter()
        counts = await asyncio.gather(*(one(k, started) for k in range(streams)))
        return sum(counts), time.perf_counter() - started

    try:
        asyncio.run(storm())  # graphs are captured and kernels compiled
        first.clear()
        n_tokens, taken = asyncio.run(storm())
    finally:
        engine.close()
    assert n_tokens == streams * n, f"{n_tokens} tokens instead of {streams * n}"
    result = {"tok_s": n_tokens / taken, "ttft_median_s": statistics.median(first), "seconds": taken}
    run.row(
        f"{streams} requests at once, {n} read and {n} written each", f"{n_tokens / taken:,.0f} tok/s",
        f"first token after {statistics.median(first) * 1000:,.0f} ms (median)",
    )  # fmt: skip
    return result


def peer(run: Run) -> dict[str, float]:
    """transformers' `generate`, one batch of the same size, and a single row."""
    model, n, streams = transformers_model(run.model), run.scale.stream_tokens, run.scale.streams
    result = {}
    for rows in (streams, 1):
        ids = torch.tensor([text(n, run.model.config.vocab_size)] * rows, device=run.device)

        def generate(ids: Tensor = ids) -> None:
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, do_sample=False,
                use_cache=True, pad_token_id=0,
            )  # fmt: skip

        taken = run.seconds(generate, n=1)
        result[str(rows)] = rows * n / taken
        ours = run.found.get("many", {}).get("tok_s")
        beside = f"ours: {ours / result[str(rows)]:.1f} x" if ours and rows == streams else ""
        run.row(f"transformers' generate, batch {rows}, {n} + {n} tokens", f"{rows * n / taken:,.1f} tok/s", beside)
    return result


def transformers_model(model: MPTForCausalLM) -> Any:
    """transformers' in-tree class over the same tensors."""
    from transformers import MptConfig, MptForCausalLM

    config = model.config
    with torch.device("meta"):
        peer = MptForCausalLM(
            MptConfig(
                d_model=config.d_model, n_heads=config.n_heads, n_layers=config.n_layers, vocab_size=config.vocab_size,
                max_seq_len=config.max_seq_len,
            )
        )  # fmt: skip
    peer.load_state_dict(model.state_dict(), assign=True, strict=False)
    peer.tie_weights()
    assert not any(p.is_meta for p in peer.parameters()), "transformers' names have changed"
    return peer.eval()


def byte_tokenizer() -> Any:
    from tokenizers import Tokenizer as Raw
    from tokenizers import decoders, models, pre_tokenizers

    from mpt.tokenizer import Tokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Raw(models.BPE(vocab={t: i for i, t in enumerate(["<|endoftext|>", *letters])}, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.add_special_tokens(["<|endoftext|>"])
    with tempfile.TemporaryDirectory() as folder:
        raw.save(f"{folder}/tokenizer.json")
        return Tokenizer.from_folder(Path(folder))


MEASUREMENTS = (ceilings, decode_one_stream, prefill, book, many, peer)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SCALES), default="7b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON, after each measurement")
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is available to torch; `--shape tiny --device cpu` tries the script", file=sys.stderr)
        return 5
    device, scale = torch.device(asked.device), SCALES[asked.shape]
    is_cuda = device.type == "cuda"
    began = time.perf_counter()
    found: dict[str, Any] = {
        "shape": asked.shape,
        "device": torch.cuda.get_device_name() if is_cuda else platform.processor(),
        "torch": torch.__version__,
        "triton": has_triton(),
        "date": date.today().isoformat(),
    }

    def say(what: str) -> None:
        print(f"{time.perf_counter() - began:6.1f} s  {what}", file=sys.stderr, flush=True)

    def keep() -> None:
        if asked.out:
            asked.out.write_text(json.dumps(found, indent=1) + "\n")

    small = make_model(SCALES["tiny"], device, torch.float32)
    checked = Run(SCALES["tiny"], device, torch.float32, small)
    try:
        for check in (check_kernels, check_backend):
            say(check.__name__)
            found[check.__name__] = check(checked)
    except AssertionError as error:
        print(f"not measured, since what would be measured is wrong here: {error}", file=sys.stderr)
        found["wrong"] = str(error)
        keep()
        return 1
    say(f"making the {asked.shape} model")
    dtype = torch.bfloat16 if is_cuda else torch.float32
    run = Run(scale, device, dtype, make_model(scale, device, dtype), found)
    print(f"{found['device']}, torch {torch.__version__}, {found['date']}; shape {asked.shape}, {dtype}\n")
    print("| what | measured | beside it |\n|---|---|---|")
    failed = False
    for measure in MEASUREMENTS:
        say(measure.__name__)
        try:
            found[measure.__name__] = measure(run)
        except Exception as error:  # the next one may still work, and time on a GPU is dear
            traceback.print_exc()
            found[measure.__name__] = {"error": f"{type(error).__name__}: {error}"}
            run.row(measure.__name__, "failed", type(error).__name__)
            failed = True
        gc.collect()
        if is_cuda:
            found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
            torch.cuda.empty_cache()
        keep()
    say("done")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
