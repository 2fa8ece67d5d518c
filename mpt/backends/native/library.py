"""The C code of this package on this machine: which variants of it run here, and the library of each, loaded.

A library came with the package, built for all processors of the platform, or is compiled once with the system's
compiler. Where there is neither, everything runs through torch, only slower. Not here: for which models the code is
made (`available.py`), how it is compiled (`build.py`).
"""

import ctypes
import functools
import os
import platform
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mpt.backends.native import build, structures
from mpt.backends.native.build import BUILT, VARIANTS, Variant
from mpt.errors import UserError
from mpt.processors import macos


class Unavailable(Exception):
    """Why something cannot run in C here; it runs through torch then."""


@dataclass(frozen=True)
class Features:
    """What of the C code runs on this machine."""

    variants: tuple[str, ...]  # the fastest first; never empty
    missing: dict[str, str]  # the others of this architecture, each with the reason as a sentence fragment
    compiler: str | None  # its path

    @property
    def variant(self) -> str:
        """The variant that runs here."""
        return self.variants[0]

    @property
    def why_not_faster(self) -> str | None:
        """Why the next faster variant is not there; None where there is none."""
        return next(reversed(self.missing.values()), None)


def features() -> Features:
    """What can run here. Nothing is compiled for it.

    `MPT_NATIVE_ISA` names the only variant that may run. Raises Unavailable where nothing can, UserError where that one
    cannot.
    """
    if os.environ.get("MPT_NATIVE") == "0":
        raise Unavailable("MPT_NATIVE=0")
    if sys.platform not in ("linux", "darwin"):
        raise Unavailable(f"it is for Linux and macOS, and this is {platform.system()}")
    compiler, flags = build.find_compiler(), _processor_flags()
    runs, missing = list[str](), dict[str, str]()
    for variant in build.of_architecture(build.architecture()):
        reason = _why_not(variant, flags, compiler)
        if reason is None:
            runs.append(variant.name)
        else:
            missing[variant.name] = reason
    if not runs:
        raise Unavailable(missing["generic"])
    forced = os.environ.get("MPT_NATIVE_ISA")
    if forced is not None:
        if forced not in runs:
            known = [variant.name for variant in VARIANTS]
            other = "it is for another kind of processor" if forced in known else f"there are {', '.join(known)}"
            why = missing.get(forced, other)
            raise UserError(f"`MPT_NATIVE_ISA={forced}` cannot run here: {why}; those that can: {', '.join(runs)}")
        runs, missing = [forced], {"faster": f"MPT_NATIVE_ISA={forced}"}
    return Features(tuple(runs), missing, compiler)


def why_none() -> str | None:
    """Why nothing can run in C here, or None where something can."""
    try:
        features()
    except Unavailable as reason:
        return str(reason)
    return None


def _why_not(variant: Variant, flags: frozenset[str], compiler: str | None) -> str | None:
    """Why a variant of this processor's architecture cannot run here, or None where it can."""
    if not flags >= set(variant.processor_flags):
        return f"this processor has no {variant.instructions}"
    if variant.name == "amx" and not _may_use_amx():
        return "the system does not let this process use AMX"
    if _built(variant).is_file():
        return None
    if compiler is None:
        install = (
            "run `xcode-select --install`" if sys.platform == "darwin" else "`apt install gcc libc6-dev` on Debian"
        )
        return f"this copy of the package brings no C code for this machine, and there is no C compiler ({install})"
    if not build.knows(compiler, variant):
        version = build.version_of(compiler)
        return f"`{version}` does not know this processor's {variant.instructions}; {variant.compilers} and newer do"
    return None


def _processor_flags() -> frozenset[str]:
    """The instructions of this processor, as Linux calls them."""
    if sys.platform == "darwin":
        return frozenset({"asimddp"} if macos("hw.optional.arm.FEAT_DotProd") else ())
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return frozenset(next((line for line in lines if line.startswith(("flags", "Features"))), "").split())


def _may_use_amx() -> bool:
    """Ask the system for the tiles of AMX, as a process must before it uses them; asking again does no harm."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18  # SYS_arch_prctl and ARCH_REQ_XCOMP_PERM of x86-64
    answer: int = ctypes.CDLL(None).syscall(*map(ctypes.c_long, (arch_prctl, request_permission, tile_data)))
    return answer == 0


@functools.cache
def load(variant: str | None = None) -> ctypes.CDLL:
    """The compiled code: the fastest variant that runs here, or one of the others that do.

    Raises Unavailable where the code cannot be compiled, or the system refuses what was made.
    """
    import torch  # noqa: F401  the code calls the libgomp that torch brings

    found = features()
    name = variant or found.variant
    assert name in found.variants, f"{name} is not one of {found.variants}"
    wanted = next(variant for variant in VARIANTS if variant.name == name)
    built = _built(wanted)
    try:
        library = ctypes.CDLL(str(built if built.is_file() else _compiled(wanted, found.compiler)))
    except OSError as error:
        raise Unavailable(f"its library cannot be loaded: {error}") from error
    structures.declare(library)
    structures.check(library, name)
    return library


def _built(variant: Variant) -> Path:
    """Where its library lies if it came with the package."""
    return BUILT / build.file_name(variant)


def _compiled(variant: Variant, compiler: str | None) -> Path:
    """A variant's library, compiled if it is not in the cache yet. Raises Unavailable."""
    assert compiler is not None, variant
    flags = build.flags_of(variant, compiler)
    sources = [path for path in build.SOURCES if path.suffix == ".c"]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mpt"
    path = cache / build.file_name(variant, compiler, build.version_of(compiler))
    if path.is_file() and path.stat().st_uid == os.getuid():  # code somebody else has put there is not ours to run
        return path
    try:
        cache.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache).close()
    except OSError:  # a read-only home
        path = Path(tempfile.mkdtemp()) / path.name
    try:
        build.compile_library(compiler, flags, sources, path)
    except build.CannotBuild as reason:
        raise Unavailable(str(reason)) from reason
    return path
