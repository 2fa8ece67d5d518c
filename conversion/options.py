"""What a conversion is asked for; light, so that the command line reads it before torch is imported."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

DtypeChoice = Literal["auto", "float32", "float16", "bfloat16", "int8", "int4"]
TritonChoice = Literal["no", "whole", "stream"]


@dataclass(frozen=True)
class Options:
    """What a conversion was asked for. An option that only some formats have is named in their row of the table."""

    to: str  # a name of `format_table.exports()`
    dtype: DtypeChoice = "auto"  # the source's own, or float32 where the format does not have it
    tensor_parallel: int = 1  # ranks the weights are split for
    allow: tuple[str, ...] = ()  # settings the target cannot express, given up by name
    verify: bool = True
    tokenizer: Path | None = None
    base: str | None = None
    triton: TritonChoice = "no"  # also a Triton repository: an answer a request, or one a token
