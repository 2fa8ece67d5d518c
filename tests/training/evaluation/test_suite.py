"""Tasks become the sequences their definitions say, and give the same numbers here, behind a URL and over ranks."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from starlette.testclient import TestClient

from mpt.backends.torch_backend import TorchBackend
from mpt.catalog import resolve
from mpt.engine.endpoint import Endpoint
from mpt.engine.engine import Engine
from mpt.errors import UserError
from mpt.tokenizer import Tokenizer
from serving.app import make_app
from serving.endpoints import Serving
from serving.options import ServeOptions
from tests.mpt.test_sentencepiece_model import OPTIONS, train
from training.distributed import World
from training.evaluation import catalog, models, report, suite, tasks
from training.evaluation.catalog import TASKS
from training.evaluation.cli import evaluate

ROOT = Path(__file__).parents[3]
ALONE = World(0, 1, torch.device("cpu"))
ROWS: dict[str, list[dict[str, Any]]] = {
    "piqa.jsonl.gz": [
        {"query": "Question: How do I boil an egg?\n", "choices": ["In hot water.", "In a hat."], "gold": 0},
        {"query": "Question: What keeps rain off?\n", "choices": ["A spoon.", "An umbrella, most days."], "gold": 1},
        {"query": "Question: Where do fish live?\n", "choices": ["In water.", "In trees."], "gold": 0},
    ],
    "winograd_wsc.jsonl": [
        {"context_options": ["The cup fell because the cup", "The cup fell because the cat"],
         "continuation": "pushed it.", "gold": 1},
    ],
    "jeopardy_all.jsonl": [
        {"context": "SCIENCE: It is H2O", "continuation": "water", "category": "science"},
        {"context": "HISTORY: First man on the moon", "continuation": "Armstrong", "category": "history"},
    ],
    "triviaqa_sub.jsonl": [
        {"context": "Question: What is red?\nAnswer:", "answer": "a rose", "aliases": ["a rose", "roses"]},
    ],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, rows in ROWS.items():
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(resolve("mpt-tiny"))


def texts(name: str, folder: Path, tokenizer: Tokenizer, n_shots: int = 0) -> list[list[tuple[str, str]]]:
    """What is context and what is scored, decoded, of every alternative of every row."""
    task = TASKS[name]
    made = tasks.examples(task, tasks.rows(task, folder), tokenizer, 2048, n_shots)
    return [
        [
            (tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:]))
            for ids, start in zip(example.query.sequences, example.query.starts, strict=True)
        ]
        for example in made
    ]


def test_contexts_and_continuations_are_llm_foundrys(folder: Path, tokenizer: Tokenizer) -> None:
    egg = "Question: How do I boil an egg?\nAnswer:"
    assert texts("piqa", folder, tokenizer)[0] == [(egg, " In hot water."), (egg, " In a hat.")]
    assert texts("winograd", folder, tokenizer)[0] == [
        ("The cup fell because the cup", " pushed it."),
        ("The cup fell because the cat", " pushed it."),
    ]
    assert texts("jeopardy", folder, tokenizer)[0] == [("SCIENCE: It is H2O\nAnswer:", " water")]


def test_shots_are_worked_examples_of_other_rows(folder: Path, tokenizer: Tokenizer) -> None:
    (context, choice), _ = texts("piqa", folder, tokenizer, n_shots=2)[0]
    umbrella = "Question: What keeps rain off?\nAnswer: An umbrella, most days.\n"
    fish = "Question: Where do fish live?\nAnswer: In water.\n"
    assert context in (
        f"{umbrella}{fish}Question: How do I boil an egg?\nAnswer:",
        f"{fish}{umbrella}Question: How do I boil an egg?\nAnswer:",
    )
    assert choice == " In hot water."


def test_a_sequence_over_the_context_loses_its_beginning(folder: Path, tokenizer: Tokenizer) -> None:
    task = TASKS["piqa"]
    example = tasks.examples(task, tasks.rows(task, folder), tokenizer, 8)[1]
    assert all(len(ids) <= 8 for ids in example.query.sequences)
    long = tokenizer.encode("Question: What keeps rain off?\nAnswer:") + tokenizer.encode(" An umbrella, most days.")
    assert example.query.sequences[1] == long[-8:]
    assert example.query.starts[1] == max(1, 8 - len(tokenizer.encode(" An umbrella, most days.")))


def test_a_continuation_has_the_one_space_it_is_given(folder: Path, tmp_path: Path) -> None:
    """Of a tokenizer that writes a space before each text, here Llama's: context and continuation make one text."""
    pair = train(tmp_path, "bpe", **OPTIONS["as Llama"])
    task = TASKS["piqa"]
    query = tasks.examples(task, tasks.rows(task, folder), pair.ours, 512)[0].query
    asked = "Question: How do I boil an egg?\nAnswer:"
    for ids, answer in zip(query.sequences, (" In hot water.", " In a hat."), strict=True):
        assert ids == pair.theirs.encode(asked + answer)


@pytest.fixture(scope="module")
def local() -> models.Local:
    return models.Local.load("mpt-tiny", torch.device("cpu"))


@pytest.mark.parametrize("name", ["piqa", "winograd", "jeopardy", "triviaqa"])
def test_a_url_gives_the_same_numbers(
    name: str, folder: Path, local: models.Local, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(TorchBackend(local.model), tokenizer, context_length=2048, kv_bytes=1 << 26)
    engine.start()
    endpoint = Endpoint("tiny", "mpt-tiny", engine, tokenizer, "none", None, "Apache-2.0", 2048, 1 << 20)
    app = make_app(Serving(ServeOptions(models={}), endpoints={"tiny": endpoint}))

    def client(**options: Any) -> TestClient:
        return TestClient(app, base_url=options["base_url"])

    monkeypatch.setattr(httpx, "Client", client)
    monkeypatch.setattr(models, "_CONNECTIONS", 1)  # the test client is not for threads
    try:
        remote = models.Served("http://test/v1", "tiny", "mpt-tiny")
        here, there = (suite.run(model, TASKS[name], folder, ALONE) for model in (local, remote))
    finally:
        engine.close()
    assert there.accuracy == here.accuracy
    assert there.by_category == here.by_category


def test_ranks_add_up_to_the_whole(folder: Path, local: models.Local) -> None:
    class Half(World):
        def sum(self, *values: float) -> list[float]:
            seen.append(values)
            return list(values)

    seen: list[tuple[float, ...]] = []
    whole = suite.run(local, TASKS["piqa"], folder, ALONE)
    for rank in (0, 1):
        suite.run(local, TASKS["piqa"], folder, Half(rank, 2, torch.device("cpu")))
    together = [sum(values) / 3 for values in zip(*seen, strict=True)]
    assert together == pytest.approx(list(whole.accuracy.values()))


def test_guessing_and_categories_are_counted(folder: Path, local: models.Local) -> None:
    piqa = suite.run(local, TASKS["piqa"], folder, ALONE)
    assert (piqa.n_rows, piqa.random_guess, piqa.majority_guess) == (3, 0.5, pytest.approx(2 / 3))
    jeopardy = suite.run(local, TASKS["jeopardy"], folder, ALONE)
    assert set(jeopardy.by_category) == {"science", "history"}
    table = report.render([piqa, jeopardy], "markdown")
    assert "| piqa | 3 of 1,838 | 0 |" in table and "token_mean" in table and "mean of 2 categories" in table
    assert [r["task"] for r in json.loads(report.render([piqa, jeopardy], "json"))] == ["piqa", "jeopardy"]


def test_unknown_tasks_and_missing_files_say_what_to_do(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match="table1"):
        catalog.select("piqqa", folder)
    with pytest.raises(UserError, match="--data-folder"):
        catalog.select("piqa,boolq", folder)
    with pytest.raises(UserError, match="--data-folder"):
        catalog.select("table1", folder / "nowhere")
    assert [chosen.task.name for chosen in catalog.select("table1", folder)] == [
        "piqa",
        "winograd",
        "triviaqa",
        "jeopardy",
    ]
    assert "not run" in caplog.text and "winogrande" in caplog.text


def test_a_model_cut_over_two_ranks_scores_as_the_whole_does(folder: Path) -> None:
    names = "piqa,winograd"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "training.cli",
        "evaluate", "mpt-tiny", "--tasks", names, "--data-folder", str(folder), "--sharded", "--json",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    whole = models.Local.load("mpt-tiny", ALONE.device)
    for found, name in zip(json.loads(done.stdout), names.split(","), strict=True):
        expected = suite.run(whole, TASKS[name], folder, ALONE)
        assert found["accuracy"] == expected.accuracy


def test_a_cut_model_needs_ranks_and_does_not_generate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="start them by `torchrun"):
        evaluate("mpt-tiny", tasks="piqa", data_folder=folder, sharded=True)
    monkeypatch.setenv("WORLD_SIZE", "2")  # refused before ranks meet
    with pytest.raises(UserError, match="`triviaqa` generates"):
        evaluate("mpt-tiny", tasks="piqa,triviaqa", data_folder=folder, sharded=True)
