"""The naive loop against stock transformers, and our model under every way transformers generates."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, MptForCausalLM, set_seed

import mpt
from mpt import generation
from mpt.config import MPTConfig
from mpt.errors import UserError
from mpt.tokenizer import Tokenizer
from mpt.transformers_model import MPTForCausalLM

V = 97
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 24}


def make_model(vocab_size: int = V, **changes: Any) -> MPTForCausalLM:
    """Two layers, 12 heads; weights scaled up so that greedy answers wander instead of repeating one token."""
    torch.manual_seed(0)
    model = MPTForCausalLM(
        MPTConfig(d_model=96, n_heads=12, n_layers=2, vocab_size=vocab_size, max_seq_len=256, **changes)
    )
    with torch.no_grad():
        for block in model.transformer.blocks:
            for parameter in block.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(3)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> MPTForCausalLM:
    return make_model()


@pytest.fixture(scope="module")
def stock(model: MPTForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> MptForCausalLM:
    """transformers' in-tree class with the same weights."""
    folder = mpt.save(model, tmp_path_factory.mktemp("model") / "saved")
    loaded: MptForCausalLM = MptForCausalLM.from_pretrained(folder)
    return loaded.eval()


@pytest.fixture(scope="module")
def prompts() -> Tensor:
    return torch.randint(1, V, (3, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def mask() -> Tensor:
    """Left padding of 0, 7 and 15 tokens."""
    return torch.tensor([[int(i >= n) for i in range(20)] for n in (0, 7, 15)])


@pytest.fixture(scope="module")
def expected(stock: MptForCausalLM, prompts: Tensor, mask: Tensor) -> Tensor:
    """What stock answers greedily, (3, 44)."""
    answer: Tensor = stock.generate(prompts, attention_mask=mask, **GREEDY)
    assert min(len(set(row)) for row in answer[:, 20:].tolist()) > 5, "answers that repeat a token tell little"
    return answer


# -- the naive loop --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [0, 1, 2])
def test_the_naive_loop_equals_stock_generate(
    model: MPTForCausalLM, prompts: Tensor, mask: Tensor, expected: Tensor, row: int
) -> None:
    prompt = prompts[row][mask[row].bool()].tolist()
    assert mpt.generate(model, prompt, 24) == expected[row, 20:].tolist()


def test_a_long_prompt_is_read_in_chunks(
    model: MPTForCausalLM, prompts: Tensor, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "_PREFILL_CHUNK", 7)
    assert mpt.generate(model, prompts[0].tolist(), 24) == expected[0, 20:].tolist()


def test_generation_ends_with_an_end_token(model: MPTForCausalLM, prompts: Tensor, expected: Tensor) -> None:
    free = expected[0, 20:].tolist()
    end = next(token for token in free[3:] if token not in free[:3])
    got = mpt.generate(model, prompts[0].tolist(), 24, end_ids={end, V - 1})
    assert got == free[: free.index(end) + 1]
    assert mpt.generate(model, prompts[0].tolist(), 0) == []


def test_an_empty_prompt_is_refused(model: MPTForCausalLM) -> None:
    with pytest.raises(UserError, match="prompt is empty"):
        mpt.generate(model, [], 5)


def test_a_seed_repeats_its_sample_and_another_does_not(model: MPTForCausalLM, prompts: Tensor) -> None:
    prompt = prompts[0].tolist()
    one, again, other = (mpt.generate(model, prompt, 24, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert one == again != other


def test_samples_follow_the_models_distribution(model: MPTForCausalLM, stock: MptForCausalLM, prompts: Tensor) -> None:
    """300 first tokens against stock's probabilities: each within 4.5 standard errors, sqrt(p (1 - p) / n)."""
    prompt, n, temperature = prompts[0].tolist(), 300, 2.0
    with torch.no_grad():
        probabilities = (stock(prompts[:1]).logits[0, -1].double() / temperature).softmax(-1)
    drawn = torch.tensor([mpt.generate(model, prompt, 1, temperature=temperature, seed=seed)[0] for seed in range(n)])
    share = torch.bincount(drawn, minlength=V) / n
    errors = (probabilities * (1 - probabilities) / n).sqrt() + 1 / n
    assert ((share - probabilities).abs() < 4.5 * errors).all()
    assert len(drawn.unique()) > 10


# -- transformers' generate on our model -----------------------------------------------------------------------------


def test_greedy_equals_stock(model: MPTForCausalLM, prompts: Tensor, mask: Tensor, expected: Tensor) -> None:
    assert torch.equal(model.generate(prompts, attention_mask=mask, **GREEDY), expected)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"cache_implementation": "static"}, id="static cache"),
        pytest.param({"use_cache": False}, id="no cache"),
        pytest.param({"prefill_chunk_size": 3}, id="chunked prefill"),
    ],
)
def test_every_cache_gives_the_same(
    model: MPTForCausalLM, prompts: Tensor, mask: Tensor, expected: Tensor, settings: dict[str, Any]
) -> None:
    assert torch.equal(model.generate(prompts, attention_mask=mask, **GREEDY, **settings), expected)


@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}])
def test_beams_equal_stock(
    model: MPTForCausalLM, stock: MptForCausalLM, prompts: Tensor, mask: Tensor, settings: dict[str, Any]
) -> None:
    """The cache is reordered at every step."""
    beams = {**GREEDY, "num_beams": 4, "num_return_sequences": 2, "attention_mask": mask}
    assert torch.equal(model.generate(prompts, **beams, **settings), stock.generate(prompts, **beams))


def test_samples_equal_stock(model: MPTForCausalLM, stock: MptForCausalLM, prompts: Tensor, mask: Tensor) -> None:
    """The same luck and probabilities that differ by rounding: the same tokens."""
    settings = {**GREEDY, "do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 1.3, "attention_mask": mask}
    answers = []
    for each in (model, stock):
        set_seed(3)
        answers.append(each.generate(prompts, **settings))
    assert torch.equal(*answers)


def test_penalties_equal_stock(model: MPTForCausalLM, stock: MptForCausalLM, prompts: Tensor) -> None:
    settings = {**GREEDY, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2}
    assert torch.equal(model.generate(prompts, **settings), stock.generate(prompts, **settings))


@pytest.mark.parametrize("n_tokens", [2, 10])
def test_prompt_lookup_equals_greedy(model: MPTForCausalLM, stock: MptForCausalLM, n_tokens: int) -> None:
    """Guesses are checked many at a time on a cache that is cropped where they were wrong."""
    prompt = (torch.arange(60)[None] * 5 % 11) + 1  # repeats itself, so that there is something to look up
    plain = stock.generate(prompt, **GREEDY)
    reads: list[int] = []
    hook = model.transformer.wte.register_forward_pre_hook(lambda _, args: reads.append(args[0].shape[1]))
    try:
        got = model.generate(prompt, **GREEDY, prompt_lookup_num_tokens=n_tokens)
    finally:
        hook.remove()
    assert torch.equal(got, plain)
    assert max(reads[1:]) > 1, "no guess was ever checked: this test proved nothing"


def test_an_assistant_model_equals_greedy(model: MPTForCausalLM, expected: Tensor, prompts: Tensor) -> None:
    assistant = make_model(attn_config={"clip_qkv": 0.1})  # another model: some of its guesses are wrong
    got = model.generate(prompts[:1], assistant_model=assistant, **GREEDY)
    assert torch.equal(got, expected[:1])


def test_a_conversation_goes_on_with_its_cache(model: MPTForCausalLM, stock: MptForCausalLM, prompts: Tensor) -> None:
    cache = DynamicCache()
    first = model.generate(prompts[:1], past_key_values=cache, **GREEDY)
    longer = torch.cat([first, prompts[1:2]], dim=1)
    again = model.generate(longer, past_key_values=cache, **GREEDY)
    assert torch.equal(again, stock.generate(longer, **GREEDY))


def test_embeddings_may_be_given_for_ids(model: MPTForCausalLM, prompts: Tensor, expected: Tensor) -> None:
    embedded = model.transformer.wte(prompts[:1])
    assert torch.equal(model.generate(inputs_embeds=embedded, **GREEDY), expected[:1, 20:])


@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}, {"num_beams": 3}])
def test_learned_positions_generate_behind_padding(settings: dict[str, Any], prompts: Tensor, mask: Tensor) -> None:
    model = make_model(attn_config={"alibi": False})
    together = model.generate(prompts, attention_mask=mask, **GREEDY, **settings)
    for row, n in enumerate((0, 7, 15)):
        alone = model.generate(prompts[row : row + 1, n:], **GREEDY, **settings)
        assert torch.equal(together[row, n:], alone[0])


# -- transformers' Auto classes --------------------------------------------------------------------------------------

REGISTERED = """
import json, sys
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline
import mpt

torch.set_num_threads(1)
folder = sys.argv[1]
before = type(AutoModelForCausalLM.from_pretrained(folder)).__module__
mpt.register()
mpt.register()
model = AutoModelForCausalLM.from_pretrained(folder)
settings = dict(max_new_tokens=12, do_sample=False)
answer = pipeline("text-generation", model=folder, return_full_text=False)("The quick", **settings)[0]
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer("The quick", return_tensors="pt").input_ids
print(json.dumps({
    "before": before,
    "config": type(AutoConfig.from_pretrained(folder)).__module__,
    "model": type(model).__module__,
    "from config": type(AutoModelForCausalLM.from_config(model.config)).__module__,
    "answer": answer["generated_text"],
    "greedy": model.generate(ids, **settings)[0].tolist(),
    "lookup": model.generate(ids, prompt_lookup_num_tokens=3, **settings)[0].tolist(),
    "beams": model.generate(ids, num_beams=3, **settings)[0].tolist(),
    "sampled": len(model.generate(ids, **{**settings, "do_sample": True})[0]),
    "prompt": ids[0].tolist(),
}))
"""


def test_register_puts_our_class_behind_transformers(small_bpe: Tokenizer, tmp_path: Path) -> None:
    """In a process of its own, so that the other tests keep the stock classes."""
    model = make_model(small_bpe.vocab_size, attn_config={"alibi_bias_max": 16, "clip_qkv": 6})
    folder = mpt.save(model, tmp_path / "storywriter", tokenizer=small_bpe)
    ran = subprocess.run([sys.executable, "-c", REGISTERED, folder], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["before"] == "transformers.models.mpt.modeling_mpt"
    assert found["config"] == "mpt.config"
    assert found["model"] == found["from config"] == "mpt.transformers_model"

    prompt = small_bpe.encode("The quick")
    assert found["prompt"] == prompt
    answer = mpt.generate(model, prompt, 12, end_ids=small_bpe.end_ids)
    assert found["greedy"] == found["lookup"] == prompt + answer
    assert found["answer"] == small_bpe.decode(answer)
    ends = list(small_bpe.end_ids)
    settings = {**GREEDY, "max_new_tokens": 12, "eos_token_id": ends, "pad_token_id": ends[0]}
    assert found["beams"] == model.generate(torch.tensor([prompt]), num_beams=3, **settings)[0].tolist()
    assert len(prompt) < found["sampled"] <= len(prompt) + 12
