"""Pairs and judged answers in every shape people keep them in, down to the text that is learned."""

from pathlib import Path
from typing import Any

import pytest

from mpt.errors import UserError
from mpt.prompts import PromptFormat
from mpt.tokenizer import Tokenizer
from training.data.rows import Sample
from training.preferences import pairs, rows

CHATML, INSTRUCT = PromptFormat("chatml"), PromptFormat("instruct")
USER = {"role": "user", "content": "Hi"}
YES, NO = {"role": "assistant", "content": "Yes"}, {"role": "assistant", "content": "No"}
HH = "\n\nHuman: Hi\n\nAssistant: Go on\n\nHuman: Well\n\nAssistant: "


def learned(sample: Sample, tokenizer: Tokenizer) -> str:
    return tokenizer.decode([i for i, is_learned in zip(sample.ids, sample.learned, strict=True) if is_learned], False)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "Yes", "rejected": "No"},
        {"question": "Hi", "chosen": "Yes", "rejected": "No"},
        {"prompt": "Hi", "chosen": [YES], "rejected": [NO]},
        {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
        {"prompt": [USER], "chosen": YES, "rejected": NO},
        {"prompt": [USER], "chosen": "Yes", "rejected": "No"},
        {"chosen": [USER, YES], "rejected": [USER, NO]},
        {"prompt": "Hi", "chosen": [USER, YES], "rejected": [USER, NO]},  # UltraFeedback has the prompt twice
        {"messages": [USER], "chosen": YES, "rejected": NO},
        {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Yes"},
         "rejected": {"from": "gpt", "value": "No"}},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Yes", "rejected": " No"},
    ],
)  # fmt: skip
def test_the_shapes_of_a_pair_are_one(row: Any, tokenizer: Tokenizer) -> None:
    pair = rows.pair_of(row, tokenizer, CHATML)
    assert pair is not None
    head = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(pair.chosen.ids, False) == f"{head}Yes<|im_end|>\n"
    assert tokenizer.decode(pair.rejected.ids, False) == f"{head}No<|im_end|>\n"
    assert learned(pair.chosen, tokenizer) == "Yes<|im_end|>"
    assert learned(pair.rejected, tokenizer) == "No<|im_end|>"


def test_of_transcripts_only_what_differs_is_learned(tokenizer: Tokenizer) -> None:
    row = {"chosen": HH + "Yes", "rejected": HH + "No"}
    for prompts, end in ((CHATML, "<|im_end|>"), (INSTRUCT, "<|endoftext|>"), (PromptFormat("none"), "<|endoftext|>")):
        pair = rows.pair_of(row, tokenizer, prompts)
        assert pair is not None
        assert learned(pair.chosen, tokenizer) == f"Yes{end}"
        assert "Go on" in tokenizer.decode(pair.chosen.ids)
    # They part ways at the first answer: both of each are learned, what the human said between them is not.
    other = "\n\nHuman: Hi\n\nAssistant: Stop\n\nHuman: Why\n\nAssistant: No"
    pair = rows.pair_of({"chosen": HH + "Yes", "rejected": other}, tokenizer, CHATML)
    assert pair is not None
    assert learned(pair.chosen, tokenizer) == "Go on<|im_end|>Yes<|im_end|>"
    assert learned(pair.rejected, tokenizer) == "Stop<|im_end|>No<|im_end|>"


def test_a_prompt_that_is_not_given_is_what_both_texts_begin_with(tokenizer: Tokenizer) -> None:
    pair = rows.pair_of({"chosen": "Say it: yes", "rejected": "Say it: yet"}, tokenizer, PromptFormat("none"))
    assert pair is not None
    assert learned(pair.chosen, tokenizer) == "yes<|endoftext|>"
    with pytest.raises(UserError, match="do not begin alike"):
        rows.pair_of({"chosen": "Yes", "rejected": "No"}, tokenizer, CHATML)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "completion": "Yes", "label": True},
        {"prompt": "Hi", "response": "Yes", "label": 1},
        {"prompt": [USER], "completion": [YES], "label": True},
        {"messages": [USER, YES], "label": True},
    ],
)
def test_the_shapes_of_a_judged_answer_are_one(row: Any, tokenizer: Tokenizer) -> None:
    (judged,) = rows.judged_of(row, tokenizer, CHATML)
    assert judged.is_desirable
    assert learned(judged.answer, tokenizer) == "Yes<|im_end|>"
    assert not rows.judged_of({**row, "label": False}, tokenizer, CHATML)[0].is_desirable


def test_a_pair_is_two_judged_answers(tokenizer: Tokenizer) -> None:
    found = rows.judged_of({"prompt": "Hi", "chosen": "Yes", "rejected": "No"}, tokenizer, CHATML)
    assert [(learned(j.answer, tokenizer), j.is_desirable) for j in found] == [
        ("Yes<|im_end|>", True), ("No<|im_end|>", False),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "Hi", "response": "Yes"}, "keys prompt, response; needed: prompt, chosen and rejected"),
        ({"prompt": "Hi", "chosen": "", "rejected": "No"}, "empty"),
        ({"prompt": "Hi", "chosen": 3, "rejected": "No"}, "must be a text, a message, or a list of messages"),
        ({"prompt": "Hi", "chosen": ["Yes"], "rejected": "No"}, "a list of messages; here is a text"),
        ({"chosen": [USER, YES], "rejected": [USER, YES, USER, NO, USER]}, "must be the assistant's"),
        ("no JSON", "not JSON|an object is needed"),
        ([1], "a row is a list; an object is needed"),
        ({"prompt": "Hi", "completion": "Yes", "label": "good"}, "`label` is 'good'; it must be true or false"),
    ],
)
def test_what_is_no_pair_is_said(row: Any, said: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=said):
        (rows.judged_of if "label" in row else rows.pair_of)(row, tokenizer, CHATML)


def test_what_a_set_leaves_out_is_counted(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "pairs.jsonl"
    good = '{"prompt": "Hi", "chosen": "Yes", "rejected": "No"}\n'
    alike, long = good.replace("No", "Yes"), good.replace("Hi", "Hi" * 200)
    file.write_text(good * 3 + alike + long + good.replace("Yes", "Yes" * 60))
    found = pairs.load(str(file), tokenizer, CHATML, 100, 0, "dpo")
    assert found.n_samples == 4
    assert "of 6 rows, 1 have two equal answers and are left out; of 5 examples, 1 are cut at 100 tokens" in caplog.text
    assert max(len(found.sample(n).chosen.ids) for n in range(4)) == 100
    file.write_text(good + "{}\n")
    with pytest.raises(UserError, match="1 of 2 rows cannot be read"):
        pairs.load(str(file), tokenizer, CHATML, 100, 0, "dpo")
    file.write_text(alike)
    with pytest.raises(UserError, match="no answers to compare"):
        pairs.load(str(file), tokenizer, CHATML, 100, 0, "dpo")


def test_the_style_is_that_of_the_rows(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    for row, style in (
        ('{"prompt": "Hi", "chosen": "Yes", "rejected": "No"}', "instruct"),
        ('{"chosen": "\\n\\nHuman: Hi", "rejected": "\\n\\nHuman: Ho"}', "chatml"),
        ('{"messages": [], "label": true}', "chatml"),
    ):
        file.write_text(row)
        assert pairs.style_of(str(file)) == (style, "`pairs.jsonl` line 1 is made for it")
    file.write_text('{"text": "Hi"}')
    with pytest.raises(UserError, match="no `chosen` and `rejected`"):
        pairs.style_of(str(file))
