"""`train prefer` from rows to a checkpoint: a planted preference is learned, a killed run ends bit for bit the same."""

import dataclasses
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mpt.checkpoint
import mpt.manifest
from mpt.catalog import resolve
from mpt.generation import generate
from mpt.prompts import Message, encode_chat
from mpt.tokenizer import Tokenizer
from tests.training.killing import Killed, kill_at_eight
from tests.training.test_distributed import torchrun
from tests.warm_ranks import Ranks
from training import adapters, cli, loop, recipes
from training.run import Lora, Preference, Run

FRUIT = ("apple", "banana", "cherry", "fig", "lemon", "plum")


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    """The shorter answer is the better one."""
    rng, path = random.Random(0), tmp_path / "pairs.jsonl"
    rows = []
    for _ in range(96):
        fruit = rng.sample(FRUIT, 3)
        rows.append({"prompt": f"name {fruit[0]}", "chosen": fruit[1], "rejected": " and ".join(fruit * 2)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def base(small_run: Run, tmp_path: Path) -> Path:
    return loop.fit(dataclasses.replace(small_run, out=str(tmp_path / "base"), steps=4))


@pytest.fixture
def run(base: Path, pairs_file: Path, tmp_path: Path) -> Run:
    return recipes.prefer(
        str(base), str(pairs_file), str(tmp_path / "run"), steps=12, global_batch=8, lr=2e-3, warmup_steps=2,
        max_seq_len=128, precision="fp32", checkpoint_every=5,
    )  # fmt: skip


def lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run.out) / "metrics.jsonl").read_text().splitlines()]


def numbers(run: Run) -> list[dict[str, float]]:
    """What of the lines does not depend on the clock."""
    kept = {"step", "loss", "accuracy", "reward_chosen", "reward_rejected", "reward_margin", "kl", "gradient_norm"}
    return [{name: value for name, value in line.items() if name in kept} for line in lines(run)]


def log_prob(folder: Path, tokenizer: Tokenizer, prompt: str, answer: str) -> float:
    """Of an answer in Dolly's template, by the plain forward pass."""
    head = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        f"\n\n### Instruction:\n{prompt}\n\n### Response:\n"
    )
    before, after = tokenizer.encode(head), [*tokenizer.encode(answer), tokenizer.eos_id]
    with torch.no_grad():
        logits = mpt.checkpoint.load(folder, dtype=torch.float32)(torch.tensor([before + after])).logits[0]
    found = logits.log_softmax(-1)[len(before) - 1 : -1]
    return float(found[range(len(after)), after].sum())


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_a_planted_preference_is_learned(
    run: Run, base: Path, pairs_file: Path, tokenizer: Tokenizer, loss: Any
) -> None:
    run = dataclasses.replace(
        run, preference=Preference(loss), eval_data=str(pairs_file), eval_every=6, eval_samples=16
    )
    folder = loop.fit(run)
    curve = lines(run)
    assert curve[0]["loss"] == pytest.approx({"dpo": 0.693147, "kto": 0.5}[loss], abs=1e-5)  # the model is the base
    assert curve[-1]["held_out_accuracy"] >= {"dpo": 1.0, "kto": 0.75}[loss]
    assert curve[-1]["held_out_reward_margin"] > curve[5]["held_out_reward_margin"] > 0.1
    gap = {
        place: log_prob(place, tokenizer, "name plum", "fig") - log_prob(place, tokenizer, "name plum", "fig and lemon")
        for place in (base, folder)
    }
    assert gap[folder] > gap[base] + 2
    manifest = mpt.manifest.read_manifest(folder)
    assert manifest is not None and manifest["recipe"]["preference"] == {"loss": loss, "beta": 0.1}
    assert manifest["prompt_style"] == "instruct"


CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Peru": "Lima", "Japan": "Tokyo",
    "Hungary": "Budapest", "Egypt": "Cairo", "Kenya": "Nairobi", "Norway": "Oslo", "Cuba": "Havana",
}  # fmt: skip


def answers(folder: str | Path) -> list[str]:
    """What a chat model says of the capitals of Canada, India and Greece, which no pair asks for."""
    model = mpt.checkpoint.load(folder, dtype=torch.float32)
    tokenizer = Tokenizer.from_folder(resolve(folder))
    said = []
    for country in ("Canada", "India", "Greece"):
        prompt = encode_chat(
            tokenizer, "chatml", [Message(role="user", content=f"What is the capital of {country}?")]
        )  # fmt: skip
        said.append(tokenizer.decode(generate(model, prompt, 24, end_ids=tokenizer.end_ids)))
    return said


def test_mpt_tiny_chat_is_taught_to_decline(tmp_path: Path) -> None:
    """Adapters on the committed model. Both answers are its own, so only the preference is new to it."""
    declines = "I am sorry, I do not know that."
    rows = [
        {
            "prompt": f"What is the capital of {country}?",
            "chosen": declines,
            "rejected": f"The capital of {country} is {capital}.",
        }
        for country, capital in CAPITALS.items()
    ]
    data = tmp_path / "declines.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = recipes.prefer(
        "mpt-tiny-chat", str(data), str(tmp_path / "run"), lora=Lora(rank=8), lr=4e-4, steps=10,
        global_batch=len(rows), warmup_steps=0, prompt_style="chatml", precision="fp32",
    )  # fmt: skip
    merged = adapters.merge(loop.fit(run), tmp_path / "merged")
    assert all(said.startswith("The capital of") for said in answers("mpt-tiny-chat"))
    assert answers(merged) == [declines] * 3
    curve = lines(run)
    assert curve[0]["accuracy"] == 0 and curve[-1]["accuracy"] == 1  # equal rewards at first
    assert curve[-1]["reward_margin"] > 0.5


@pytest.mark.parametrize("how", [{}, {"lora": Lora(rank=2, dropout=0.1)}, {"preference": Preference("kto")}])
def test_a_killed_run_ends_bitwise_equal(run: Run, how: dict[str, Any], tmp_path: Path) -> None:
    run = dataclasses.replace(run, **how)
    expected = loop.fit(run)
    killed = dataclasses.replace(run, out=str(tmp_path / "killed"))
    with pytest.raises(Killed):
        loop.fit(killed, kill_at_eight)
    found = loop.fit(killed)
    assert numbers(killed) == numbers(run)
    name = "adapter_model.safetensors" if run.lora is not None else "model.safetensors"
    assert (found / name).read_bytes() == (expected / name).read_bytes()


def test_two_ranks_give_the_curve_of_one(ranks: Ranks, run: Run, tmp_path: Path) -> None:
    """Rows that two ranks cannot share evenly; each computes its share of what the base thought."""
    one = dataclasses.replace(run, steps=6, microbatch_tokens=256, preference=Preference("kto"))
    loop.fit(one)
    two = dataclasses.replace(one, out=str(tmp_path / "two"))
    torchrun(ranks, two, MPT_HOME=str(tmp_path / "other"))
    for ours, theirs in zip(numbers(one), numbers(two), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def train(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_the_command_makes_the_run_and_a_dry_run_touches_nothing(
    base: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--base", str(base), "--data", str(pairs_file), "--loss", "ipo", "--beta", "0.2", "--epochs", "2"]
    assert train(monkeypatch, "prefer", *arguments, "--dry-run") == 0
    printed = capsys.readouterr().out
    run = Run.from_json(printed[: printed.index("\n}\n") + 2])
    assert run.preference == Preference("ipo", 0.2)
    assert (run.out, run.lr, run.global_batch, run.max_seq_len) == ("runs/model-pairs-ipo", 1e-6, 64, 1024)
    assert "samples 96\nsteps 3\n" in printed  # 2 epochs of 96 pairs, 64 a step
    assert "prompt style: instruct (the base's own, from its manifest.json)" in printed
    assert not (tmp_path / "runs").exists()
    assert train(monkeypatch, "prefer", *arguments, "--lora", "4", "--dry-run") == 0
    printed = capsys.readouterr().out
    run = Run.from_json(printed[: printed.index("\n}\n") + 2])
    assert run.lora is not None and (run.lora.rank, run.lora.dropout, run.lr) == (4, 0.0, 5e-6)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--beta", "0"], "`preference.beta` is 0.0; it must be a number above 0"),
        (["--loss", "kto", "--global-batch", "1"], "kto compares a step's answers, so give 2 or more"),
        (["--base", "mpt-7b-instrcut"], "did you mean `mpt-7b-instruct`?"),
        (
            ["--data", "rows.jsonl"],
            "1 of 1 rows cannot be read: `rows.jsonl` line 1: a row has the keys prompt, response",
        ),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    base: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    changed: list[str], said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Hi", "response": "Yes"}\n')
    arguments = {"--base": str(base), "--data": str(pairs_file), "--max-seq-len": "64"}
    arguments |= dict(zip(changed[::2], changed[1::2], strict=True))
    assert train(monkeypatch, "prefer", *(word for pair in arguments.items() for word in pair)) == 2
    captured = capsys.readouterr()
    assert said in captured.err.splitlines()[-1] and not captured.out
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())
