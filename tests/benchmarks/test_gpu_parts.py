"""Every part of the command for a GPU on a CPU with toy sizes, and the numbers in it that can be counted by hand."""

import dataclasses
import json
import math
import time
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from benchmarks.gpu_parts import (
    bench,
    child,
    gpu_tests,
    in_onnxruntime,
    kernel_choices,
    many_requests,
    right,
    sampling,
    training_right,
)
from benchmarks.gpu_parts.bench import SCALES, Bench
from benchmarks.gpu_parts.parts import NAMES
from mpt.backends.paged_backend import PagedBackend
from mpt.config import MPTConfig
from mpt.transformers_model import MPTForCausalLM

TOY = dataclasses.replace(SCALES["toy"], compiles=False)  # `--rehearse` compiles too, which takes a minute
CEILINGS = {"card": {"found": {"copy_gb_s": 10.0, "matmul_tflop_s": 0.1}}}


@pytest.fixture
def cpu(tmp_path) -> Bench:
    return Bench(TOY, torch.device("cpu"), tmp_path / "part.json", earlier=CEILINGS)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "gpu_tests"])  # which starts pytest; see below
def test_a_part_runs_on_a_small_model(name, cpu, tmp_path):
    child.function_of(name)(cpu)
    assert not cpu.failures
    kept = json.loads((tmp_path / "part.json").read_text())
    assert kept["found"] and kept["rows"] and all(len(row) == 3 for row in kept["rows"])
    assert not torch.distributed.is_initialized()


def test_every_part_has_a_file():
    folder = Path(bench.__file__).parent
    shared = {"bench", "child", "parts", "report"}
    assert {path.stem for path in folder.glob("*.py")} == {*NAMES, *shared}


def test_a_wrong_kernel_is_found(cpu, monkeypatch):
    good = right.paged_decode
    monkeypatch.setattr(right, "paged_decode", lambda *args, **options: good(*args, **options) * 1.1)
    right.run(cpu)
    assert "decode float32" in cpu.found["wrong"] and "kernels beside float64" in cpu.failures


def test_a_measurement_that_fails_leaves_the_others_alone(cpu):
    cpu.measure("first", lambda: 1 / 0)
    cpu.measure("second", lambda: cpu.note(second=2))
    cpu.deadline = time.monotonic() + 1
    cpu.measure("third", lambda: cpu.note(third=3))
    assert cpu.failures == {"first": "ZeroDivisionError: division by zero"}
    assert cpu.found == {"second": 2} and cpu.left_out == {"third": "no time was left"}


def test_every_prompt_of_a_storm_is_read(cpu):
    """5 streams of 40 tokens in each of the storms, though all of them go through one engine and its prefix cache."""
    cpu.scale = dataclasses.replace(TOY, stream_tokens=40)
    many_requests.ours(cpu, cpu.model())
    greedy = cpu.found["requests"]["greedy"]
    assert {streams: numbers["prompt_tokens_read"] for streams, numbers in greedy.items()} == {
        "1": 40,
        "2": 80,
        "5": 200,
    }


def test_prompts_that_are_found_again_do_not_count_as_read(cpu, monkeypatch):
    """The fault that the count is there for: the same prompts in every storm; one token of each must be read."""
    cpu.scale = dataclasses.replace(TOY, stream_tokens=40, streams=(5,))
    monkeypatch.setattr(
        many_requests, "random_text", lambda n, n_vocab, seed: [4 + int(seed.split()[-1]), *[7] * (n - 1)]
    )
    many_requests.ours(cpu, cpu.model())
    assert cpu.found["requests"]["greedy"]["5"]["prompt_tokens_read"] == 5


@pytest.mark.parametrize(
    ("known", "why"),
    [
        (["CPUExecutionProvider"], "is built without CUDA"),
        (["CUDAExecutionProvider", "CPUExecutionProvider"], "did not load CUDA and would compute on the CPU"),
    ],
)
def test_onnxruntime_that_does_not_compute_on_cuda_is_not_run(cpu, monkeypatch, tmp_path, known, why):
    """Without CUDA in its build, or with a provider that does not load: onnxruntime then takes the CPU in silence."""
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: known)
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda path, options, **_: real(path, options, providers=known[-1:])
    )
    cpu.device = torch.device("cuda")
    in_onnxruntime.run(cpu)
    kept = json.loads((tmp_path / "part.json").read_text())
    assert why in kept["not_run"] and kept["rows"] == [["onnxruntime", "not run", kept["not_run"]]]
    assert not kept["failures"]


def test_a_missing_onnxruntime_is_not_run(cpu, monkeypatch):
    monkeypatch.setattr(in_onnxruntime.importlib.util, "find_spec", lambda name: None if name == "onnx" else name)
    in_onnxruntime.run(cpu)
    assert cpu.not_run == "onnx not installed" and not cpu.failures


def test_entropy_and_what_the_best_tokens_hold_are_those_of_a_distribution_known_by_hand():
    """Even over 8,192: 13 bits, and the best 1,024 hold an eighth. One token of all: nothing, and enough."""
    logits = torch.zeros(2, 8192)
    logits[1, 7] = 1e3
    assert bench.entropies(logits).tolist() == pytest.approx([13 * math.log(2), 0.0])
    assert bench.short_of(logits, 0.125) == 0.5 and bench.short_of(logits, 0.12) == 0.0


def test_zipfs_logits_have_the_entropies_that_the_part_claims():
    """Sums over k^-s made in numpy: 4.48 nats for s = 1.3, 0.79 for 2.8, 1.88 on average of 64 rows between."""
    found = bench.entropies(bench.zipf_logits(64, 50_432, sampling.EXPONENTS))
    assert float(found[0]) == pytest.approx(4.48, abs=0.05) and float(found[-1]) == pytest.approx(0.79, abs=0.05)
    assert float(found.mean()) == pytest.approx(1.88, abs=0.05)


def test_a_sharpened_model_has_that_entropy_and_the_same_likeliest_tokens():
    model = bench.make_model(TOY.model, torch.device("cpu"), torch.float32)
    ids = torch.tensor([bench.random_text(100, 512, "asked")])
    with torch.no_grad():
        before = model(ids).logits[0]
        bench.sharpen(model, bench.pool(PagedBackend(model), 1024))
        after = model(ids).logits[0]
    assert float(bench.entropies(before).mean()) > 5  # of 6.2 that are possible
    assert float(bench.entropies(after).mean()) == pytest.approx(bench.TRAINED_NATS, abs=0.6)  # on another text
    assert torch.equal(before.argmax(-1), after.argmax(-1))


def test_operations_are_counted_as_by_hand():
    """7B: 12.885 GFLOP a token in products; causal attention over 2,048 tokens."""
    with torch.device("meta"):
        model = MPTForCausalLM(MPTConfig(**SCALES["7b"].model, max_seq_len=8192))
    expected = 12.885e9 * 2048 + 2 * 50432 * 4096 + 4 * 4096 * 32 * (2048 * 2049 / 2)
    assert abs(bench.reading_flop(model, 2048) / expected - 1) < 1e-3


@pytest.mark.parametrize(("T", "S"), [(256, 256), (256, 1024), (512, 768)])
def test_a_chunks_blocks_are_those_that_torch_finds(T, S):
    past = torch.tensor(S - T)
    expected = create_block_mask(lambda b, h, i, j: j <= i + past, None, None, T, S, device="cpu")
    assert torch.equal(kernel_choices.causal_blocks(T, S, past).to_dense(), expected.to_dense())


def test_ways_of_attention_are_compared_in_what_they_compute(cpu):
    for T, S in cpu.scale.attended:
        kernel_choices.prompts(cpu, T, S)
    offs = {name: numbers["off"] for name, numbers in cpu.found["prompts"].items() if "off" in numbers}
    assert len(offs) >= 3 and max(offs.values()) < 1e-5


def test_a_resume_that_loses_the_optimizers_state_is_seen(cpu, monkeypatch, tmp_path):
    """What the comparison is there for: after a resume without AdamW's moments the losses differ."""
    from training import checkpoint

    def forgets(path, model, optimizer):
        position = restore(path, model, optimizer)
        optimizer.state.clear()
        return position

    restore = checkpoint.restore
    (tmp_path / "tokenizer").mkdir()
    training_right.vocabulary.train(training_right.TEXTS, 384).save(tmp_path / "tokenizer")
    whole = training_right.six_steps(cpu, tmp_path)
    monkeypatch.setattr(checkpoint, "restore", forgets)
    training_right.resumed(cpu, tmp_path, whole)
    assert cpu.found["resume_difference"] > 0 and not cpu.found["resume_same_weights"]


SUITE = """
import pytest
def test_right(): pass
def test_wrong(): assert 1 == 2
@pytest.mark.skip
def test_left_out(): pass
@pytest.fixture
def broken(): raise OSError("no disk")
def test_without_its_fixture(broken): pass
@pytest.fixture
def breaks_behind():
    yield
    raise OSError("no end")
def test_whose_end_fails(breaks_behind): pass
"""


def test_tests_are_counted_once_whatever_share_runs_them(cpu, tmp_path):
    """Of five: one passes, three fail (in the test, before it and behind it), one is skipped."""
    (tmp_path / "test_suite.py").write_text(SUITE)
    with pytest.raises(AssertionError, match="3 tests failed, 0 errors"):
        gpu_tests.count(
            cpu, 2, ["-c", "/dev/null", "-p", "no:asyncio", f"--rootdir={tmp_path}", str(tmp_path / "test_suite.py")]
        )
    counts = {key: cpu.found[key] for key in ("collected", "passed", "failed", "skipped", "errors", "not_run")}
    assert counts == {"collected": 5, "passed": 1, "failed": 3, "skipped": 1, "errors": 0, "not_run": 0}
    assert {failure["why"] for failure in cpu.found["failures"]} == {
        "assert 1 == 2", "OSError: no disk", "OSError: no end",
    }  # fmt: skip


def test_no_test_collected_is_a_failure(cpu, tmp_path):
    (tmp_path / "test_suite.py").write_text("")
    with pytest.raises(AssertionError, match="no test was collected"):
        gpu_tests.count(cpu, 1, ["-c", "/dev/null", f"--rootdir={tmp_path}", str(tmp_path / "test_suite.py")])


def test_the_tests_for_a_gpu_are_found():
    """The files that have them, by the marker that pytest selects them by."""
    on_a_gpu = Bench(SCALES["7b"], torch.device("cuda"))
    _, told = gpu_tests.arguments(on_a_gpu)
    assert told[:2] == ["-m", "gpu"]
    assert {"test_paged_backend.py", "test_paged_attention.py", "test_attention.py"} <= {
        Path(file).name for file in told[2:]
    }
