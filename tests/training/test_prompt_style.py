"""The prompt style is what the base or the rows say; no name, folder or ending is read for hints."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import mpt.checkpoint
from mpt.catalog import describe, stated_style
from mpt.config import MPTConfig
from mpt.engine.local import LocalModel
from mpt.errors import UserError
from mpt.options import ModelOptions
from mpt.prompts import PromptStyle
from mpt.tokenizer import Tokenizer
from mpt.transformers_model import MPTForCausalLM
from training import datasets, loop, prompt_style, recipes
from training.run import Run

EXCHANGE = {"prompt": "Name a fruit.", "response": "An apple."}
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}] * 2
CHAT = {"messages": TURNS}
DOLLY = "{{ '### Instruction:\\n' + messages[0].content + '\\n\\n### Response:\\n' }}"


@pytest.fixture(scope="session")
def plain_tokenizer() -> Tokenizer:
    """Of a base model: it has end-of-text and no ChatML tokens."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(["name: Ada"], trainer)
    return Tokenizer(trained)


def make_base(folder: Path, tokenizer: Tokenizer, **files: Any) -> str:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "mpt"}')
    tokenizer.save(folder)
    for name, value in files.items():
        path = folder / f"{name}.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**known, **value}))
    return str(folder)


def make_rows(path: Path, *rows: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chosen(base: str, data: str, recipe: str = "instruct", given: PromptStyle | None = None) -> tuple[PromptStyle, str]:
    return prompt_style.choose(recipes.make_finetune(recipe, base, data, "out"), recipe, given)


@pytest.mark.parametrize("folder", ["chats/mpt-7b", "instruct-models/mine", "my-chat"])
@pytest.mark.parametrize("file", ["my_wechat_qa.jsonl", "chatfiles/rows.jsonl", "instruct.jsonl"])
def test_letters_of_a_name_decide_nothing(tmp_path: Path, plain_tokenizer: Tokenizer, folder: str, file: str) -> None:
    base = make_base(tmp_path / folder, plain_tokenizer)
    assert chosen(base, make_rows(tmp_path / file, EXCHANGE))[0] == "instruct"
    assert chosen(base, make_rows(tmp_path / file, {"text": "Once upon a time"}))[0] == "none"


def test_a_base_that_was_trained_on_a_style_keeps_it(
    tmp_path: Path, plain_tokenizer: Tokenizer, tokenizer: Tokenizer
) -> None:
    chat, exchange = make_rows(tmp_path / "a.jsonl", CHAT), make_rows(tmp_path / "b.jsonl", EXCHANGE)
    assert chosen("mpt-7b-chat", exchange) == ("chatml", "the base's own, from the catalog")
    assert chosen("mosaicml/mpt-7b-instruct", chat) == ("instruct", "the base's own, from the catalog")
    ours = make_base(tmp_path / "ours", tokenizer, manifest={"prompt_style": "instruct"})
    assert chosen(ours, chat) == ("instruct", "the base's own, from its manifest.json")
    template = make_base(tmp_path / "template", tokenizer, tokenizer_config={"chat_template": DOLLY})
    assert chosen(template, chat) == ("template", "the base's own, from its chat template")
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": DOLLY}]
    listed = make_base(tmp_path / "listed", plain_tokenizer, tokenizer_config={"chat_template": several})
    assert stated_style(listed) == ("template", "its chat template")
    (Path(make_base(tmp_path / "jinja", plain_tokenizer)) / "chat_template.jinja").write_text(DOLLY)
    assert describe(tmp_path / "jinja").prompt_style == "template"  # as the server would render it
    foreign = make_base(tmp_path / "foreign", tokenizer)
    style, reason = chosen(foreign, exchange)
    assert style == "chatml" and "<|im_start|>" in reason


@pytest.mark.parametrize(
    ("row", "style"),
    [
        (CHAT, "chatml"),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, "chatml"),
        ({"chosen": "\n\nHuman: Hi\n\nAssistant: Hello"}, "chatml"),
        ({"prompt": {"text": "Hi", "role": "prompter", "replies": []}}, "chatml"),
        (EXCHANGE, "instruct"),
        ({"instruction": "Name a fruit.", "input": "", "output": "An apple.", "text": "Below is ..."}, "instruct"),
        ({"question": "Why?", "chatgpt_answers": ["So."]}, "instruct"),
        ({"text": "Once upon a time"}, "none"),
    ],
)
def test_a_base_without_a_style_takes_that_of_the_rows(tmp_path: Path, row: Any, style: PromptStyle) -> None:
    path = make_rows(tmp_path / "rows.jsonl", row)
    assert chosen("mpt-tiny", path)[0] == style
    assert chosen("mpt-tiny", str(tmp_path))[0] == style  # the folder of this file


def test_sets_with_a_name_say_their_style_without_being_read() -> None:
    assert chosen("mpt-7b", "dolly_hhrlhf") == ("instruct", "the rows of `dolly_hhrlhf` are made for it")
    assert chosen("mpt-tiny", "sharegpt")[0] == "chatml"
    assert chosen("mpt-tiny", "tiny_chat")[0] == "chatml"
    assert chosen("mpt-tiny", "yaml_to_json")[0] == "instruct"
    assert chosen("mpt-tiny", "tiny_stories")[0] == "none"


def test_what_is_asked_for_comes_first_then_the_recipe() -> None:
    assert chosen("mpt-7b-chat", "sharegpt", given="instruct") == ("instruct", "given by --prompt-style")
    assert chosen("mpt-7b-instruct", "dolly", "chat") == ("chatml", "part of the recipe `chat`")
    assert chosen("mpt-7b-chat", "dolly", "long_8k") == ("none", "part of the recipe `long_8k`")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"question": "Why?", "reply": "So."}], "line 1 has the keys question, reply"),
        ([EXCHANGE, CHAT], "line 1 has `prompt`, `rows.jsonl` line 2 has `messages`"),
    ],
)
def test_rows_that_do_not_say_are_asked_about(tmp_path: Path, rows: list[Any], said: str) -> None:
    path = make_rows(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(UserError, match="give --prompt-style none, instruct, chatml") as caught:
        chosen("mpt-7b", path)
    assert said in str(caught.value)
    assert chosen("mpt-7b", path, given="instruct")[0] == "instruct"


def test_mpt_7bs_tokenizer_gets_the_ids_that_mpt_7b_chats_has(data_file: Callable[[str], Path]) -> None:
    """The released chat models' tokenizer is sam-mosaic/gpt-neox-20b-chatml."""
    made = Tokenizer.from_file(data_file("tokenizer/gpt-neox-20b.compact.json")).with_chatml()
    released = Tokenizer.from_file(data_file("tokenizer/gpt-neox-20b-chatml.compact.json"))
    text = "<|im_start|>system\nHi<|im_end|>"
    assert made.encode(text, allow_special=True) == [50277, 10394, 187, 12764, 50278]
    assert made.end_ids == released.end_ids == (0, 50278)
    assert made.encode(text) == released.encode(text)
    assert made.with_chatml() is made


@pytest.mark.parametrize(("recipe", "said"), [("instruct", "has `messages`"), ("chat", "part of the recipe `chat`")])
def test_a_base_without_chatml_gets_its_tokens(
    tmp_path: Path, plain_tokenizer: Tokenizer, recipe: str, said: str
) -> None:
    n = plain_tokenizer.vocab_size
    base = make_base(tmp_path / "base", plain_tokenizer, config={"vocab_size": n + 2})
    rows = make_rows(tmp_path / "rows.jsonl", CHAT)
    style, reason = chosen(base, rows, recipe)
    assert style == "chatml" and said in reason
    assert f"its tokens are added to the tokenizer as ids {n} and {n + 1}" in reason
    full = make_base(tmp_path / "full", plain_tokenizer, config={"vocab_size": n + 1})
    with pytest.raises(UserError, match=rf"{n + 2} ids, and the embedding {n + 1} rows; give --prompt-style instruct"):
        chosen(full, rows, recipe)
    assert chosen(full, rows, given="instruct")[0] == "instruct"


def test_what_is_trained_in_chatml_on_such_a_base_serves_it(
    tmp_path: Path, plain_tokenizer: Tokenizer, small_run: Run
) -> None:
    n = plain_tokenizer.vocab_size
    config = MPTConfig(d_model=32, n_heads=2, n_layers=1, vocab_size=n + 40, max_seq_len=256)
    base = mpt.checkpoint.save(MPTForCausalLM(config), tmp_path / "base", tokenizer=plain_tokenizer)
    before = mpt.checkpoint.load(base).transformer.wte.weight[n : n + 2].clone()
    rows = make_rows(tmp_path / "rows.jsonl", *[CHAT] * 8)
    made = recipes.make_finetune("chat", str(base), rows, str(tmp_path / "run"), steps=2, lr=1e-2, precision="fp32")
    folder = loop.fit(dataclasses.replace(made, warmup_steps=0))
    model = LocalModel(ModelOptions(str(folder)))
    start, end = n, n + 1
    newline, role = plain_tokenizer.encode("\n"), plain_tokenizer.encode
    assert model.encode_prompt("Hi") == [
        start, *role("user\nHi"), end, *newline, start, *role("assistant\n"),
    ]  # fmt: skip
    assert describe(folder).prompt_style == "chatml"
    assert model.tokenizer.end_ids == (plain_tokenizer.eos_id, end)
    stock = PreTrainedTokenizerFast.from_pretrained(str(folder))
    assert stock.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [start, end]
    assert not torch.equal(mpt.checkpoint.load(folder).transformer.wte.weight[n : n + 2], before)


def test_turns_for_an_instruct_base_become_instructions_one_after_the_other(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """The rule that docs/training.md gives for a conflict, down to the text."""
    data = datasets.load(make_rows(tmp_path / "rows.jsonl", CHAT), tokenizer, "instruct", 1000, 0)
    head = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    )
    block = "### Instruction:\nHi\n\n### Response:\nHello<|endoftext|>"
    assert tokenizer.decode(data.sample(0).ids, False) == head + block + block
