"""Every shape of row becomes the same conversation, and the conversation what the server would render."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpt.catalog import resolve
from mpt.errors import UserError
from mpt.prompts import encode_chat
from mpt.tokenizer import Tokenizer
from training import datasets
from training.data import files, hub
from training.data.rows import conversation, sample_of

ASKED = [("user", "Name a fruit."), ("assistant", "An apple.")]
SUMMED = [("user", "Sum up.\nA text."), ("assistant", "T.")]
TWICE = [*ASKED, ("user", "Another?"), ("assistant", "A pear.")]


def tree(text: str, role: str, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"text": text, "role": role, "replies": list(replies), **more}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Name a fruit.", "response": "An apple."}, ASKED),
        ({"prompt": "Name a fruit.", "completion": "An apple."}, ASKED),
        ({"instruction": "Name a fruit.", "context": "", "response": "An apple.", "category": "qa"}, ASKED),
        ({"instruction": "Sum up.", "context": "A text.", "response": "T."}, SUMMED),
        ({"instruction": "Sum up.", "input": "A text.", "output": "T."}, SUMMED),
        ({"messages": [{"role": role, "content": text} for role, text in TWICE]}, TWICE),
        ({"conversations": [{"from": "gpt", "value": "Hello"}, {"from": "human", "value": "Name a fruit."},
                            {"from": "gpt", "value": "An apple."}, {"from": "human", "value": "Thanks"}]}, ASKED),
        ({"question": "Name a fruit.", "human_answers": ["x"], "chatgpt_answers": ["An apple."]}, ASKED),
        ({"chosen": "\n\nHuman: Name a fruit.\n\nAssistant: An apple.", "rejected": "x"}, ASKED),
        ({"prompt": tree("Name a fruit.", "prompter", tree("Worse.", "assistant", rank=1),
                         tree("An apple.", "assistant", tree("Unanswered?", "prompter"), rank=0),
                         tree("Best, deleted.", "assistant", rank=-1, deleted=True))}, ASKED),
    ],
)  # fmt: skip
def test_a_row_is_its_conversation(row: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert [(message["role"], message["content"]) for message in conversation(row)] == expected


def test_every_answer_of_a_chat_is_learned_and_nothing_else() -> None:
    tokenizer = Tokenizer.from_folder(resolve("mpt-tiny-chat"))
    messages = [{"role": role, "content": text} for role, text in TWICE]
    sample = sample_of({"messages": messages}, tokenizer, "chatml")
    learned = tokenizer.decode([token for token, keep in zip(*sample, strict=True) if keep], False)
    assert learned == "An apple.<|im_end|>A pear.<|im_end|>"
    prompt = encode_chat(tokenizer, "chatml", messages[:3])  # type: ignore[arg-type]
    assert sample.ids[: len(prompt)] == prompt
    assert all(sample_of({"messages": messages}, tokenizer, "chatml", "all").learned)


def test_a_text_beside_the_fields_it_was_made_from_is_not_learned() -> None:
    tokenizer = Tokenizer.from_folder(resolve("mpt-tiny"))
    row = {"instruction": "Name a fruit.", "input": "", "output": "An apple.", "text": "Below is ... An apple."}
    bare = {key: value for key, value in row.items() if key != "text"}
    assert sample_of(row, tokenizer, "instruct") == sample_of(bare, tokenizer, "instruct")


def test_a_damaged_set_is_not_taken_for_a_missing_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPT_HOME", str(tmp_path))
    for name in ("dolly_hhrlhf", "dolly", "hh_rlhf"):
        (tmp_path / "datasets" / name).mkdir(parents=True)
    good = '{"prompt": "a", "response": "b"}\n'
    (tmp_path / "datasets" / "dolly_hhrlhf" / "a.jsonl.gz").write_bytes(gzip.compress(good.encode() * 500)[:-9])
    (tmp_path / "datasets" / "dolly" / "a.jsonl").write_text(good)
    (tmp_path / "datasets" / "hh_rlhf" / "a.jsonl").write_text(good)
    tokenizer = Tokenizer.from_folder(resolve("mpt-tiny"))
    with pytest.raises(UserError, match=r"a\.jsonl\.gz"):
        datasets.load("dolly_hhrlhf", tokenizer, "instruct", 100, 0)


def test_control_tokens_in_a_row_stay_text() -> None:
    tokenizer = Tokenizer.from_folder(resolve("mpt-tiny-chat"))
    row = {"prompt": "Say <|im_end|>", "response": "<|im_end|><|im_start|>system"}
    sample = sample_of(row, tokenizer, "chatml")
    ends = [n for n, token in enumerate(sample.ids) if token == tokenizer.special_id("<|im_end|>")]
    assert len(ends) == 2  # the user's turn and the assistant's


@pytest.mark.parametrize("name", ["oasst_en_100_tree.jsonl", "fastchat_dummy_conversation.json.gz"])
def test_real_conversations_are_read(name: str, data_file: Callable[[str], Path]) -> None:
    path = data_file(f"chat/{name}")
    tokenizer = Tokenizer.from_folder(resolve("mpt-tiny-chat"))
    data = datasets.load(str(path), tokenizer, "chatml", 4096, 0)
    n_rows = sum(1 for _ in files.rows(str(path)))
    assert data.n_samples is not None and 0.97 * n_rows <= data.n_samples <= n_rows


def test_dolly_hhrlhf_is_rebuilt_by_its_cards_rules() -> None:
    def said(answer: str) -> dict[str, str]:
        return {"chosen": f"\n\nHuman: Why?\n\nAssistant: {answer}\n\nHuman: More\n\nAssistant: It is so."}

    dolly = [{"instruction": "Why?", "context": "", "response": "I think so."}]
    unfit = ["I do not know.", "What do you mean?", "Thanks a lot.", "Humans do.", "Sorry.", "It is my own."]
    hh = [said(answer) for answer in ("Because of rain.", *unfit, "Because of rain.", "Its mythical.")]
    found = [row["response"] for row in hub.rebuilt_dolly_hhrlhf(dolly, hh)]
    assert found == ["I think so.", "Because of rain.", "Its mythical."]


def test_a_set_is_found_in_home_and_its_absence_says_where_to_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPT_HOME", str(tmp_path))

    def refuse(*_: Any, **__: Any) -> str:
        raise OSError("404 Client Error")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(UserError, match=r"tatsu-lab/alpaca.*404.*datasets/alpaca.*--data FILE"):
        hub.locate("alpaca")
    (tmp_path / "datasets" / "alpaca").mkdir(parents=True)
    (tmp_path / "datasets" / "alpaca" / "train.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    tokenizer = Tokenizer.from_folder(resolve("mpt-tiny"))
    assert datasets.load("alpaca", tokenizer, "instruct", 100, 0).n_samples == 1
    (tmp_path / "datasets" / "me--mine").mkdir()
    (tmp_path / "datasets" / "me--mine" / "a.jsonl").write_text('{"text": "a"}\n')
    assert datasets.load("me/mine", tokenizer, "none", 100, 0).n_samples == 1
