"""An int8 KV cache behind the engine: twice the tokens, and one answer however rows grow, are shared or sent back."""

import asyncio
import contextlib
import copy
import functools
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

import mpt
from mpt.backends.backend import Row, Work
from mpt.backends.native import library
from mpt.backends.torch_backend import TorchBackend
from mpt.engine import endpoint as endpoints
from mpt.engine.endpoint import open_endpoint
from mpt.engine.engine import Engine
from mpt.engine.request import Delta, Event, Sampling, Started
from mpt.engine.speculation import PromptLookup, Speculation
from mpt.errors import MachineRefused, UserError
from mpt.options import ModelOptions
from mpt.tokenizer import Tokenizer
from serving.cluster import deployment
from serving.cluster.options import ReplicaOptions, read_args
from tests.in_process import running_engine
from tests.mpt.repetitive import CONTEXT, repetitive_model
from tests.serving import servers

IN_C = {"prefill_chunk": 4}  # at most 16 tokens of a row in a step: all of them in C, where nothing depends on company
pytestmark = pytest.mark.skipif(library.why_none() is not None, reason=str(library.why_none()))


@pytest.fixture(scope="module")
def small() -> mpt.MPTForCausalLM:
    return repetitive_model(n_heads=2)  # heads of 64, as the larger models have


@contextlib.contextmanager
def running(
    model: mpt.MPTForCausalLM, tokenizer: Tokenizer, *, kv_tokens: int = 1 << 14, guesses: bool = False, **options: int
) -> Iterator[Engine]:
    backend = TorchBackend(model, int8_cache=True)
    kv_bytes = kv_tokens * backend.bytes_per_token
    speculation = Speculation(PromptLookup()) if guesses else None
    with running_engine(
        backend, tokenizer, context_length=CONTEXT, kv_bytes=kv_bytes, speculation=speculation, **options
    ) as engine:
        yield engine


def prompt(n: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, 480), k=n)


async def ask(engine: Engine, tokens: list[int], n: int = 24, **sampling: object) -> list[Event]:
    asked = Sampling(max_tokens=n, ignore_eos=True, **{"temperature": 0.0, **sampling})  # type: ignore[arg-type]
    return [event async for event in engine.generate(tokens, asked, request_id="test")]


def tokens_of(events: list[Event], index: int = 0) -> list[int]:
    return [t for e in events if isinstance(e, Delta) and e.index == index for t in e.token_ids]


class Alone:
    """The expected answers: a row made as large as it gets, one request at a time, no engine."""

    def __init__(self, model: mpt.MPTForCausalLM) -> None:
        self.backend = TorchBackend(model, int8_cache=True)

    def read(self, row: Row, tokens: list[int]) -> torch.Tensor:
        """Logits (V) behind these tokens."""
        logits = self.backend.forward([Work(row, tokens, 1)])[0]
        row.length += len(tokens)
        return logits

    def answer(self, tokens: list[int], n: int) -> list[int]:
        row, said = self.backend.reserve(None, CONTEXT), []
        for start in range(0, len(tokens), 11):
            logits = self.read(row, tokens[start : start + 11])
        for _ in range(n):
            said.append(int(logits.argmax()))
            logits = self.read(row, said[-1:])
        return said


async def test_answers_are_the_same_in_company_and_as_rows_grow(small, tokenizer):
    """Rows of 256 tokens become rows of 512 beside others."""
    asked, alone = [prompt(n, seed=n) for n in (5, 13, 40, 200, 240, 250)], Alone(small)
    with running(small, tokenizer, **IN_C) as engine:
        found = await asyncio.gather(*(ask(engine, tokens, 90) for tokens in asked))
    assert [tokens_of(events) for events in found] == [alone.answer(tokens, 90) for tokens in asked]


def test_a_row_that_grew_and_a_copy_hold_the_same_bits(small):
    """Logits behind 300 tokens and three more: of a row made large at once, grown twice, and copied from another."""
    alone, tokens = Alone(small), prompt(300)
    large, grown = alone.backend.reserve(None, 900), alone.backend.reserve(None, 16)
    for start in range(0, 300, 12):
        grown = alone.backend.reserve(grown, start + 12)
        for row in (large, grown):
            alone.read(row, tokens[start : start + 12])
    copied = alone.backend.copy(large, 300, 700)
    shorter = alone.backend.copy(large, 120, 256)
    expected = alone.read(large, [5, 6, 7])
    assert torch.equal(alone.read(grown, [5, 6, 7]), expected)
    assert torch.equal(alone.read(copied, [5, 6, 7]), expected)
    beginning = alone.backend.reserve(None, 256)
    for start in range(0, 120, 12):
        alone.read(beginning, tokens[start : start + 12])
    assert torch.equal(alone.read(shorter, [9]), alone.read(beginning, [9]))


def _few_in_c(backend: TorchBackend, work):
    parts = TorchBackend._parts(backend, work)
    return parts if len(work[0].tokens) <= 16 else [(work, backend._pack)]


@pytest.mark.parametrize("torch_reads", [False, True], ids=["in_c", "in_torch"])
def test_all_ways_to_read_a_prompt_store_and_attend_over_the_same_numbers(small, torch_reads, monkeypatch):
    """Few tokens at a time against many, chunk by chunk: apart by bfloat16's rounding of what is computed."""
    alone, tokens = Alone(small), prompt(240)
    assert alone.backend.native is not None
    if torch_reads:  # as it does for an embedding
        monkeypatch.setattr(alone.backend, "_parts", lambda work: _few_in_c(alone.backend, work))
    stored, logits = [], []
    for chunk in (16, 17, 120, 240):
        row = alone.backend.reserve(None, 256)
        for start in range(0, 240, chunk):
            last = alone.read(row, tokens[start : start + chunk])
        logits.append(last)
        stored.append(row.kv[1].read(0, 240))
        assert (row.kv[1].read(0, 240)[0].norm(dim=-1).amax(-1) <= row.memory.key_norms[1]).all()
    for k in (1, 2, 3):
        largest = stored[0].abs().amax(-1, keepdim=True)
        assert ((stored[k] - stored[0]).abs() <= 0.04 * largest).all()  # a step of 1/127, and four roundings of 2^-8
        assert (logits[k] - logits[0]).abs().max() < 0.03 * logits[0].abs().max()


async def test_a_prompt_that_begins_like_another_finds_its_cache(small, tokenizer):
    first, alone = prompt(300), Alone(small)
    second = first + prompt(8, seed=1)
    with running(small, tokenizer, **IN_C) as engine:
        await ask(engine, first)
        events = await ask(engine, second)
    assert next(e for e in events if isinstance(e, Started)).cached_tokens == 300
    assert tokens_of(events) == alone.answer(second, 24)


async def test_answers_survive_being_sent_back(small, tokenizer):
    """Room for two rows of 512 tokens and six that grow from 200 to 330."""
    asked, alone = [prompt(200, seed) for seed in range(6)], Alone(small)
    with running(small, tokenizer, kv_tokens=1024, max_running=6, **IN_C) as engine:
        found = await asyncio.gather(*(ask(engine, tokens, 130) for tokens in asked))
        assert engine.stats().n_preemptions > 0
    assert [tokens_of(events) for events in found] == [alone.answer(tokens, 130) for tokens in asked]


async def test_samples_of_one_prompt_are_those_asked_for_one_by_one(small, tokenizer):
    tokens = prompt(60)
    with running(small, tokenizer, **IN_C) as engine:
        three = Sampling(max_tokens=40, ignore_eos=True, temperature=1.0, seed=5, n=3)
        together = [event async for event in engine.generate(tokens, three, request_id="three")]
    for k in range(3):
        with running(small, tokenizer, **IN_C) as engine:
            assert tokens_of(await ask(engine, tokens, 40, temperature=1.0, seed=5 + k)) == tokens_of(together, k)


async def test_guesses_change_no_bit_of_an_answer(small, tokenizer):
    phrase = prompt(12)
    asked = [phrase * 3 + prompt(k, seed=k) + phrase[:4] for k in range(4)]

    async def answers(engine: Engine) -> list[Delta]:
        found = await asyncio.gather(*(ask(engine, tokens, 60, logprobs=2) for tokens in asked))
        return [functools.reduce(Delta.then, (e for e in events if isinstance(e, Delta))) for events in found]

    with running(small, tokenizer) as engine:
        expected = await answers(engine)
    with running(small, tokenizer, guesses=True) as engine:
        assert await answers(engine) == expected
        assert engine.stats().n_guessed_right > 0


def test_a_budget_holds_nearly_twice_the_tokens(small, tokenizer):
    """Of heads of 64: 2 x 2 heads x 2 layers, 128 bytes each in bfloat16 and 64 + 4 in int8."""
    plain, int8 = TorchBackend(small), TorchBackend(small, int8_cache=True)
    assert (plain.bytes_per_token, int8.bytes_per_token) == (8 * 128, 8 * 68)
    kv_bytes = 1024 * 600
    stats = {}
    for name, backend in (("bfloat16", plain), ("int8", int8)):
        engine = Engine(backend, tokenizer, context_length=CONTEXT, kv_bytes=kv_bytes)
        stats[name] = (engine.longest_request, engine.stats().kv_total_bytes)
    assert stats["bfloat16"][0] == 512 and stats["int8"][0] == 1024  # whole blocks of 256 in 600 and in 1,129 tokens
    assert all(kv_bytes - 8 * 128 < total <= kv_bytes for _, total in stats.values())
    row = int8.reserve(None, 700)
    held = sum(layer.numbers.nbytes + layer.scales.nbytes for layer in row.kv)
    assert held == row.capacity * int8.bytes_per_token  # what is promised is what is taken


async def test_what_metrics_tell_is_what_rows_take(small, tokenizer):
    with running(small, tokenizer) as engine:
        await ask(engine, prompt(300))
        stats = engine.stats()
    assert stats.kv_kept_bytes == 512 * 8 * 68


# -- as `mpt serve` and a cluster set it up ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(small, tokenizer, tmp_path_factory) -> Path:
    return mpt.save(copy.deepcopy(small).float(), tmp_path_factory.mktemp("checkpoints") / "base", tokenizer=tokenizer)


def opened(folder: Path, **options: object) -> endpoints.Endpoint:
    asked = ModelOptions(str(folder), kv_gb=0.004, kv_cache="int8", **options)  # type: ignore[arg-type]
    endpoint = open_endpoint("base", asked)
    endpoint.engine.close()
    return endpoint


def test_a_server_answers(folder):
    with servers.running("serve", "--port", "0", "--model", f"base={folder}", "--kv-cache", "int8") as server:
        body = {"model": "base", "prompt": list(range(4, 44)), "max_tokens": 20, "temperature": 0, "ignore_eos": True}
        [choice] = httpx.post(f"{server.url}/v1/completions", json=body, timeout=100).json()["choices"]
        assert choice["finish_reason"] == "length"
        metrics = httpx.get(f"{server.url}/metrics").text
        assert any("int8 KV cache" in line for line in server.lines)
    assert 'mpt_kv_cache_usage_perc{model_name="base"}' in metrics


@pytest.mark.parametrize(
    ("options", "environment", "reason"),
    [
        (["--dtype", "float32"], {}, "asked for in float32"),
        ([], {"MPT_NATIVE": "0"}, "cannot run here (MPT_NATIVE=0)"),
        ([], {"PATH": ""}, "install gcc"),
        (["--tensor-parallel", "2"], {}, "shared by several processes"),
    ],
)
def test_where_it_cannot_be_had_one_line_says_so(folder, options, environment, reason):
    command = [sys.executable, "-m", "mpt", "serve", "--port", "0", "--model", f"base={folder}", "--kv-cache", "int8"]
    done = subprocess.run(
        [*command, *options],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    lines = [line for line in done.stderr.splitlines() if "--kv-cache int8" in line]
    assert done.returncode in (2, 5) and len(lines) == 1, done.stderr
    assert reason in lines[0] and "leave `--kv-cache` out" in lines[0]
    assert "Traceback" not in done.stderr


def test_onnx_is_refused(folder, tmp_path):
    (tmp_path / "model.onnx").touch()
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"`base` is an ONNX folder.*`--kv-cache int8`"):
        opened(tmp_path)


def test_a_model_the_c_step_is_not_made_for_is_refused():
    model = mpt.MPTForCausalLM(mpt.MPTConfig(d_model=544, n_heads=2, n_layers=1, vocab_size=64)).bfloat16()
    with pytest.raises(MachineRefused, match=r"`--kv-cache int8`.*heads of 272.*leave `--kv-cache` out"):
        TorchBackend(model, int8_cache=True)


def test_a_clusters_model_gets_it_too(folder):
    options = read_args({"models": {"base": {"root": str(folder), "kv_cache": "int8", "kv_gb": 0.004}}})
    endpoint = deployment._open("base", options.models["base"], 1)
    endpoint.engine.close()
    assert endpoint.engine._backend.bytes_per_token == 8 * 68
    with pytest.raises(UserError, match=r"`models.base.kv_cache` is 'int4'; it takes `auto` or `int8`"):
        read_args({"models": {"base": {"root": "x", "kv_cache": "int4"}}})
    assert ReplicaOptions("x").kv_cache == "auto"
