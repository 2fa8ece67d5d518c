"""Attention within packed documents in C on CPU, forward and backward: two operators of torch, `mpt::documents`.

As operators they are seen by `torch.compile`, which keeps a block in one piece, and by selective activation
checkpointing. The C code is `mpt/backends/native/documents.c`. Not here: where it is wanted (`documents_kernel` in
`mpt/attention.py`).
"""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from mpt.backends.native.library import Unavailable, load
from mpt.backends.native.structures import FORMATS, Documents, Heads

_FORMAT_OF = {torch.float32: "FLOAT32", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16"}
_HEAD_MULTIPLE, _LARGEST_HEAD = 16, 256


def why_not_native(dtype: torch.dtype, d_head: int) -> str | None:
    """Why attention of this dtype and size of head cannot run in C here, None where it can. The first call compiles."""
    if dtype not in _FORMAT_OF:
        return f"C is for float32, float16 and bfloat16, and attention is in {str(dtype).removeprefix('torch.')} here"
    if d_head % _HEAD_MULTIPLE or d_head > _LARGEST_HEAD:
        return f"C is for heads of multiples of {_HEAD_MULTIPLE} up to {_LARGEST_HEAD}, and those here have {d_head}"
    return _why_no_library()


@functools.cache
def _why_no_library() -> str | None:
    try:
        load()
    except Unavailable as reason:
        return str(reason)
    return None


def pieces(first: Tensor, lengths: Tensor, is_padding: Tensor) -> Tensor:
    """What `attend` takes of documents, (pieces, 2) int64: each one's first position, rows laid end to end, and length.

    The longest come first, which leaves the threads least to wait for at the end; a length below 0 says padding.
    """
    signed = torch.where(is_padding, -lengths, lengths)
    order = signed.argsort(descending=True, stable=True)
    return torch.stack([first, signed], dim=-1)[order]


def attend(q: Tensor, k: Tensor, v: Tensor, pieces: Tensor, slopes: Tensor | None, scale: float) -> Tensor:
    """Causal attention within each piece, (B, H, T, D) in v's dtype, with gradients; zero in padding.

    q, k, v: (B, H, T, D) on CPU. slopes: (H,) float32, or None without ALiBi. Raises Unavailable.
    """
    return _attend(q.to(v.dtype), k.to(v.dtype), v, pieces, slopes, scale)[0]  # `qk_ln` widens two under autocast


@torch.library.custom_op("mpt::documents", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, pieces: Tensor, slopes: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The output, and the log of each query's sum of e^score, (H, B * T) float32."""
    B, H, T, _ = q.shape
    out, lse = _empty(q), q.new_empty(H, B * T, dtype=torch.float32)
    heads = {"q": q, "k": k, "v": v, "out": out}
    _run("mpt_documents_forward", heads, lse, pieces, slopes, scale)
    return out, lse


@_attend.register_fake
def _shapes(
    q: Tensor, k: Tensor, v: Tensor, pieces: Tensor, slopes: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    B, H, T, _ = q.shape
    return _empty(q), q.new_empty(H, B * T, dtype=torch.float32)


@torch.library.custom_op("mpt::documents_backward", mutates_args=())
def _backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    pieces: Tensor, slopes: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v."""
    made = [_empty(q) for _ in range(3)]
    heads = {"q": q, "k": k, "v": v, "out": out, "out_gradient": gradient.to(q.dtype)}
    heads |= {"q_gradient": made[0], "k_gradient": made[1], "v_gradient": made[2]}
    _run("mpt_documents_backward", heads, lse, pieces, slopes, scale)
    return made[0], made[1], made[2]


@_backward.register_fake
def _gradient_shapes(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    pieces: Tensor, slopes: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _empty(q), _empty(q), _empty(q)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, pieces, slopes, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, pieces, slopes)


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, pieces, slopes = ctx.saved_tensors
    return *_backward(gradient, q, k, v, out, lse, pieces, slopes, ctx.scale), None, None, None


_attend.register_autograd(_differentiate, setup_context=_keep)


def _empty(like: Tensor) -> Tensor:
    """(B, H, T, D), a position's heads side by side, as the projections before and after have them."""
    B, H, T, D = like.shape
    return like.new_empty(B, T, H, D).transpose(1, 2)


def _run(name: str, heads: dict[str, Tensor], lse: Tensor, pieces: Tensor, slopes: Tensor | None, scale: float) -> None:
    """Call C. What its arguments point to is kept until it returns."""
    library = load()
    q = heads["q"]
    B, H, T, D = q.shape
    assert D % _HEAD_MULTIPLE == 0 and D <= _LARGEST_HEAD, D
    assert slopes is None or (slopes.dtype == torch.float32 and slopes.shape == (H,)), slopes
    assert pieces.dtype == torch.int64 and int(pieces[:, 1].abs().sum()) == B * T, "pieces are not these rows"
    for tensor in heads.values():
        assert tensor.shape == q.shape and tensor.dtype == q.dtype and tensor.device.type == "cpu", tensor.shape
    kept = {key: tensor if tensor.stride(-1) == 1 else tensor.contiguous() for key, tensor in heads.items()}
    pieces, slopes = pieces.contiguous(), None if slopes is None else slopes.contiguous()
    longest = max(1, int(pieces[0, 1]))
    n_threads = min(torch.get_num_threads(), len(pieces) * H)
    n_floats = n_threads * library.mpt_documents_scratch_floats(longest, D)
    scratch = q.new_empty(n_floats, dtype=torch.float32)
    call = Documents(
        format=FORMATS.index(_FORMAT_OF[q.dtype]), n_heads=H, d_head=D, n_threads=n_threads,
        row_length=T, n_positions=B * T, n_pieces=len(pieces), longest=longest,
        pieces=pieces.data_ptr(), slopes=None if slopes is None else slopes.data_ptr(), scale=scale,
        lse=lse.data_ptr(), scratch=scratch.data_ptr(),
        **{key: Heads(tensor.data_ptr(), *tensor.stride()[:3]) for key, tensor in kept.items()},
    )  # fmt: skip
    getattr(library, name)(ctypes.byref(call))
