"""`MPTConfig`: the numbers that define an MPT (`architecture.py`) behind transformers' interface.

What is written, transformers' in-tree `MptConfig` reads.
"""

from typing import Any, Self

from transformers import PreTrainedConfig

from mpt.architecture import Architecture, own_keys


class MPTConfig(PreTrainedConfig, Architecture):
    """An `Architecture` that transformers' classes take.

    Raises UnsupportedConfig for a key or value this implementation would otherwise have to ignore.
    """

    model_type = "mpt"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  (transformers reads a plain class attribute)
    attribute_map = {  # noqa: RUF012
        "num_attention_heads": "n_heads",
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "max_position_embeddings": "max_seq_len",
    }

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        """The config in a config.json: an MPT's own, or the one inside a larger model's."""
        found = own_keys(config_dict)
        found |= {key: _dtype_name(found[key]) for key in ("torch_dtype", "dtype") if key in found}
        return super().from_dict(found, **kwargs)

    def __post_init__(self, **others: Any) -> None:
        self.settle(others)
        kept = (
            "torch_dtype",
            "dtype",
            "name_or_path",
            "attn_implementation",
            "output_attentions",
            "num_labels",
        )
        super().__post_init__(**{key: others[key] for key in kept if key in others})
        self.architectures = ["MPTForCausalLM"]

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON-ready values, in the forms transformers' strict in-tree reader accepts."""
        out = super().to_dict()
        del out["dropped"]
        attention = dict(self.attention)
        if attention["kv_n_heads"] is None:
            del attention["kv_n_heads"]
        out["attn_config"] = attention
        if self.norm_eps != 1e-5:
            out["layer_norm_epsilon"] = self.norm_eps
        return out


def _dtype_name(value: object) -> Any:
    """A dtype as torch names it; None for `auto` and unknown names, which leave it to the tensors."""
    if not isinstance(value, str):
        return value
    name = value.removeprefix("torch.")
    return name if name in ("float64", "float32", "float16", "bfloat16") else None
