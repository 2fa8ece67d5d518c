"""The scaling law: found again where it is known, fitted to a real sweep at toy sizes, resumed, refused."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from mpt.errors import UserError
from training import cli, plan, scale, scaling_law
from training.scaling_law import Point

pytest.importorskip("scipy")
# Hoffmann et al. 2022, equation 10: what they fitted to more than 400 runs.
E, A, ALPHA, B, BETA = 1.69, 406.4, 0.34, 410.7, 0.28


def chinchilla(parameters: float, tokens: float) -> float:
    return E + A / parameters**ALPHA + B / tokens**BETA


def grid(noise: float = 0.0) -> list[Point]:
    rng = random.Random(3)
    return [
        Point(n, ratio * n, chinchilla(n, ratio * n) * (1 + rng.gauss(0, noise)))
        for n in (1e7, 2.5e7, 6e7, 1.25e8)
        for ratio in (5.0, 20.0, 80.0)
    ]


def test_chinchillas_law_is_found_again_from_its_own_losses() -> None:
    law = scaling_law.fit(grid())
    assert law.form == "chinchilla"
    assert law.named == pytest.approx({"E": E, "A": A, "alpha": ALPHA, "B": B, "beta": BETA}, rel=0.02)
    # Chinchilla itself, three decimal orders beyond the runs: 70 billion parameters on 1.4 trillion tokens.
    assert law.loss(70e9, 1.4e12).value == pytest.approx(chinchilla(70e9, 1.4e12), rel=0.005)


def test_the_optimum_is_where_the_law_is_least() -> None:
    law = scaling_law.fit(grid())
    flops = 1e21
    found = law.optimal(flops)
    assert found is not None
    searched = min((10 ** (8 + n / 500) for n in range(1500)), key=lambda n: chinchilla(n, flops / 6 / n))
    assert found[0] == pytest.approx(searched, rel=0.03)
    assert 6 * found[0] * found[1] == pytest.approx(flops)


def test_noise_widens_the_interval_which_holds_the_truth() -> None:
    truth = chinchilla(1e9, 2e10)
    loud, quiet = (scaling_law.fit(grid(noise)).loss(1e9, 2e10) for noise in (0.005, 0.0005))
    assert loud.low < truth < loud.high
    assert quiet.low < truth < quiet.high
    assert loud.high - loud.low > 3 * (quiet.high - quiet.low)


def test_runs_of_one_ratio_have_a_power_law() -> None:
    points = [Point(n, 20 * n, 2.0 + 300 / n**0.4) for n in (1e7, 2.5e7, 6e7, 1.25e8)]
    law = scaling_law.fit(points)
    assert law.form == "power"
    assert law.named == pytest.approx({"E": 2.0, "A": 300, "alpha": 0.4}, rel=0.02)
    assert law.optimal(1e21) is None
    with pytest.raises(UserError, match="4 runs"):
        scaling_law.fit(points[:3])


@pytest.mark.parametrize("size", [1e5, 1e6, 1e7, 2.5e7, 6e7, 1.25e8, 1.3e9])
def test_a_size_gives_a_model_of_it(size: float) -> None:
    vocab_size = 2048 if size < 2e7 else 50_277
    model = scale.model_of(size, vocab_size, 512)
    assert plan.shape_of_model(model).n_parameters == pytest.approx(size, rel=0.25)
    assert model["d_model"] % model["n_heads"] == 0 and model["vocab_size"] % 128 == 0
    with pytest.raises(UserError, match="--sizes"):
        scale.model_of(1e5, 50_277, 512)


def test_words_for_numbers() -> None:
    assert [scale.number(text, "--sizes") for text in ("10m", "1.3B", "2e6", "70k")] == [1e7, 1.3e9, 2e6, 7e4]
    assert scale.amount("20n").of(1e6) == 2e7
    assert scale.amount("3e5").of(1e6) == 3e5
    for bad in ("", "ten", "-5m", "1.2.3m", "0"):
        with pytest.raises(UserError, match="--sizes"):
            scale.number(bad, "--sizes")


def test_the_learning_rate_of_125m_is_the_yamls() -> None:
    assert scale.learning_rate(125e6) == pytest.approx(6e-4, rel=0.1)


def command(folder: Path, tokenizer: Path, *more: str) -> list[str]:
    return [
        "scale", "--sizes", "12k", "37k", "74k", "--tokens", "0.2n", "0.8n", "--data", str(folder / "text.txt"),
        "--tokenizer", str(tokenizer), "--out", str(folder / "sweep"), "--max-seq-len", "64", "--global-batch", "8",
        "--precision", "fp32", *more,
    ]  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> Path:
    rng = random.Random(0)
    words = ["rain", "sun", "wind", "snow", "falls", "comes", "goes", "and", "then", "the"]
    (tmp_path / "text.txt").write_text(" ".join(rng.choice(words) for _ in range(60_000)))
    return tmp_path


def test_a_toy_sweep_ends_in_a_law_and_a_picture(
    text: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cli.app(command(text, tokenizer_folder, "--predict", "150k"), standalone_mode=False)
    shown = capsys.readouterr().out
    story = json.loads((text / "sweep" / "scale.json").read_text())
    assert story["form"] == "chinchilla" and len(story["runs"]) == 6
    found = story["prediction"]["loss"]
    assert found["low"] <= found["value"] <= found["high"] < min(run["loss"] for run in story["runs"][:2])
    assert "predicted parameters 1.5e+05" in shown and "optimal" in shown
    assert (text / "sweep" / "scale.png").read_bytes().startswith(b"\x89PNG")
    # What a run read and ended at is what its own metrics say.
    lines = (text / "sweep" / "74k-0.8n" / "metrics.jsonl").read_text().splitlines()
    assert story["runs"][-1]["tokens"] == json.loads(lines[-1])["tokens"]

    def never(*_: Any) -> None:
        raise AssertionError("a finished run took a step")

    monkeypatch.setattr("training.loop.train_step", never)
    cli.app(command(text, tokenizer_folder, "--predict", "150k"), standalone_mode=False)
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sizes", "20k", "30k"], "at least 3 sizes"),
        (["--sizes", "20k", "20k", "30k"], "twice"),
        (["--tokens", "10", "20"], "one step"),
        (["--predict", "big"], "--predict"),
        (["--sizes", "1k", "2k", "3k"], "larger"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(
    text: Path, tokenizer_folder: Path, more: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        cli.app(command(text, tokenizer_folder, *more), standalone_mode=False)
    assert not (text / "sweep").exists()
