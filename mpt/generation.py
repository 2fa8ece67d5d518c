"""The naive generation loop, one sequence at a time: the truth every faster path is tested against."""

import random
from collections.abc import Collection, Sequence

import torch
from transformers.cache_utils import DynamicCache

from mpt.draw_parameters import DrawParameters
from mpt.errors import UserError
from mpt.model import MPTLanguageModel
from mpt.sampling import columns, sample

_PREFILL_CHUNK = 4096  # bounds the MLP's activations of a long prompt; attention needs no bound


@torch.inference_mode()
def generate(
    model: MPTLanguageModel,
    ids: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    end_ids: Collection[int] = (),
) -> list[int]:
    """Up to max_new_tokens that continue ids; ends after, and includes, a token of end_ids."""
    if not ids:
        raise UserError("the prompt is empty; give at least one token, for example the end-of-text token")
    random_numbers = random.Random(seed)
    cache = DynamicCache()
    device = model.device
    unread = list(ids)
    tokens: list[int] = []
    wanted = columns([DrawParameters(temperature=temperature, top_p=top_p, top_k=top_k)])
    for _ in range(max_new_tokens):
        while unread:
            chunk, unread = unread[:_PREFILL_CHUNK], unread[_PREFILL_CHUNK:]
            rows = torch.tensor([chunk], device=device)
            logits = model(rows, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        uniform = torch.tensor([random_numbers.random()], dtype=torch.float64)
        token = int(sample(logits.float().cpu(), uniform=uniform, **wanted))
        tokens.append(token)
        if token in end_ids:
            break
        unread = [token]
    return tokens
