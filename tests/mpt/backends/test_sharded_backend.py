"""A model shared by two processes over gloo: the same greedy tokens, a share of the memory each, and one fate."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest
import torch

import mpt
import mpt.checkpoint
from mpt.errors import UnsupportedConfig, UserError
from mpt.generation import generate
from mpt.sharding import Shard
from tests.serving.servers import running

SHAPES = {
    "plain": {},
    "grouped": {"attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 2}, "no_bias": False},
    "positions": {"attn_config": {"alibi": False}, "learned_pos_emb": True, "no_bias": False},
    "storywriter": {"attn_config": {"alibi_bias_max": 16, "clip_qkv": 6}, "n_heads": 8},
}


def small(**more) -> mpt.MPTConfig:
    return mpt.MPTConfig(**{"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 260, "max_seq_len": 512, **more})


@pytest.mark.parametrize("shape", SHAPES)
def test_the_shares_are_the_whole(shape, tokenizer, tmp_path):
    """Every number of the checkpoint is in the shares, once; what is not cut is in each."""
    torch.manual_seed(0)
    model = mpt.MPTForCausalLM(small(**SHAPES[shape]))
    mpt.save(model, tmp_path / "m", tokenizer=tokenizer)
    shares = [mpt.checkpoint.load_for_engine(tmp_path / "m", shard=Shard(rank, 2)) for rank in range(2)]
    config = model.config
    for name, whole in model.named_parameters():
        parts = [dict(share.named_parameters()).get(name) for share in shares]
        if "Wqkv" in name:
            width, kv = config.d_model // 2, config.n_kv_heads * config.d_head // 2
            pieces = [part.split([width, kv, kv]) for part in parts]
            joined = torch.cat([torch.cat(pair) for pair in zip(*pieces, strict=True)])
        elif "up_proj" in name:
            joined = torch.cat(parts)
        elif name.endswith(("out_proj.weight", "down_proj.weight")):
            joined = torch.cat(parts, dim=1)
        else:
            joined = parts[0]
            assert parts[1] is None or torch.equal(parts[1], whole), name
        assert torch.equal(joined, whole), name


@pytest.mark.parametrize(
    ("more", "n", "words"),
    [({"n_heads": 4}, 3, "4 heads"), ({"attn_config": {"attn_type": "multiquery_attention"}}, 2, "1 KV heads")],
)
def test_what_cannot_be_shared_is_refused(more, n, words):
    with pytest.raises(UserError, match=words):
        Shard(0, n).check(small(**more))
    with pytest.raises(UnsupportedConfig, match="qk_ln"):
        Shard(0, 2).check(small(attn_config={"qk_ln": True}))


# Each case in a process of its own, since one serves one model, and so is the process beside it; both are forked from
# one that has imported torch. That the other is started as a command is tested below, by servers.
PROGRAM = """
import asyncio, json, os, signal, sys, types
import torch
torch.set_num_threads(1)
from pathlib import Path
from mpt.tokenizer import Tokenizer
from mpt.engine.engine import Engine
from mpt.engine.request import Delta, Sampling
from mpt.engine.speculation import PromptLookup, Speculation
from mpt.backends import sharded_backend
from mpt.backends.paged_backend import Steps
from mpt.backends.sharded_backend import open_sharded

class Forked:
    def __init__(self, command, env):
        self.pid = os.fork()
        if self.pid == 0:
            sys.argv = command[2:]  # after the interpreter and -m
            sharded_backend.main()
            os._exit(0)
    def terminate(self):
        os.kill(self.pid, signal.SIGTERM)
    def wait(self):
        os.waitpid(self.pid, 0)

sharded_backend.subprocess = types.SimpleNamespace(Popen=Forked)

async def main(folder, prompts, in_pages, guesses):
    steps = Steps(n_rows=3, n_prompt=64, context=1024) if in_pages else None
    backend = open_sharded(Path(folder), 2, dtype=torch.float32, device="cpu", steps=steps)
    backend.allocate(backend.bytes_per_token * 256 * 3)
    # a budget of a few rows: prefixes are copied, rows grow, the youngest are sent back
    engine = Engine(backend, Tokenizer.from_folder(folder), context_length=1024, prefill_chunk=16, max_running=3,
                    kv_bytes=backend.bytes_per_token * 256 * 3,
                    speculation=Speculation(PromptLookup()) if guesses else None)
    engine.start()
    async def one(prompt, n):
        events = engine.generate(prompt, Sampling(max_tokens=n, temperature=0, ignore_eos=True), request_id="x")
        return [token async for event in events if isinstance(event, Delta) for token in event.token_ids]
    answers = await asyncio.gather(*(one(prompt, n) for prompt, n in prompts))
    stats = engine.stats()
    engine.close()
    return [answers, stats.n_preemptions, stats.prefix_hits_tokens, backend.bytes_per_token, stats.n_guessed_right]

for name, case in json.loads(sys.argv[1]).items():
    child = os.fork()
    if child == 0:
        print(json.dumps([name, asyncio.run(main(*case))]), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""
CASES = {
    "grouped": ("grouped", False, False),
    "positions": ("positions", False, False),
    "storywriter": ("storywriter", False, False),
    "storywriter_in_pages": ("storywriter", True, False),
    "storywriter_guessing": ("storywriter", False, True),
    "storywriter_guessing_in_pages": ("storywriter", True, True),
}
BEGINNING = [(7 * k) % 250 for k in range(90)]
PROMPTS = [([*BEGINNING, k], n) for k, n in enumerate((20, 300, 40, 280, 30))]


@pytest.fixture(scope="module")
def models() -> dict[str, mpt.MPTForCausalLM]:
    made = {}
    for shape, *_ in CASES.values():
        torch.manual_seed(1)
        made[shape] = mpt.MPTForCausalLM(small(**SHAPES[shape])).eval()
    return made


@pytest.fixture(scope="module")
def found(models, tokenizer, tmp_path_factory) -> tuple[dict[str, list], str]:
    """What two processes answered in each case, and what they said on stderr."""
    work = tmp_path_factory.mktemp("shared")
    for shape, model in models.items():
        mpt.save(model, work / shape, tokenizer=tokenizer)
    asked = {name: [str(work / shape), PROMPTS, *how] for name, (shape, *how) in CASES.items()}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(asked)],
        capture_output=True, text=True, timeout=250, cwd=Path(mpt.__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith('["')]  # gloo says on stdout what it connects
    return dict(map(json.loads, lines)), done.stderr


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_greedy_tokens_of_one(case, models, found):
    answers_of, said = found
    assert case in answers_of, said[-2000:]
    answers, n_preemptions, n_shared, bytes_per_token, n_guessed_right = answers_of[case]
    shape, _, guesses = CASES[case]
    model = models[shape]
    assert answers == [generate(model, prompt, n) for prompt, n in PROMPTS]
    assert n_preemptions > 0 and n_shared > 0  # what was to be tested has happened
    assert (n_guessed_right > 0) == guesses
    assert bytes_per_token == model.config.kv_bytes_per_token * 4 // 2 // 2  # float32, half of the heads


def test_a_process_that_dies_ends_the_model_and_says_so(tokenizer, tmp_path):

    mpt.save(mpt.MPTForCausalLM(small()), tmp_path / "m", tokenizer=tokenizer)
    with running("serve", "--model", f"m={tmp_path / 'm'}", "--tensor-parallel", "2", "--port", "0") as server:
        body = {"model": "m", "prompt": "abc", "max_tokens": 4, "ignore_eos": True}
        assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=100).status_code == 200
        (other,) = psutil.Process(server.process.pid).children()
        os.kill(other.pid, signal.SIGKILL)
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=100)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_stopped")
        assert server.process.wait(100) == 6


def test_the_other_processes_leave_with_the_first(tokenizer, tmp_path):

    mpt.save(mpt.MPTForCausalLM(small()), tmp_path / "m", tokenizer=tokenizer)
    for number in (signal.SIGTERM, signal.SIGKILL):
        with running("serve", "--model", f"m={tmp_path / 'm'}", "--tensor-parallel", "2", "--port", "0") as server:
            (other,) = psutil.Process(server.process.pid).children()
            server.process.send_signal(number)
            server.process.wait(100)
            assert psutil.wait_procs([other], timeout=100)[1] == []
