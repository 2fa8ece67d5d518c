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
from training.data.columns import apply, parse
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
        ({"input": "Name a fruit.", "output": "An apple."}, ASKED),
        ({"question": "Name a fruit.", "answer": "An apple."}, ASKED),
        ({"question": "Sum up.", "context": "A text.", "answer": "T."}, SUMMED),
        ({"query": "Name a fruit.", "response": "An apple."}, ASKED),
        ({"Question": "Name a fruit.", "Answer": "An apple."}, ASKED),
        ({"INSTRUCTION": "Name a fruit.", "RESPONSE": "An apple."}, ASKED),
        ({"prompt": "Name a fruit.", "chosen": "An apple.", "rejected": "x"}, ASKED),
        ({"prompt": [{"role": "user", "content": "Name a fruit."}], "completion": "An apple."}, ASKED),
        ({"prompt": [{"role": "user", "content": "Name a fruit."}],
          "completion": [{"role": "assistant", "content": "An apple."}]}, ASKED),
        ({"chosen": [{"role": role, "content": text} for role, text in TWICE], "rejected": []}, TWICE),
        ({"system_prompt": "Be brief.", "question": "Name a fruit.", "response": "An apple."},
         [("system", "Be brief."), *ASKED]),
        ({"messages": [{"role": role, "content": text} for role, text in TWICE]}, TWICE),
        ({"messages": [{"role": role, "content": text} for role, text in TWICE], "system": "Be brief."},
         [("system", "Be brief."), *TWICE]),
        ({"conversations": [{"role": "human", "content": "Name a fruit."},
                            {"role": "model", "content": "An apple."}]}, ASKED),
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


@pytest.mark.parametrize(
    ("columns", "row", "expected"),
    [
        ("prompt=q,response=a", {"q": "Name a fruit.", "a": "An apple.", "prompt": "x", "response": "y"}, ASKED),
        ("prompt=q, response=a, system=s", {"q": "Name a fruit.", "a": "An apple.", "s": "Be brief."},
         [("system", "Be brief."), *ASKED]),
        ("messages=turns", {"turns": [{"role": role, "content": text} for role, text in TWICE]}, TWICE),
    ],
)  # fmt: skip
def test_columns_say_which_keys_hold_what(columns: str, row: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    keyed = apply(parse(columns), row)
    assert [(message["role"], message["content"]) for message in conversation(keyed)] == expected


@pytest.mark.parametrize("text", ["", "prompt", "prompt=q", "question=q,response=a", "text=a,prompt=b", "text=a,text=b",
                                  "text=a,system=b"])  # fmt: skip
def test_columns_that_make_no_row_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="prompt=question,response=answer"):
        parse(text)


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(resolve("mpt-tiny"))
    path = tmp_path / "rows.jsonl"
    path.write_text('{"q": "a", "reply": "b"}\n')
    with pytest.raises(UserError, match=r"line 1: there is no `a`, which --columns names for response.*q, reply"):
        datasets.load(str(path), tokenizer, "instruct", 100, 0, columns="prompt=q,response=a")
    data = datasets.load(str(path), tokenizer, "none", 100, 0, columns="prompt=q,response=reply")
    assert tokenizer.decode(data.sample(0).ids) == "ab"
    assert datasets.style_of(str(path), "prompt=q,response=reply")[0] == "instruct"
    assert datasets.style_of(str(path), "text=q")[0] == "none"


def learned_of(row: Any, tokenizer: Tokenizer, **how: Any) -> str:
    ids, learned = sample_of(row, tokenizer, "chatml", **how)
    return tokenizer.decode([token for token, keep in zip(ids, learned, strict=True) if keep], False)


def test_the_last_response_and_long_prompts_are_learned_as_llm_foundry_did() -> None:
    """Its `target_responses` and `target_prompts`, by hand: a prompt is what stands before a response."""
    tokenizer = Tokenizer.from_folder(resolve("mpt-tiny-chat"))
    row = {"messages": [{"role": role, "content": text} for role, text in TWICE]}
    asked = "<|im_start|>user\nName a fruit.<|im_end|>\n<|im_start|>assistant\n"
    again = "\n<|im_start|>user\nAnother?<|im_end|>\n<|im_start|>assistant\n"
    first, second = "An apple.<|im_end|>", "A pear.<|im_end|>"
    assert learned_of(row, tokenizer) == first + second
    assert learned_of(row, tokenizer, learn="last") == second
    assert learned_of(row, tokenizer, learn_prompts="all") == asked + first + again + second
    assert learned_of(row, tokenizer, learn="last", learn_prompts="all") == asked + again + second
    n = len(tokenizer.encode(again, allow_special=True))
    assert n < len(tokenizer.encode(asked, allow_special=True))
    assert learned_of(row, tokenizer, learn_prompts=f"length>={n}") == asked + first + again + second
    assert learned_of(row, tokenizer, learn_prompts=f"length>={n + 1}") == asked + first + second
    assert learned_of(row, tokenizer, learn="all") == asked + first + again + second + "\n"


def test_tokens_that_llm_foundry_stored_are_taken_as_they_are() -> None:
    tokenizer = Tokenizer.from_folder(resolve("mpt-tiny"))
    row = {"turns": [{"input_ids": [5, 6], "labels": [7]}, {"input_ids": [8], "labels": [9, tokenizer.eos_id]}]}
    assert sample_of(row, tokenizer, "instruct") == (
        [5, 6, 7, 8, 9, tokenizer.eos_id], [False, False, True, False, True, True],
    )  # fmt: skip
    row["turns"][1]["labels"] = [tokenizer.vocab_size]
    with pytest.raises(UserError, match=f"token {tokenizer.vocab_size}, the tokenizer has {tokenizer.vocab_size}"):
        sample_of(row, tokenizer, "instruct")


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


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "p", "response": {"a": 1}}, "`response` is an object; a text is needed, for example its JSON"),
        ({"prompt": {"a": 1}, "response": "r"}, "`prompt` is an object; a text is needed, for example its JSON"),
        ({"prompt": "p", "response": float("nan")}, "`response` is NaN; a text is needed"),
        ({"prompt": "p", "response": 4}, "`response` is a number; a text is needed"),
        ({"prompt": "p", "response": True}, "`response` is true; a text is needed"),
        ({"prompt": "p", "response": [1]}, "`response` has a part that is a number; a text is needed"),
        ({"prompt": "p", "response": "r", "system": {"a": 1}}, "`system` is an object"),
        ({"prompt": "p", "response": "r", "system": float("nan")}, "`system` is NaN"),
        ({"instruction": "p", "input": float("nan"), "output": "r"}, "what the question is about is NaN"),
        ({"text": float("nan")}, "`text` is NaN"),
        ({"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": {"a": 1}}]},
         "content is an object"),
        ({"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "tool_calls": [
            {"function": {"name": "f", "arguments": {"x": float("nan")}}}]}]}, "holds NaN or infinity"),
        ({"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}],
          "tools": [{"name": "f", "parameters": {"default": float("inf")}}]}, "holds NaN or infinity"),
    ],
)  # fmt: skip
def test_a_value_that_is_no_text_is_refused_in_the_words_of_json(row: dict[str, Any], said: str) -> None:
    """Python would write an object as {'a': 1} and NaN as nan, which no model should learn."""
    with pytest.raises(UserError) as caught:
        conversation(row)
    assert said in str(caught.value) and "dict" not in str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "response": ""},
        {"prompt": "p", "response": None},
        {"prompt": [{"role": "user", "content": "p"}], "completion": " "},
        {"question": "p", "chatgpt_answers": [""], "human_answers": [""]},
        {"chosen": "\n\nHuman: p\n\nAssistant: ", "rejected": "x"},
        {"prompt": tree("p", "prompter", tree("", "assistant"))},
        {"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "\n"}]},
        {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": None}]},
    ],
)
def test_an_empty_answer_is_refused_alike_in_every_shape(row: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="a message of the assistant's is empty"):
        conversation(row)


@pytest.mark.parametrize("keys", [("input", "output"), ("query", "response"), ("question", "answer")])
def test_a_row_that_keeps_its_rendered_text_too_is_its_question_and_answer(keys: tuple[str, str]) -> None:
    row = {"text": "rendered", keys[0]: "Name a fruit.", keys[1]: "An apple."}
    assert [(turn["role"], turn["content"]) for turn in conversation(row)] == ASKED
