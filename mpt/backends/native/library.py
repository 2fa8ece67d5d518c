"""The C code of this package: which variant of it runs here, compiled once with the system's compiler, and loaded.

Without a compiler, or on another platform than Linux, everything runs through torch, only slower. Not here: for which
models it is made (`available.py`).
"""

import ctypes
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

from mpt.backends.native import structures
from mpt.errors import UserError

SOURCES = sorted(Path(__file__).parent.glob("*.[ch]"))
# Sums may be reordered, once and for all when compiling; infinities and NaN stay what they are.
_FLAGS = [
    *("-std=gnu11", "-O3", "-march=native", "-fopenmp", "-fPIC", "-Wall", "-Wno-psabi"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-ffp-contract=fast"),
]


class Unavailable(Exception):
    """Why something cannot run in C here; it runs through torch then."""


@dataclass(frozen=True)
class Variant:
    """One way to compile the C code: the branches of its `#if`s that a set of instructions selects."""

    name: str
    macros: tuple[str, ...]  # what the compiler predefines where this variant can be made; common.h asks for the same
    processor_flags: tuple[str, ...]  # how /proc/cpuinfo calls these instructions
    instructions: str  # how people call them
    compilers: str  # the first that know them
    without: tuple[str, ...]  # macros of faster variants, which must not be predefined when this one is made
    architecture: str = "__x86_64__"  # the macro of the only architecture that has it; "": all do


_AMX = ("__AMX_TILE__", "__AMX_BF16__", "__AMX_INT8__")
_AVX512 = ("__AVX512BW__", "__AVX512DQ__")
_NEON = ("__ARM_NEON", "__ARM_FEATURE_DOTPROD")
_AVX2 = ("__AVX2__", "__FMA__", "__F16C__")
# From the fastest to the slowest; each needs less than the one before, and the last needs nothing.
VARIANTS = (
    Variant(
        "amx", (*_AVX512, "__AVX512BF16__", *_AMX), ("amx_tile", "amx_bf16", "amx_int8"), "AMX", "gcc 11", without=()
    ),
    Variant("avx512_bf16", (*_AVX512, "__AVX512BF16__"), ("avx512_bf16",), "AVX-512 BF16", "gcc 10", without=_AMX),
    Variant("avx512", _AVX512, ("avx512bw", "avx512dq"), "AVX-512", "gcc 5", without=(*_AMX, "__AVX512BF16__")),
    Variant("avx2", _AVX2, ("avx2", "fma", "f16c"), "AVX2", "gcc 4.9", without=(*_AMX, "__AVX512F__")),
    Variant("neon", _NEON, ("asimddp",), "dot products of NEON", "gcc 8", without=(), architecture="__aarch64__"),
    Variant(
        "generic", (), (), "", "", without=(*_AMX, "__AVX512F__", "__AVX2__", "__ARM_FEATURE_DOTPROD"), architecture=""
    ),
)
_SWITCHED_OFF_BY = {
    "__AMX_TILE__": "-mno-amx-tile",
    "__AMX_BF16__": "-mno-amx-bf16",
    "__AMX_INT8__": "-mno-amx-int8",
    "__AVX512BF16__": "-mno-avx512bf16",
    "__AVX512F__": "-mno-avx512f",  # and with it all other kinds of AVX-512
    "__AVX2__": "-mno-avx2",
    "__ARM_FEATURE_DOTPROD": "-march=armv8-a",
}


@dataclass(frozen=True)
class Features:
    """What this machine and its compiler can make of the C code."""

    compiler: str  # its path
    version: str  # the first line it says about itself
    macros: frozenset[str]  # names it predefines for this processor
    variants: tuple[str, ...]  # those that can run here, the fastest first; never empty
    missing: dict[str, str]  # the others, each with the reason as a sentence fragment

    @property
    def variant(self) -> str:
        """The variant that runs here."""
        return self.variants[0]

    @property
    def why_not_faster(self) -> str | None:
        """Why the next faster variant is not there; None where there is none."""
        return next(reversed(self.missing.values()), None)


def features() -> Features:
    """What can be compiled and run here. Nothing is compiled for it.

    `MPT_NATIVE_ISA` names the only variant that may run. Raises Unavailable where nothing can, UserError where that one
    cannot.
    """
    if os.environ.get("MPT_NATIVE") == "0":
        raise Unavailable("MPT_NATIVE=0")
    if sys.platform != "linux":
        raise Unavailable(f"it is for Linux, and this is {platform.system()}")
    compiler = _compiler()
    if compiler is None:
        raise Unavailable("there is no C compiler; install gcc (Debian: `apt install gcc libc6-dev`)")
    version = _version(compiler)
    macros = frozenset(line.split()[1] for line in _predefined(compiler, ("-march=native",)).splitlines())
    runs, missing = [], {}
    for variant in VARIANTS:
        if variant.architecture and variant.architecture not in macros:
            continue
        reason = _why_not(variant, macros, version)
        if reason is None:
            runs.append(variant.name)
        else:
            missing[variant.name] = reason
    forced = os.environ.get("MPT_NATIVE_ISA")
    if forced is not None:
        if forced not in runs:
            known = [variant.name for variant in VARIANTS]
            other = "it is for another kind of processor" if forced in known else f"there are {', '.join(known)}"
            why = missing.get(forced, other)
            raise UserError(f"`MPT_NATIVE_ISA={forced}` cannot run here: {why}; those that can: {', '.join(runs)}")
        runs, missing = [forced], {"faster": f"MPT_NATIVE_ISA={forced}"}
    return Features(compiler, version, macros, tuple(runs), missing)


def _why_not(variant: Variant, macros: frozenset[str], version: str) -> str | None:
    """Why a variant of this processor's architecture cannot run here, or None where it can."""
    if not set(variant.macros) <= macros:
        if set(variant.processor_flags) <= _processor_flags():
            return (
                f"`{version}` does not know this processor's {variant.instructions}; {variant.compilers} and newer do"
            )
        return f"this processor has no {variant.instructions}"
    if variant.name == "amx" and not _may_use_amx():
        return "the system does not let this process use AMX"
    return None


def _processor_flags() -> set[str]:
    """The instruction sets of this processor, as Linux calls them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return set(next((line for line in lines if line.startswith(("flags", "Features"))), "").split())


def _may_use_amx() -> bool:
    """Ask the system for the tiles of AMX, as a process must before it uses them; asking again does no harm."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18  # SYS_arch_prctl and ARCH_REQ_XCOMP_PERM of x86-64
    answer: int = ctypes.CDLL(None).syscall(*map(ctypes.c_long, (arch_prctl, request_permission, tile_data)))
    return answer == 0


def has_compiler() -> bool:
    """Whether the step can be compiled here."""
    return sys.platform == "linux" and _compiler() is not None


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CC") or "cc")


@functools.cache
def _version(compiler: str) -> str:
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    return said.split("\n")[0]


@functools.cache
def _predefined(compiler: str, flags: tuple[str, ...]) -> str:
    """The compiler's predefined macros with these flags, one `#define` a line. Raises Unavailable."""
    command = [compiler, *flags, "-dM", "-E", "-x", "c", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"`{compiler}` cannot compile for this processor: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout


@functools.cache
def load(variant: str | None = None) -> ctypes.CDLL:
    """The compiled code: the fastest variant that runs here, or one of the others that do.

    Raises Unavailable where there is no compiler, or the system refuses what it made.
    """
    import torch  # noqa: F401  the code calls the libgomp that torch brings

    found = features()
    variant = variant or found.variant
    assert variant in found.variants, f"{variant} is not one of {found.variants}"
    path = build(found, flags_of(variant, found), [path for path in SOURCES if path.suffix == ".c"])
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"`{path}` cannot be loaded: {error}") from error
    structures.declare(library)
    structures.check(library, variant)
    return library


def flags_of(name: str, found: Features) -> list[str]:
    """What a variant is compiled with. The fastest one that runs here takes all that the processor has."""
    variant = next(variant for variant in VARIANTS if variant.name == name)
    return [*_FLAGS, *(_SWITCHED_OFF_BY[macro] for macro in variant.without if macro in found.macros)]


def build(found: Features, flags: Sequence[str], files: Sequence[Path]) -> Path:
    """The library made of these C files, compiled if it is not in the cache yet. Raises Unavailable."""
    compiler = found.compiler
    texts = [path.read_text() for path in [*SOURCES, *files]]
    # What -march=native means is in the macros: two processors for which the compiler does the same share a library.
    key = hashlib.sha256("\0".join([*texts, *flags, found.version, _predefined(compiler, tuple(flags))]).encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mpt"
    path = cache / f"step-{key.hexdigest()[:16]}.so"
    if path.is_file() and path.stat().st_uid == os.getuid():  # code somebody else has put there is not ours to run
        return path
    try:
        cache.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(dir=cache)
    except OSError:  # a read-only home
        folder = tempfile.mkdtemp()
        path = Path(folder) / path.name
    made = Path(folder) / "made.so"
    objects = [f"{folder}/{file.stem}.o" for file in files]
    try:
        _run_all([[compiler, *flags, "-c", str(file), "-o", to] for file, to in zip(files, objects, strict=True)])
        # Not linked with a libgomp of its own, for torch's is there: two pools of threads would fight for the cores.
        _run_all([[compiler, "-shared", *objects, "-o", str(made), "-lm"]])
    except Unavailable:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    os.replace(made, path)
    if path.parent != Path(folder):
        shutil.rmtree(folder, ignore_errors=True)
    return path


def _run_all(commands: Sequence[Sequence[str]]) -> None:
    """Run compilers side by side. Raises Unavailable with the last line of the first that fails."""
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    said = [process.communicate()[1] for process in running]
    for process, errors in zip(running, said, strict=True):
        if process.returncode:
            raise Unavailable(f"`{commands[0][0]}` cannot compile it: {errors.strip().splitlines()[-1:]}")
