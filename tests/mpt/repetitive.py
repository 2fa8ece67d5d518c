"""A small model whose texts repeat themselves, for tests of guesses and of caches."""

import torch

import mpt

CONTEXT = 1024


def repetitive_model(n_heads: int) -> mpt.MPTForCausalLM:
    """2 layers, 128 wide, in bfloat16, so that it runs through the C step; of 512 tokens 32 are likely."""
    torch.manual_seed(0)
    config = mpt.MPTConfig(d_model=128, n_heads=n_heads, n_layers=2, vocab_size=512, max_seq_len=CONTEXT)
    model = mpt.MPTForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight[:480] *= 0.2
    return model.to(torch.bfloat16)
