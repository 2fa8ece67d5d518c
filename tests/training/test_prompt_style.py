"""The prompt style is what the base or the rows say; no name, folder or ending is read for hints."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mpt.catalog import describe, stated_style
from mpt.errors import UserError
from mpt.prompts import PromptStyle
from mpt.tokenizer import Tokenizer
from training import datasets, prompt_style, recipes

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


def test_chat_rows_need_a_tokenizer_with_chatml(
    tmp_path: Path, plain_tokenizer: Tokenizer, tokenizer_folder: Path
) -> None:
    base, rows = make_base(tmp_path / "base", plain_tokenizer), make_rows(tmp_path / "rows.jsonl", CHAT)
    with pytest.raises(UserError, match=r"<\|im_start\|>.*--prompt-style instruct, or --tokenizer"):
        chosen(base, rows)
    run = recipes.make_finetune("instruct", base, rows, "out", tokenizer=str(tokenizer_folder))
    assert prompt_style.choose(run, "instruct", None)[0] == "chatml"


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
