"""Rows of files become samples as the server would render them; bad rows are named."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpt.errors import UserError
from mpt.prompts import PromptFormat, encode_instruct
from mpt.tokenizer import Tokenizer
from training import datasets
from training.data.rows import sample_of
from training.datasets import Rows


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_prompt_and_response_become_prompt_ids_and_learned_response(tokenizer: Tokenizer) -> None:
    sample = sample_of({"prompt": "Add 1.", "response": "2"}, tokenizer, "instruct")
    prompt = encode_instruct(tokenizer, "Add 1.")
    assert sample.ids == [*prompt, *tokenizer.encode("2"), tokenizer.eos_id]
    assert sample.learned == [False] * len(prompt) + [True] * 2


def test_a_prompt_already_in_the_template_is_not_wrapped_twice(tokenizer: Tokenizer) -> None:
    wrapped = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd 1.\n\n### Response:\n"
    )
    plain, dolly = (
        sample_of({"prompt": prompt, "response": "2"}, tokenizer, "instruct") for prompt in ("Add 1.", wrapped)
    )
    assert plain == dolly
    assert tokenizer.decode(dolly.ids) == wrapped + "2"


def test_each_epoch_visits_every_row_once_in_another_order() -> None:
    numbers = np.arange(50)

    def rows() -> Rows:
        return Rows(numbers, numbers >= 0, numbers, numbers + 1, seed=1)

    data = rows()
    first, second = ([data.sample(e * 50 + n).ids[0] for n in range(50)] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert [rows().sample(n).ids[0] for n in (70, 3)] == [second[20], first[3]]


def test_gzip_and_text_files_are_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"text": "hello"}\n'))
    assert datasets.load(str(packed), tokenizer, "none", 100, 0).n_samples == 1
    novel = tmp_path / "novel.txt"
    novel.write_text("it was the best of times " * 20)
    data = datasets.load(str(novel), tokenizer, "none", 16, 0)
    assert data.n_samples is not None
    ids = {tuple(data.sample(n).ids) for n in range(data.n_samples)}
    whole = [*tokenizer.encode(novel.read_text()), tokenizer.eos_id]
    assert {tuple(whole[i : i + 16]) for i in range(0, len(whole), 16)} == ids | {
        tuple(whole[i:]) for i in range(0, len(whole), 16) if len(whole) - i == 1
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a", "reply": "b"}, "question, reply"),
        ({"messages": [{"role": "user", "content": "x"}]}, "the user's; it must be the assistant's"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "1 messages"),
        ({"messages": [{"role": "user", "content": "x"}] * 2}, "assistant's"),
        ({"prompt": "", "response": "b"}, "empty"),
        ([1], "list"),
        ({"messages": [{"role": "user"}]}, "`content`"),
        ({"messages": [{"role": "robot", "content": "x"}, {"role": "assistant", "content": "y"}]}, "robot"),
    ],
)
def test_a_bad_row_is_named_by_line(tokenizer: Tokenizer, tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a", "response": "b"}, row])
    with pytest.raises(UserError, match="line 2") as caught:
        datasets.load(str(path), tokenizer, "instruct", 100, 0)
    assert message in str(caught.value)


def test_one_bad_row_in_a_hundred_is_left_out_and_said(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"prompt": "a", "response": "b"}) + "\n"
    path.write_text(good * 120 + "{not json\n" + good)
    assert datasets.load(str(path), tokenizer, "instruct", 300, 0).n_samples == 121
    assert "1 of 122 rows cannot be read" in caplog.text and "line 121: it is not JSON" in caplog.text
    path.write_text(good * 120 + "{not json\n" * 2)
    with pytest.raises(UserError, match="2 of 122 rows"):
        datasets.load(str(path), tokenizer, "instruct", 300, 0)


def test_rows_that_are_cut_or_left_out_are_counted(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "a" * n, "response": "b" * 50} for n in (1, 200, 600)]
    data = datasets.load(str(write(tmp_path / "rows.jsonl", rows)), tokenizer, "none", 210, 0)
    assert data.n_samples == 2
    assert "of 3 rows, 1 are cut at 210 tokens and 1 left out" in caplog.text


def test_settings_of_rows_are_refused_where_there_are_none() -> None:
    with pytest.raises(UserError, match="is generated, so --columns and --learn would change nothing"):
        datasets.require_rows("tiny_chat", "last", "none", "text=a")
    datasets.require_rows("tiny_chat", "responses", "none", None)
    datasets.require_rows("alpaca", "last", "all", "prompt=a,response=b")


def test_unknown_names_get_a_suggestion(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="did you mean `dolly_hhrlhf`"):
        datasets.load("dolly_hhrlf", tokenizer, "instruct", 100, 0)


def test_a_missing_file_is_not_looked_for_on_the_hub(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"no dataset `sets/rows\.jsonl\.gz`.*give a file"):
        datasets.load("sets/rows.jsonl.gz", tokenizer, "instruct", 100, 0)


def test_dolly_hhrlhf_is_read_whole_from_home(
    tokenizer: Tokenizer, tmp_path: Path, data_file: Callable[[str], Path]
) -> None:
    folder = tmp_path / "home" / "datasets" / "dolly_hhrlhf"
    folder.mkdir(parents=True)
    shutil.copy(data_file("instruct/dolly_hhrlhf_train_small.jsonl"), folder)
    data = datasets.load("dolly_hhrlhf", tokenizer, "instruct", 4096, 0)
    assert data.n_samples is not None and 900 < data.n_samples <= 1000


def test_yaml_of_any_shape_fits_a_sequence_with_its_whole_answer(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a-novel.txt").write_text("It was the best of times, it was the worst of times. " * 9, encoding="utf-8")
    monkeypatch.setenv("MPT_NOVELS", str(tmp_path))
    made = datasets.DATASETS["tiny_yaml"].make(tokenizer, PromptFormat("instruct"), 300, 1)
    n_documents = 0
    for number in range(60):
        sample = made.sample(number)
        assert len(sample.ids) <= 300
        answer = tokenizer.decode([token for token, is_learned in zip(*sample, strict=True) if is_learned])
        if answer[0] in "{[":
            json.loads(answer)
            n_documents += 1
    assert n_documents > 50
