"""The ladder's arithmetic on times made by hand, its short form, and small runs of it as a person starts it."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from benchmarks import as_they_lie, engine
from benchmarks.engine import Cell, Part, Side, Speed, decode_rate, section, shortest_seconds, skip, speed_of
from benchmarks.peers.worker import Refused, Worker

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
    assert found.prefill_tokens_per_s == pytest.approx(200)  # 100 tokens in half a second
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


def test_the_section_names_who_is_not_here_and_who_refused() -> None:
    chosen = [Side("a", "bfloat16", ()), Side("b", "bfloat16", ()), Side("c", "x", (), absent="`make c` installs it")]
    machine = {"processor": "EPYC", "cores": 2, "instruction_sets": ["AVX2"], "memory_gb": 25, "native": "avx2",
               "threads": 2, "date": "2026-11-26"}  # fmt: skip
    about = {**ABOUT, "version": "1", "checked": 16, "equal": 15, "ready_s": [1.0, 4.0, 2.0]}
    one = result([[0.5, 0.6, 0.7, 0.8, 0.9]], peak_bytes=30_000_000)
    data = {
        "command": "python -m benchmarks.engine", "tokens": 5, "machine": machine, "ceilings": {"toy": {"0": CEILING}},
        "sides": {"toy": {"a": about, "b": {"refused": "not for MPT"}}},
        "cells": [one, {**one, "round": 1, "peak_bytes": 40_000_000}],
    }  # fmt: skip
    text = section(data, [Part("toy", (100,), (1,), 2, 120.0)], chosen, Path("docs/images/ladder.png"))
    assert text.startswith(
        "### On 2 cores of EPYC\n\n`python -m benchmarks.engine`, 2026-11-26: 2 cores of EPYC with AVX2"
    )
    assert "- c is not here: `make c` installs it" in text
    assert "| b | not for MPT |" in text
    assert "| a | 500.0 | 100.0 | 5.6 | 10.0 | 200 |" in text
    assert "| a | 1 | 1 | 2.0 | 40 | 15 of 16 |" in text  # megabytes of weights, seconds to be ready, most memory
    assert "](images/ladder.png)" in text
    tables = [[line.count("|") for line in block.splitlines()] for block in text.split("\n\n") if block[0] == "|"]
    assert [set(columns) for columns in tables] == [{11}, {7}]
    assert isinstance(engine.summary(data, "toy")[(100, 1, "a")], Speed)


def asked(**options: object) -> argparse.Namespace:
    nothing = dict.fromkeys(("shapes", "prompts", "concurrency", "rounds", "cell_seconds"))
    return argparse.Namespace(**{"short": False, **nothing, **options})


def test_the_short_form_has_what_a_machine_is_compared_by() -> None:
    known = {side.name for side in engine.sides()}
    small, middle, large = engine.parts_of(asked(short=True))
    assert (small.shape, small.prompts, small.concurrency, small.sides) == ("125m", (128, 1024), (1, 16), None)
    assert (middle.shape, middle.prompts, middle.concurrency) == ("1b", (128,), (1, 16))
    assert (large.shape, large.prompts, large.concurrency) == ("7b", (128,), (1,))
    assert {"ours int4", "OpenVINO int8", "llama.cpp Q8_0", "transformers generate"} <= set(middle.sides or ()) <= known
    assert large.sides == ("ours Q4_0 file", "llama.cpp Q4_0")
    assert [part.shape for part in engine.parts_of(asked(short=True, shapes=["1b"]))] == ["1b"]
    with pytest.raises(SystemExit, match="leave out --prompts"):
        engine.parts_of(asked(short=True, prompts=[8]))
    assert engine.parts_of(asked(prompts=[8], rounds=1)) == [Part("125m", (8,), (1, 4, 16, 32), 1, 120.0)]


def test_7b_has_files_only(tmp_path: Path) -> None:
    assert engine.bfloat16_bytes(engine.SHAPES["7b"]) == pytest.approx(
        2 * 6_649_286_656, rel=1e-3
    )  # mpt-7b's parameters
    with pytest.raises(Refused, match="13 GB"):
        engine.make_model("7b", "bfloat16", tmp_path, 256)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_random_blocks_are_a_file_that_llama_cpp_takes(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    as_they_lie.write(path, (64, 1, 4), kind, context_length=256)
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert (fields["mpt.block_count"], fields["mpt.context_length"]) == (1, 256)
    assert len(fields["tokenizer.ggml.tokens"]) == as_they_lie.VOCAB
    values = [gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors if t.name == "blk.0.ffn_up.weight"]
    assert np.std(values) == pytest.approx(0.0092, rel=0.02)  # of either kind; integers below 16 spread by 4.6


def test_a_side_runs_this_trees_code_and_tells_its_memory() -> None:
    say = "import json, mpt; held = bytearray(b'x' * 100_000_000); print('@ladder ' + json.dumps({'at': mpt.__file__}))"
    with Worker([sys.executable, "-c", f"{say}; input()"], threads=1) as worker:
        assert Path(worker.about["at"]).is_relative_to(engine.ROOT)
        assert 100e6 < worker.peak_bytes() < 1e9


@pytest.mark.skipif(not engine.THEIR_PYTHON.exists(), reason="needs `make peers`")
def test_openvino_answers_as_our_float32_model(tmp_path: Path) -> None:
    path = tmp_path / "ladder.json"
    command = [sys.executable, "-m", "benchmarks.engine", "--shapes", "toy", "--prompts", "40", "--tokens", "6"]
    command += ["--sides", "OpenVINO int8", "--concurrency", "2", "--rounds", "1", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, cwd=engine.ROOT)
    assert done.returncode == 0, done.stderr
    about = json.loads(path.read_text())["sides"]["toy"]["OpenVINO int8"]
    assert about["equal"] >= 14  # of 16 in 8 bits; without `show_alibi`, 0


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
