"""Random checkpoints of every kind of MPT, with a small tokenizer, small enough to convert in a second."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import mpt.checkpoint
from mpt.catalog import resolve
from mpt.config import MPTConfig
from mpt.tokenizer import Tokenizer
from mpt.transformers_model import MPTForCausalLM

SHAPE: dict[str, Any] = {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 2048, "max_seq_len": 512}
STORYWRITER = {"attn_config": {"alibi_bias_max": 16, "clip_qkv": 0.7}, "max_seq_len": 65536}
SHAPES: dict[str, dict[str, Any]] = {
    "mpt-7b": {},
    "storywriter": STORYWRITER,
    "1b": {"attn_config": {"qk_ln": True}},
    "biases": {"no_bias": False},
    "positions": {"attn_config": {"alibi": False}},
    "grouped": {"attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 2}},
    "untied": {"tie_word_embeddings": False},
    "scaled": {"logit_scale": "inv_sqrt_d_model", "attn_config": {"softmax_scale": 0.3}},
    "12 heads": {"d_model": 96, "n_heads": 12, "expansion_ratio": 2},
}


def neox_like() -> Tokenizer:
    """mpt-tiny's vocabulary, text split as the published tokenizers split it."""
    described = json.loads((resolve("mpt-tiny") / "tokenizer.json").read_text())
    described["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    return Tokenizer.from_json(json.dumps(described), "the test's own")


def make(
    folder: Path,
    shape: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    **changes: Any,
) -> Path:
    """A folder with a random model whose norms and biases are not at their starting values."""
    torch.manual_seed(seed)
    model = MPTForCausalLM(MPTConfig(**{**SHAPE, **SHAPES[shape], **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "blocks" in name:
                parameter.mul_(1.5)
    tokenizer = tokenizer or neox_like()
    manifest = {"name": shape, "licence": "Apache-2.0"}
    return mpt.checkpoint.save(model.to(dtype), folder, tokenizer=tokenizer, manifest=manifest)


@pytest.fixture
def checkpoint(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The shape an indirect parameter names, else mpt-7b's."""
    return make(tmp_path / "source", getattr(request, "param", "mpt-7b"))


def random_ids(rows: int, n: int, seed: int = 3) -> torch.Tensor:
    """Token ids (rows, n) of any model here."""
    return torch.randint(3, SHAPE["vocab_size"], (rows, n), generator=torch.Generator().manual_seed(seed))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(mpt.checkpoint.load(folder).state_dict())


def have_equal_weights(one: Path, other: Path) -> bool:
    """Whether two folders hold the same tensors, bit for bit and in the same dtype."""
    before, after = weights(one), weights(other)
    return before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before
    )


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = mpt.checkpoint.load(folder, dtype=torch.float32)(ids).logits
    return found
