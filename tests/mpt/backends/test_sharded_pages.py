"""A model shared by two processes over gloo, each share in pages: the logits of the whole model, pages in step."""

import gc
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mpt
from mpt.backends.backend import Backend, Row, Work
from mpt.backends.choose import Choice
from mpt.backends.paged_attention import PAGE
from mpt.backends.paged_backend import PagedBackend
from mpt.backends.sharded_backend import ShardedBackend
from mpt.engine.room import kv_budget
from mpt.errors import MachineRefused
from mpt.generation import generate
from mpt.transformers_model import MPTForCausalLM
from tests.kernels import needs_interpreter
from tests.second_rank import FREE, NOT_IN_THE_SECOND, SecondRank

SHAPES = {
    "plain": {},
    "grouped": {"attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 2}, "no_bias": False},
    "positions": {"attn_config": {"alibi": False}, "learned_pos_emb": True, "no_bias": False},
    "storywriter": {"attn_config": {"alibi_bias_max": 16, "clip_qkv": 6}, "n_heads": 8},
}


@pytest.fixture(scope="module")
def second() -> Iterator[SecondRank]:
    process = SecondRank()
    yield process
    process.close()


def saved(folder: Path, tokenizer, shape: str = "grouped") -> MPTForCausalLM:
    settings = {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 260, "max_seq_len": 1024, **SHAPES[shape]}
    torch.manual_seed(1)
    model = MPTForCausalLM(mpt.MPTConfig(**settings)).eval()
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.1)  # a bias that every process adds would be added twice
    mpt.save(model, folder / "m", tokenizer=tokenizer)
    return model


@pytest.fixture
def shared(second, tokenizer, tmp_path) -> Iterator[ShardedBackend]:
    saved(tmp_path, tokenizer)
    with second.sharing(tmp_path / "store", tmp_path / "m") as backend:
        yield backend


def text(seed: int, n: int) -> list[int]:
    return random.Random(seed).choices(range(4, 260), k=n)


class Rows:
    """Rows of a backend with the texts that they hold, and the logits of every position that was asked for."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.rows: dict[str, Row] = {}
        self.texts: dict[str, list[int]] = {}
        self.asked: list[tuple[list[int], Tensor]] = []  # a text, and logits (n, V) of its last positions

    def add(self, name: str, n_tokens: int) -> None:
        self.rows[name], self.texts[name] = self.backend.reserve(None, n_tokens), []

    def copy(self, name: str, source: str, n_tokens: int, capacity: int) -> None:
        self.rows[name] = self.backend.copy(self.rows[source], n_tokens, capacity)
        self.texts[name] = self.texts[source][:n_tokens]

    def cut(self, name: str, n_tokens: int) -> None:
        self.rows[name].length, self.texts[name] = n_tokens, self.texts[name][:n_tokens]

    def step(self, n_logits: int | None = None, **reads: list[int]) -> Tensor:
        """Rows read these tokens; logits of the last n_logits positions of each, or of all."""
        wanted = {name: len(read) if n_logits is None else n_logits for name, read in reads.items()}
        logits = self.backend.forward([Work(self.rows[name], read, wanted[name]) for name, read in reads.items()])
        assert len(logits) == sum(wanted.values())
        for (name, read), part in zip(reads.items(), logits.split(list(wanted.values())), strict=True):
            self.rows[name].length += len(read)
            self.texts[name] = self.texts[name] + read
            self.asked.append((self.texts[name], part))
        return logits

    def are_those_of(self, model: MPTForCausalLM) -> None:
        """The whole model's over each text at once. 2 layers of float32 sums in another order, on logits of size 1."""
        with torch.inference_mode():
            for read, found in self.asked:
                expected = model(torch.tensor([read])).logits[0, len(read) - len(found) :]
                torch.testing.assert_close(found, expected, rtol=0, atol=3e-4)


def come_and_go(backend: Backend) -> Rows:
    """Prompts in chunks, rows that join and leave, prefixes that are shared, cut and written on."""
    rows = Rows(backend)
    for name, n in (("a", 700), ("b", 40), ("c", 60)):
        rows.add(name, n)
    rows.step(a=text(1, 300), b=text(2, 3), c=text(3, 40))
    rows.step(1, a=[7], b=[8], c=[9])  # the step of fixed shape, three rows in four
    rows.step(1, a=text(4, 212), b=[8])  # the second chunk, over the end of a page
    del rows.rows["c"]
    rows.copy("d", "a", 400, 500)
    rows.step(d=text(5, 30), a=[7], b=text(6, 17))  # both write on from the middle of a page
    rows.copy("e", "a", PAGE, PAGE + 10)
    rows.cut("a", 100)
    rows.step(0, a=[5], e=[6])  # nobody asks for logits, and a page that three rows hold is written into
    rows.step(1, a=[5], b=[6], d=[7])
    rows.step(a=text(7, 20), d=[7])
    return rows


def greedy(backend: Backend, prompt: list[int], n: int) -> list[int]:
    rows, found = Rows(backend), list[int]()
    rows.add("a", len(prompt) + n)
    for start in range(0, len(prompt), 64):
        logits = rows.step(1, a=prompt[start : start + 64])
    for _ in range(n):
        found.append(int(logits[-1].argmax()))
        logits = rows.step(1, a=found[-1:])
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_two_shares_give_the_logits_and_the_tokens_of_the_whole(second, tokenizer, tmp_path, shape) -> None:
    model = saved(tmp_path, tokenizer, shape)
    with second.sharing(tmp_path / "store", tmp_path / "m") as backend:
        backend.allocate(10 * PAGE * backend.bytes_per_token)
        found = come_and_go(backend)
        tokens = greedy(backend, text(8, 150), 30)
    found.are_those_of(model)
    assert tokens == generate(model, text(8, 150), 30)
    alone = PagedBackend(model)
    assert backend.bytes_per_token * 2 == alone.bytes_per_token
    alone.allocate(10 * PAGE * alone.bytes_per_token)
    for (_, ours), (_, theirs) in zip(found.asked, come_and_go(alone).asked, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-4)


@needs_interpreter
def test_two_shares_give_the_logits_of_the_whole_through_the_kernels(second, tokenizer, tmp_path) -> None:
    model = saved(tmp_path, tokenizer)
    with second.sharing(tmp_path / "store", tmp_path / "m", triton=True) as backend:
        backend.allocate(4 * PAGE * backend.bytes_per_token)
        rows = Rows(backend)
        rows.add("a", 300)
        rows.add("b", 20)
        rows.step(1, a=text(1, 40), b=text(2, 2))
        rows.step(1, a=[5], b=[6])
        rows.step(a=text(3, 3), b=[6])
    rows.are_those_of(model)


def test_a_warm_up_is_the_same_in_both_and_leaves_nothing_behind(second, tokenizer, tmp_path) -> None:
    model = saved(tmp_path, tokenizer)
    with second.sharing(tmp_path / "store", tmp_path / "m", warm_up=True) as backend:
        backend.allocate(5 * PAGE * backend.bytes_per_token)
        assert backend._local.n_free_pages == 5
        rows = Rows(backend)
        rows.add("a", 5 * PAGE)  # all of them, in the other process too
        rows.step(1, a=text(1, 100))
    rows.are_those_of(model)


def test_pages_of_rows_that_are_gone_are_free_in_both_processes(shared) -> None:
    """A process that finds none ends, and the next call with it."""
    shared.allocate(4 * PAGE * shared.bytes_per_token)
    for round in range(6):
        rows = Rows(shared)
        rows.add("a", 3 * PAGE)
        rows.step(1, a=text(round, 20))
        rows.copy("b", "a", 20, PAGE)
        rows.step(1, a=[5], b=[6])
        assert shared._local.n_free_pages == 0
        del rows


def test_pages_of_rows_in_cycles_are_found_before_the_other_process_is_told(shared) -> None:
    """In a new row, in a copy, and in a step that must copy a shared page."""
    shared.allocate(4 * PAGE * shared.bytes_per_token)
    rows = Rows(shared)

    def leave_garbage(n_pages: int) -> None:
        row = shared.reserve(None, n_pages * PAGE)
        row.itself = row  # type: ignore[attr-defined]
        assert shared._local.n_free_pages == 0

    gc.disable()
    try:
        leave_garbage(4)
        rows.add("a", 2 * PAGE)
        rows.step(1, a=text(1, 300))
        leave_garbage(2)
        rows.copy("b", "a", 300, 2 * PAGE)
        rows.cut("b", PAGE)
        leave_garbage(1)
        rows.cut("a", 100)
        rows.step(1, a=[5])
        rows.step(1, a=[5], b=[6])
    finally:
        gc.enable()


def test_a_call_for_which_there_is_no_page_leaves_both_processes_as_they_were(shared) -> None:
    shared.allocate(4 * PAGE * shared.bytes_per_token)
    rows = Rows(shared)
    rows.add("a", 2 * PAGE)
    with pytest.raises(RuntimeError, match="3 pages are asked for and 2 of 5"):
        shared.reserve(None, 3 * PAGE)
    rows.step(1, a=text(1, 300))
    with pytest.raises(RuntimeError, match="3 pages are asked for and 2 of 5"):
        shared.copy(rows.rows["a"], PAGE, 4 * PAGE)
    rows.add("b", 2 * PAGE)
    rows.step(1, a=[5], b=[6])


def test_a_pool_that_one_process_has_no_memory_for_is_refused_in_both(shared) -> None:
    with pytest.raises(MachineRefused, match="another GPU of the model"):
        shared.allocate(NOT_IN_THE_SECOND)
    with pytest.raises(MachineRefused, match="in one piece for the KV cache"):
        shared.allocate(1 << 60)


def test_the_budget_is_what_the_gpu_with_the_least_free_memory_has(shared, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (FREE[0], 2 * FREE[0]))
    assert shared.least_free_bytes() == FREE[1]
    choice = Choice("sharded", "cuda", "float32 in 2 processes", (), shared.capabilities)
    kv_bytes, _ = kv_budget(shared, 1 << 40, 1, choice, n_sharing=1, promised_bytes=0)
    assert kv_bytes == 0.6 * FREE[1]
