"""Which kernel reads prompts on CUDA, and the one of flash-attn 2.

FlexAttention through Triton is what reads them where nothing else is known to be better. `flash_attn` is one name for
two libraries: version 2 brings `flash_attn_varlen_func`, which takes ALiBi's slopes and pages; version 4 brings
`flash_attn.cute`, which FlexAttention can be compiled to. Either may be there, both, or one that does not load, so
what counts is what can be imported. Not here: FlexAttention's masks (`mpt/backends/paged_attention.py`), and whether
version 2 loads (`mpt/flash_2.py`).
"""

import functools
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import flex_attention

from mpt import attention
from mpt.backends.paged_attention import KERNEL_OPTIONS, PAGE, Part, Prompts
from mpt.flash_2 import flash_2, is_installed, why_no_flash_2
from mpt.transfer import to_device

PromptKernel = Literal["FlexAttention", "FlexAttention through flash-attn 4", "flash-attn 2"]
FLASH_4_OPTIONS = {"BACKEND": "FLASH"}
_ALIKE = 0.03  # what 16 bits of another kernel may differ by, on values of size 1


def prompt_kernel(dtype: torch.dtype, d_head: int, *, int8_cache: bool = False) -> tuple[PromptKernel, str | None]:
    """What reads the prompts of such a model on this machine's GPU, and why nothing faster does.

    The wish for speed is flash-attn 2 up to Ampere and Ada; from Hopper on it is behind FlexAttention, and flash-attn 4
    is made for it.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return "FlexAttention", f"flash-attn is for bfloat16 and float16, and this model is {str(dtype)[6:]}"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return "FlexAttention", f"flash-attn is for compute capability 8.0 and later, and this GPU has {capability}"
    if capability < (9, 0):
        if int8_cache:
            return "FlexAttention", "flash-attn 2 reads pages where they lie, and these are int8"
        why_not = why_no_flash_2(d_head)
        return ("FlexAttention", why_not) if why_not else ("flash-attn 2", None)
    if not is_installed("flash_attn.cute"):
        return "FlexAttention", None
    why_not = why_no_flash_4(dtype, d_head)
    return ("FlexAttention", why_not) if why_not else ("FlexAttention through flash-attn 4", None)


@functools.cache
def why_no_flash_4(dtype: torch.dtype, d_head: int) -> str | None:
    """Why FlexAttention is not compiled to flash-attn 4, None where it is: both answer alike then.

    Torch calls this an experiment, and not every GPU, head size and version takes our masks; so each process that has
    it tries it once.
    """
    if "FLASH" not in get_args(getattr(flex_attention, "_Backend", None)):
        return f"torch {torch.__version__} cannot compile FlexAttention to flash-attn 4"
    try:
        import flash_attn.cute  # noqa: F401

        difference = _difference(dtype, d_head)
    except Exception as error:  # whatever a compiler that is not ours says, there is another one
        return f"flash-attn 4 fails here ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    return None if difference < _ALIKE else f"flash-attn 4 answers otherwise than Triton here, by {difference:.2g}"


def _difference(dtype: torch.dtype, d_head: int, device: str = "cuda") -> float:
    """How far two prompts through flash-attn 4 are from the same through Triton."""
    n_heads = 4
    kv = torch.randn(5, 2, n_heads, PAGE, d_head, dtype=dtype, device=device)
    norms = kv[:, 0].float().norm(dim=-1).amax(-1)
    parts = [Part(0, 200, 300, [3, 1]), Part(200, 60, 700, [0, 2, 4])]
    q = torch.randn(n_heads, 260, d_head, dtype=dtype, device=device)
    slopes = attention.alibi_slopes(n_heads).to(device)
    with torch.inference_mode():
        one, other = (
            Prompts(parts, slopes, d_head**-0.5, q.device, options=options).attend(q, kv, norms).float()
            for options in (FLASH_4_OPTIONS, KERNEL_OPTIONS)
        )
    return float((one - other).abs().max().nan_to_num(torch.inf))


class FlashPrompts:
    """Parts of several rows' prompts through one call of flash-attn 2, which reads the pages where they lie."""

    def __init__(self, parts: Sequence[Part], slopes: Tensor | None, scale: float, device: torch.device) -> None:
        self._kernel, self._slopes, self._scale = flash_2(), slopes, scale
        n_tokens, stored = [part.n_tokens for part in parts], [part.stored for part in parts]
        table = np.zeros((len(parts), max(len(part.pages) for part in parts)), dtype=np.int32)
        for line, part in zip(table, parts, strict=True):
            line[: len(part.pages)] = part.pages
        self._table = to_device(table, device)
        self._ends = [  # of queries and of keys, from 0
            to_device(np.cumsum([0, *lengths], dtype=np.int32), device) for lengths in (n_tokens, stored)
        ]
        self._longest = max(n_tokens), max(stored)
        tokens = np.concatenate([np.arange(part.start, part.start + part.n_tokens) for part in parts])
        self.tokens = to_device(tokens, device)

    def attend(self, q: Tensor, kv: Tensor, key_norms: Tensor, scales: Tensor | None = None) -> Tensor:
        """As `Prompts.attend`, in the queries' dtype alone."""
        assert scales is None
        k, v = kv.transpose(2, 3).unbind(1)  # (pages, PAGE, KV heads, D) each
        return self._kernel(
            q.transpose(0, 1)[self.tokens], k, v, *self._ends, *self._longest,
            softmax_scale=self._scale, causal=True, alibi_slopes=self._slopes, block_table=self._table,
        )  # fmt: skip
