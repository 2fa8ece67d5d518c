"""Which tasks there are: the Gauntlet's arithmetic, definitions of one's own, and answers behind a chain of thought."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from mpt.catalog import resolve
from mpt.errors import UserError
from mpt.tokenizer import Tokenizer
from training.evaluation import catalog, gauntlet, tasks
from training.evaluation.catalog import GAUNTLET, TASKS
from training.evaluation.suite import Result, is_right
from training.evaluation.tasks import Task


def result(name: str, n_shots: int, accuracy: float, stderr: float = 0.0, **more: Any) -> Result:
    values = {"n_rows": 1, "n_rows_published": 1, "by_category": {}, "random_guess": 0.0, "majority_guess": 0.0}
    return Result(
        task=name, n_shots=n_shots, accuracy={"a": accuracy}, stderr={"a": stderr}, seconds=0.0, **{**values, **more}
    )


def test_a_category_of_the_gauntlet_is_what_is_above_guessing() -> None:
    """By hand: (0.75 - 0.5) / 0.5 = 0.5 for copa, where the error doubles; all others at guessing are 0."""
    name = "commonsense_reasoning"
    at_guessing = [result(one.name, one.n_shots, one.baseline) for one in GAUNTLET[name] if one.name != "copa"]
    found = {one.name: one for one in gauntlet.averages([*at_guessing, result("copa", 0, 0.75, 0.07)])}
    assert found[name].score == pytest.approx(0.5 / 7) and found[name].stderr == pytest.approx(0.14 / 7)
    assert found["reading_comprehension"].score is None and "squad (3 shots)" in found["reading_comprehension"].missing
    assert found["core_average"].score is None and name not in found["core_average"].missing


def test_the_core_average_is_the_mean_of_five_categories() -> None:
    """All right in one category and guessing in the others: a fifth. Jeopardy counts by its categories."""
    results = []
    for category, benchmarks in GAUNTLET.items():
        for one in benchmarks:
            results.append(result(one.name, one.n_shots, 1.0 if category == "world_knowledge" else one.baseline, 0.01))
    *_, core = gauntlet.averages(results)
    assert core.name == "core_average" and core.score == pytest.approx(0.2) and core.stderr is not None
    results[0] = result("jeopardy", 3, 1.0, by_category={"science": 1.0, "history": 0.0})
    assert gauntlet.averages(results)[0].score == pytest.approx((0.5 + 5) / 6)


def test_other_shots_are_another_benchmark() -> None:
    found = gauntlet.averages([result(one.name, 0, 1.0) for one in GAUNTLET["world_knowledge"]])
    assert found[0].score is None and "mmlu (5 shots)" in found[0].missing


def test_every_benchmark_is_a_task() -> None:
    assert {one.name for benchmarks in GAUNTLET.values() for one in benchmarks} <= TASKS.keys()


def test_an_answer_stands_behind_its_chain_of_thought_and_before_a_stop() -> None:
    gsm8k = TASKS["gsm8k"]
    right = " She sells 9 eggs at $2. The answer is 18.\n\nQ: And then? The answer is 7."
    assert is_right(gsm8k, right, ["18"])
    assert not is_right(gsm8k, right, ["7"]) and not is_right(gsm8k, " She sells 18 eggs. The answer is 9.", ["18"])
    assert is_right(gsm8k, " The answer is 180.", ["18"])  # begins with it, as LLM Foundry counts
    assert not is_right(gsm8k, " The answer is 180", ["18"], strict=True)
    assert not is_right(gsm8k, " The answer is The Rose", ["rose"])  # nothing is normalized here
    assert is_right(TASKS["triviaqa"], " The Rose, of course", ["a rose"])


ROWS = [
    {"context": "Mary has 2 cups.", "chain_of_thought": "( 2 + 0 )", "answer": "2"},
    {"context": "Tom has 7 hats.", "chain_of_thought": "( 10 - 3 )", "answer": "7"},
]


def test_worked_examples_show_their_chain_of_thought() -> None:
    """The text that LLM Foundry's code gives for its `svamp` entry, put together by hand."""
    tokenizer = Tokenizer.from_folder(resolve("mpt-tiny"))
    task = TASKS["svamp"]
    example = tasks.examples(task, ROWS, tokenizer, 2048, n_shots=1)[0]
    assert tokenizer.decode(example.query.sequences[0]) == (
        "Question: Tom has 7 hats.\n\nA:( 10 - 3 )The answer is 7\nQuestion: Mary has 2 cups.\n\nA:"
    )
    longest = len(tokenizer.encode(" ( 10 - 3 )The answer is 7", is_continuation=True))
    assert example.query.starts == (longest + 10,) and example.aliases == ("2",)


DEFINITION = """
icl_tasks:
- label: hats
  dataset_uri: rows/hats.jsonl
  num_fewshot: [0, 1]
  icl_task_type: generation_task_with_answers
  question_prelimiter: "Q: "
  continuation_delimiter: "\\nA: "
  prompt_string: "Count."
  early_stopping_criteria: ["\\n"]
  do_normalization: false
- label: eggs
  dataset_uri: eggs.jsonl
  icl_task_type: multiple_choice
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "rows/hats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "data/eggs.jsonl").write_text('{"query": "An egg is", "choices": ["round", "blue"], "gold": 0}\n')
    (tmp_path / "mine.yaml").write_text(DEFINITION)
    return tmp_path


def test_a_definition_of_llm_foundrys_makes_tasks(folder: Path) -> None:
    """Rows beside the definition, or in the data folder; once for each number of worked examples."""
    chosen = catalog.select(str(folder / "mine.yaml"), folder / "data")
    assert [(one.task.name, one.n_shots, one.folder.name) for one in chosen] == [
        ("hats", 0, "rows"), ("hats", 1, "rows"), ("eggs", 0, "data"),
    ]  # fmt: skip
    task = chosen[0].task
    assert (task.kind, task.stops, task.normalizes, task.n_rows) == ("generation", ("\n",), False, None)
    tokenizer = Tokenizer.from_folder(resolve("mpt-tiny"))
    example = tasks.examples(task, tasks.rows(task, folder / "rows"), tokenizer, 512, n_shots=1)[0]
    text = "Count.\nQ: Tom has 7 hats.\nA: 7\nQ: Mary has 2 cups.\nA:"
    assert tokenizer.decode(example.query.sequences[0]) == text
    assert catalog.select(str(folder / "mine.yaml"), folder / "data", 3)[2].n_shots == 3
    rows = [{"query": "An egg is", "choices": ["round", "blue"], "gold": 0, "category": "food"}]
    with_them, without = chosen[2].task, dataclasses.replace(chosen[2].task, has_categories=False)
    found = [tasks.examples(task, rows, tokenizer, 512)[0].category for task in (with_them, without)]
    assert found == ["food", None]
    (folder / "mine.yaml").write_text(f"{DEFINITION}  has_categories: false\n")
    assert not catalog.select(str(folder / "mine.yaml"), folder / "data")[2].task.has_categories


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("num_fewshot", "n_shots", "`n_shots` is not supported"),
        ("multiple_choice", "telepathy", "no icl_task_type `telepathy`"),
        ("icl_tasks", "tasks", "it needs `icl_tasks`"),
        ("label: eggs", "name: eggs", "`name` is not supported"),
        ("eggs.jsonl", "spoons.jsonl", "needs `spoons.jsonl`"),
        ("- label: hats", "- [", "it needs `icl_tasks`"),
    ],
)
def test_a_definition_that_cannot_be_read_says_why(folder: Path, before: str, after: str, message: str) -> None:
    (folder / "mine.yaml").write_text(DEFINITION.replace(before, after, 1))
    with pytest.raises(UserError, match=re.escape(message)):
        catalog.select(str(folder / "mine.yaml"), folder / "data")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "needs `query`, a str"),
        ('{"query": "a", "choices": ["b"]}', "needs `gold`, a int"),
        ('{"query": "a", "choices": ["b"], "gold": 1}', "gold is 1, of 1 choices"),
    ],
)
def test_a_bad_row_is_named_by_line(tmp_path: Path, line: str, message: str) -> None:
    good = '{"query": "a", "choices": ["b"], "gold": 0}'
    (tmp_path / "rows.jsonl").write_text(f"{good}\n\n{line}\n")
    with pytest.raises(UserError, match=re.escape(f"rows.jsonl:3`{' is' if 'JSON' in message else ':'}")) as caught:
        tasks.rows(Task("mine", "choice", "rows.jsonl", None), tmp_path)
    assert message in str(caught.value)


def test_standard_errors_are_lm_evals() -> None:
    metrics = pytest.importorskip("lm_eval.api.metrics", reason="needs lm_eval")
    right = [1, 0, 0, 1, 1, 0, 1, 1]
    mean = sum(right) / len(right)
    assert math.sqrt(mean * (1 - mean) / (len(right) - 1)) == pytest.approx(metrics.mean_stderr(right))
