"""GGML's tensor types: the plain ones, and the blocks that quantised weights are stored in. Imports nothing heavy.

A row of a matrix is cut into blocks of 32 or 256 values. A block holds small integers and one or two scales in float16;
in the types of 256 values the scales of its parts are small integers too. Source: ggml, `ggml.h` and `ggml-common.h`.

Not here: the values of blocks (`ggml_blocks.py`).
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class BlockType:
    """One type of blocks."""

    name: str
    number: int  # in files: `enum ggml_type`
    n_values: int
    n_bytes: int


BLOCK_TYPES: dict[str, BlockType] = {
    block.name: block
    for block in (
        BlockType("Q4_0", 2, 32, 18),
        BlockType("Q4_1", 3, 32, 20),
        BlockType("Q5_0", 6, 32, 22),
        BlockType("Q5_1", 7, 32, 24),
        BlockType("Q8_0", 8, 32, 34),
        BlockType("Q2_K", 10, 256, 84),
        BlockType("Q3_K", 11, 256, 110),
        BlockType("Q4_K", 12, 256, 144),
        BlockType("Q5_K", 13, 256, 176),
        BlockType("Q6_K", 14, 256, 210),
        BlockType("IQ4_NL", 20, 32, 18),
    )
}

PLAIN_TYPES = {"F32": 4, "F16": 2, "BF16": 2}  # and the bytes of a value
_NAMES = {0: "F32", 1: "F16", 30: "BF16"} | {block.number: block.name for block in BLOCK_TYPES.values()}
_NOT_READ = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


def type_name(number: int) -> str | None:
    """The name of a type that is read, by its number in a file."""
    return _NAMES.get(number)


def unknown_type(number: int) -> str:
    """For errors: a type that is not read, and those that are."""
    name = f"{number} ({_NOT_READ[number]})" if number in _NOT_READ else str(number)
    return f"GGML's type {name}; supported: {', '.join(_NAMES.values())}"


def n_bytes(kind: str, shape: tuple[int, ...]) -> int | None:
    """What a tensor takes; None where its rows do not fill their blocks."""
    if kind in PLAIN_TYPES:
        return math.prod(shape) * PLAIN_TYPES[kind]
    block = BLOCK_TYPES[kind]
    if not shape or shape[-1] % block.n_values:
        return None
    return math.prod(shape) // block.n_values * block.n_bytes
