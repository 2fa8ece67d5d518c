"""How the C code of this folder becomes a library: its variants, one for each set of instructions, and the compiler.

Only the standard library is imported: the build of the package (`hatch_build.py`) reads this file by itself, and makes
all variants of its platform. Not here: which variant runs (`library.py`).
"""

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = sorted(FOLDER.glob("*.[ch]"))
BUILT = FOLDER / "built"  # the libraries that came with the package; a source checkout has none
# Sums may be reordered, once and for all when compiling; infinities and NaN stay what they are.
FLAGS = (
    *("-std=gnu11", "-O3", "-fPIC", "-pthread", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-ffp-contract=fast"),
)


class CannotBuild(Exception):
    """Why there is no library: a sentence fragment."""


@dataclass(frozen=True)
class Variant:
    """One way to compile the C code: for processors with some instructions. common.h asks for the same by macros."""

    name: str
    instructions: str  # that the next slower variant does not need, as people call them
    architecture: str  # x86_64, arm64, or "" for both
    processor_flags: tuple[str, ...]  # what Linux calls all that it needs
    options: tuple[str, ...]  # what a compiler calls them
    compilers: str  # the first that know them


_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi2", "-mlzcnt", "-mpopcnt")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512cd", "-mprefer-vector-width=512")
_VNNI = (*_AVX512, "-mavx512vnni")
_BF16 = (*_VNNI, "-mavx512bf16")
_AVX2_FLAGS = ("avx2", "fma", "f16c", "bmi2", "abm", "popcnt")
_AVX512_FLAGS = (*_AVX2_FLAGS, "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd")
_VNNI_FLAGS = (*_AVX512_FLAGS, "avx512_vnni")
_BF16_FLAGS = (*_VNNI_FLAGS, "avx512_bf16")
_AMX = ("amx_tile", "amx_bf16", "amx_int8")
# From the fastest to the slowest of each architecture; the last needs nothing.
VARIANTS = (
    Variant(
        "amx", "AMX", "x86_64", (*_BF16_FLAGS, *_AMX), (*_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"), "gcc 11"
    ),
    Variant("avx512_bf16", "AVX-512 BF16", "x86_64", _BF16_FLAGS, _BF16, "gcc 10"),
    Variant("avx512_vnni", "AVX-512 VNNI", "x86_64", _VNNI_FLAGS, _VNNI, "gcc 8"),
    Variant("avx512", "AVX-512", "x86_64", _AVX512_FLAGS, _AVX512, "gcc 8"),
    Variant("avx2_vnni", "AVX-VNNI", "x86_64", (*_AVX2_FLAGS, "avx_vnni"), (*_AVX2, "-mavxvnni"), "gcc 11"),
    Variant("avx2", "AVX2", "x86_64", _AVX2_FLAGS, _AVX2, "gcc 5"),
    Variant("neon", "dot products of NEON", "arm64", ("asimddp",), ("-march=armv8.2-a+dotprod",), "gcc 8"),
    Variant("generic", "", "", (), (), ""),
)


def architecture() -> str:
    """Of this machine's processor, as VARIANTS calls it."""
    names = {"amd64": "x86_64", "aarch64": "arm64"}
    return names.get(platform.machine().lower(), platform.machine().lower())


def of_architecture(name: str) -> tuple[Variant, ...]:
    """The variants of one, the fastest first."""
    return tuple(variant for variant in VARIANTS if variant.architecture in ("", name))


def find_compiler() -> str | None:
    """Its path: what `CC` names, else `cc`."""
    return shutil.which(os.environ.get("CC") or "cc")


@functools.cache
def version_of(compiler: str) -> str:
    """The first line that it says of itself."""
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    return said.split("\n")[0]


@functools.cache
def knows(compiler: str, variant: Variant) -> bool:
    """Whether it can compile a variant."""
    command = [compiler, *variant.options, "-E", "-x", "c", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@functools.cache
def has_openmp(compiler: str) -> bool:
    """Whether it makes calls of libgomp, which torch brings on Linux; elsewhere the code has threads of its own."""
    if sys.platform != "linux":
        return False
    command = [compiler, "-dM", "-E", "-x", "c", os.devnull]
    return "__clang__" not in subprocess.run(command, capture_output=True, text=True, check=False).stdout


def flags_of(variant: Variant, compiler: str) -> list[str]:
    """What a variant is compiled with."""
    return [*FLAGS, *variant.options, *(["-fopenmp"] if has_openmp(compiler) else [])]


def file_name(variant: Variant, *more: str) -> str:
    """Of its library: another one for each change of the C code, of the flags, or of `more`."""
    texts = [path.read_text() for path in SOURCES]
    key = hashlib.sha256("\0".join([*texts, *FLAGS, *variant.options, *more]).encode()).hexdigest()
    return f"{variant.name}-{key[:16]}.so"


def compile_library(compiler: str, flags: Sequence[str], files: Sequence[Path], to: Path) -> None:
    """Make a library of C files, complete or not at all. Raises CannotBuild, and OSError where it cannot be written."""
    with tempfile.TemporaryDirectory(dir=to.parent) as folder:
        made = Path(folder) / "made.so"
        objects = [f"{folder}/{file.stem}.o" for file in files]
        _run_all([[compiler, *flags, "-c", str(file), "-o", out] for file, out in zip(files, objects, strict=True)])
        # Not linked with a libgomp of its own, for torch's is there: two pools of threads would fight for the cores.
        _run_all([[compiler, "-shared", *objects, "-o", str(made), "-lm"]])
        made.replace(to)


def _run_all(commands: Sequence[Sequence[str]]) -> None:
    """Run compilers side by side. Raises CannotBuild with the last line of the first that fails."""
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    said = [process.communicate()[1] for process in running]
    for process, errors in zip(running, said, strict=True):
        if process.returncode:
            raise CannotBuild(f"`{commands[0][0]}` cannot compile it: {errors.strip().splitlines()[-1:]}")
