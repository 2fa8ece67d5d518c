"""A run is checked when it is made and comes back equal from JSON."""

import dataclasses
import json
from typing import Any

import pytest

from mpt.errors import UserError
from training import recipes
from training.run import Run


def test_a_run_survives_json(small_run: Run) -> None:
    assert Run.from_json(small_run.to_json()) == small_run


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", 0.0),
        ("lr", float("nan")),
        ("global_batch", -1),
        ("max_seq_len", True),
        ("betas", (0.9, 1.0)),
        ("betas", (0.9,)),
        ("optimizer", "adam"),
        ("schedule", "step"),
        ("precision", "fp8"),
        ("prompt_style", "alpaca"),
        ("lr_floor", 1.5),
        ("lr_floor", -0.1),
        ("eps", float("nan")),
        ("global_batch", 1.5),
        ("on_spike", "pause"),
        ("trackers", ("comet",)),
        ("warmup_steps", -1),
        ("clip", 0.0),
        ("epochs", 1.0),
        ("steps", None),
        ("tokenizer", None),
        ("learn", "first"),
        ("learn_prompts", "some"),
        ("learn_prompts", "length>=x"),
        ("columns", "prompt=q"),
        ("max_bad_rows", -1),
    ],
)
def test_a_bad_value_is_refused_by_name(small_run: Run, key: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"`{key}`"):
        dataclasses.replace(small_run, **{key: value})


def test_a_runs_file_from_before_these_settings_is_read(small_run: Run) -> None:
    values = json.loads(small_run.to_json())
    for key in ("learn_prompts", "columns", "max_bad_rows"):
        del values[key]
    assert Run.from_json(json.dumps(values)) == small_run


def test_prompts_beside_the_whole_row_are_refused(small_run: Run) -> None:
    with pytest.raises(UserError, match="`learn` is all"):
        dataclasses.replace(small_run, learn="all", learn_prompts="all")


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ("[]", "a JSON list"), ('{"learning_rate": 1}', "`learning_rate`"), ("{}", "lacks `name`")],
)
def test_a_bad_file_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Run.from_json(text)


def test_the_instruct_recipe_has_the_published_numbers() -> None:
    """llm-foundry mpt-7b_dolly_sft.yaml, as reference/training.md 2.3 lists it."""
    run = recipes.finetune("mpt-7b", "dolly_hhrlhf", "out")
    published = (5e-6, (0.9, 0.999), "linear", 50, 0.0, 48, 2, 2048, 1.0, 17, "adamw", 1e-8, 0.0, "instruct")
    assert published == (
        run.lr, run.betas, run.schedule, run.warmup_steps, run.lr_floor, run.global_batch, run.epochs, run.max_seq_len,
        run.clip, run.seed, run.optimizer, run.eps, run.weight_decay, run.prompt_style,
    )  # fmt: skip


def test_steps_replace_epochs() -> None:
    run = recipes.finetune("mpt-tiny", "dolly_hhrlhf", "out", steps=7, lr=None)
    assert (run.steps, run.epochs, run.lr) == (7, None, 5e-6)
