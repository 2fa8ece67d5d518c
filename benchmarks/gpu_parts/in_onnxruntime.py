"""A model converted to ONNX, in onnxruntime on CUDA: how fast it is, and whether its logits are ours.

The session itself refuses to compute on the CPU where CUDA did not load; the part is told as not run then.
"""

import importlib.util
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import mpt
from benchmarks.gpu_parts.bench import Bench, make_model, make_tokenizer, random_text
from mpt.backends.backend import Work
from mpt.backends.onnx_session import find_device
from mpt.errors import MachineRefused

DTYPES: tuple[Any, ...] = ("float32", "float16")
N_READ, N_WRITTEN = 128, 48
TOLERANCE = {"float32": 1e-2, "float16": 5e-2}


def run(bench: Bench) -> None:
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        bench.refuse("onnxruntime", f"{' and '.join(missing)} not installed")
        return
    import onnxruntime

    bench.note(available=onnxruntime.get_available_providers(), built_for_cuda=onnxruntime.cuda_version)
    try:
        find_device(bench.device.type)
    except MachineRefused as error:
        bench.refuse("onnxruntime", str(error))
        return
    with tempfile.TemporaryDirectory() as folder:
        for dtype in DTYPES:
            if not bench.not_run:
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
    try:
        backend = OnnxBackend(folder / dtype, bench.device.type)
    except MachineRefused as error:
        bench.refuse("onnxruntime", str(error))
        return
    session = backend.session
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
    on_cpu = ", ".join(f"{n} {kind}" for kind, n in session.on_cpu.items())
    bench.note(**{dtype: {"tok_s": tok_s, "off": off, "providers": session.providers, "on_cpu": session.on_cpu}})
    bench.row(f"onnxruntime, {dtype}, 1 stream at {N_READ} tokens", f"{tok_s:,.1f} tok/s",
              f"providers {', '.join(session.providers)}; on the CPU: {on_cpu or 'nothing that takes time'}; "
              f"logits {off:.1e} off ours")  # fmt: skip
    assert off < TOLERANCE[dtype], f"logits of {dtype} are {off} off"
