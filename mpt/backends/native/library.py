"""The C code of this package: compiled once with the system's compiler, and loaded.

Without a compiler, or on another platform than Linux, everything runs through torch, only slower.
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
from pathlib import Path

SOURCES = sorted(Path(__file__).parent.glob("*.[ch]"))
# Sums may be reordered, once and for all when compiling; infinities and NaN stay what they are.
_FLAGS = [
    *("-std=gnu11", "-O3", "-march=native", "-fopenmp", "-fPIC", "-Wall"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-ffp-contract=fast"),
]
Pointer = ctypes.c_void_p


class LinearStruct(ctypes.Structure):
    _fields_ = (
        ("weight", Pointer),
        ("scale", Pointer),
        ("bias", Pointer),
        ("n_out", ctypes.c_int32),
        ("n_in", ctypes.c_int32),
    )


class Unavailable(Exception):
    """Why something cannot run in C here; it runs through torch then."""


def has_compiler() -> bool:
    """Whether the step can be compiled here."""
    return sys.platform == "linux" and _compiler() is not None


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CC") or "cc")


@functools.cache
def load(extra_flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The compiled code. Raises Unavailable where there is no compiler, or the system refuses what it made."""
    if os.environ.get("MPT_NATIVE") == "0":
        raise Unavailable("MPT_NATIVE=0")
    if sys.platform != "linux":
        raise Unavailable(f"it is for Linux, and this is {platform.system()}")
    path = _compiled(extra_flags)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"`{path}` cannot be loaded: {error}") from error
    if library.mpt_prepare() < 0:
        raise Unavailable("the system does not let this process use AMX")
    return library


def _compiled(extra_flags: tuple[str, ...]) -> Path:
    """The library for this source, compiler and processor, made if it is not in the cache yet."""
    compiler = _compiler()
    if compiler is None:
        raise Unavailable("there is no C compiler; install gcc (Debian: `apt install gcc libc6-dev`)")
    flags = [*_FLAGS, *extra_flags]
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    texts = [path.read_text() for path in SOURCES]
    key = hashlib.sha256("\0".join([*texts, *flags, cpu, version]).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mpt"
    path = cache / f"step-{key}.so"
    if path.is_file() and path.stat().st_uid == os.getuid():  # code somebody else has put there is not ours to run
        return path
    try:
        cache.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(dir=cache)
    except OSError:  # a read-only home
        folder = tempfile.mkdtemp()
        path = Path(folder) / path.name
    made = Path(folder) / "made.so"
    # Not linked with a libgomp of its own: two pools of spinning threads would fight for the cores. torch's is there.
    sources = [path for path in SOURCES if path.suffix == ".c"]
    objects = [f"{folder}/{path.stem}.o" for path in sources]
    commands = [[compiler, *flags, "-c", str(path), "-o", to] for path, to in zip(sources, objects, strict=True)]
    for step in (*commands, [compiler, "-shared", *objects, "-o", str(made), "-lm"]):
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if done.returncode:
            shutil.rmtree(folder, ignore_errors=True)
            raise Unavailable(f"`{compiler}` cannot compile it: {done.stderr.strip().splitlines()[-1:]}")
    os.replace(made, path)
    if path.parent != Path(folder):
        shutil.rmtree(folder, ignore_errors=True)
    return path
