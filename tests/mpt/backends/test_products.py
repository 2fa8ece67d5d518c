"""Products of every weight format by every set of kernels, also by those for ARM, which an emulator runs.

Expected values are those of the `gguf` package's dequantisation, in float64.
"""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from mpt.backends.native import build, library, structures
from mpt.gguf.ggml_types import BLOCK_TYPES

WHY_NONE = library.why_none() or (None if library.features().compiler else "needs a C compiler")
FOUND = library.features() if WHY_NONE is None else library.Features((), {}, None)
pytestmark = pytest.mark.skipif(WHY_NONE is not None, reason=str(WHY_NONE))
NATIVE = Path(library.__file__).parent
VARIANTS = {variant.name: variant for variant in build.VARIANTS}
PROGRAM, HALVES_PROGRAM = Path(__file__).with_name("products.c"), Path(__file__).with_name("halves.c")
ARM = ("aarch64-linux-gnu-gcc", "qemu-aarch64")
ON_ARM = {"neon": "neon", "generic on ARM": "generic"}
EVERY_SET = (*(variant for variant in FOUND.variants if variant != "amx"), *ON_ARM)
HALVES = {
    "Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)
}  # fmt: skip
Array = np.ndarray[Any, Any]


def compiled(program: Path, name: str, folder: Path) -> list[str]:
    """The command that runs a program, compiled for a set of kernels."""
    out = folder / f"{program.stem} {name}"
    if name in ON_ARM:
        if missing := [tool for tool in ARM if shutil.which(tool) is None]:
            pytest.skip(f"{missing[0]} is not here; Debian has it in gcc-aarch64-linux-gnu and qemu-user")
        compile_, run = [ARM[0], *build.flags_of(VARIANTS[ON_ARM[name]], ARM[0]), "-static"], [ARM[1], str(out)]
    else:
        assert FOUND.compiler is not None
        compile_, run = [FOUND.compiler, *build.flags_of(VARIANTS[name], FOUND.compiler)], [str(out)]
    files = [str(program), str(NATIVE / "threads.c")]
    command = [*compile_, "-Wno-unused", f"-I{NATIVE}", *files, "-o", str(out), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return run


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Each set of kernels with the command that runs it, compiled when it is first asked for."""
    folder, made = tmp_path_factory.mktemp("products"), dict[str, list[str]]()

    class Programs(dict[str, list[str]]):
        def __missing__(self, name: str) -> list[str]:
            self[name] = compiled(PROGRAM, name, folder)
            return self[name]

    return Programs(made)


def bfloat16(x: Array) -> Array:
    """The nearest bfloat16 numbers, as their bits."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def widened(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def matrix(kind: str, n_out: int, n_in: int) -> tuple[bytes, Array, Array]:
    """A random matrix as it is stored, the scales of its rows, and its real values."""
    random = np.random.default_rng(1)
    scales = random.uniform(0.01, 0.02, n_out).astype(np.float32)
    if kind in ("FLOAT32", "FLOAT16"):
        real = random.standard_normal((n_out, n_in)).astype(kind.lower())
        real[:, :2] *= 2.0**-20  # float16's subnormal numbers are among them
        return real.tobytes(), scales, real.astype(np.float64)
    if kind == "BFLOAT16":
        bits = bfloat16(random.standard_normal((n_out, n_in)))
        return bits.tobytes(), scales, widened(bits)
    if kind == "INT8_ROWS":
        codes = random.integers(-127, 128, (n_out, n_in)).astype(np.int8)
        return codes.tobytes(), scales, codes * scales.astype(np.float64)[:, None]
    block = BLOCK_TYPES[kind]
    data = random.integers(0, 256, (n_out, n_in // block.n_values, block.n_bytes), dtype=np.uint8)
    for at in HALVES.get(kind, (0,)):
        halves = random.uniform(0.01, 0.02, data.shape[:2]).astype(np.float16)
        data[..., at : at + 2] = halves[..., None].view(np.uint8)
    real = gguf.quants.dequantize(data.reshape(n_out, -1), gguf.GGMLQuantizationType[kind])
    return data.tobytes(), scales, real.astype(np.float64)


def product(command: list[str], kind: str, n_out: int, x: Array, is_prompt: bool) -> tuple[Array, Array]:
    """What a program computes, and the truth."""
    stored, scales, real = matrix(kind, n_out, x.shape[1])
    asked = [structures.FORMATS.index(kind), n_out, x.shape[1], len(x), int(is_prompt)]
    data = np.array(asked, "<i4").tobytes() + stored + scales.tobytes() + x.astype("<f4").tobytes()
    done = subprocess.run(command, input=data, capture_output=True, check=True)
    return np.frombuffer(done.stdout, "<f4").reshape(len(x), n_out), x.astype(np.float64) @ real.T


@pytest.mark.parametrize("is_prompt", [False, True], ids=["few", "prompt"])
@pytest.mark.parametrize("kind", structures.FORMATS)
@pytest.mark.parametrize("kernels", EVERY_SET)
def test_products_are_those_of_the_real_values(
    programs: dict[str, list[str]], kernels: str, kind: str, is_prompt: bool
) -> None:
    """Of 37 outputs, which fill no strip, and 2,816 inputs, which fill no chunk; one input is 30 times the others."""
    x = np.random.default_rng(2).standard_normal((7, 2816))
    x[:, 5] *= 30
    is_plain = kind in ("FLOAT32", "FLOAT16", "BFLOAT16")
    x = widened(bfloat16(x)) if kind == "BFLOAT16" else x.astype(np.float32)
    found, expected = product(programs[kernels], kind, 37, x, is_prompt)
    if not is_plain:
        expected = in_eight_bits(x) @ matrix(kind, 37, x.shape[1])[2].T
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).mean()


def in_eight_bits(x: Array) -> Array:
    """Inputs as ggml rounds them to Q8_0, but for its steps in float16."""
    blocks = gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q8_0).reshape(-1, 34)
    steps = np.abs(x.reshape(-1, 32)).max(1, keepdims=True).astype(np.float64) / 127
    return (blocks[:, 2:].view(np.int8) * steps).reshape(x.shape)


@pytest.mark.parametrize("kind", structures.FORMATS)
@pytest.mark.parametrize("kernels", EVERY_SET)
def test_no_bit_depends_on_the_tokens_beside(programs: dict[str, list[str]], kernels: str, kind: str) -> None:
    """Of inputs that do not fill a span of 256 where the format allows it, and of outputs that fill no sixteen."""
    command = programs[kernels]
    n_in = 768 if kind in BLOCK_TYPES and BLOCK_TYPES[kind].n_values == 256 else 800
    x = np.random.default_rng(3).standard_normal((9, n_in))
    together = product(command, kind, 40, x, False)[0]
    for n in (0, 3, 8):
        assert np.array_equal(product(command, kind, 40, x[n : n + 1], False)[0][0], together[n])
    assert np.array_equal(product(command, kind, 40, x[2:7], False)[0], together[2:7])


@pytest.mark.parametrize("kind", ["BFLOAT16", "INT8_ROWS", "Q4_0", "Q6_K"])
@pytest.mark.parametrize("kernels", EVERY_SET)
def test_no_bit_of_a_prompt_depends_on_the_tokens_beside(
    programs: dict[str, list[str]], kernels: str, kind: str
) -> None:
    """1, 2, 4 and 18 tokens end differently where 6 or 12 are multiplied at once; of inputs some are left."""
    n_in = 768 if kind == "Q6_K" else 544
    x = np.random.default_rng(6).standard_normal((25, n_in))
    together, expected = product(programs[kernels], kind, 70, x, True)
    assert np.abs(together - expected).max() < 0.05 * np.abs(expected).mean()
    for start, end in ((0, 1), (1, 3), (3, 7), (7, 25)):
        assert np.array_equal(product(programs[kernels], kind, 70, x[start:end], True)[0], together[start:end])
    if kind != "BFLOAT16":
        assert np.array_equal(product(programs[kernels], kind, 70, x[3:7], False)[0], together[3:7])


@pytest.mark.parametrize("kernels", EVERY_SET)
@pytest.mark.parametrize("kind", ["FLOAT32", "FLOAT16", "BFLOAT16"])
def test_no_bit_depends_on_the_way_of_the_weights(programs: dict[str, list[str]], kernels: str, kind: str) -> None:
    """More than eight tokens have them widened beforehand; 2,051 inputs leave some over in the second chunk."""
    x = np.random.default_rng(5).standard_normal((9, 2051))
    together = product(programs[kernels], kind, 40, x, True)[0]
    assert np.array_equal(product(programs[kernels], kind, 40, x[:8], True)[0], together[:8])
    assert np.array_equal(product(programs[kernels], kind, 40, x[8:], True)[0], together[8:])


@pytest.mark.parametrize("kernels", EVERY_SET)
@pytest.mark.parametrize("kind", ["FLOAT32", "FLOAT16", "BFLOAT16"])
@pytest.mark.parametrize("n_in", [1, 7, 33, 50, 100])
def test_rows_of_any_width(programs: dict[str, list[str]], kernels: str, kind: str, n_in: int) -> None:
    x = widened(bfloat16(np.random.default_rng(4).standard_normal((5, n_in))))
    found, expected = product(programs[kernels], kind, 3, x, True)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max() + 1e-6


@pytest.mark.parametrize("kernels", EVERY_SET)
def test_float16_is_rounded_and_widened_as_numpy_does(kernels: str, tmp_path: Path) -> None:
    """Every float16 number; of float32 those halfway between two of them, those beside, large and subnormal ones."""
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    known = every[np.isfinite(every)].astype(np.float32)
    halfway = (np.sort(known)[1:].astype(np.float64) + np.sort(known)[:-1]) / 2
    halfway = halfway.astype(np.float32)  # exact
    ends = np.array([65519.0, 65520.0, -65520.0, 1e9, -1e9, np.inf, -np.inf, np.nan, 1e-9, -1e-9, 1e-40], np.float32)
    given = np.concatenate([known, halfway, np.nextafter(halfway, np.inf), np.nextafter(halfway, -np.inf), ends])
    data = np.int32(len(given)).tobytes() + given.astype(np.float32).tobytes()
    done = subprocess.run(compiled(HALVES_PROGRAM, kernels, tmp_path), input=data, capture_output=True, check=True)
    found = np.frombuffer(done.stdout[: 2 * len(given)], np.uint16).view(np.float16)
    with np.errstate(over="ignore"):
        expected = given.astype(np.float16)
    np.testing.assert_array_equal(found, expected)
    assert np.array_equal(np.signbit(found), np.signbit(expected))
    widened_ = np.frombuffer(done.stdout[2 * len(given) :], np.float32)
    np.testing.assert_array_equal(widened_, every.astype(np.float32))
