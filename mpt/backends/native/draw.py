"""Draws of tokens in C, for many rows of a large vocabulary."""

import ctypes

import torch
from torch import Tensor

from mpt.backends.native.library import load


def draw(logits: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    """What `mpt.sampling.sample` gives, for logits (B, V) float32 on CPU. Raises Unavailable."""
    library = load()
    library.mpt_draw_scratch_doubles.restype = ctypes.c_size_t
    n_rows, n_vocab = logits.shape
    assert logits.dtype == torch.float32 and logits.device.type == "cpu"
    logits = logits.contiguous()
    wishes = torch.stack([column.double() for column in (temperature, top_p, top_k, min_p, uniform)], dim=-1)
    n_threads = min(torch.get_num_threads(), n_rows)
    sizes = ctypes.c_int64(n_vocab), ctypes.c_int32(n_threads)
    scratch = torch.empty(library.mpt_draw_scratch_doubles(*sizes), dtype=torch.float64)
    tokens = torch.empty(n_rows, dtype=torch.int64)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (logits, wishes, tokens, scratch)]
    library.mpt_draw(pointers[0], ctypes.c_int64(n_rows), sizes[0], *pointers[1:], sizes[1])
    return tokens
