"""The paged backend beside the other one and the naive loop: the same answers, and every page given back.

On CPU in plain torch, a few cases through the kernels under Triton's interpreter, all of it on CUDA if there is one.
"""

import asyncio
import contextlib
import gc
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import mpt
from mpt.backends import compilations, flash, paged_attention
from mpt.backends.backend import Work
from mpt.backends.native import library
from mpt.backends.paged_attention import PAGE, paged_decode
from mpt.backends.paged_backend import PagedBackend, Steps, _prompts
from mpt.backends.torch_backend import TorchBackend
from mpt.engine.endpoint import open_endpoint
from mpt.engine.engine import Engine
from mpt.engine.request import Delta, Event, Sampling, Started
from mpt.engine.speculation import PromptLookup, Speculation
from mpt.errors import MachineRefused
from mpt.generation import generate
from mpt.lora import Adapter, adaptable
from mpt.options import ModelOptions
from mpt.transformers_model import MPTForCausalLM
from tests import flash_2
from tests.in_process import running_engine
from tests.kernels import needs_interpreter

CONTEXT = 2048
SHAPES = {
    "alibi": {},
    "storywriter": {"attn_config": {"alibi": True, "alibi_bias_max": 16, "clip_qkv": 6.0}},
    "grouped": {"attn_config": {"alibi": True, "attn_type": "grouped_query_attention", "kv_n_heads": 2}},
    "one_key_head": {"attn_config": {"alibi": True, "attn_type": "multiquery_attention"}},
    "positions": {"attn_config": {"alibi": False}, "learned_pos_emb": True},
    "normed_with_biases": {"attn_config": {"alibi": True, "qk_ln": True}, "no_bias": False, "logit_scale": 0.5},
    "heads_of_80": {"d_model": 240, "n_heads": 3},
    "clipped": {"attn_config": {"alibi": True, "clip_qkv": 0.5}},  # one number in two
}
on_cpu = pytest.param(("cpu", False), id="torch")
on_cuda = pytest.param(("cuda", True), id="cuda", marks=pytest.mark.gpu)
interpreted = pytest.param(("cpu", True), id="interpreted", marks=needs_interpreter)
anywhere = pytest.mark.parametrize("where", [on_cpu, on_cuda])
with_kernels = pytest.mark.parametrize("where", [on_cpu, interpreted, on_cuda])
needs_c = pytest.mark.skipif(library.why_none() is not None, reason=str(library.why_none()))
both_caches = pytest.mark.parametrize("int8", [False, pytest.param(True, marks=needs_c, id="int8")])


def make(shape: str) -> MPTForCausalLM:
    torch.manual_seed(0)
    settings = {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 260, "max_seq_len": CONTEXT, **SHAPES[shape]}
    settings["attn_config"] = {"alibi": True, **settings.get("attn_config", {})}
    model = MPTForCausalLM(mpt.MPTConfig(**settings)).eval()
    for name, weight in model.named_parameters():
        if "ln" in name or "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(weight, mean=0.0 if name.endswith("bias") else 1.0, std=0.1)
    return model


def paged(model: MPTForCausalLM, where: tuple[str, bool], kv_tokens: int = 1 << 14, **options) -> PagedBackend:
    backend = PagedBackend(model.to(where[0]), triton=where[1], **options)
    backend.allocate(kv_tokens * backend.bytes_per_token)
    pages = backend._pages
    (pages.kv if pages.scales is None else pages.scales).fill_(torch.nan)  # nobody may read what nobody has written
    return backend


@contextlib.contextmanager
def running(backend: PagedBackend, tokenizer, kv_tokens: int = 1 << 14, **options) -> Iterator[Engine]:
    """An engine over it; when it ends, all pages must be back."""
    n_pages = backend.n_free_pages
    kv_bytes = kv_tokens * backend.bytes_per_token
    with running_engine(backend, tokenizer, context_length=CONTEXT, kv_bytes=kv_bytes, **options) as engine:
        yield engine
    engine._scheduler.prefixes = None
    gc.collect()
    assert backend.n_free_pages == n_pages


@pytest.fixture
def model(model) -> Iterator[MPTForCausalLM]:
    """The shared one comes back to the CPU."""
    yield model
    model.to("cpu")


async def collect(engine: Engine, prompt: list[int], sampling: Sampling, adapter: Adapter | None = None) -> list[Event]:
    answer = engine.submit(prompt, sampling, request_id="test", adapter=adapter)
    return [event async for event in answer]


def tokens_of(events: list[Event]) -> list[int]:
    return [token for event in events if isinstance(event, Delta) for token in event.token_ids]


def prompts(n: int, longest: int = 90) -> list[list[int]]:
    numbers = random.Random(1)
    return [[numbers.randrange(4, 260) for _ in range(numbers.randrange(1, longest))] for _ in range(n)]


def greedy(max_tokens: int = 24) -> Sampling:
    return Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


def close(found: Tensor, expected: Tensor, int8: bool = False) -> None:
    """Two layers of float32 sums in another order, on logits of size 1. What lies halfway between two int8 numbers may
    then become the other one, which moves logits by up to 0.008 here; without int8 on one side they are 0.15 apart."""
    torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=0, atol=0.015 if int8 else 3e-4)


class Pair:
    """The same work for both backends, rows side by side. int8: caches of both; the other one's is read by C."""

    def __init__(
        self, model: MPTForCausalLM, where: tuple[str, bool], kv_tokens: int = 1 << 14, int8: bool = False, **options
    ) -> None:
        self.int8 = int8
        self.torch = TorchBackend(make_like(model), int8_cache=int8)
        self.paged = paged(model, where, kv_tokens, int8_cache=int8, **options)
        self.rows: list[tuple] = []

    def row(self, n_tokens: int) -> int:
        self.rows.append((self.torch.reserve(None, n_tokens), self.paged.reserve(None, n_tokens)))
        return len(self.rows) - 1

    def step(self, reads: dict[int, list[int]], n_logits: int | None = None) -> None:
        """Rows read these tokens; the logits of both are compared, of the last n_logits positions or all."""
        both = []
        for side, backend in enumerate((self.torch, self.paged)):
            work = [
                Work(self.rows[row][side], tokens, len(tokens) if n_logits is None else n_logits)
                for row, tokens in reads.items()
            ]
            both.append(backend.forward(work))
        close(both[1], both[0], self.int8)
        for row, tokens in reads.items():
            for side in self.rows[row]:
                side.length += len(tokens)


def make_like(model: MPTForCausalLM) -> MPTForCausalLM:
    """The same model, to stay on the CPU."""
    copy = MPTForCausalLM(model.config).eval()
    copy.load_state_dict(model.state_dict())
    return copy


def text(seed: int, n: int) -> list[int]:
    return random.Random(seed).choices(range(4, 260), k=n)


# -- logits, beside TorchBackend -------------------------------------------------------------------------------------


@anywhere
@both_caches
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_the_other_backend_in_any_mix(where, shape, int8) -> None:
    pair = Pair(make(shape), where, int8=int8)
    a, b, c, d = (pair.row(700) for _ in range(4))
    pair.step({a: text(1, 500), b: text(2, 3), c: text(3, 40)})  # two chunks and a few tokens
    pair.step({a: [7], b: [8], c: [9]}, 1)  # one each: the step of fixed shape
    pair.step({a: [7], d: text(4, 300), b: text(5, 16), c: [9]})  # decoding, guesses and prefill
    pair.step({d: text(6, 17), a: text(7, 2)})
    pair.step({a: [1]}, 1)
    pair.step({a: [1], b: [2, 3]}, 0)  # nobody asks for logits
    pair.step({d: [5], a: [6], b: [7], c: [8]}, 1)


@with_kernels
@both_caches
def test_the_kernels_give_the_same_logits(where, int8) -> None:
    pair = Pair(make("grouped"), where, int8=int8)
    a, b = pair.row(300), pair.row(40)
    pair.step({a: text(1, 254), b: text(2, 2)}, 1)
    for token in range(3):  # across the border of a page
        pair.step({a: [5 + token], b: [9]}, 1)
    pair.step({a: text(3, 5), b: [9]})


@anywhere
def test_more_rows_than_a_graph_has_and_numbers_between(where) -> None:
    pair = Pair(make("alibi"), where, kv_tokens=80 * PAGE)
    rows = [pair.row(20) for _ in range(70)]
    pair.step({row: text(row, 1 + row % 5) for row in rows}, 1)
    for n in (70, 64, 33, 3, 1):
        pair.step({row: [row + 4] for row in rows[:n]}, 1)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("kernel", ["flex", pytest.param("flex over int8", marks=needs_c), "flash_attn"])
@pytest.mark.parametrize("shape", ["storywriter", "grouped", "positions"])
def test_prompts_read_as_on_cuda_give_the_same_logits(monkeypatch, shape, kernel) -> None:
    pair = Pair(make(shape), ("cpu", False), int8=kernel == "flex over int8")
    if kernel != "flash_attn":
        pair.paged._prompts_by = "FlexAttention"
    else:
        pair.paged._prompts_by = "flash-attn 2"
        monkeypatch.setattr(flash, "flash_2", lambda: flash_2.flash_attn_varlen_func)
    a, b = pair.row(700), pair.row(300)
    pair.step({a: text(1, 300), b: text(2, 20)})
    pair.step({a: text(3, 212), b: text(2, 2)})  # to the end of a page
    pair.step({a: text(4, 17), b: text(5, 200)})
    pair.step({a: [5], b: [6]}, 1)


class Recorded:
    """In a graph's place on a CPU: numbers and answers in memory of fixed size, written over by the next replay."""

    def __init__(self, step, numbers: Tensor, pool: object) -> None:
        self.step, self.numbers = step, numbers
        self.answers = step(self.numbers)

    def replay(self, numbers: Tensor) -> Tensor:
        assert numbers.shape == self.numbers.shape
        self.numbers.copy_(numbers)
        self.answers.copy_(self.step(self.numbers))
        return self.answers


def test_no_step_asks_the_kernel_for_a_shape_that_was_not_read_at_start(monkeypatch) -> None:
    """Triton compiles anew for other numbers of queries, widths and strides (1, of 16, others), and numbers of splits,
    which follow from the rows and the width; those are never more than at start."""
    asked: dict[tuple, int] = {}

    def noted(q: Tensor, kv: Tensor, norms: Tensor, table: Tensor, *rest, **options) -> Tensor:
        strides = (*q.stride()[:3], *kv.stride()[:4], norms.stride(0), table.stride(0))
        key = (q.shape[1], table.shape[1], tuple(1 if s == 1 else s % 16 == 0 for s in strides))
        asked[key] = max(asked.get(key, 0), len(q))
        return paged_decode(q, kv, norms, table, *rest, **options)

    monkeypatch.setattr("mpt.backends.paged_backend.paged_decode", noted)
    steps = Steps(n_rows=6, n_prompt=64, context=20 * PAGE)
    backend = paged(make("alibi"), ("cpu", False), kv_tokens=80 * PAGE, steps=steps)
    backend.warm_up()
    at_start = dict(asked)
    asked.clear()
    numbers = random.Random(0)
    rows = [backend.reserve(None, 20 * PAGE if k == 0 else 3 * PAGE) for k in range(6)]
    for _ in range(120):
        rows[0].length = numbers.choice([5, 2047, 2048, 4000, 19 * PAGE])
        chosen = numbers.sample(rows, numbers.randrange(1, 7))
        backend.forward([Work(row, text(1, numbers.choice([1, 1, 1, 2, 7, 16, 30])), 1) for row in chosen])
        backend.forward([Work(row, [7], 1) for row in chosen])
    assert {key[:2] for key in asked} == {(1, 8), (1, 32), (16, 8), (16, 32)}  # all of them have been met
    assert all(asked[key] <= at_start.get(key, 0) for key in asked)


@both_caches
def test_every_step_of_one_token_finds_its_graph_from_the_start(monkeypatch, int8) -> None:
    monkeypatch.setattr("mpt.backends.paged_backend._Graph", Recorded)
    steps = Steps(n_rows=5, n_prompt=64, context=9 * PAGE)
    pair = Pair(make("alibi"), ("cpu", False), kv_tokens=80 * PAGE, steps=steps, graphs=True, int8=int8)
    assert set(pair.paged._graphs) == {(n, width) for n in (1, 2, 4, 8) for width in (8, 32)}
    before = compilations.of_this_thread()
    rows = [pair.row(20) for _ in range(5)]
    long = pair.row(9 * PAGE)
    pair.step({long: text(1, 8 * PAGE - 1)}, 1)
    for n in (1, 5, 3, 4, 1):
        pair.step({row: [row + 4] for row in rows[:n]}, 1)
    pair.step({long: [5], rows[0]: [6]}, 1)  # eight pages still
    pair.step({long: [5], rows[0]: [6]}, 1)
    pair.step({rows[0]: [5, 6]}, 1)  # several tokens: none
    assert compilations.of_this_thread() == before and len(pair.paged._graphs) == 8


def test_more_than_256_rows_find_their_graph_from_the_start(monkeypatch) -> None:
    """The graphs alone are captured: reading all else for so many rows takes a CPU long."""
    monkeypatch.setattr("mpt.backends.paged_backend._Graph", Recorded)
    pair = Pair(make("one_key_head"), ("cpu", False), kv_tokens=310 * PAGE, steps=Steps(n_rows=300, context=PAGE))
    pair.paged._has_graphs = True
    pair.paged._graphs.capture_all()
    before = compilations.of_this_thread()
    rows = [pair.row(20) for _ in range(300)]
    for n in (300, 257):
        pair.step({row: [row % 256 + 4] for row in rows[:n]}, 1)
    assert compilations.of_this_thread() == before and max(pair.paged._graphs) == (384, 8)


def test_no_prompt_is_compiled_for_that_is_read_after_the_start(monkeypatch) -> None:
    """Dynamo decides when torch compiles anew; what it would hand to a compiler runs as it is here.

    Chunks of 512 and of 2,048 that need no padding have as many queries as keys.
    """
    kernel = torch.compile(paged_attention.flex_attention, dynamic=True, fullgraph=True, backend="eager")
    monkeypatch.setattr(paged_attention, "flex", lambda q: kernel)
    torch._dynamo.reset()
    counters.clear()
    backend = paged(make("grouped"), ("cpu", False), steps=Steps(n_prompt=2048, context=4096))
    backend._prompts_by = "FlexAttention"
    backend.warm_up()
    at_start = counters["stats"]["unique_graphs"]
    assert at_start > 0
    for stored, n in ((0, 512), (0, 2048), (0, 17), (0, 256), (0, 1024), (512, 512), (2048, 2048), (700, 333)):
        row = backend.reserve(None, stored + n)
        row.length = stored
        backend.forward([Work(row, text(1, n), 1)])
    rows = [backend.reserve(None, 512) for _ in range(3)]
    backend.forward([Work(row, text(1, n), 1) for row, n in zip(rows, (512, 30, 512), strict=True)])
    assert counters["stats"]["unique_graphs"] == at_start
    torch._dynamo.reset()


def test_fresh_prompts_of_whole_pages_are_read_at_start() -> None:
    assert {((0, 512),), ((0, 2048),)} <= {tuple(parts) for parts in _prompts(8192, 65_536)}
    assert all(stored + n <= 600 for parts in _prompts(8192, 600) for stored, n in parts)  # of a row
    assert max(n for parts in _prompts(300, 65_536) for _, n in parts if parts[0][0] == 0) <= 300  # of a step


def test_what_cannot_be_captured_runs_in_a_larger_graph_or_without(monkeypatch) -> None:
    """And only a short while: a third try finds memory."""
    refused: list[int] = []

    class Tight(Recorded):
        def __init__(self, step, numbers: Tensor, pool: object) -> None:
            if len(numbers) != 4 or len(refused) < 2:
                refused.append(len(numbers))
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().__init__(step, numbers, pool)

    monkeypatch.setattr("mpt.backends.paged_backend._Graph", Tight)
    monkeypatch.setattr("mpt.backends.graphs._AGAIN_S", 0.0)
    pair = Pair(make("alibi"), ("cpu", False), steps=Steps(n_rows=4, n_prompt=64), graphs=True)
    rows = [pair.row(20) for _ in range(4)]
    assert refused == [4, 2, 1] and not len(pair.paged._graphs)
    pair.step({rows[0]: [5]}, 1)
    pair.step({row: [6] for row in rows[:3]}, 1)
    assert set(pair.paged._graphs) == {(4, 8)} and refused == [4, 2, 1, 1]
    pair.step({row: [7] for row in rows[:2]}, 1)
    pair.step({rows[3]: [8]}, 1)
    assert refused == [4, 2, 1, 1]  # those of two rows and of one run in it


# -- rows and pages --------------------------------------------------------------------------------------------------


@anywhere
@both_caches
def test_a_copy_shares_full_pages_and_copies_the_last(where, int8) -> None:
    pair = Pair(make("alibi"), where, int8=int8)
    a = pair.row(700)
    pair.step({a: text(1, 600)}, 1)
    n_free = pair.paged.n_free_pages
    source = pair.rows[a]
    pair.rows.append((pair.torch.copy(source[0], 550, 560), pair.paged.copy(source[1], 550, 560)))
    b = 1
    copied = pair.rows[b][1]
    assert copied.length == 550 and copied.capacity == 3 * PAGE
    assert copied.pages[:2] == source[1].pages[:2] and copied.pages[2] != source[1].pages[2]
    assert pair.paged.n_free_pages == n_free - 1
    pair.step({a: text(2, 30), b: text(3, 30)})  # both write on from the middle of a page
    pair.step({a: [5], b: [5]}, 1)
    pair.rows[a] = pair.rows[b]
    del source
    gc.collect()
    assert pair.paged.n_free_pages == n_free  # the first row's own page is back, the shared ones are not
    pair.step({b: [6]}, 1)


@anywhere
@both_caches
@pytest.mark.parametrize("writer", ["the source", "the copy"])
def test_a_shared_page_is_copied_before_one_writes_into_it(where, writer, int8) -> None:
    """As when a kept prefix is cut back and written on."""
    pair = Pair(make("alibi"), where, int8=int8)
    a = pair.row(600)
    pair.step({a: text(1, 520)}, 1)
    first = pair.rows[a]
    second = (pair.torch.copy(first[0], 512, 600), pair.paged.copy(first[1], 512, 600))
    pair.rows.append(second)
    cut, other = (0, 1) if writer == "the source" else (1, 0)
    for side in pair.rows[cut]:
        side.length = 300
    shared = list(pair.rows[other][1].pages)
    pair.step({cut: text(2, 100)})
    assert pair.rows[other][1].pages == shared
    assert pair.rows[cut][1].pages[0] == shared[0] and pair.rows[cut][1].pages[1] != shared[1]
    pair.step({other: [5], cut: [6]}, 1)
    pair.step({other: text(3, 20), cut: text(4, 20)})
    del first, second, side
    pair.rows.clear()
    assert pair.paged.n_free_pages == 64


def test_the_bounds_of_keys_go_with_a_copied_page_and_not_with_a_freed_one() -> None:
    backend = paged(make("alibi"), ("cpu", False), kv_tokens=4 * PAGE)
    row = backend.reserve(None, 300)
    backend.forward([Work(row, text(1, 290), 0)])
    row.length = 290
    norms = backend._pages.key_norms[:, row.pages]
    assert (norms > 0).all()
    copied = backend.copy(row, 280, 300)
    assert torch.equal(backend._pages.key_norms[:, copied.pages], norms)
    del row, copied
    assert backend.n_free_pages == 4
    assert not backend._pages.key_norms[:, backend.reserve(None, 4 * PAGE).pages].any()


def test_pages_come_back_also_from_cycles_and_an_empty_pool_says_so() -> None:
    backend = paged(make("alibi"), ("cpu", False), kv_tokens=4 * PAGE)
    row = backend.reserve(None, 3 * PAGE)
    with pytest.raises(RuntimeError, match="2 pages are asked for and 1 of 5"):
        backend.copy(row, PAGE, 3 * PAGE)
    assert backend.n_free_pages == 1
    row.itself = row  # type: ignore[attr-defined]
    del row
    assert len(backend.reserve(None, 4 * PAGE).pages) == 4


def test_int8_pages_are_as_many_as_their_bytes_say() -> None:
    """Of heads of 16: 2 x 4 heads x 2 layers, 32 bytes each in bfloat16 and 16 + 4 in int8."""
    model = make("alibi").bfloat16()
    plain, int8 = PagedBackend(model), PagedBackend(model, int8_cache=True)
    assert (plain.bytes_per_token, int8.bytes_per_token) == (16 * 32, 16 * 20)
    for backend, n_pages in ((plain, 25), (int8, 40)):
        backend.allocate(25 * PAGE * 16 * 32)
        assert backend.n_free_pages == n_pages
    scales = int8._pages.scales
    assert scales is not None and int8._pages.kv.nbytes + scales.nbytes == 41 * PAGE * 16 * 20  # with page 0


def test_capacity_is_in_pages_and_a_pool_that_is_too_large_is_refused() -> None:
    backend = PagedBackend(make("alibi"))
    assert [backend.capacity_for(n) for n in (1, 256, 257)] == [256, 256, 512]
    with pytest.raises(MachineRefused, match="lower `--kv-gb`"):
        backend.allocate(1 << 60)


@anywhere
def test_warming_up_leaves_nothing_behind(where) -> None:
    small = MPTForCausalLM(
        mpt.MPTConfig(d_model=64, n_heads=4, n_layers=1, max_seq_len=24, attn_config={"alibi": False})
    )
    assert small.config.has_wpe
    for model, kv_tokens in ((make("alibi"), PAGE), (make("alibi"), 1 << 12), (small, 1 << 12)):
        backend = paged(model, where, kv_tokens)
        n_free = backend.n_free_pages
        backend.warm_up()
        assert backend.n_free_pages == n_free == kv_tokens // PAGE


# -- in the engine, beside the naive loop ----------------------------------------------------------------------------


@anywhere
@pytest.mark.parametrize("chunk", [7, 512])
async def test_greedy_tokens_equal_the_naive_loop_whatever_shares_the_batch(model, tokenizer, where, chunk):
    asked = prompts(12)
    expected = [generate(model, prompt, 24) for prompt in asked]
    with running(paged(model, where), tokenizer, prefill_chunk=chunk, max_running=5) as engine:
        answers = await asyncio.gather(*(collect(engine, prompt, greedy()) for prompt in asked))
    assert [tokens_of(events) for events in answers] == expected


@needs_c
@anywhere
async def test_greedy_tokens_over_int8_pages_are_those_of_the_int8_cache_on_cpu(model, tokenizer, where):
    asked = prompts(6)
    backend = TorchBackend(make_like(model), int8_cache=True)
    expected = []
    for prompt in asked:
        row, unread, said = backend.reserve(None, len(prompt) + 24), prompt, list[int]()
        while len(said) < 24:
            logits = backend.forward([Work(row, unread, 1)])
            row.length += len(unread)
            said.append(int(logits.argmax()))
            unread = said[-1:]
        expected.append(said)
    with running(paged(model, where, int8_cache=True), tokenizer, prefill_chunk=30, max_running=4) as engine:
        answers = await asyncio.gather(*(collect(engine, prompt, greedy()) for prompt in asked))
    assert [tokens_of(events) for events in answers] == expected


@pytest.mark.parametrize("where", [interpreted])
async def test_greedy_tokens_through_the_interpreted_kernels(model, tokenizer, where):
    asked = prompts(2, longest=40)
    expected = [generate(model, prompt, 4) for prompt in asked]
    with running(paged(model, where), tokenizer, prefill_chunk=30) as engine:
        answers = await asyncio.gather(*(collect(engine, prompt, greedy(4)) for prompt in asked))
    assert [tokens_of(events) for events in answers] == expected


@anywhere
async def test_greedy_tokens_survive_preemption(model, tokenizer, where):
    """Room for four pages, and six that grow from one to two: somebody must be sent back, and no page is lost."""
    asked = [text(seed, 200) for seed in range(6)]
    expected = [generate(model, prompt, 130) for prompt in asked]
    with running(paged(model, where, 1024), tokenizer, kv_tokens=1024, max_running=6) as engine:
        answers = await asyncio.gather(*(collect(engine, prompt, greedy(130)) for prompt in asked))
        assert engine.stats().n_preemptions > 0
    assert [tokens_of(events) for events in answers] == expected


@anywhere
async def test_greedy_tokens_over_int8_pages_survive_preemption_and_cut_prefixes(model, tokenizer, where):
    """Those that nobody disturbs, where four pages and six rows that grow from one to two send some of them back."""
    asked = [text(0, 150) + text(seed, 50) for seed in range(6)]
    with running(paged(model, where, int8_cache=True), tokenizer) as engine:
        expected = [tokens_of(await collect(engine, prompt, greedy(70))) for prompt in asked]
    small = paged(model, where, 1024, int8_cache=True)
    with running(small, tokenizer, kv_tokens=1024, max_running=6) as engine:
        answers = await asyncio.gather(*(collect(engine, prompt, greedy(70)) for prompt in asked))
        stats = engine.stats()
        assert stats.n_preemptions > 0 and stats.prefix_hits_tokens > 0
    assert [tokens_of(events) for events in answers] == expected


@anywhere
async def test_prefixes_are_shared_and_their_budget_never_runs_the_pool_dry(model, tokenizer, where):
    """The pool has exactly the pages of the budget; requests share beginnings of all lengths, cut and written on."""
    book, numbers = text(9, 900), random.Random(3)
    asked = [book[: numbers.randrange(100, 900)] + text(k, numbers.randrange(1, 60)) for k in range(14)]
    expected = [generate(model, prompt, 12) for prompt in asked]
    with running(paged(model, where, 3072), tokenizer, kv_tokens=3072, max_running=3) as engine:
        answers = await asyncio.gather(*(collect(engine, prompt, greedy(12)) for prompt in asked))
        assert engine.stats().prefix_hits_tokens > 1000
    assert [tokens_of(events) for events in answers] == expected
    assert any(isinstance(events[0], Started) and events[0].cached_tokens > PAGE for events in answers)


@anywhere
async def test_guesses_change_no_answer(model, tokenizer, where):
    asked = [text(k, 12) * 3 + text(k, 4) for k in range(4)]
    expected = [generate(model, prompt, 60) for prompt in asked]
    speculation = Speculation(PromptLookup())
    with running(paged(model, where), tokenizer, speculation=speculation) as engine:
        answers = await asyncio.gather(*(collect(engine, prompt, greedy(60)) for prompt in asked))
        assert engine.stats().n_guessed > 0
    assert [tokens_of(events) for events in answers] == expected


@anywhere
async def test_rows_with_different_adapters_share_a_step(model, tokenizer, where):
    """And steps without one, in between, are as if there had never been any."""

    def adapter(seed: int) -> Adapter:
        numbers = torch.Generator().manual_seed(seed)
        pairs = {}
        for name, linear in adaptable(model):
            a = torch.randn(4, linear.in_features, generator=numbers) * 0.2
            pairs[name] = (a, torch.randn(linear.out_features, 4, generator=numbers) * 0.2)
        return Adapter(f"a{seed}", pairs)

    def merged(adapter: Adapter | None) -> MPTForCausalLM:
        copy = make_like(model)
        for name, (a, b) in adapter.pairs.items() if adapter else ():
            copy.get_submodule(name).weight.data += b @ a
        return copy

    chosen = [None, adapter(1), adapter(2), adapter(1)]
    asked = [text(k, 30) for k in range(4)]
    expected = [generate(merged(one), prompt, 16) for one, prompt in zip(chosen, asked, strict=True)]
    moved = {
        one: Adapter(one.name, {name: (a.to(where[0]), b.to(where[0])) for name, (a, b) in one.pairs.items()})
        for one in chosen
        if one
    }
    copy = make_like(model)  # its hooks would stay on the shared one
    with running(paged(copy, where), tokenizer, prefill_chunk=16) as engine:
        answers = await asyncio.gather(
            *(
                collect(engine, prompt, greedy(16), moved[one] if one else None)
                for one, prompt in zip(chosen, asked, strict=True)
            )
        )
        plain = await collect(engine, asked[0], greedy(16))
    assert [tokens_of(events) for events in answers] == expected
    assert tokens_of(plain) == expected[0]


# -- on a GPU only ---------------------------------------------------------------------------------------------------


@pytest.mark.gpu
async def test_steps_are_captured_and_answer_as_without_graphs(model, tokenizer):
    asked = prompts(12)
    answers = []
    for graphs in (True, False):
        backend = PagedBackend(model.to("cuda"), graphs=graphs)
        backend.allocate((1 << 14) * backend.bytes_per_token)
        with running(backend, tokenizer, max_running=5) as engine:
            events = await asyncio.gather(*(collect(engine, prompt, greedy()) for prompt in asked))
        assert bool(backend._graphs) == graphs and engine.stats().n_compiled == {}
        answers.append([tokens_of(one) for one in events])
    assert answers[0] == answers[1]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
async def test_a_served_model_on_cuda_takes_this_backend(dtype):
    endpoint = open_endpoint("mpt-tiny", ModelOptions("mpt-tiny", device="cuda", dtype=dtype, kv_gb=0.064))
    try:
        assert isinstance(endpoint.engine._backend, PagedBackend)
        events = await collect(endpoint.engine, endpoint.tokenizer.encode("name: Ada"), greedy(8))
        assert len(tokens_of(events)) == 8
    finally:
        endpoint.engine.close()
