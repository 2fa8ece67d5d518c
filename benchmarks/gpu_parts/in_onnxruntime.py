"""A model converted to ONNX, in onnxruntime on CUDA: whether it really runs there, since it falls back in silence."""

import importlib.util
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import mpt
from benchmarks.gpu_parts.bench import Bench, make_model, make_tokenizer, random_text
from mpt.backends.backend import Work

DTYPES: tuple[Any, ...] = ("float32", "float16")
N_READ, N_WRITTEN = 128, 48
TOLERANCE = {"float32": 1e-2, "float16": 5e-2}


def run(bench: Bench) -> None:
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        bench.leave_out("onnxruntime", f"{' and '.join(missing)} not installed")
        return
    import onnxruntime

    providers = onnxruntime.get_available_providers()
    bench.note(available=providers)
    if bench.is_cuda and "CUDAExecutionProvider" not in providers:
        bench.leave_out("onnxruntime", f"this build has no CUDA, only {', '.join(providers)}; onnxruntime-gpu has")
        return
    with tempfile.TemporaryDirectory() as folder:
        for dtype in DTYPES:
            bench.measure(f"onnx {dtype}", lambda dtype=dtype: decode(bench, Path(folder), dtype))


def decode(bench: Bench, folder: Path, dtype: Any) -> None:
    """Tokens a second of one stream, and the logits beside our own model's."""
    from conversion.convert import convert
    from conversion.options import Options
    from mpt.backends.onnx_backend import OnnxBackend

    model = make_model(bench.scale.onnx, torch.device("cpu"), torch.float32)
    source = folder / f"source-{dtype}"
    mpt.save(model, source, tokenizer=make_tokenizer(bench.scale.onnx["vocab_size"]))
    convert(source, folder / dtype, Options(to="onnx", dtype=dtype, verify=False))
    backend = OnnxBackend(folder / dtype, bench.device.type)
    holding = backend.session._session.get_providers()
    wanted = "CUDAExecutionProvider" if bench.is_cuda else "CPUExecutionProvider"
    assert wanted in holding, f"the session of {dtype} runs on {holding}, not on {wanted}"
    prompt = random_text(N_READ, bench.scale.onnx["vocab_size"])
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0, -1]
    row = backend.reserve(None, N_READ + N_WRITTEN + 4)
    logits = backend.forward([Work(row, prompt, 1)])[0]
    row.length += N_READ
    off = float((logits.float() - expected).abs().max())
    for step in range(N_WRITTEN + 3):
        if step == 3:
            started = time.perf_counter()
        token = int(logits.argmax())
        logits = backend.forward([Work(row, [token], 1)])[0]
        row.length += 1
    tok_s = N_WRITTEN / (time.perf_counter() - started)
    bench.note(**{dtype: {"tok_s": tok_s, "off": off, "providers": holding}})
    bench.row(f"onnxruntime, {dtype}, 1 stream at {N_READ} tokens", f"{tok_s:,.1f} tok/s",
              f"providers {', '.join(holding)}; logits {off:.1e} off ours")  # fmt: skip
    assert off < TOLERANCE[dtype], f"logits of {dtype} are {off} off"
