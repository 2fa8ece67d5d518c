"""What the command lines share: the choices of device, precision and prompt style, light to import.

`Style` is the same as in `mpt.prompts`, which is slow to import; the type checker compares them.
"""

from typing import Annotated, Literal

import typer

Style = Literal["none", "instruct", "chatml"]
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["int8"]
KVCache = Literal["auto", "int8"]

DeviceOption = Annotated[Device, typer.Option(help="Where to compute; `auto` is CUDA where there is one.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Precision of the weights; `auto` keeps the checkpoint's.")]
QuantizeOption = Annotated[
    Quantization | None,
    typer.Option(
        help="Compute with int8 weights: half the memory, up to twice the speed on CPU; the rest stays bfloat16.",
        show_default="no",
    ),
]
KVCacheOption = Annotated[
    KVCache,
    typer.Option(
        help="Precision of the KV cache; `auto` is the weights', `int8` holds nearly twice the tokens, on CPU."
    ),
]
