"""The C side as Python sees it: the structures of common.h, its constants, and the functions with their arguments.

`check` compares them with what the compiled library says about itself (boundary.c): ctypes would believe anything.
"""

import ctypes
from collections.abc import Iterator, Mapping
from typing import Any

Pointer = ctypes.c_void_p


class Linear(ctypes.Structure):
    _fields_ = (
        ("weight", Pointer),
        ("scale", Pointer),
        ("bias", Pointer),
        ("n_out", ctypes.c_int32),
        ("n_in", ctypes.c_int32),
        ("format", ctypes.c_int32),
    )


class Norm(ctypes.Structure):
    _fields_ = (("weight", Pointer), ("bias", Pointer))


class Lora(ctypes.Structure):
    _fields_ = (("a", Pointer), ("b", Pointer), ("rank", ctypes.c_int32))


class Layer(ctypes.Structure):
    _fields_ = (
        *((name, Norm) for name in ("norm_1", "norm_2", "q_ln", "k_ln")),
        *((name, Linear) for name in ("wqkv", "out_proj", "up_proj", "down_proj")),
    )


class Model(ctypes.Structure):
    _fields_ = (
        ("format", ctypes.c_int32),
        *((name, ctypes.c_int32) for name in ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_head", "d_ffn")),
        *((name, ctypes.c_float) for name in ("eps", "softmax_scale", "clip_qkv")),
        ("slopes", Pointer),
        ("layers", ctypes.POINTER(Layer)),
        ("norm_f", Norm),
        ("head", Linear),
    )


class Step(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("n_tokens", "n_rows", "n_logits", "n_threads")),
        *((name, ctypes.c_int32) for name in ("n_adapters", "max_rank")),
        *((name, Pointer) for name in ("x", "row_tokens", "row_length", "row_capacity", "kv", "kv_scale", "key_norm")),
        *((name, Pointer) for name in ("adapters", "row_adapter", "low")),
        *((name, Pointer) for name in ("logit_tokens", "logits", "scratch", "keys_read")),
        ("drop", ctypes.c_float),
    )


class Heads(ctypes.Structure):
    _fields_ = (("numbers", Pointer), *((name, ctypes.c_int64) for name in ("row", "head", "position")))


class Documents(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("format", "n_heads", "d_head", "n_threads")),
        *((name, ctypes.c_int64) for name in ("row_length", "n_positions", "n_pieces", "longest")),
        ("pieces", Pointer),
        ("slopes", Pointer),
        ("scale", ctypes.c_float),
        *((name, Heads) for name in ("q", "k", "v", "out")),
        ("lse", Pointer),
        *((name, Heads) for name in ("out_gradient", "q_gradient", "k_gradient", "v_gradient")),
        ("scratch", Pointer),
    )


STRUCTURES: Mapping[str, type[ctypes.Structure]] = {
    "Linear": Linear, "Norm": Norm, "Lora": Lora, "Layer": Layer, "Model": Model, "Step": Step,
    "Heads": Heads, "Documents": Documents,
}  # fmt: skip

# Python decides with these where nothing is compiled yet, or ever; what they mean is said in common.h.
PANEL = 16
MAX_TOKENS = 64
MAX_HEAD = 256
N_OUT_MULTIPLE = 16
N_IN_MULTIPLE = 32
N_IN_MULTIPLE_INT8 = 64
FORMATS = (
    "FLOAT32", "FLOAT16", "BFLOAT16", "INT8_ROWS", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K",
    "Q5_K", "Q6_K", "IQ4_NL",
)  # of weights, by their numbers in C  # fmt: skip
PROJECTIONS = ("attn.Wqkv", "attn.out_proj", "ffn.up_proj", "ffn.down_proj")  # in the order of a layer's adapters
CONSTANTS: Mapping[str, int] = {
    "PANEL": PANEL, "MAX_TOKENS": MAX_TOKENS, "MAX_HEAD": MAX_HEAD, "N_OUT_MULTIPLE": N_OUT_MULTIPLE,
    "N_IN_MULTIPLE": N_IN_MULTIPLE, "N_IN_MULTIPLE_INT8": N_IN_MULTIPLE_INT8,
    **{name.split(".")[1].upper(): place for place, name in enumerate(PROJECTIONS)},
    **{name: number for number, name in enumerate(FORMATS)},
}  # fmt: skip


class _Place(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("offset", ctypes.c_int64), ("size", ctypes.c_int64))


class _Constant(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("value", ctypes.c_int64))


_int32, _int64 = ctypes.c_int32, ctypes.c_int64
_model, _step, _documents = ctypes.POINTER(Model), ctypes.POINTER(Step), ctypes.POINTER(Documents)
# Each function's result and arguments.
_FUNCTIONS = {
    "mpt_places": (ctypes.POINTER(_Place), ()),
    "mpt_constants": (ctypes.POINTER(_Constant), ()),
    "mpt_variant": (ctypes.c_char_p, ()),
    "mpt_scratch_floats": (ctypes.c_size_t, (_model, _int32, _int32)),
    "mpt_step": (None, (_model, _step)),
    "mpt_wish_names": (ctypes.c_char_p, ()),
    "mpt_draw_scratch_doubles": (ctypes.c_size_t, (_int64, _int32)),
    "mpt_draw": (None, (Pointer, _int64, _int64, Pointer, Pointer, Pointer, _int32)),
    "mpt_prompt_scratch_floats": (ctypes.c_size_t, (_model, _int32, _int32, _int32, _int32)),
    "mpt_prompt": (None, (_model, _step)),
    "mpt_documents_scratch_floats": (ctypes.c_size_t, (_int64, _int32)),
    "mpt_documents_forward": (None, (_documents,)),
    "mpt_documents_backward": (None, (_documents,)),
}


class Mismatch(Exception):
    """C and the Python beside it do not agree on something they share: a mistake in this package."""


def declare(library: ctypes.CDLL) -> None:
    """Give a library's functions their types."""
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments


def check(library: ctypes.CDLL, variant: str) -> None:
    """Raise Mismatch, naming what differs, unless a library is this variant and its memory is as said here."""
    _compare("variant", variant, library.mpt_variant().decode())
    in_c = {place.name.decode(): (place.offset, place.size) for place in _until_nameless(library.mpt_places())}
    here = dict[str, tuple[int, int]]()
    for name, structure in STRUCTURES.items():
        for field, *_ in structure._fields_:
            descriptor = getattr(structure, field)
            here[f"{name}.{field}"] = (descriptor.offset, descriptor.size)
    here |= {name: (0, ctypes.sizeof(structure)) for name, structure in STRUCTURES.items()}
    for name in (*here, *in_c):
        _compare(f"offset and size of {name}", here.get(name), in_c.get(name))
    constants = {constant.name.decode(): constant.value for constant in _until_nameless(library.mpt_constants())}
    for name in (*CONSTANTS, *constants):
        _compare(name, CONSTANTS.get(name), constants.get(name))


def _compare(what: str, here: object, in_c: object) -> None:
    if here != in_c:
        raise Mismatch(f"{what}: {here} in structures.py, {in_c} in the compiled C; make the two agree")


def _until_nameless(items: Any) -> Iterator[Any]:
    """The items of a C list that ends with one without a name."""
    place = 0
    while items[place].name is not None:
        yield items[place]
        place += 1
