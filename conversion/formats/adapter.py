"""peft's LoRA adapters, added to the weights of their base as each of those is read."""

import copy
from collections.abc import Callable
from pathlib import Path

from conversion.source import Source
from mpt.catalog import ADAPTER_CONFIG
from mpt.errors import UnsupportedConfig
from mpt.lora import open_lora, trained_context


def read(folder: Path, base: str | None, open_base: Callable[[str], Source]) -> Source:
    """The base with the adapter's products added, W + alpha / r B A, in float32 before it is rounded to W's dtype.

    base: instead of the one its configuration names. open_base: opens either.
    Raises UnsupportedConfig for another kind than plain LoRA.
    """
    lora = open_lora(folder)
    named = base or lora.base
    if not named:
        raise UnsupportedConfig(f"`{folder}` does not name its base; give --base")
    whole = open_base(named)
    config = copy.deepcopy(whole.config)
    config.max_seq_len = trained_context(folder, config)
    tensors = dict(whole.tensors)
    for name, (a, b) in lora.pairs({name: tensor.shape for name, tensor in tensors.items()}).items():
        tensors[name] = tensors[name].plus_product(a, b, lora.scale)
    return Source(
        kind="adapter",
        path=folder,
        config=config,
        tensors=tensors,
        tokenizer=whole.tokenizer,
        why_no_tokenizer=whole.why_no_tokenizer,
        tokenizer_files=whole.tokenizer_files,
        files=(folder / ADAPTER_CONFIG, lora.weights, *whole.files),
        chat_template=whole.chat_template,
        generation=whole.generation,
        notes=(f"LoRA of rank {lora.rank} added to `{Path(named).name}`",),
        folder=folder,
        manifests=(folder, *whole.manifests),
    )
