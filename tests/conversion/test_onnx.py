"""The ONNX graph: exact for every kind of MPT, in float32 and float16, quantised, and in onnxruntime-genai."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import mpt.checkpoint
from conversion.convert import convert
from conversion.options import Options
from conversion.quantised import dequantise, quantise
from mpt.backends import onnx_session
from mpt.backends.onnx_session import Session
from mpt.tokenizer import Tokenizer
from mpt.transformers_model import MPTForCausalLM
from tests.conversion.conftest import SHAPES, make, random_ids


def exported(shape: str, work: Path) -> tuple[MPTForCausalLM, Session]:
    """A model and its ONNX copy in onnxruntime."""
    source = make(work / "source", shape)
    convert(source, work / "out", Options(to="onnx", verify=False))
    return mpt.checkpoint.load(source), Session(work / "out")


@pytest.mark.parametrize("shape", list(SHAPES))
def test_chunks_padding_and_cache_reuse_give_the_models_logits(shape: str, tmp_path: Path) -> None:
    model, session = exported(shape, tmp_path)
    ids = random_ids(3, 40)
    mask = torch.ones_like(ids)
    mask[1, :13], mask[2, :39] = 0, 0
    with torch.no_grad():
        alone = [model(row[keep.bool()][None]).logits[0] for row, keep in zip(ids, mask, strict=True)]
    found = session.forward(ids, mask)
    for row, keep, expected in zip(found, mask, alone, strict=True):
        torch.testing.assert_close(row[keep.bool()], expected, rtol=0, atol=5e-5)
    cache, parts = None, []
    for start, end in ((0, 7), (7, 8), (8, 30), (30, 40)):  # prefill in chunks, single tokens between
        cache, logits = session.extend(cache, ids[0, start:end].tolist(), end - start)
        parts.append(logits[0])
    torch.testing.assert_close(torch.from_numpy(np.concatenate(parts)), alone[0], rtol=0, atol=5e-5)
    # The cache of a row's first 20 tokens, used again for another continuation.
    prefix = session.cut(cache, 20)
    _, logits = session.extend(prefix, ids[0, 20:].tolist(), 20)
    torch.testing.assert_close(torch.from_numpy(logits[0]), alone[0][20:], rtol=0, atol=5e-5)


def test_a_verification_tells_where_onnxruntime_computed_or_why_not(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_session, "has_gpu", lambda: False)
    report = convert(checkpoint, tmp_path / "cpu", Options(to="onnx"))
    assert "onnxruntime on cpu, 1, 17, 256" in report.render() and all(check.ok for check in report.checks)
    real = onnxruntime.InferenceSession  # with a provider for CUDA that does not load: on the CPU, and nothing raised
    monkeypatch.setattr(onnx_session, "has_gpu", lambda: True)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda path, options, **_: real(path, options, providers=["CPUExecutionProvider"]),
    )
    report = convert(checkpoint, tmp_path / "cuda", Options(to="onnx"))
    (numbers,) = (check for check in report.checks if check.level == 3)
    assert numbers.ok is None and "did not load CUDA and would compute on the CPU" in numbers.detail


def test_a_batch_decodes_with_left_padding(tmp_path: Path) -> None:
    model, session = exported("storywriter", tmp_path)
    ids = random_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    _, cache = session.run(ids.numpy(), mask.numpy(), session.empty(2), 1)
    new = torch.tensor([[7], [9]])
    longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
    logits = session.run(new.numpy(), longer.numpy(), cache, 1)[0]
    with torch.no_grad():
        for row, start in ((0, 0), (1, 5)):
            expected = model(torch.cat([ids[row, start:], new[row]])[None]).logits[0, -1]
            torch.testing.assert_close(torch.from_numpy(logits[row, 0]), expected, rtol=0, atol=5e-5)


def test_the_graph_is_small_and_checked_and_its_weights_are_the_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "out", Options(to="onnx", verify=False))
    path = tmp_path / "out" / "model.onnx"
    assert path.stat().st_size < 20_000
    onnx.checker.check_model(str(path))
    graph = onnx.load(str(path), load_external_data=False).graph
    external = {t.name for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
    assert external == set(mpt.checkpoint.stored_tensors(checkpoint))
    inputs = [value.name for value in graph.input]
    assert inputs[:4] == ["input_ids", "attention_mask", "past_key_values.0.key", "past_key_values.0.value"]
    assert [value.name for value in graph.output][:3] == ["logits", "present.0.key", "present.0.value"]
    assert [node.op_type for node in graph.node].count("Attention") == 2


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.5 / 127), (4, 0.5 / 7)])
def test_quantising_is_off_by_half_a_step_at_most(bits: int, limit: float) -> None:
    values = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
    values[0, :32] = 0
    levels, scales = quantise(values, bits)
    assert levels.shape == (6, 3, 32 * bits // 8) and levels.dtype == torch.uint8
    found = dequantise(levels, scales, bits)
    largest = values.view(6, 3, 32).abs().amax(-1, keepdim=True)
    # The largest value's own sign is exact; the other end has one level less, where a whole step may be lost.
    assert ((found - values).view(6, 3, 32).abs() <= 2.01 * limit * largest).all()
    assert ((found - values).view(6, 3, 32).abs() <= 1.01 * limit * largest).float().mean() > 0.98
    assert torch.equal(found[0, :32], torch.zeros(32))


def test_float16_needs_half_the_disk_and_takes_float16_caches(checkpoint: Path, tmp_path: Path) -> None:
    sizes = {}
    for dtype in ("float32", "float16"):
        convert(checkpoint, tmp_path / dtype, Options(to="onnx", dtype=dtype))  # type: ignore[arg-type]
        sizes[dtype] = (tmp_path / dtype / "model.safetensors").stat().st_size
    assert 0.49 < sizes["float16"] / sizes["float32"] < 0.52
    assert Session(tmp_path / "float16").dtype == np.float16


def test_genai_serves_the_folder(checkpoint: Path, tmp_path: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    convert(checkpoint, tmp_path / "out", Options(to="onnx", verify=False))
    config = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert config["model"]["context_length"] == 512
    made = og.Model(str(tmp_path / "out"))
    parameters = og.GeneratorParams(made)
    parameters.set_search_options(max_length=64, batch_size=1)
    generator: Any = og.Generator(made, parameters)
    ids = [5, 6, 7, 8, 9]
    generator.append_tokens(np.array([ids], dtype=np.int32))
    found = list(ids)
    while len(found) < 40:
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    model = mpt.checkpoint.load(checkpoint)
    with torch.no_grad():
        while len(ids) < len(found):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert found == ids
    text = "The quick brown fox, 12345!"
    assert og.Tokenizer(made).encode(text).tolist() == Tokenizer.from_folder(checkpoint).encode(text)
