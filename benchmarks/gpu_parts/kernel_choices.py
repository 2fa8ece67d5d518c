"""Which way of computing is the fastest on this card: figures to choose kernels and their options by.

Not a goal among them: the products of each matrix at several numbers of tokens, the decode kernel with more and fewer
splits and over int8 pages, FlexAttention with other options, how long a block mask takes, and whether torch's own
flash-attention takes ALiBi's slopes. Times are of the GPU alone; variants of one thing are compared in what they
compute, too.
"""

import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks.gpu_parts.bench import Bench, largest_difference, prompt_attention
from mpt import attention
from mpt.backends.int8_cache import head_bytes
from mpt.backends.paged_attention import DROP, PAGE, Pages, paged_decode, store

SPLITS = (1, 4, 8, 16, 32, 64)
FLASH_TOLERANCE = 0.05  # above this the slopes were ignored
OPTIONS = {"IS_DIVISIBLE": True, "BLOCKS_ARE_CONTIGUOUS": True, "ROWS_GUARANTEED_SAFE": True}
BLOCK = 128
ALIBI_MAX = 16.0  # StoryWriter's
_COLD_BYTES = 400_000_000  # weights that are read in turn, so that no cache holds them


def run(bench: Bench) -> None:
    bench.measure("torch's flash-attention with ALiBi", lambda: bundled_flash(bench))
    bench.measure("products", lambda: products(bench))
    for new, total in bench.scale.attended:
        bench.measure(f"attention of prompts, {new:,} of {total:,}", lambda n=new, t=total: prompts(bench, n, t))
    for rows, length in bench.scale.decoded:
        bench.measure(f"the decode kernel, {rows} of {length:,}", lambda r=rows, n=length: decode(bench, r, n))
    for length in bench.scale.masked:
        bench.measure(f"a block mask of {length:,}", lambda n=length: masks(bench, n))


def heads(bench: Bench) -> tuple[int, int]:
    """How many, and how wide."""
    n_heads = bench.scale.model["n_heads"]
    return n_heads, bench.scale.model["d_model"] // n_heads


def note(bench: Bench, table: str, name: str, numbers: dict[str, Any]) -> None:
    bench.note(**{table: bench.found.get(table, {}) | {name: numbers}})


def products(bench: Bench) -> None:
    d, vocab = bench.scale.model["d_model"], bench.scale.model["vocab_size"]
    shapes = {
        "Wqkv": (3 * d, d),
        "out_proj": (d, d),
        "up_proj": (4 * d, d),
        "down_proj": (d, 4 * d),
        "head": (vocab, d),
    }
    for name, (n_out, n_in) in shapes.items():
        n_weights = max(1, _COLD_BYTES // (n_out * n_in * 2)) if bench.is_cuda else 1
        weights = [torch.randn(n_out, n_in, device=bench.device).to(bench.dtype) for _ in range(n_weights)]
        for n in bench.scale.products:
            x = torch.randn(n, n_in, device=bench.device).to(bench.dtype)
            seconds = bench.kernel_seconds(lambda x=x, weights=weights: [F.linear(x, w) for w in weights]) / n_weights
            gb_s, tflop_s = weights[0].nbytes / seconds / 1e9, 2 * n * n_out * n_in / seconds / 1e12
            note(bench, "products", f"{name} {n}", {"seconds": seconds, "gb_s": gb_s, "tflop_s": tflop_s})
            bench.row(f"{name}, {n} tokens", f"{seconds * 1e6:,.1f} us", f"{gb_s:,.0f} GB/s, {tflop_s:,.1f} TFLOP/s")
        del weights
        bench.free()


def bundled_flash(bench: Bench) -> None:
    """Whether the flash-attention inside this torch takes ALiBi's slopes; then nothing else has to be installed."""
    if not bench.is_cuda:
        bench.leave_out("torch's flash-attention with ALiBi", "it is for CUDA")
        return
    H, D = heads(bench)
    n = 512
    q, k, v = torch.randn(3, 1, n, H, D, device=bench.device).to(torch.bfloat16)
    slopes = attention.alibi_slopes(H).to(bench.device)
    try:
        forward = torch.ops.aten._flash_attention_forward
        out = forward(q, k, v, None, None, n, n, 0.0, True, False, scale=D**-0.5, alibi_slopes=slopes)[0]
    except (RuntimeError, TypeError) as error:
        bench.note(bundled_flash={"refused": str(error)[:300]})
        bench.row("torch's flash-attention with ALiBi", "refuses the slopes", str(error).splitlines()[0][:120])
        return
    wide = [x.transpose(1, 2).float() for x in (q, k, v)]
    bias, allowed = attention.alibi_bias(slopes, n), attention.causal_mask(n, n, q.device)
    expected = attention.eager(*wide, scale=D**-0.5, bias=bias, allowed=allowed).transpose(1, 2)
    off = largest_difference(out, expected)
    bench.note(bundled_flash={"off": off, "takes_slopes": off < FLASH_TOLERANCE})
    word = "takes the slopes" if off < FLASH_TOLERANCE else "ignores the slopes"
    bench.row("torch's flash-attention with ALiBi", word, f"{off:.1e} off the formula")


def masks(bench: Bench, T: int) -> None:
    """What a mask of documents costs by `create_block_mask`, on the host and in memory."""
    documents = torch.zeros(1, T, dtype=torch.long, device=bench.device)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (documents[b, i] == documents[b, j]) & (documents[b, j] >= 0)

    def make() -> BlockMask:
        return create_block_mask(visible, 1, None, T, T, device=bench.device)

    bench.reset_peak()
    before = torch.cuda.memory_allocated() if bench.is_cuda else 0
    make()
    n_bytes = (torch.cuda.max_memory_allocated() - before) / T**2 if bench.is_cuda else None
    bench.sync()
    started = time.perf_counter()
    make()
    host = time.perf_counter() - started
    bench.sync()
    total = time.perf_counter() - started
    note(bench, "masks", str(T), {"host_s": host, "seconds": total, "bytes_a_pair": n_bytes})
    peak = "" if n_bytes is None else f"peak of {n_bytes:.1f} bytes a pair"
    bench.row(f"create_block_mask, {T:,} tokens", f"{host * 1e3:.1f} ms on the host, {total * 1e3:.1f} in all", peak)


def prompts(bench: Bench, T: int, S: int) -> None:
    """The product's attention over a chunk of a prompt, and FlexAttention called in other ways."""
    H, D = heads(bench)
    flop = 4 * H * D * (T * (S - T) + T * (T + 1) / 2)
    slopes = attention.alibi_slopes(H, ALIBI_MAX).to(bench.device)
    q = torch.randn(1, H, T, D, device=bench.device).to(bench.dtype)
    n_pages = -(-S // PAGE)
    pages = Pages.empty(1, n_pages + 1, H, D, bench.dtype, bench.device)
    pages.kv.normal_()
    pages.key_norms[0] = 1.0001 * pages.kv[0, :, 0].float().norm(dim=-1).amax(-1)
    k, v = (pages.kv[0, 1:, half].transpose(0, 1).reshape(1, H, n_pages * PAGE, D) for half in (0, 1))
    if bench.is_cuda:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    expected: Tensor | None = None

    def variant(name: str, call: Any) -> None:
        nonlocal expected
        key = f"{T:,} of {S:,}, {name}"
        started = time.perf_counter()
        try:
            with torch.inference_mode():
                out = call()
                bench.sync()
                first = time.perf_counter() - started
                seconds = bench.kernel_seconds(call, 10)
        except Exception as error:  # an option that this torch or this card does not know
            note(bench, "prompts", key, {"refused": f"{type(error).__name__}: {str(error)[:300]}"})
            bench.row(f"attention of prompts, {key}", "refused", f"{type(error).__name__}: {str(error)[:100]}")
            return
        expected = out if expected is None else expected
        off = largest_difference(out, expected)
        note(
            bench, "prompts", key, {"seconds": seconds, "tflop_s": flop / seconds / 1e12, "first_s": first, "off": off}
        )
        bench.row(
            f"attention of prompts, {key}", f"{seconds * 1e3:.2f} ms, {flop / seconds / 1e12:,.0f} TFLOP/s",
            f"first call {first:.1f} s, {off:.1e} off the first way",
        )  # fmt: skip

    numbers = list(range(1, n_pages + 1))
    attend = prompt_attention(q[0].transpose(0, 1), pages, numbers, S, slopes, D**-0.5)
    variant("as the product does it", lambda: attend().transpose(0, 1)[None])
    kernel = torch.compile(flex_attention, dynamic=True) if bench.is_cuda else flex_attention
    whole = {"int64 offset": (torch.int64, None), "int32 offset": (torch.int32, None)}
    ways: dict[str, tuple[torch.dtype, dict[str, bool] | None]] = whole | {
        "int32, options": (torch.int32, OPTIONS),
        "int32, options, TMA": (torch.int32, OPTIONS | {"USE_TMA": True}),
    }
    for name, (dtype, options) in ways.items():
        if T % BLOCK or S % PAGE or bench.left_s < 15:
            continue  # the options are for whole blocks
        past = torch.full((), S - T, device=bench.device, dtype=dtype)

        def add_alibi(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor, past: Tensor = past) -> Tensor:
            return score + slopes[h] * (j - i - past)

        mask = causal_blocks(T, S, past)
        variant(
            name,
            lambda mod=add_alibi, mask=mask, options=options: kernel(
                q, k, v, score_mod=mod, block_mask=mask, scale=D**-0.5, kernel_options=options
            ),
        )


def causal_blocks(T: int, S: int, past: Tensor) -> BlockMask:
    """The last T of S positions, whole blocks both, each seeing itself and what is before it."""
    device, n_blocks = past.device, S // BLOCK

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i + past

    n_whole = torch.arange((S - T) // BLOCK, n_blocks, device=device, dtype=torch.int32)  # before each one's own block
    whole = torch.arange(n_blocks, device=device, dtype=torch.int32).expand(len(n_whole), -1)
    own = n_whole[:, None] + torch.zeros(n_blocks, device=device, dtype=torch.int32)
    tables = (torch.ones_like(n_whole), own, n_whole, whole)
    n_partly, partly, n_whole, whole = (table[None, None].contiguous() for table in tables)
    return BlockMask.from_kv_blocks(
        n_partly, partly, n_whole, whole, BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(T, S)
    )


def decode(bench: Bench, B: int, S: int) -> None:
    """The decode kernel with more and fewer splits and over int8 pages, leaving out pages of no weight or none."""
    H, D = heads(bench)
    P = -(-S // PAGE)
    pages, in_int8 = (Pages.empty(1, B * P + 1, H, D, dtype, bench.device) for dtype in (bench.dtype, torch.int8))
    table = torch.arange(1, B * P + 1, device=bench.device, dtype=torch.int32).view(B, P)
    lengths = torch.full((B,), S, dtype=torch.int32, device=bench.device)
    slopes = attention.alibi_slopes(H, ALIBI_MAX).to(bench.device)
    for row in range(B):
        k, v = torch.randn(2, S, H, D, device=bench.device).to(bench.dtype)
        position = torch.arange(S, device=bench.device)
        slots = table[row].long()[position // PAGE] * PAGE + position % PAGE
        for pool in (pages, in_int8):
            store(pool.kv[0], pool.key_norms[0], k, v, slots, scales=pool.scales_of(0))
    q = torch.randn(B, 1, H, D, device=bench.device).to(bench.dtype)
    expected: Tensor | None = None
    for drop in (0.0, DROP):
        for pool, n_splits in ((pages, None), *((pages, n) for n in SPLITS), (in_int8, None)):

            def attend(pool: Pages = pool, drop: float = drop, n_splits: int | None = n_splits) -> Tensor:
                return paged_decode(
                    q, pool.kv[0], pool.key_norms[0], table, lengths, slopes, D**-0.5,
                    scales=pool.scales_of(0), drop=drop, n_splits=n_splits,
                )  # fmt: skip

            out = attend()
            expected = out if expected is None else expected
            seconds, off = bench.kernel_seconds(attend), largest_difference(out, expected)
            n_bytes = 2 * B * S * H * (head_bytes(D) if pool is in_int8 else D * q.element_size())
            splits = "the product's splits" if n_splits is None else f"{n_splits} splits"
            key = f"{B} rows of {S:,}, {splits}" + (", int8" if pool is in_int8 else "")
            key += ", pages left out" if drop else ""
            note(bench, "decode", key, {"seconds": seconds, "gb_s": n_bytes / seconds / 1e9, "off": off})
            bench.row(
                f"decode, {key}", f"{seconds * 1e6:,.1f} us, {n_bytes / seconds / 1e9:,.0f} GB/s if all were read",
                f"{off:.1e} off the first way",
            )  # fmt: skip
