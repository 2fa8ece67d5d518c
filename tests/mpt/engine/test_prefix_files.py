"""Prefixes on disk: the bits that memory would have given, nothing that is another's, and no request that suffers."""

import asyncio
import contextlib
import copy
import errno
import logging
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from prometheus_client import generate_latest

import mpt
from mpt import fingerprint as fingerprints
from mpt.backends.backend import Row, Work
from mpt.backends.native import library
from mpt.backends.paged_backend import PagedBackend
from mpt.backends.torch_backend import TorchBackend
from mpt.engine import prefix_transfers
from mpt.engine.endpoint import open_endpoint
from mpt.engine.engine import Engine
from mpt.engine.errors import EngineFailed
from mpt.engine.prefix_files import BLOCK, PrefixFiles, used_at
from mpt.engine.request import Delta, Sampling, Started
from mpt.errors import UserError
from mpt.fingerprint import fingerprint
from mpt.lora import Adapter, adaptable
from mpt.options import ModelOptions
from mpt.transformers_model import MPTForCausalLM
from serving.metrics import Metrics
from tests.in_process import running_engine

N_BLOCKS = 10
LENGTH = N_BLOCKS * BLOCK + 1  # so that memory and disk share the same tokens, all but the last
needs_c = pytest.mark.skipif(library.why_none() is not None, reason=str(library.why_none()))


def prompt(n: int = LENGTH, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(4, 260), k=n)


def in_c(model: MPTForCausalLM) -> TorchBackend:
    backend = TorchBackend(model)
    assert backend.native is not None
    return backend


def in_torch(model: MPTForCausalLM) -> TorchBackend:
    backend = TorchBackend(model)
    backend.native = None
    return backend


def in_pages(model: MPTForCausalLM) -> PagedBackend:
    return PagedBackend(model, triton=False)


BACKENDS: dict[str, Callable[[MPTForCausalLM], TorchBackend | PagedBackend]] = {
    "C, float32": in_c,
    "C, bfloat16": lambda model: in_c(copy.deepcopy(model).bfloat16()),
    "C, int8 cache": lambda model: TorchBackend(copy.deepcopy(model).bfloat16(), int8_cache=True),
    "torch": in_torch,
    "torch, bfloat16": lambda model: in_torch(copy.deepcopy(model).bfloat16()),
    "pages": in_pages,
    "pages, bfloat16": lambda model: in_pages(copy.deepcopy(model).bfloat16()),
    "pages, int8 numbers": lambda model: PagedBackend(copy.deepcopy(model).bfloat16(), triton=False, int8_cache=True),
}


@dataclass
class Asker:
    """An engine, and what is asked of it."""

    engine: Engine

    async def ask(
        self, tokens: list[int], n: int = 8, adapter: Adapter | None = None, salt: str = "", cache_salt: str = ""
    ) -> "Answered":
        sampling = Sampling(max_tokens=n, temperature=0.0, ignore_eos=True, logprobs=5, cache_salt=cache_salt)
        answer = self.engine.submit(tokens, sampling, request_id="test", salt=salt, adapter=adapter)
        found = Answered(-1, [], [])
        try:
            async for event in answer:
                if isinstance(event, Started):
                    found.n_cached = event.cached_tokens
                elif isinstance(event, Delta):
                    found.tokens += event.token_ids
                    found.logprobs += [(each.logprob, each.top) for each in event.logprobs or ()]
        finally:
            answer.close()
        return found

    async def until_written(self, n_tokens: int) -> None:
        deadline = time.monotonic() + 100
        while self.engine.stats().prefix_disk_written_tokens < n_tokens:
            assert time.monotonic() < deadline, self.engine.stats()
            await asyncio.sleep(0.002)


@dataclass
class Answered:
    n_cached: int
    tokens: list[int]
    logprobs: list[tuple[float | None, object]]


@contextlib.contextmanager
def running(
    backend: TorchBackend | PagedBackend,
    tokenizer: object,
    folder: Path | None,
    identity: str = "a model",
    prefill_chunk: int = 512,
    kv_tokens: int = 1 << 14,
) -> Iterator[Asker]:
    """folder: None for an engine that keeps prefixes in memory only."""
    files = None if folder is None else PrefixFiles(folder, 10**9, identity)
    kv_bytes = kv_tokens * backend.bytes_per_token
    backend.allocate(kv_bytes)
    options = {"kv_bytes": kv_bytes, "prefill_chunk": prefill_chunk, "prefix_files": files}
    with running_engine(backend, tokenizer, context_length=4096, **options) as engine:
        yield Asker(engine)


def blocks_in(folder: Path) -> list[Path]:
    return [path for path in folder.glob("mpt-prefixes/??/*") if path.is_file()]


async def read_once(model: MPTForCausalLM, tokenizer: object, folder: Path) -> list[Path]:
    """Have an engine in C or torch read the prompt and go; the files of its blocks, in order."""
    with running(TorchBackend(model), tokenizer, folder) as asker:
        await asker.ask(prompt())
        await asker.until_written(N_BLOCKS * BLOCK)
    return sorted(blocks_in(folder), key=lambda path: -path.stat().st_mtime_ns)


# -- the same bits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pytest.param(k, marks=needs_c if "C" in k else ()) for k in BACKENDS])
async def test_an_answer_after_a_restart_has_the_bits_of_one_from_memory(model, tokenizer, tmp_path, kind):
    make = BACKENDS[kind]
    with running(make(model), tokenizer, None) as asker:
        await asker.ask(prompt())
        from_memory = await asker.ask(prompt())
    with running(make(model), tokenizer, tmp_path) as asker:
        assert (await asker.ask(prompt())).n_cached == 0
        await asker.until_written(N_BLOCKS * BLOCK)
    with running(make(model), tokenizer, tmp_path) as asker:
        from_disk = await asker.ask(prompt())
        stats = asker.engine.stats()
    assert from_disk == from_memory and from_disk.n_cached == N_BLOCKS * BLOCK
    assert stats.prefix_disk_hits_tokens == stats.prefix_hits_tokens == N_BLOCKS * BLOCK
    assert stats.prefix_disk_bytes == sum(path.stat().st_size for path in blocks_in(tmp_path))


async def test_whole_blocks_that_two_texts_share_are_found(model, tokenizer, tmp_path):
    await read_once(model, tokenizer, tmp_path)
    other = prompt()[: 5 * BLOCK + 60] + prompt(900, seed=1)
    with running(TorchBackend(model), tokenizer, None) as asker:
        expected = await asker.ask(other)
    with running(TorchBackend(model), tokenizer, tmp_path) as asker:
        found = await asker.ask(other)
    assert (found.n_cached, found.tokens) == (5 * BLOCK, expected.tokens)


async def test_a_conversation_that_goes_on_adds_only_what_is_new(model, tokenizer, tmp_path):
    first = {path: path.stat().st_ino for path in await read_once(model, tokenizer, tmp_path)}
    with running(TorchBackend(model), tokenizer, tmp_path) as asker:
        await asker.ask(prompt() + prompt(3 * BLOCK, seed=1))
        await asker.until_written(3 * BLOCK)
        assert asker.engine.stats().prefix_disk_written_tokens == 3 * BLOCK
    assert len(blocks_in(tmp_path)) == N_BLOCKS + 3
    assert {path: path.stat().st_ino for path in first} == first


async def test_what_memory_holds_is_not_read_from_disk(model, tokenizer, tmp_path):
    with running(TorchBackend(model), tokenizer, tmp_path) as asker:
        await asker.ask(prompt())
        await asker.until_written(N_BLOCKS * BLOCK)
        assert (await asker.ask(prompt())).n_cached == LENGTH - 1
        assert asker.engine.stats().prefix_disk_hits_tokens == 0


async def test_short_prompts_leave_nothing(model, tokenizer, tmp_path):
    with running(TorchBackend(model), tokenizer, tmp_path) as asker:
        await asker.ask(prompt(prefix_transfers.LEAST - 1))
    assert blocks_in(tmp_path) == []


# -- nothing that is another's -----------------------------------------------------------------------------------------


async def test_clients_salts_adapters_and_models_have_their_own(model, tokenizer, tmp_path):
    def adapter(seed: int) -> Adapter:
        rng = torch.Generator().manual_seed(seed)
        pairs = {
            name: (torch.randn(2, layer.in_features, generator=rng), torch.randn(layer.out_features, 2, generator=rng))
            for name, layer in adaptable(model)
        }
        return Adapter("any name", pairs)

    asked = [("alice", "", None), ("bob", "", None), ("alice", "x", None), ("alice", "", 1), ("alice", "", 2)]
    for n_cached in (0, N_BLOCKS * BLOCK):  # before, and after a restart
        with running(TorchBackend(model), tokenizer, tmp_path) as asker:
            for salt, cache_salt, seed in asked:
                own = None if seed is None else adapter(seed)
                found = await asker.ask(prompt(), adapter=own, salt=salt, cache_salt=cache_salt)
                assert found.n_cached == n_cached, (salt, cache_salt, seed)
            if not n_cached:
                await asker.until_written(len(asked) * N_BLOCKS * BLOCK)
    with running(TorchBackend(model), tokenizer, tmp_path, identity="another model") as asker:
        assert (await asker.ask(prompt(), salt="alice")).n_cached == 0


async def test_nothing_on_disk_names_the_client_and_nobody_else_can_read_it(model, tokenizer, tmp_path):
    with running(TorchBackend(model), tokenizer, tmp_path) as asker:
        await asker.ask(prompt(), salt="a-salt-made-of-a-key")
        await asker.until_written(N_BLOCKS * BLOCK)
    everything = list(tmp_path.rglob("*"))
    assert all(b"a-salt" not in path.read_bytes() + bytes(path) for path in everything if path.is_file())
    assert {path.stat().st_mode & 0o777 for path in everything if path.is_file()} == {0o600}
    assert {path.stat().st_mode & 0o777 for path in everything if path.is_dir()} == {0o700}


def test_names_depend_on_the_folders_secret(tmp_path):
    one, two, again = (PrefixFiles(tmp_path / name, 10**6, "m") for name in ("a", "b", "a"))
    assert one.root("salt", "") == again.root("salt", "") != two.root("salt", "")


def test_a_folder_that_others_can_read_is_refused(tmp_path):
    folder = PrefixFiles(tmp_path, 10**6).folder
    folder.chmod(0o750)
    with pytest.raises(UserError, match=r"open to others \(mode 750\).*; make it mode 700"):
        PrefixFiles(tmp_path, 10**6)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be kept in .*/file`: .*; choose another folder"):
        PrefixFiles(tmp_path / "file", 10**6)


async def test_an_endpoint_finds_its_own_weights_prefixes_only(model, tokenizer, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    mpt.save(model, one, tokenizer=tokenizer)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.transformer.blocks[0].ffn.down_proj.weight[3, 5] += 1
    mpt.save(other, two, tokenizer=tokenizer)
    found = []
    for folder, dtype in ((one, "float32"), (one, "float32"), (two, "float32"), (one, "bfloat16")):
        options = ModelOptions(str(folder), device="cpu", dtype=dtype, kv_gb=0.05, prefix_cache=tmp_path / "cache")
        endpoint = open_endpoint("m", options)
        assert isinstance(endpoint.engine, Engine)
        asker = Asker(endpoint.engine)
        try:
            found.append((await asker.ask(prompt())).n_cached)
            if not found[-1]:
                await asker.until_written(N_BLOCKS * BLOCK)
            shown = generate_latest(Metrics([endpoint].copy).registry).decode()
            assert f'mpt_prefix_disk_hits_total{{model_name="m"}} {found[-1]}.0' in shown
            assert f'mpt_prefix_disk_written_tokens_total{{model_name="m"}} {N_BLOCKS * BLOCK - found[-1]}.0' in shown
        finally:
            endpoint.engine.close()
    assert found == [0, N_BLOCKS * BLOCK, 0, 0]


def test_a_fingerprint_is_of_contents_and_files_are_hashed_once(tmp_path, monkeypatch):
    hashed: list[str] = []
    monkeypatch.setattr(fingerprints, "sha256", lambda path: hashed.append(path.name) or path.read_bytes().hex())
    place, notes = tmp_path / "model", tmp_path / "notes"
    place.mkdir()
    for name in ("a.safetensors", "b.safetensors", "config.json", "README.md"):
        (place / name).write_text(name)
    first = fingerprint(place, notes)
    assert sorted(hashed) == ["a.safetensors", "b.safetensors", "config.json"]
    hashed.clear()
    assert fingerprint(place, notes) == first and hashed == []
    before = (place / "b.safetensors").stat()
    (place / "b.safetensors").write_text("B.safetensors")  # as long, and made to look as old
    os.utime(place / "b.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns))
    changed = fingerprint(place, notes)
    assert changed != first and hashed == ["b.safetensors"]
    (place / "b.safetensors").write_text("b.safetensors")
    assert fingerprint(place, notes) == first


def test_a_fingerprint_takes_the_hashes_of_a_manifest(model, tmp_path):
    place = mpt.save(model, tmp_path / "model")
    first = fingerprint(place, tmp_path / "notes")
    assert not (tmp_path / "notes").exists()
    manifest = place / "manifest.json"
    digest = fingerprints.sha256(place / "model.safetensors")
    manifest.write_text(manifest.read_text().replace(digest, "0" * 64))
    assert fingerprint(place, tmp_path / "notes") != first


# -- damage ------------------------------------------------------------------------------------------------------------


def flip(path: Path, _: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path: Path, _: Path) -> None:
    path.write_bytes(b"")


def mistake(path: Path, other: Path) -> None:
    path.write_bytes(other.read_bytes())  # whole, and another block's


@pytest.mark.parametrize("damage", [flip, cut, lengthen, empty, mistake])
async def test_a_damaged_block_is_dropped_and_read_as_usual(model, tokenizer, tmp_path, caplog, damage):
    files = await read_once(model, tokenizer, tmp_path)
    damage(files[4], files[3])
    with running(TorchBackend(model), tokenizer, None) as asker:
        expected = await asker.ask(prompt())
    for n_cached in (4 * BLOCK, N_BLOCKS * BLOCK):  # and written again meanwhile
        caplog.clear()
        with running(TorchBackend(model), tokenizer, tmp_path) as asker, caplog.at_level(logging.WARNING):
            found = await asker.ask(prompt())
            assert (found.n_cached, found.tokens) == (n_cached, expected.tokens)
            if n_cached < N_BLOCKS * BLOCK:
                await asker.until_written(BLOCK)
        assert len(caplog.messages) == (n_cached < N_BLOCKS * BLOCK), caplog.messages
        assert all("is damaged and is removed" in message for message in caplog.messages)


async def test_rows_of_a_model_that_gave_no_number_are_removed_again(model, tokenizer, tmp_path):
    class Broken(TorchBackend):
        def forward(self, work):
            logits = super().forward(work)
            return torch.full_like(logits, torch.nan) if work[0].row.length else logits

    with running(Broken(model), tokenizer, tmp_path, prefill_chunk=128) as asker:  # alone, 512
        with pytest.raises(EngineFailed, match="no finite logits"):
            await asker.ask(prompt())
        await asker.until_written(BLOCK)
    assert blocks_in(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
async def test_a_full_disk_costs_one_warning_and_no_request(model, tokenizer, tmp_path, caplog, monkeypatch, number):
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with running(TorchBackend(model), tokenizer, tmp_path) as asker, caplog.at_level(logging.WARNING):
        with monkeypatch.context() as full:
            full.setattr(Path, "replace", refuse)
            first = await asker.ask(prompt())
            await asker.ask(prompt(seed=1))
            assert [os.strerror(number) in message for message in caplog.messages] == [True]
            assert blocks_in(tmp_path) == [] and list(tmp_path.glob("mpt-prefixes/partial/*")) == []
        asker.engine._disk._off_until = 0.0  # a minute later
        again = await asker.ask(prompt())
        await asker.until_written(N_BLOCKS * BLOCK)
    assert len(first.tokens) == len(again.tokens) == 8
    with running(TorchBackend(model), tokenizer, tmp_path) as asker:
        assert (await asker.ask(prompt())).n_cached == N_BLOCKS * BLOCK


class HeldReads:
    """Within it, blocks are not read from disk before `may_read` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked, self.may_read, self.n_asked = threading.Event(), threading.Event(), 0
        read = PrefixFiles.read

        def slow(files: PrefixFiles, name: bytes, block: np.ndarray) -> bool:
            self.n_asked += 1
            self.asked.set()
            self.may_read.wait()
            return read(files, name, block)

        monkeypatch.setattr(PrefixFiles, "read", slow)

    def __enter__(self) -> "HeldReads":
        return self

    def __exit__(self, *_: object) -> None:
        self.may_read.set()


async def test_who_is_sent_back_while_loading_loads_again(model, tokenizer, tmp_path, monkeypatch):
    """Room for 2,048 tokens: a text that grows beyond 512 sends the one of 1,281 back, which waits for it."""
    await read_once(model, tokenizer, tmp_path)
    held = HeldReads(monkeypatch)

    class Patient(TorchBackend):
        def forward(self, work):
            held.asked.wait(0.1)  # in each of 200 steps at most, until the other has its row
            return super().forward(work)

    with running(Patient(model), tokenizer, tmp_path, kv_tokens=2048) as asker, held:
        grows = asyncio.create_task(asker.ask(prompt(312, 1), n=300))
        loads = asyncio.create_task(asker.ask(prompt()))
        await asyncio.to_thread(held.asked.wait)
        assert len((await grows).tokens) == 300
        assert asker.engine.stats().n_preemptions == 1
        held.may_read.set()
        assert (await loads).n_cached == N_BLOCKS * BLOCK
    assert held.n_asked == N_BLOCKS + 1


# -- others go on ------------------------------------------------------------------------------------------------------


async def test_others_are_answered_while_a_prefix_is_loaded(model, tokenizer, tmp_path, monkeypatch):
    await read_once(model, tokenizer, tmp_path)
    with running(TorchBackend(model), tokenizer, tmp_path) as asker, HeldReads(monkeypatch) as held:
        long = asyncio.create_task(asker.ask(prompt()))
        await asyncio.to_thread(held.asked.wait)
        for seed in (1, 2):  # one after another: the second begins when nobody computes
            assert len((await asker.ask(prompt(50, seed))).tokens) == 8
        assert not long.done()
        held.may_read.set()
        assert (await long).n_cached == N_BLOCKS * BLOCK


async def test_who_leaves_while_loading_gives_the_memory_back(model, tokenizer, tmp_path, monkeypatch):
    await read_once(model, tokenizer, tmp_path)
    with running(TorchBackend(model), tokenizer, tmp_path) as asker, HeldReads(monkeypatch) as held:
        leaves = asyncio.create_task(asker.ask(prompt()))
        await asyncio.to_thread(held.asked.wait)
        while not asker.engine.stats().kv_used_bytes:
            await asyncio.sleep(0)
        leaves.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await leaves  # its memory is given back in the turn that takes in the next request
        assert len((await asker.ask(prompt(50))).tokens) == 8
        stats = asker.engine.stats()
        assert (stats.n_running, stats.n_waiting, stats.kv_used_bytes) == (0, 0, 0)


@dataclass
class Owned:
    """A row of three blocks, as far as it has been read, outside of any engine."""

    row: Row
    trail: prefix_transfers.Trail
    tokens: list[int]

    @classmethod
    def make(cls, backend: TorchBackend, files: PrefixFiles, n_blocks: int) -> "Owned":
        row, root = backend.reserve(None, 3 * BLOCK), files.root("", "")
        row.length = n_blocks * BLOCK
        return cls(row, prefix_transfers.Trail(root, time.time_ns(), name=root), prompt(3 * BLOCK))


def test_blocks_are_copied_for_a_share_of_the_steps_time(model, tmp_path):
    """With no time to spend, while others run, nothing is copied; with nobody there, all of it is."""
    backend, files = TorchBackend(model), PrefixFiles(tmp_path, 10**9)
    transfers = prefix_transfers.PrefixTransfers(files, backend, lambda: None)
    owned = Owned.make(backend, files, 2)
    transfers.keep([owned], step_s=0.0)
    assert owned.trail.n_blocks == 0 and transfers.wants_turn
    transfers.keep([owned], step_s=None)
    assert owned.trail.n_blocks == 2 and not transfers.wants_turn
    transfers.close()
    assert len(blocks_in(tmp_path)) == 2


def test_after_a_failure_a_row_is_written_from_its_beginning_and_nothing_twice(model, tmp_path, monkeypatch):
    backend, files = TorchBackend(model), PrefixFiles(tmp_path, 10**9)
    write, failing, done = files.write, [True], threading.Semaphore(0)

    def write_or_fail(name: bytes, block: np.ndarray, used_ns: int) -> None:
        if failing:
            raise OSError(failing.pop(), "no")
        write(name, block, used_ns)

    monkeypatch.setattr(files, "write", write_or_fail)
    transfers = prefix_transfers.PrefixTransfers(files, backend, done.release)
    owned = Owned.make(backend, files, 1)
    transfers.keep([owned], step_s=None)
    done.acquire()
    transfers._off_until = 0.0  # a minute later
    owned.row.length = 3 * BLOCK
    transfers.keep([owned], step_s=None)
    for _ in range(3):
        done.acquire()
    transfers.keep([Owned.make(backend, files, 3)], step_s=None)
    transfers.close()
    assert len(blocks_in(tmp_path)) == 3 and transfers.n_written_tokens == 3 * BLOCK


@pytest.mark.parametrize("kind", ["torch", "torch, bfloat16", "pages"])
def test_a_block_comes_back_with_the_bound_of_its_keys(model, kind):
    """The larger one, where the row that gets it has one already."""
    backend = BACKENDS[kind](model)
    backend.allocate((1 << 12) * backend.bytes_per_token)
    rows = [backend.reserve(None, BLOCK) for _ in range(3)]
    backend.forward([Work(rows[0], prompt(BLOCK), 0)])
    block = backend.take_out(rows[0], 0, BLOCK)
    n_norms = backend.block_bytes(0) // 4

    def norms(row: Row) -> torch.Tensor:
        return torch.from_numpy(backend.take_out(row, 0, BLOCK)[: 4 * n_norms].copy()).view(torch.float32)

    smaller, larger = block.copy(), block.copy()
    for other, factor in ((smaller, 0.5), (larger, 2.0)):
        other[: 4 * n_norms].view(np.float32)[...] *= factor
    for row, before, after in ((rows[1], smaller, 1.0), (rows[2], larger, 2.0)):
        backend.put_in(row, 0, BLOCK, before)
        backend.put_in(row, 0, BLOCK, block)
        assert torch.equal(norms(row), after * norms(rows[0])) and bool((norms(row) > 0).all())
        assert (backend.take_out(row, 0, BLOCK)[4 * n_norms :] == block[4 * n_norms :]).all()


# -- the folder --------------------------------------------------------------------------------------------------------


def block(seed: int, n_bytes: int = 1000) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, n_bytes, dtype=np.uint8)


def named(*numbers: int) -> list[bytes]:
    return [bytes([number]) * 32 for number in numbers]


def test_what_was_used_longest_ago_goes_first_and_ends_before_beginnings(tmp_path):
    files = PrefixFiles(tmp_path, 6300)  # six files of 1,020 bytes
    a, b, new = named(1, 2, 3), named(4, 5, 6), named(7)
    for start, chain in ((1000, a), (2000, b)):
        for place, name in enumerate(chain):
            files.write(name, block(name[0]), used_at(start, place))
    for place, name in enumerate(a):
        assert files.touch(name, used_at(3000, place))
    files.write(*new, block(7), 4000)
    there = [name[0] for name in (*a, *b, *new) if files.read(name, np.empty(1000, np.uint8))]
    assert there == [1, 2, 3, 4, 7]  # 5 and 6 make room, with a twentieth to spare
    assert files.n_bytes == sum(path.stat().st_size for path in blocks_in(tmp_path)) == 5 * 1020


def test_a_lower_limit_and_files_never_finished_count_at_the_start(tmp_path):
    files = PrefixFiles(tmp_path, 10**6)
    for name in named(1, 2, 3, 4):
        files.write(name, block(name[0]), name[0] * 10**9)
    partial = tmp_path / "mpt-prefixes" / "partial"
    (partial / "old").write_bytes(b"x")
    (partial / "new").write_bytes(b"x")
    os.utime(partial / "old", (0, 0))
    lower = PrefixFiles(tmp_path, 2200)
    lower.look()
    assert [name[0] for name in named(1, 2, 3, 4) if lower.read(name, np.empty(1000, np.uint8))] == [3, 4]
    assert [path.name for path in partial.iterdir()] == ["new"]


_PROCESS = """
import os, sys, numpy as np
from pathlib import Path
from mpt.engine.prefix_files import PrefixFiles
files = PrefixFiles(Path(sys.argv[1]), 20_000, "m")
if sys.argv[2] == "crash":
    Path.replace = lambda *_: os._exit(9)
found, buffer = 0, np.empty(1000, np.uint8)
for turn in range(300):
    number = turn * 7 % 40
    name, data = bytes([number]) * 32, np.random.default_rng(number).integers(0, 256, 1000, dtype=np.uint8)
    if files.read(name, buffer):
        assert (buffer == data).all(), number
        found += 1
    else:
        files.write(name, data, turn)
print(files.root("", "").hex(), found)
"""


def other_process(folder: Path, how: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _PROCESS, str(folder), how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_share_a_folder(tmp_path):
    """Two write, read and evict 40 blocks where 19 have room: each reads only what was written."""
    both = [other_process(tmp_path, "share") for _ in range(2)]
    outputs = [process.communicate(timeout=100) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert all(error == "" for _, error in outputs), outputs
    assert outputs[0][0].split()[0] == outputs[1][0].split()[0]  # one secret, whoever made it
    assert sum(path.stat().st_size for path in blocks_in(tmp_path)) <= 20_000 + 2 * 1_000 + 2 * 1_020


def test_a_crash_before_the_rename_leaves_nothing_that_counts(tmp_path):
    crashed = other_process(tmp_path, "crash")
    crashed.communicate(timeout=100)
    assert crashed.returncode == 9
    [left] = (tmp_path / "mpt-prefixes" / "partial").iterdir()
    files = PrefixFiles(tmp_path, 10**6, "m")
    assert blocks_in(tmp_path) == [] and not files.read(*named(0), np.empty(1000, np.uint8))
    os.utime(left, (0, 0))
    files.look()
    assert not left.exists()
