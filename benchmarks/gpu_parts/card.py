"""The card and the software: names, versions, clocks and power, and the ceilings that other parts are compared with."""

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks import machine
from benchmarks.gpu_parts.bench import Bench

PACKAGES = (
    "torch", "triton", "transformers", "tokenizers", "numpy", "flash-attn", "flash-attn-4", "onnxruntime-gpu",
    "onnxruntime", "onnx", "llguidance", "bitsandbytes", "torchao",
)  # fmt: skip
SMI = (
    "name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit",
    "temperature.gpu", "utilization.gpu", "memory.used", "memory.total",
)  # fmt: skip


def run(bench: Bench) -> None:
    describe(bench)
    bench.measure("nvidia-smi", lambda: at_rest(bench))
    bench.measure("copy bandwidth", lambda: copying(bench))
    bench.measure("matmul", lambda: multiplying(bench))


def describe(bench: Bench) -> None:
    is_cuda = bench.is_cuda
    properties = torch.cuda.get_device_properties(bench.device) if is_cuda else None
    bench.note(
        name=torch.cuda.get_device_name(bench.device) if is_cuda else machine.describe()["processor"],
        memory_gb=properties.total_memory / 1e9 if properties else None,
        processors=properties.multi_processor_count if properties else None,
        n_gpus=torch.cuda.device_count(),
        python=platform.python_version(),
        cuda=torch.version.cuda,
        versions={name: found for name in PACKAGES if (found := _version(name)) is not None},
    )


def at_rest(bench: Bench) -> None:
    bench.note(at_rest=smi())


def copying(bench: Bench) -> None:
    """Bytes a second that go through memory: a copy reads and writes each, a sum only reads."""
    buffer = torch.ones(bench.scale.copied_bytes // 4, device=bench.device)
    other = torch.empty_like(buffer)
    copied = 2 * buffer.nbytes / bench.seconds(lambda: other.copy_(buffer)) / 1e9
    summed = buffer.nbytes / bench.seconds(lambda: buffer.sum()) / 1e9
    bench.note(copy_gb_s=copied, sum_gb_s=summed)
    bench.row("copy, read and written bytes", f"{copied:,.0f} GB/s")
    bench.row("sum, read bytes", f"{summed:,.0f} GB/s")


def multiplying(bench: Bench) -> None:
    """The fastest of some square products, and what the clocks and the power are meanwhile."""
    speeds = {}
    for n in bench.scale.squares:
        a, b = torch.randn(2, n, n, device=bench.device).to(bench.dtype)
        speeds[str(n)] = 2 * n**3 / bench.seconds(lambda a=a, b=b: a @ b, 10) / 1e12
        bench.note(matmul_tflop_s=max(speeds.values()), matmuls=speeds)
        bench.row(f"matmul, {n:,} square, {str(bench.dtype)[6:]}", f"{speeds[str(n)]:,.1f} TFLOP/s")
    for _ in range(100 if bench.is_cuda else 1):  # a tenth of a second and more, which nvidia-smi looks into
        a @ b
    bench.note(at_work=smi())
    bench.sync()


def smi() -> dict[str, str] | None:
    """What nvidia-smi says of the first card; None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader", "--id=0"]
    said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    values = [value.strip() for value in said.stdout.partition("\n")[0].split(",")]
    return dict(zip(SMI, values, strict=True)) if len(values) == len(SMI) else {"error": said.stdout + said.stderr}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
