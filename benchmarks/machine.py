"""What this machine is, as the head of a report: its processor, the instruction sets that matter here, its memory."""

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What people call them, and what Linux does, on x86-64 and on ARM.
_INSTRUCTION_SETS = {
    "AMX bfloat16": {"amx_tile", "amx_bf16"},
    "AMX int8": {"amx_tile", "amx_int8"},
    "AVX-512": {"avx512f", "avx512bw", "avx512dq"},
    "AVX-512 BF16": {"avx512_bf16"},
    "AVX-512 VNNI": {"avx512_vnni"},
    "AVX-VNNI": {"avx_vnni"},
    "AVX2": {"avx2", "fma", "f16c"},
    "NEON": {"asimd"},
    "NEON dot products": {"asimddp"},
    "NEON i8mm": {"i8mm"},
    "NEON bfloat16": {"asimd", "bf16"},
    "SVE": {"sve"},
}


def describe() -> dict[str, Any]:
    """`processor`, `cores`, `instruction_sets`, `memory_gb`, and which variant of our C code runs (`native`)."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    return {
        "processor": processor(cpuinfo),
        "cores": os.cpu_count(),
        "instruction_sets": instruction_sets(cpuinfo),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "native": _native(),
    }


def sentence(machine: Mapping[str, Any]) -> str:
    """What `describe` found, for people."""
    sets = ", ".join(machine["instruction_sets"]) or "none of the instruction sets that matter here"
    return (
        f"{machine['cores']} cores of {machine['processor']} with {sets}; {machine['memory_gb']} GB of memory; "
        f"our C code: {machine['native']}"
    )


def processor(cpuinfo: str) -> str:
    """The model's name; on ARM, whose cpuinfo has only numbers, as lscpu reads them."""
    name = _field(cpuinfo, "model name")
    if not name and shutil.which("lscpu"):
        said = subprocess.run(["lscpu"], capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}, check=False)
        name = _field(said.stdout, "Model name")
    return name or platform.machine()


def instruction_sets(cpuinfo: str) -> list[str]:
    """Those of the first processor that the kernels of some side use, by the names people know."""
    flags = set((_field(cpuinfo, "flags") or _field(cpuinfo, "Features")).split())
    return [name for name, needed in _INSTRUCTION_SETS.items() if needed <= flags]


def _field(text: str, name: str) -> str:
    pairs = (line.partition(":") for line in text.splitlines())
    return next((value.strip() for key, _, value in pairs if key.strip() == name), "")


def _native() -> str:
    from mpt.backends.native import library

    try:
        return library.features().variant
    except library.Unavailable as reason:
        return f"none, for {reason}"
