"""Guesses that the paged backend checks: a row's few tokens in one step, through graphs and outside them.

Beside the same backend without guesses, `TorchBackend`, and the naive loop. In the place of graphs, which need CUDA, is
`Recorded`; a few cases run through the kernels under Triton's interpreter.
"""

import asyncio
import gc
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import mpt
from mpt.backends import compilations, paged_backend
from mpt.backends.backend import CHEAP_TOKENS, FEW_TOKENS, Work
from mpt.backends.graphs import guessed_shapes, rows_for, tokens_for
from mpt.backends.paged_attention import PAGE, paged_decode
from mpt.backends.paged_backend import PagedBackend, Steps
from mpt.backends.torch_backend import TorchBackend
from mpt.engine.speculation import DraftModel, Guesser, PromptLookup, Speculation
from mpt.generation import generate
from mpt.transformers_model import MPTForCausalLM
from tests.mpt.backends.test_paged_backend import (
    Pair,
    Recorded,
    close,
    collect,
    greedy,
    interpreted,
    make,
    make_like,
    on_cpu,
    on_cuda,
    paged,
    running,
    text,
    tokens_of,
)

with_kernels = pytest.mark.parametrize("where", [on_cpu, interpreted, on_cuda])
anywhere = pytest.mark.parametrize("where", [on_cpu, on_cuda])
STEPS = Steps(n_rows=3, n_prompt=64, context=PAGE, guesses=True)


@pytest.fixture
def model(model) -> Iterator[MPTForCausalLM]:
    """The shared one comes back to the CPU."""
    yield model
    model.to("cpu")


@pytest.fixture
def replays(monkeypatch) -> list[int]:
    """Gets the tokens of each step that runs through a graph of guesses. On CUDA the graphs are real ones."""
    found: list[int] = []
    real = PagedBackend._replay_guesses

    def noted(self: PagedBackend, rows, work) -> Tensor | None:
        logits = real(self, rows, work)
        if logits is not None:
            found.append(sum(len(item.tokens) for item in work))
        return logits

    monkeypatch.setattr(PagedBackend, "_replay_guesses", noted)
    graph = paged_backend._Graph
    monkeypatch.setattr(
        paged_backend, "_Graph", lambda step, n, pool: (graph if n.is_cuda else Recorded)(step, n, pool)
    )
    return found


def captured(backend: PagedBackend) -> PagedBackend:
    """With its graphs, without all else of a start, which takes the interpreter long. On CUDA it has been started."""
    if not backend._has_graphs:
        backend._has_graphs = True
        with torch.inference_mode():
            backend._graphs.capture_all()
            backend._guess_graphs.capture_all()
    return backend


# -- shapes ----------------------------------------------------------------------------------------------------------


def test_graphs_of_guesses_hold_one_rows_or_all_that_is_cheap():
    assert (FEW_TOKENS, CHEAP_TOKENS) == (16, 32)  # what the numbers below stand for
    assert [tokens_for(n) for n in (1, 2, 4, 8, 16, 32)] == [16, 32, 32, 32, 32, 32]
    assert guessed_shapes(5, 9) == [(8, 32), (8, 8), (4, 32), (4, 8), (2, 32), (2, 8), (1, 32), (1, 8)]
    assert {shape.n_rows for shape in guessed_shapes(256, 8)} == {1, 2, 4, 8, 16, 32}


def test_every_step_with_guesses_fits_a_graph():
    """However many rows decode and whatever they guess, as `Speculation` shares out what is cheap."""
    planned = {shape.n_rows for shape in guessed_shapes(256, 8)}
    for n_rows in range(1, CHEAP_TOKENS):
        n_tokens = min(CHEAP_TOKENS, n_rows * FEW_TOKENS)
        assert rows_for(n_rows) in planned and n_tokens <= tokens_for(rows_for(n_rows))


# -- logits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "shape"),
    [
        pytest.param(("cpu", False), "grouped", id="grouped"),
        pytest.param(("cpu", False), "positions", id="positions"),
        pytest.param(("cpu", False), "normed_with_biases", id="normed_with_biases"),
        pytest.param(("cpu", True), "grouped", id="interpreted", marks=interpreted.marks),
        pytest.param(("cuda", True), "grouped", id="cuda", marks=pytest.mark.gpu),
    ],
)
def test_rows_with_different_numbers_of_guesses_get_the_logits_of_the_other_backend(where, shape, replays) -> None:
    pair = Pair(make(shape), where, steps=STEPS)
    captured(pair.paged)
    assert set(pair.paged._guess_graphs) == {(1, 8), (2, 8), (4, 8)}
    a, b, c = (pair.row(700) for _ in range(3))
    pair.step({a: text(1, 250), b: text(2, 40), c: text(3, 20)}, 1)
    compiled = compilations.of_this_thread()
    pair.step({a: text(4, 16)})  # over the end of a page
    pair.step({a: text(5, 16), b: [5]})
    pair.step({a: [5], b: text(6, 11), c: text(7, 4)})
    pair.step({c: text(8, 2), a: text(9, 3)}, 1)  # the last alone is asked for
    pair.step({a: [5], b: [6, 7]}, 0)
    assert replays == [16, 17, 16, 5, 3]
    assert compilations.of_this_thread() == compiled


@with_kernels
def test_guesses_over_an_int8_cache_give_the_same_logits_inside_graphs_and_outside(where, replays) -> None:
    model, found = make("grouped"), []
    for graphs in (True, False):
        backend = paged(model, where, graphs=None if graphs else False, steps=STEPS, int8_cache=True)
        if graphs:
            captured(backend)
        a, b = (backend.reserve(None, 100) for _ in range(2))
        backend.forward([Work(a, text(1, 30), 1), Work(b, text(2, 5), 1)])
        a.length, b.length = 30, 5
        found.append(backend.forward([Work(a, text(3, 4), 4), Work(b, text(4, 2), 2)]).clone())
    assert replays == [6]
    close(*found)


def test_a_row_that_outgrows_a_width_finds_the_next_graph(replays) -> None:
    pair = Pair(make("alibi"), ("cpu", False), steps=replace(STEPS, context=9 * PAGE))
    captured(pair.paged)
    a, b = pair.row(9 * PAGE), pair.row(PAGE)
    pair.step({a: text(1, 8 * PAGE - 5)}, 1)
    for seed in (2, 3):
        pair.step({a: text(seed, 4), b: text(seed, 2)})  # 8 pages, and 9
    assert replays == [6, 6] and len(pair.paged._guess_graphs) == 6


def test_what_no_graph_has_room_for_runs_without(replays) -> None:
    pair = Pair(make("alibi"), ("cpu", False), steps=STEPS)
    captured(pair.paged)
    a, b, c = (pair.row(300) for _ in range(3))
    pair.step({a: text(1, 17)})
    pair.step({a: text(2, 16), b: text(3, 16), c: [5]})  # 33 in all
    plain = Pair(make("alibi"), ("cpu", False), steps=replace(STEPS, guesses=False))
    captured(plain.paged)
    plain.step({plain.row(300): text(4, 5)})  # nobody said that there would be guesses
    assert replays == [] and not len(plain.paged._guess_graphs)


# -- what is wrong leaves no trace -----------------------------------------------------------------------------------


@with_kernels
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "packed"])
def test_a_rejected_guess_leaves_no_trace(where, graphs, replays) -> None:
    """Rows that read the same and guessed otherwise, all of it wrong, give the same bits, which are right too."""
    model = make("grouped")
    backend = paged(model, where, graphs=None if graphs else False, steps=STEPS)
    if graphs:
        captured(backend)
    prompt, after = text(1, 30), text(2, 3)
    found = []
    for wrong in (text(3, 4), text(4, 4)):
        row = backend.reserve(None, 100)
        n_free = backend.n_free_pages
        backend.forward([Work(row, prompt, 1)])
        row.length = 30
        backend.forward([Work(row, [5, *wrong], 5)])
        row.length = 31  # the 5 is in the cache, what was guessed behind it is not
        one = backend.forward([Work(row, [6], 1)]).clone()
        row.length = 32
        found.append(torch.cat([one, backend.forward([Work(row, after, 3)])]))
        assert backend.n_free_pages == n_free
    assert torch.equal(*found)
    other = TorchBackend(make_like(model))
    close(found[0], other.forward([Work(other.reserve(None, 100), [*prompt, 5, 6, *after], 4)]))
    assert bool(replays) == graphs


# -- in the engine ---------------------------------------------------------------------------------------------------


class Known:
    """Knows the answers, guesses more tokens for each prompt that is later, and every seventh wrong."""

    def __init__(self, answers: dict[tuple[int, ...], list[int]]) -> None:
        self._answers = answers
        self.n_guessed = self.n_right = 0
        self.numbers: set[tuple[int, ...]] = set()  # of the tokens guessed in a step, row by row

    def guess(self, rooms):
        found = {}
        for one, n in rooms.items():
            prompt, at = tuple(one.request.prompt), one.n_generated
            n = min(n, 3 + 4 * list(self._answers).index(prompt))
            right = self._answers[prompt][at : at + n]
            guess = [(token + 1) % 256 if (at + k) % 7 == 6 else token for k, token in enumerate(right)]
            if guess:
                found[one] = guess
                self.n_guessed += len(guess)
                self.n_right += next((k for k, token in enumerate(guess) if token != right[k]), len(guess))
        self.numbers.add(tuple(len(guess) for guess in found.values()))
        return found


def asked(n: int) -> list[list[int]]:
    """Prompts that repeat themselves, so that lookups find something."""
    return [text(k, 12) * 3 + text(k, 4) for k in range(n)]


async def answers(backend: PagedBackend, tokenizer, guesser: Guesser | None, n: int, length: int):
    """What the prompts are answered, greedily, and the engine's totals."""
    speculation = None if guesser is None else Speculation(guesser)
    with running(backend, tokenizer, max_running=4, speculation=speculation) as engine:
        events = await asyncio.gather(*(collect(engine, prompt, greedy(length)) for prompt in asked(n)))
        return [tokens_of(one) for one in events], engine.stats()


@pytest.mark.parametrize(
    ("where", "graphs", "n", "length"),
    [
        pytest.param(("cpu", False), True, 3, 40, id="graphs"),
        pytest.param(("cpu", False), False, 3, 40, id="packed"),
        pytest.param(("cpu", True), True, 2, 8, id="interpreted", marks=interpreted.marks),
        pytest.param(("cuda", True), True, 3, 40, id="cuda", marks=pytest.mark.gpu),
    ],
)
async def test_greedy_tokens_are_those_without_guesses(model, tokenizer, where, graphs, n, length, replays) -> None:
    """On this backend and in the naive loop; what was guessed right is counted; nothing is captured while it runs."""
    naive = [generate(model, prompt, length) for prompt in asked(n)]
    steps = Steps(n_rows=4, n_prompt=128, context=512, guesses=True)

    def made() -> PagedBackend:
        backend = paged(model, where, graphs=None if graphs else False, steps=steps)
        return captured(backend) if graphs else backend

    plain, without = await answers(made(), tokenizer, None, n, length)
    known = Known({tuple(prompt): answer for prompt, answer in zip(asked(n), naive, strict=True)})
    found, stats = await answers(made(), tokenizer, known, n, length)
    assert found == plain == naive
    assert (stats.n_guessed, stats.n_guessed_right) == (known.n_guessed, known.n_right)
    assert 0 < stats.n_guessed_right < stats.n_guessed
    assert stats.n_steps < 0.8 * without.n_steps
    assert any(len(set(numbers)) > 1 for numbers in known.numbers), "rows guess different numbers in one step"
    assert stats.n_compiled == {}
    assert bool(replays) == graphs


@anywhere
async def test_what_is_looked_up_changes_no_answer(model, tokenizer, where, replays) -> None:
    naive = [generate(model, prompt, 60) for prompt in asked(4)]
    steps = Steps(n_rows=4, n_prompt=128, context=512, guesses=True)
    backend = paged(model, where, graphs=True, steps=steps)
    found, stats = await answers(backend, tokenizer, PromptLookup(), 4, 60)
    assert found == naive
    assert stats.n_guessed > 0 and replays and stats.n_compiled == {}


@anywhere
async def test_a_draft_over_pages_guesses_for_a_model_over_pages(model, tokenizer, where, replays) -> None:
    """The model itself, which is nearly always right, and another one, which is not; both read through graphs."""
    naive = [generate(model, prompt, 40) for prompt in asked(3)]
    torch.manual_seed(9)
    config = mpt.MPTConfig(d_model=32, n_heads=2, n_layers=1, vocab_size=260, max_seq_len=2048)
    other = MPTForCausalLM(config).eval()
    steps = Steps(n_rows=4, n_prompt=512, context=512, guesses=True)
    n_right = []
    for small in (model, other):
        draft = captured(paged(small, where, steps=steps))
        n_free = draft.n_free_pages
        guesser = DraftModel(draft, 260)
        found, stats = await answers(captured(paged(model, where, steps=steps)), tokenizer, guesser, 3, 40)
        assert found == naive
        assert stats.n_guessed > 0 and stats.n_compiled == {}
        n_right.append(stats.n_guessed_right / stats.n_guessed)
        guesser.guess({})  # lets go of the rows of those that have ended
        gc.collect()
        assert draft.n_free_pages == n_free
    assert n_right[0] > 0.9 > n_right[1]


async def test_a_draft_without_memory_guesses_nothing_and_all_are_answered(model, tokenizer) -> None:
    """Room for one page: of several rows one has a draft at a time."""
    naive = [generate(model, prompt, 24) for prompt in asked(3)]
    draft = paged(model, ("cpu", False), kv_tokens=PAGE)
    found, stats = await answers(paged(model, ("cpu", False)), tokenizer, DraftModel(draft, 260), 3, 24)
    assert found == naive and stats.n_guessed_right > 0
    gc.collect()
    assert draft.n_free_pages == 1


async def test_a_draft_gives_its_pages_back_when_a_sequence_waits_again(model, tokenizer) -> None:
    """As many pages for the draft as for the model, whose rows grow from one page to two and send each other back."""
    prompts = [text(seed, 200) for seed in range(6)]
    naive = [generate(model, prompt, 130) for prompt in prompts]
    draft, backend = paged(model, ("cpu", False), 1024), paged(model, ("cpu", False), 1024)
    speculation = Speculation(DraftModel(draft, 260))
    with running(backend, tokenizer, kv_tokens=1024, max_running=6, speculation=speculation) as engine:
        events = await asyncio.gather(*(collect(engine, prompt, greedy(130)) for prompt in prompts))
        stats = engine.stats()
    assert [tokens_of(one) for one in events] == naive
    assert stats.n_preemptions > 0 and stats.n_guessed_right > 0.9 * stats.n_guessed > 0
    speculation.guesser.guess({})  # lets go of the rows of those that have ended
    gc.collect()
    assert draft.n_free_pages == 4


async def test_a_draft_with_fewer_positions_stops_guessing_where_they_end(model, tokenizer) -> None:
    short = {"d_model": 32, "n_heads": 2, "n_layers": 1, "vocab_size": 260, "max_seq_len": 50}
    draft = MPTForCausalLM(mpt.MPTConfig(**short, learned_pos_emb=True, attn_config={"alibi": False})).eval()
    naive = [generate(model, prompt, 40) for prompt in asked(2)]
    longest: list[int] = []

    class Watched(DraftModel):
        def guess(self, rooms):
            found = super().guess(rooms)
            longest.extend(len(one.tokens) + len(guess) for one, guess in found.items())
            return found

    guesser = Watched(paged(draft, ("cpu", False)), 260)
    found, _ = await answers(paged(model, ("cpu", False)), tokenizer, guesser, 2, 40)
    assert found == naive
    assert 40 < max(longest) <= 50  # prompts have 40 tokens


# -- shapes met are those warmed -------------------------------------------------------------------------------------


def test_no_step_with_guesses_asks_the_kernel_for_a_shape_that_was_not_read_at_start(monkeypatch, replays) -> None:
    """As the test of the same name without guesses, through graphs and, where they were refused, outside them."""
    asked_for: dict[tuple, int] = {}

    def noted(q: Tensor, kv: Tensor, norms: Tensor, table: Tensor, *rest, **options) -> Tensor:
        strides = (*q.stride()[:3], *kv.stride()[:4], norms.stride(0), table.stride(0))
        key = (q.shape[1], table.shape[1], tuple(1 if s == 1 else s % 16 == 0 for s in strides))
        asked_for[key] = max(asked_for.get(key, 0), len(q))
        return paged_decode(q, kv, norms, table, *rest, **options)

    monkeypatch.setattr("mpt.backends.paged_backend.paged_decode", noted)
    steps = Steps(n_rows=6, n_prompt=64, context=20 * PAGE, guesses=True)
    for graphs in (True, False):
        backend = PagedBackend(make("alibi"), triton=False, graphs=graphs, steps=steps)
        backend.make_pool(80 * PAGE * backend.bytes_per_token)
        asked_for.clear()
        backend.warm_up()
        at_start = dict(asked_for)
        asked_for.clear()
        numbers = random.Random(0)
        rows = [backend.reserve(None, 20 * PAGE if k == 0 else PAGE) for k in range(6)]
        before = compilations.of_this_thread()
        for _ in range(60):
            rows[0].length = numbers.choice([5, 2047, 2048, 19 * PAGE])
            chosen = numbers.sample(rows, numbers.randrange(1, 7))
            n_each = [1 + numbers.randrange(4) for _ in chosen]
            backend.forward([Work(row, text(1, n), n) for row, n in zip(chosen, n_each, strict=True)])
        assert compilations.of_this_thread() == before
        assert {key[:2] for key in asked_for} >= {(16, 8), (16, 32)}
        assert all(asked_for[key] <= at_start.get(key, 0) for key in asked_for)
