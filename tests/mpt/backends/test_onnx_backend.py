"""The engine over an ONNX folder: the answers of the torch model, under crowding, chunks, preemption and reuse."""

import asyncio
import json
from collections.abc import Iterator

import pytest

from mpt.backends.onnx_backend import OnnxBackend
from mpt.engine.endpoint import open_endpoint
from mpt.engine.engine import Engine
from mpt.engine.request import PromptScored, Started
from mpt.errors import DamagedFile, UserError
from mpt.generation import generate
from mpt.options import ModelOptions
from mpt.transformers_model import MPTForCausalLM
from tests.mpt.engine.test_engine import collect, greedy, prompts, tokens_of

CONTEXT = 2048


@pytest.fixture
def engine(onnx_folder, tokenizer, request) -> Iterator[Engine]:
    backend = OnnxBackend(onnx_folder, "cpu")
    options = {"prefill_chunk": 7, "max_running": 5} | getattr(request, "param", {})
    tokens = options.pop("kv_tokens", 1 << 16)
    made = Engine(backend, tokenizer, context_length=CONTEXT, kv_bytes=tokens * backend.bytes_per_token, **options)
    made.start()
    yield made
    made.close()


async def test_greedy_tokens_equal_the_naive_loop_whatever_shares_the_batch(engine, model):
    asked = prompts(12)
    answers = await asyncio.gather(*(collect(engine, prompt, greedy()) for prompt in asked))
    for prompt, events in zip(asked, answers, strict=True):
        assert tokens_of(events) == generate(model, prompt, 24)


@pytest.mark.parametrize("engine", [{"kv_tokens": 400, "max_running": 6}], indirect=True)
async def test_greedy_tokens_survive_preemption(engine, model):
    asked = [prompt[:60] for prompt in prompts(6)]
    answers = await asyncio.gather(*(collect(engine, prompt, greedy(80)) for prompt in asked))
    assert engine.stats().n_preemptions > 0
    for prompt, events in zip(asked, answers, strict=True):
        assert tokens_of(events) == generate(model, prompt, 80)


async def test_a_kept_beginning_is_read_once(engine, model):
    book = prompts(1)[0] * 5
    first, second = [*book, 10, 11], [*book, 12, 13, 14]
    await collect(engine, first, greedy())
    events = await collect(engine, second, greedy())
    assert events[0] == Started(len(second), len(book))
    assert tokens_of(events) == generate(model, second, 24)


async def test_the_same_prompt_again_cuts_the_kept_row_back(engine, model):
    (prompt,) = prompts(1)
    for _ in range(2):
        assert tokens_of(await collect(engine, prompt, greedy())) == generate(model, prompt, 24)


async def test_scoring_a_prompt_gives_every_tokens_logprob(engine, model: MPTForCausalLM):
    import torch

    (prompt,) = prompts(1)
    events = await collect(engine, prompt, greedy(0, prompt_logprobs=0))
    (scored,) = (event for event in events if isinstance(event, PromptScored))
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    expected = [float(logprobs[n, token]) for n, token in enumerate(prompt[1:])]
    assert [entry.logprob for entry in scored.logprobs[1:] if entry is not None] == pytest.approx(expected, abs=1e-4)


async def test_an_endpoint_recognises_the_folder_and_keeps_its_precision(onnx_folder, model, tmp_path):
    endpoint = open_endpoint("base", ModelOptions(str(onnx_folder)))
    try:
        (prompt,) = prompts(1)
        assert tokens_of(await collect(endpoint.engine, prompt, greedy())) == generate(model, prompt, 24)
        assert endpoint.context_length == CONTEXT
    finally:
        endpoint.engine.close()
    with pytest.raises(UserError, match="was converted to float32; --dtype bfloat16 needs another conversion"):
        open_endpoint("base", ModelOptions(str(onnx_folder), dtype="bfloat16"))
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in onnx_folder.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(DamagedFile, match="sha256"):
        open_endpoint("base", ModelOptions(str(broken)))
    manifest = json.loads((broken / "manifest.json").read_text())
    del manifest["files"]["model.onnx"]
    (broken / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedFile, match=r"model\.onnx` cannot be loaded"):
        open_endpoint("base", ModelOptions(str(broken)))
