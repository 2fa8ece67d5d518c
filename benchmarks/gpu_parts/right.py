"""Are the kernels and the backend right on this GPU? Kernels beside a formula in float64, logits beside transformers'.

What is wrong here is not measured: `found["wrong"]` says what, and the parts that stand on it are left out.
"""

import contextlib
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu_parts.bench import (
    SCALES,
    Bench,
    largest_difference,
    make_model,
    pool,
    prompt_attention,
    random_text,
    read,
    transformers_model,
)  # fmt: skip
from mpt import attention
from mpt.backends.backend import Work
from mpt.backends.int8_cache import quantize_heads
from mpt.backends.paged_attention import PAGE, Pages, paged_decode, store
from mpt.backends.paged_backend import PagedBackend

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SHAPES = ((4, 4, 64, True), (4, 2, 80, True), (8, 1, 112, False), (2, 2, 128, True))  # heads, KV heads, size, ALiBi


def run(bench: Bench) -> None:
    for name, check in (("kernels beside float64", check_kernels), ("logits beside transformers'", check_backend)):
        bench.measure(name, lambda check=check: _or_wrong(bench, check))


def _or_wrong(bench: Bench, check: Callable[[Bench], None]) -> None:
    try:
        check(bench)
    except AssertionError as error:
        bench.note(wrong=str(error))
        raise


def check_kernels(bench: Bench) -> None:
    """Note the largest error of each kernel in each dtype. Raises AssertionError where one is wrong."""
    worst: dict[str, float] = {}
    torch.manual_seed(0)
    for dtype in TOLERANCE:
        for H, n_kv, D, alibi in SHAPES:
            _check_one(bench, worst, dtype, (H, n_kv, D), alibi)
            bench.note(kernels=worst)
    _check_one(bench, worst, bench.dtype, (2, 2, 128), alibi=True, int8=True)
    for name, error in worst.items():
        bench.row(name, f"{error:.1e} off", "the formula in float64, at most")


def _check_one(
    bench: Bench,
    worst: dict[str, float],
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    alibi: bool,
    int8: bool = False,
) -> None:
    (H, n_kv, D), device = shape, bench.device
    name = str(dtype).removeprefix("torch.") + (" over int8 pages" if int8 else "")
    slopes = attention.alibi_slopes(H).to(device) if alibi else None
    lengths = [1000, 1, 257, 600]
    pages = Pages.empty(1, 20, n_kv, D, torch.int8 if int8 else dtype, device)
    scales = pages.scales_of(0)
    (pages.kv if scales is None else scales).fill_(torch.nan)  # what was not written must not be read
    numbers = torch.randperm(19).add(1).tolist()
    table = torch.zeros(len(lengths), 4, dtype=torch.int32, device=device)
    keys = []
    for row, n in enumerate(lengths):
        n_pages = -(-n // PAGE)
        table[row, :n_pages] = torch.tensor(numbers[:n_pages])
        mine, numbers = torch.tensor(numbers[:n_pages]), numbers[n_pages:]
        k, v = torch.randn(2, n, n_kv, D).to(device, dtype)
        slots = (mine[torch.arange(n) // PAGE] * PAGE + torch.arange(n) % PAGE).to(device)
        store(pages.kv[0], pages.key_norms[0], k, v, slots, scales=scales)
        keys.append((k, v) if scales is None else (_eight_bits(k), _eight_bits(v)))
        if scales is not None:
            of_keys = pages.kv[0, slots // PAGE, 0, :, slots % PAGE] * scales[slots // PAGE, 0, :, slots % PAGE, None]
            assert torch.equal(of_keys, keys[-1][0]), f"{name}: other numbers are stored than on a CPU"
    length = torch.tensor(lengths, dtype=torch.int32, device=device)
    for T in (1, 16):
        q = torch.randn(len(lengths), T, H, D).to(device, dtype)
        out = paged_decode(q, pages.kv[0], pages.key_norms[0], table, length, slopes, D**-0.5, scales=scales)
        for row, (k, v) in enumerate(keys):
            real = min(T, lengths[row])
            expected = formula(q[row, -real:], k, v, slopes, D**-0.5)
            _judge(worst, f"decode {name}", out[row, -real:], expected, TOLERANCE[dtype])
    if dtype == torch.float16 or D not in (80, 128):
        return  # each compilation of FlexAttention takes seconds
    q = torch.randn(300, H, D).to(device, dtype)
    numbers = table[0, : -(-lengths[0] // PAGE)].tolist()
    out = prompt_attention(q, pages, numbers, lengths[0], slopes, D**-0.5)()
    _judge(worst, f"prefill {name}", out, formula(q, *keys[0], slopes, D**-0.5), TOLERANCE[dtype])


def _eight_bits(x: Tensor) -> Tensor:
    """The values that the int8 cache on a CPU has for x, float32."""
    numbers, scales = quantize_heads(x.cpu())
    return (numbers * scales[..., None]).to(x.device)


def _judge(worst: dict[str, float], what: str, found: Tensor, expected: Tensor, allowed: float) -> None:
    error = largest_difference(found, expected)
    assert error < allowed, f"{what}: {error} off, at most {allowed} was expected"
    worst[what] = max(worst.get(what, 0.0), error)


def formula(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, scale: float) -> Tensor:
    """(T, H, D) float64 of q (T, H, D) over k, v (S, KV heads, D)."""
    T, S, groups = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, 1).transpose(0, 1) for x in (k, v))
    distance = torch.arange(S - T, S, device=q.device)[:, None] - torch.arange(S, device=q.device)
    scores = q.double().transpose(0, 1) @ k.transpose(-1, -2) * scale
    if slopes is not None:
        scores = scores - slopes.double()[:, None, None] * distance
    return (scores.masked_fill(distance < 0, -torch.inf).softmax(-1) @ v).transpose(0, 1)


def check_backend(bench: Bench) -> None:
    """A small float32 model beside transformers': prefill in chunks, decoding with and without graphs."""
    shape = SCALES["toy"].model
    model = make_model(shape, bench.device, torch.float32)
    tokens = random_text(600, shape["vocab_size"])
    with torch.inference_mode():
        expected = transformers_model(model)(torch.tensor([tokens], device=bench.device)).logits[0, -1].float()
    for graphs in (False, True) if bench.is_cuda else (False,):
        name = "logits, decoding in CUDA graphs" if graphs else "logits, decoding without graphs"
        with counted_replays() as replays:
            logits = read_and_decode(PagedBackend(model, graphs=graphs), tokens)
        worst = largest_difference(logits, expected)
        bench.note(**{name: worst})
        bench.row(name, f"{worst:.1e} off", "transformers', float32")
        assert worst < 5e-3, f"{name}: {worst} off transformers'"
        assert replays.call_count or not graphs, "no decoding step was replayed from a graph; see what was logged above"


def read_and_decode(backend: PagedBackend, tokens: list[int]) -> Tensor:
    """The logits after the last token, (V,): all but ten read in chunks, those ten one by one."""
    row = pool(backend, 1000).reserve(None, len(tokens) + 16)
    read(backend, row, tokens[:-10], 200)
    for token in tokens[-10:]:
        logits = backend.forward([Work(row, [token], 1)])[0]
        row.length += 1
    return logits


def counted_replays() -> "contextlib.AbstractContextManager[mock.MagicMock]":
    """CUDA graphs as they are, and how often one was replayed."""
    graph = torch.cuda.CUDAGraph
    return mock.patch.object(graph, "replay", autospec=True, side_effect=graph.replay)
