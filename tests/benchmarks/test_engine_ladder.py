"""The ladder's arithmetic on times made by hand, and one small run of it as a person starts it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import engine
from benchmarks.engine import Cell, Side, Speed, decode_rate, report, shortest_seconds, skip, speed_of

SHAPE = {"d_model": 64, "n_heads": 4, "n_layers": 2}
ABOUT = {"weight_bytes": 1_000_000, "kv_item_bytes": 2}
CEILING = {"read_gb_s": 10.0, "bf16_tflop_s": 1.0}


def result(times: list[list[float]], prompt: int = 100, **more: object) -> dict[str, object]:
    cell = {"shape": "toy", "round": 0, "prompt": prompt, "side": "a", "concurrency": len(times)}
    return {**cell, "status": "ok", "times": times, **more}


def test_one_stream_by_hand() -> None:
    # First token after 0.5 s, then one each 0.1 s.
    found = speed_of(result([[0.5, 0.6, 0.7, 0.8, 0.9]]), ABOUT, CEILING, SHAPE)
    assert found.ttft_s == 0.5
    assert found.itl_s == pytest.approx(0.1)
    assert found.tokens_per_s == pytest.approx(5 / 0.9)
    assert found.decode_tokens_per_s == pytest.approx(10)
    flops = 2 * (24 * 64**2 * 100 + 2 * 100**2 * 64)  # 12 C^2 weights a layer, twice; causal scores and values
    assert found.prefill_of_peak == pytest.approx(flops / 0.5 / 1e12)
    step_bytes = 1_000_000 + 2 * 64 * 2 * 2 * (100 + 2)  # keys and values of 2 layers, at the middle token
    assert found.decode_of_read == pytest.approx(10 * step_bytes / 1e9 / 10)


def test_streams_that_never_decode_together_have_no_rate() -> None:
    assert decode_rate([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]]) == (None, 0.0)
    rate, place = decode_rate([[0.1, 0.2, 0.3, 0.4, 0.5], [0.2, 0.3, 0.4, 0.5, 0.6]])
    assert rate == pytest.approx(20)  # from 0.2 to 0.5 s each has three gaps
    assert place == 2


def test_what_must_take_too_long_is_not_tried() -> None:
    cell = Cell("toy", 0, 100, "a", 16)
    done = [result([[2.0, 3.0]] * 4)]  # 2 s to read four prompts, one more to write
    assert shortest_seconds(cell, done) == pytest.approx(2 * 16 / 4 + 1)
    assert skip(cell, done, limit_s=9.5) is None
    assert skip(cell, done, limit_s=8.5) == {"status": "over", "reason": "over 8 s"}
    broken = [{**result([[0.0]] * 1), "status": "failed", "reason": "out of memory"}]
    assert skip(cell, broken, limit_s=100) == {"status": "failed", "reason": "out of memory"}
    assert skip(Cell("toy", 0, 50, "a", 16), broken, limit_s=100) is None  # a shorter prompt may work


def test_prompts_share_no_beginning() -> None:
    prompts = engine.prompts_of(Cell("toy", 0, 20, "a", 32))
    assert len({prompt[0] for prompt in prompts}) == 32
    assert {len(prompt) for prompt in prompts} == {20}
    assert engine.prompts_of(Cell("toy", 0, 20, "another", 32)) == prompts  # the same for every side


def test_the_report_names_who_is_not_here_and_who_refused() -> None:
    chosen = [Side("a", "bfloat16", ()), Side("b", "bfloat16", ()), Side("c", "x", (), absent="`make c` installs it")]
    data = {
        "tokens": 5, "machine": {"threads": 2}, "ceilings": {"toy": {"0": CEILING}},
        "sides": {"toy": {"a": {**ABOUT, "version": "1", "checked": 16, "equal": 16}, "b": {"refused": "not for MPT"}}},
        "cells": [result([[0.5, 0.6, 0.7, 0.8, 0.9]])],
    }  # fmt: skip
    text = report(data, "toy", chosen)
    assert "- c is not here: `make c` installs it" in text
    assert "| b | not for MPT |" in text
    assert "| a | 500.0 | 100.0 | 5.6 |" in text
    assert isinstance(engine.summary(data, "toy")[(100, 1, "a")], Speed)


def test_a_run_of_the_toy_shape_can_be_gone_on_with(tmp_path: Path) -> None:
    path, picture = tmp_path / "ladder.json", tmp_path / "ladder.png"
    command = [sys.executable, "-m", "benchmarks.engine", "--shapes", "toy", "--prompts", "40", "--tokens", "6"]
    command += ["--sides", "ours bfloat16", "ours int8", "--rounds", "1", "--models", str(tmp_path / "models")]
    first = subprocess.run(
        [*command, "--concurrency", "1", "--json", str(path)], capture_output=True, text=True, timeout=110
    )
    assert first.returncode == 0, first.stderr
    again = [*command, "--concurrency", "1", "2", "--resume", str(path), "--out", str(picture)]
    second = subprocess.run(again, capture_output=True, text=True, timeout=110)
    assert second.returncode == 0, second.stderr
    assert second.stderr.count("x 1,") == 0  # measured before
    cells = json.loads(path.read_text())["cells"]
    assert [(cell["side"], cell["concurrency"]) for cell in cells] == [
        ("ours bfloat16", 1), ("ours int8", 1), ("ours bfloat16", 2), ("ours int8", 2),
    ]  # fmt: skip
    assert all(len(stream) == 6 for cell in cells for stream in cell["times"])
    assert "| 40 | 2 | ours int8 |" in second.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
