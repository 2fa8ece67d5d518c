"""What a run does beside its steps changes none of them, and says what the finished model would say."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import mpt.checkpoint
from mpt.errors import UserError
from mpt.generation import generate
from mpt.prompts import INSTRUCT_TEMPLATE
from tests.training.test_distributed import torchrun
from tests.warm_ranks import Ranks
from training import batches, loop
from training.distributed import World
from training.evaluation import models, suite
from training.evaluation.catalog import TASKS
from training.logbook import Logbook
from training.run import Run

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def watched(small_run: Run, tmp_path: Path) -> Run:
    """A run that is sampled and examined every 6 steps, on four questions of our own."""
    folder = tmp_path / "home" / "datasets" / "icl"
    folder.mkdir(parents=True)
    rows = [{"query": f"name: {name}", "choices": ["age: 36", "}"], "gold": 0} for name in ("Ada", "Bo", "Cy", "Di")]
    (folder / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("name: Ada\n\nage: 36\n")
    return dataclasses.replace(
        small_run, max_seq_len=256, eval_tasks="piqa", eval_every=6, eval_rows=3, sample_every=6,
        sample_prompts=str(prompts),
    )  # fmt: skip


def of(run: Run, event: str) -> list[dict[str, Any]]:
    return [entry for entry in Logbook(Path(run.out)).entries() if entry["event"] == event]


def losses(run: Run) -> list[float]:
    return [json.loads(line)["loss"] for line in (Path(run.out) / "metrics.jsonl").read_text().splitlines()]


def test_samples_and_tasks_are_the_models_and_change_no_step(watched: Run) -> None:
    model = mpt.checkpoint.load(loop.fit(watched))
    plain = dataclasses.replace(
        watched, out=watched.out + "-plain", eval_tasks=None, sample_every=None, sample_prompts=None
    )
    loop.fit(plain)
    assert losses(watched) == losses(plain)
    samples = of(watched, "sample")
    assert [entry["step"] for entry in samples] == [6, 6, 12, 12]
    tokenizer = batches.load_tokenizer(watched)
    for line, entry in zip(("name: Ada", "age: 36"), samples[2:], strict=True):
        prompt = tokenizer.encode(INSTRUCT_TEMPLATE.format(instruction=line))[-128:]
        assert entry["prompt"] == tokenizer.decode(prompt)
        ids = generate(model, prompt, 64, end_ids=tokenizer.end_ids)
        assert entry["text"] == tokenizer.decode([token for token in ids if token not in tokenizer.end_ids])
    folder = Path(watched.out).parent / "home" / "datasets" / "icl"
    expected = suite.run(models.Local(model, tokenizer), TASKS["piqa"], folder, ALONE, limit=3)
    scores = [(entry["step"], entry["accuracy"], entry["rows"]) for entry in of(watched, "task")]
    assert [step for step, *_ in scores] == [6, 12]
    assert scores[1] == (12, round(expected.headline, 4), 3)


def test_two_ranks_sample_and_examine_what_one_does(ranks: Ranks, watched: Run) -> None:
    loop.fit(watched)
    two = dataclasses.replace(watched, out=watched.out + "-two", global_batch=4)
    torchrun(ranks, two)
    assert losses(two) == pytest.approx(losses(watched), rel=2e-5)
    for event in ("sample", "task"):
        assert [{**e, "time": ""} for e in of(two, event)] == [{**e, "time": ""} for e in of(watched, event)]


def test_what_is_sampled_without_prompts_is_the_first_held_out_rows(small_run: Run) -> None:
    run = dataclasses.replace(small_run, steps=2, sample_every=2, eval_data="yaml_to_json", eval_samples=2)
    loop.fit(run)
    tokenizer = batches.load_tokenizer(run)
    ids, learned = batches.load_data(run, tokenizer, "yaml_to_json").sample(0)
    first = [bool(x) for x in learned].index(True)
    assert of(run, "sample")[0]["prompt"] == tokenizer.decode(ids[:first][-256:])


def test_what_cannot_be_done_is_said_before_the_first_step(watched: Run, tmp_path: Path) -> None:
    for changes, said in (
        ({"eval_tasks": "piqa,nothing"}, "no task `nothing`"),
        ({"eval_tasks": "copa"}, "needs `copa.jsonl`"),
        ({"sample_prompts": str(tmp_path / "none.txt")}, "is no file"),
        ({"sample_every": None}, "needs `sample_every`"),
    ):
        with pytest.raises(UserError, match=said):
            loop.fit(dataclasses.replace(watched, **changes))
    assert not Path(watched.out).exists()
