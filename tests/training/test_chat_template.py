"""A base with a chat template of its own is finetuned in it, and the result keeps the template."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import mpt.checkpoint
import mpt.manifest
from mpt.catalog import describe
from mpt.config import MPTConfig
from mpt.engine.local import LocalModel
from mpt.errors import UserError
from mpt.options import ModelOptions
from mpt.tokenizer import Tokenizer
from mpt.transformers_model import MPTForCausalLM
from training import adapters, batches, loop, prompt_style
from training.run import Lora, Run

SEA_LION = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '### USER:\n' + message['content'] + '\n\n### RESPONSE:\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
ROWS = [{"prompt": "Name a fruit.", "response": "An apple.<|endoftext|>"}] * 8
ASKED = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def base(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    torch.manual_seed(0)
    config = MPTConfig(d_model=32, n_heads=2, n_layers=1, vocab_size=tokenizer.vocab_size, max_seq_len=256)
    folder = mpt.checkpoint.save(MPTForCausalLM(config), tmp_path / "sea-lion-like", tokenizer=tokenizer)
    (folder / "manifest.json").unlink()  # no tool but ours writes one
    (folder / "special_tokens_map.json").unlink()
    path = folder / "tokenizer_config.json"
    more = {"chat_template": SEA_LION, "bos_token": "<|im_start|>"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    return folder


def finetune(small_run: Run, base: Path, tmp_path: Path, **changes: Any) -> Run:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    run = dataclasses.replace(small_run, base=str(base), tokenizer=None, model={}, data=str(rows), steps=2, **changes)
    style, reason = prompt_style.choose(run, "instruct", None)
    assert (style, reason) == ("template", "the base's own, from its chat template")
    return dataclasses.replace(run, prompt_style=style)


def test_the_learned_positions_of_a_row_are_counted_by_hand(
    small_run: Run, base: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """The response's `<|endoftext|>` is text, the template's own is the token that ends it."""
    run = finetune(small_run, base, tmp_path)
    sample = batches.load_data(run, batches.load_tokenizer(run), run.data).sample(0)
    start = tokenizer.special_id("<|im_start|>")
    prompt = [start, *tokenizer.encode("### USER:\nName a fruit.\n\n### RESPONSE:\n")]
    answer = [*tokenizer.encode("An apple.<|endoftext|>"), tokenizer.eos_id]
    assert sample.ids == prompt + answer
    assert sample.learned == [False] * len(prompt) + [True] * len(answer)
    assert sample.ids.count(tokenizer.eos_id) == 1


def test_a_finetune_keeps_the_template_of_its_base(small_run: Run, base: Path, tmp_path: Path) -> None:
    """The result answers to the prompt that transformers makes of the base."""
    folder = loop.fit(finetune(small_run, base, tmp_path))
    assert describe(folder).prompt_style == "template"
    stock = PreTrainedTokenizerFast.from_pretrained(str(base))
    expected = stock.apply_chat_template(ASKED, return_dict=False)
    assert LocalModel(ModelOptions(str(folder))).encode_prompt("Hi") == expected
    stock = PreTrainedTokenizerFast.from_pretrained(str(folder))
    assert stock.apply_chat_template(ASKED, return_dict=False) == expected
    mpt.manifest.verify_manifest(folder)


def test_an_adapter_merged_into_its_base_keeps_the_template_it_was_trained_in(
    small_run: Run, base: Path, tmp_path: Path
) -> None:
    given = tmp_path / "given.jinja"
    given.write_text("{% for m in messages %}{{ bos_token }}Q: {{ m.content }}{{ eos_token }}{% endfor %}")
    run = finetune(small_run, base, tmp_path, lora=Lora(rank=2), chat_template=str(given))
    merged = adapters.merge(loop.fit(run), tmp_path / "merged")
    local = LocalModel(ModelOptions(str(merged)))
    expected = local.tokenizer.encode("<|im_start|>Q: Hi<|endoftext|>", allow_special=True)
    assert local.encode_prompt("Hi") == expected


def test_the_flag_takes_a_file_or_a_style(small_run: Run, base: Path, tmp_path: Path) -> None:
    for asked, expected in (
        ("own.jinja", {"chat_template": "own.jinja", "prompt_style": "template"}),
        ("chatml", {"prompt_style": "chatml"}),
    ):
        changes = {"chat_template": asked}
        prompt_style.settle(changes)
        assert changes == expected
    with pytest.raises(UserError, match="contradict each other"):
        prompt_style.settle({"chat_template": "own.jinja", "prompt_style": "chatml"})
    run = dataclasses.replace(small_run, base=str(base), chat_template="own.jinja")
    assert prompt_style.choose(run, "instruct", "template") == ("template", "given by --chat-template")
    with pytest.raises(UserError, match=r"chat template `own\.jinja` cannot be read"):
        batches.load_format(dataclasses.replace(run, prompt_style="template"), batches.load_tokenizer(run))
