"""Tasks of lm-evaluation-harness asked of a model here: its requests are answered as a plain loop answers them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mpt.errors import UserError
from mpt.generation import generate
from training.evaluation import harness, models

pytest.importorskip("lm_eval", reason="needs lm_eval")
ROWS = [
    {"context": "The sea is", "choices": ["blue and deep", "made of wood", "a"], "gold": 0},
    {"context": "The sea is", "choices": ["made", "wide"], "gold": 1},
    {"context": "A ship has", "choices": ["two sails", "four legs"], "gold": 0},
]
CHOICES = """
task: own_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc}}]
"""
ANSWERS = """
task: own_answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}, cache_dir: {cache}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{context}}}}"
doc_to_target: " none"
generation_kwargs: {{until: ["e"], max_gen_toks: 12}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def local() -> models.Local:
    return models.Local.load("mpt-tiny", torch.device("cpu"), torch.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows, tasks = tmp_path / "rows.jsonl", tmp_path / "tasks"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tasks.mkdir()
    for name, text in (("choices", CHOICES), ("answers", ANSWERS)):
        (tasks / f"{name}.yaml").write_text(text.format(rows=rows, cache=tmp_path / "cache"))
    return tasks


def logprob(local: models.Local, context: str, continuation: str) -> tuple[float, bool]:
    """As the harness defines it: the two are one text, whose tokens behind the context's are scored."""
    encode, eos = local.tokenizer.encode, local.tokenizer.eos_id
    whole, n = (encode(context + continuation), len(encode(context))) if context else ([eos, *encode(continuation)], 1)
    with torch.inference_mode():
        logprobs = local.model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    places = range(n, len(whole))
    greedy = all(int(logprobs[place - 1].argmax()) == whole[place] for place in places)
    return sum(float(logprobs[place - 1, whole[place]]) for place in places), greedy


def test_its_tasks_are_judged_by_our_scores_and_answers(local: models.Local, folder: Path) -> None:
    found = harness.run(lambda: local, [str(folder)])
    right = 0
    for row in ROWS:
        scores = [logprob(local, row["context"], f" {choice}")[0] for choice in row["choices"]]
        right += scores.index(max(scores)) == row["gold"]
    assert found["results"]["own_choices"]["acc,none"] == pytest.approx(right / 3)
    assert found["results"]["own_answers"]["exact_match,none"] == 0
    table = harness.render(found, "markdown")
    assert f"| own_choices | 0 | acc | {right / 3:.4f} |" in table
    assert json.loads(harness.render(found, "json"))["n-samples"]["own_choices"]["effective"] == 3


class Request:
    def __init__(self, *args: Any) -> None:
        self.args = args


def test_what_it_asks_is_answered_as_a_plain_loop_answers_it(local: models.Local) -> None:
    adapter = harness._adapter(local)
    pairs = [("The sea is", " blue and deep"), ("The sea is", " made of wood"), ("", "The sea"), ("A ship ", "has")]
    answers = adapter.loglikelihood([Request(*pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), answer in zip(pairs, answers, strict=True):
        before = context.rstrip()  # a space at the end belongs to what follows
        expected, is_greedy = logprob(local, before, context[len(before) :] + continuation)
        assert answer == (pytest.approx(expected, abs=1e-3), is_greedy)
    asked = [Request("The sea is", {"until": ["e"], "max_gen_toks": 12}), Request("A", {"until": "\n"})]
    texts = adapter.generate_until(asked)
    for request, text, most in zip(asked, texts, (12, 256), strict=True):
        ids = local.tokenizer.encode(request.args[0])
        whole = generate(local.model, ids, most, end_ids=local.tokenizer.end_ids)
        until = request.args[1]["until"][0]
        assert text == local.tokenizer.decode([i for i in whole if i not in local.tokenizer.end_ids]).split(until)[0]


def test_a_context_that_is_too_long_loses_its_beginning(local: models.Local, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "max_seq_len", 12)
    context, continuation = "The whale swam on through the cold sea, and no man of the crew had", " a word"
    ((found, _),) = harness._adapter(local).loglikelihood([Request(context, continuation)], disable_tqdm=True)
    ids = local.tokenizer.encode(context + continuation)
    n = len(ids) - len(local.tokenizer.encode(context))
    assert len(ids) > 12 > n > 0
    with torch.inference_mode():
        logprobs = local.model(torch.tensor([ids[-12:]])).logits[0].double().log_softmax(-1)
    assert found == pytest.approx(sum(float(logprobs[k - 1, ids[-12:][k]]) for k in range(12 - n, 12)), abs=1e-3)


def test_a_long_text_is_read_in_windows_each_token_once(local: models.Local, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum over windows of 16 tokens, each of which predicts its own tokens behind the last of the window before."""
    monkeypatch.setattr(local, "max_seq_len", 17)
    text = "The whale swam on through the cold sea, and no man of the crew had a word for it. " * 3
    (found,) = harness._adapter(local).loglikelihood_rolling([Request(text)])
    ids = [local.tokenizer.eos_id, *local.tokenizer.encode(text)]
    total = 0.0
    for start in range(0, len(ids) - 1, 16):
        end = min(start + 16, len(ids) - 1)
        window = ids[max(0, end - 16) : end + 1]  # the last one keeps its full context
        with torch.inference_mode():
            logprobs = local.model(torch.tensor([window])).logits[0].double().log_softmax(-1)
        for place in range(len(window) - (end - start), len(window)):
            total += float(logprobs[place - 1, window[place]])
    assert found == pytest.approx(total, abs=1e-2)


def test_what_it_cannot_do_is_said(local: models.Local, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for tasks, message in (([str(tmp_path / "empty")], "defines no task"), (["no_such_task_at_all"], "has no task")):
        with pytest.raises(UserError, match=message):
            harness.run(lambda: local, tasks)
    (folder / "answers.yaml").write_text(
        (folder / "answers.yaml").read_text().replace("until:", "do_sample: true, until:")
    )
    with pytest.raises(UserError, match="greedy"):
        harness.run(lambda: local, [str(folder)])
