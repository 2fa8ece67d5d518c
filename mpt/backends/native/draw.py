"""Draws of tokens in C, for many rows of a large vocabulary."""

import torch
from torch import Tensor

from mpt.backends.native.library import load


def draw(logits: Tensor, *, uniform: Tensor, **columns: Tensor) -> Tensor:
    """What `mpt.sampling.sample` gives, for logits (B, V) float32 on CPU. Raises Unavailable.

    columns: what each row asks for, (B,) each, under the names draw.c has for them: all of them, in any order.
    """
    library = load()
    columns["uniform"] = uniform
    names = library.mpt_wish_names().decode().split()
    assert columns.keys() == set(names), f"draw.c draws by {names}, not by {list(columns)}"
    n_rows, n_vocab = logits.shape
    assert logits.dtype == torch.float32 and logits.device.type == "cpu"
    logits = logits.contiguous()
    wishes = torch.stack([columns[name].double() for name in names], dim=-1)
    n_threads = min(torch.get_num_threads(), n_rows)
    scratch = torch.empty(library.mpt_draw_scratch_doubles(n_vocab, n_threads), dtype=torch.float64)
    tokens = torch.empty(n_rows, dtype=torch.int64)
    library.mpt_draw(
        logits.data_ptr(), n_rows, n_vocab, wishes.data_ptr(), tokens.data_ptr(), scratch.data_ptr(), n_threads
    )
    return tokens
