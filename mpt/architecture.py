"""The shape of an MPT: reads every config.json the family has been published with, refuses what it cannot honour.

Reading is an allowlist: a known key at a supported value is used, a known key at its default is dropped, and what may
change the answers is an error naming key and value. `config_keys.py` judges the keys that are not MPT's. Read are
llm-foundry's files of every age, the hub's, descendants' and re-saves, and the flat `mosaic_gpt` config of
mpt-1b-redpajama-200b.

Importing it imports no torch, so a command refuses a wrong checkpoint before the seconds that torch takes. Not here:
the same numbers behind transformers' interface (`config.py`).

Source: llm-foundry v0.1.0 to v0.21.0 (`MPTConfig`), mosaicml/examples v0.0.4 (`MosaicGPTConfig`).
"""

import functools
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mpt import config_keys
from mpt.bounded import shown
from mpt.catalog import refuse_ctranslate2
from mpt.errors import CheckpointNotFound, ImpossibleConfig, UnsupportedConfig
from mpt.files import read_json
from mpt.gguf import config as gguf_config
from mpt.gguf.file import is_gguf, open_gguf
from mpt.packed.packing import read_packing

log = logging.getLogger(__name__)

# Keys of `attn_config` that change what is computed, with the value a file means when it leaves them out.
_ATTENTION_DEFAULTS: dict[str, Any] = {
    "attn_type": "multihead_attention",
    "kv_n_heads": None,
    "attn_pdrop": 0,
    "clip_qkv": None,
    "softmax_scale": None,
    "qk_ln": False,
    "alibi": True,
    "alibi_bias_max": 8,
    # Whether training packed documents behind a mask. Packed documents are always masked here, so it changes nothing.
    "attn_uses_sequence_id": False,
    "prefix_lm": False,
}
_ATTENTION_TYPES = ("multihead_attention", "multiquery_attention", "grouped_query_attention")

# Known keys whose every other value asks for something else than MPT as released. Per key: the values that mean "off".
_ATTENTION_ONLY_AT: dict[str, tuple[Any, ...]] = {
    "attn_impl": (
        "torch",
        "flash",
        "triton",
        "sdpa",
        "eager",
        "xformers",
        "flash_attention_2",
    ),  # how, not what: any of them gives the same answer
    "prefix_lm": (False,),
    "qk_gn": (False,),
    "fused_qkv": (True,),
    "rope": (False,),
    "nope": (False,),
    "attn_logit_softcapping": (None,),
    "sliding_window_size": (-1,),
    "attn_temperature_tuning": (None, False),
    "kv_dim": (None,),
    "reuse_kv_layer_idx": (None,),
    "reuse_kv_x_layer_idx": (None,),
}
_ATTENTION_IGNORED = {
    "rope_theta",
    "rope_impl",
    "rope_dail_config",
    "rope_hf_config",
}  # mean nothing with rope off
_NORM_TYPES = ("low_precision_layernorm", "layernorm")
_ONLY_AT: dict[str, tuple[Any, ...]] = {
    "final_logit_softcapping": (None,),
    "block_overrides": (None,),
    "ffn_type": ("mptmlp",),
    "tie_encoder_decoder": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}
# Keys about where a file came from or how somebody else's code was to run it.
_IGNORED = {
    "auto_map", "init_device", "initializer_range", "name", "tokenizer_name", "verbose",
    "attn_impl", "_from_model_config", "_commit_hash", "_attn_implementation_autoset", "model_type",
    # What transformers 4 and 5 write into every config, nested ones included.
    "torchscript", "use_bfloat16", "tf_legacy_loss", "pruned_heads", "chunk_size_feed_forward", "is_decoder",
    "cross_attention_hidden_size", "finetuning_task", "prefix", "tokenizer_class", "task_specific_params",
    "sep_token_id", "decoder_start_token_id", "output_attentions", "output_scores", "output_hidden_states",
    "return_dict", "return_dict_in_generate", "id2label", "label2id", "num_labels", "problem_type", "architectures",
    "transformers_version", "_name_or_path", "name_or_path", "attn_implementation", "experts_implementation",
    "per_layer_config", "tie_last_hidden_states", "dtype", "torch_dtype",
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id",
    "forced_eos_token_id",
}  # fmt: skip
# The in-tree class saves attn_config as a config of its own, with these besides.
_STOCK_JUNK = {
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "use_cache",
    "base_config_key",
    "quantization_config",
}
# Flat keys of `mosaic_gpt` (2023-04) and where they went.
_MOSAIC_GPT_ATTENTION = {
    "attn_qk_ln": "qk_ln", "attn_clip_qkv": "clip_qkv", "attn_pdrop": "attn_pdrop", "softmax_scale": "softmax_scale",
    "attn_uses_sequence_id": "attn_uses_sequence_id", "alibi": "alibi", "alibi_bias_max": "alibi_bias_max",
    "prefix_lm": "prefix_lm", "attn_impl": "attn_impl",
}  # fmt: skip
_COMPUTED = ("qk_ln", "clip_qkv", "softmax_scale", "alibi", "alibi_bias_max", "prefix_lm")  # change the answers
_MOSAIC_GPT_INIT = {
    "fan_mode", "init_div_is_residual", "init_gain", "init_nonlinearity", "init_std", "emb_init_std",
    "emb_init_uniform_lim",
}  # fmt: skip
# Far beyond every published model, and small enough that nothing which is computed of them overflows or takes long.
_MOST = {"d_model": 1 << 18, "n_heads": 1 << 13, "n_layers": 1 << 10, "max_seq_len": 1 << 30, "vocab_size": 1 << 26}
_TINY = 1e-12  # stands for: anything above 0
_RANGES = {
    "expansion_ratio": (_TINY, 1024),
    "resid_pdrop": (0, 1),
    "emb_pdrop": (0, 1),
    "embedding_fraction": (_TINY, 1),
    "norm_eps": (0, math.inf),
}
_INIT_DEFAULTS = {
    "name": "kaiming_normal_",
    "fan_mode": "fan_in",
    "init_nonlinearity": "relu",
    "init_div_is_residual": True,
}
# Fields of transformers' GenerationConfig beside those above: they choose tokens among logits.
_OF_GENERATION = {
    "assistant_confidence_threshold", "assistant_early_exit", "assistant_ensemble_weight", "assistant_lookbehind",
    "cache_config", "cache_implementation", "compile_config", "constraints", "continuous_batching_config",
    "disable_compile", "dola_layers", "encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff",
    "force_words_ids", "guidance_scale", "is_assistant", "low_memory", "max_cache_len", "max_matching_ngram_size",
    "max_new_tokens", "max_time", "min_new_tokens", "min_p", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "output_logits", "penalty_alpha", "prefill_chunk_size",
    "prompt_lookup_num_tokens", "renormalize_logits", "sequence_bias", "speculation_type", "stop_strings",
    "target_lookbehind", "token_healing", "top_h", "use_mtp", "watermarking_config",
}  # fmt: skip


@dataclass(kw_only=True, repr=False, eq=False)
class Architecture:
    """The numbers that define an MPT, under the names its checkpoints use.

    Left-out keys take the released models' values (ALiBi, no biases), not llm-foundry's defaults; every published file
    spells them out.
    """

    d_model: int = 2048
    n_heads: int = 16
    n_layers: int = 24
    expansion_ratio: int | float = 4
    max_seq_len: int = 2048
    vocab_size: int = 50432
    resid_pdrop: float = 0.0
    emb_pdrop: float = 0.0
    embedding_fraction: float = 1.0
    learned_pos_emb: bool = True  # published as true beside ALiBi, where it means nothing: see `has_wpe`
    attn_config: dict[str, Any] | None = None
    init_config: dict[str, Any] | None = None
    logit_scale: float | str | None = None
    no_bias: bool = True
    norm_type: str = "low_precision_layernorm"
    norm_eps: float = 1e-5
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def settle(self, others: dict[str, Any]) -> None:
        """Check every number and complete the tables. others: the keys of the file that are none of these fields.

        Raises UnsupportedConfig for a key or value this implementation would otherwise have to ignore.
        """
        self.dropped: dict[str, str] = {}  # keys that change no logit, with their value and the reason
        self._check_sizes()
        extends = config_keys.extended_type(others)
        others = self._read_mosaic_gpt(others)
        eps = others.pop("layer_norm_epsilon", None)  # the in-tree class's name for norm_eps
        if eps is not None:
            self.norm_eps = eps
        self._check_ffn(others.pop("ffn_config", None))
        head_dim = others.pop("head_dim", None)
        self.attn_config = self._read_attention(_table("attn_config", self.attn_config), extends)
        self.init_config = {**_INIT_DEFAULTS, **_table("init_config", self.init_config)}
        self._check_numbers(head_dim)
        repeats = self._repeats()
        _refuse_unless("norm_type", self.norm_type, _NORM_TYPES)
        for key, value in others.items():
            if key == "quantization_config" and value:  # how weights are packed: what reads them unpacks them
                read_packing(value)
            elif key in _ONLY_AT:
                self._drop_unless(key, value, _ONLY_AT[key])
            elif key not in _IGNORED and not key.startswith("_attn") and key not in _OF_GENERATION:
                self._drop(key, value, config_keys.judge(key, value, repeats, extends))
        if self.dropped:
            _say_once("; ".join(f"`{key}` {reason}" for key, reason in self.dropped.items()))

    def _drop(self, path: str, value: object, reason: str) -> None:
        self.dropped[path] = f"{_shown(value)}: {reason}"

    def _drop_unless(self, path: str, value: object, supported: tuple[Any, ...]) -> None:
        """Refuse a value that asks for something else than MPT; null asks for nothing, whatever the key."""
        if value is not None:
            _refuse_unless(path, value, supported)
        else:
            self._drop(path, value, "asks for nothing")

    def _repeats(self) -> dict[str, object]:
        """This model's settings under the names that other programs have for them."""
        attention, has_bias = self.attention, not self.no_bias
        sizes = {theirs: getattr(self, ours) for theirs, ours in config_keys.SAME_SIZE.items()}
        heads = dict.fromkeys(("num_attention_heads", "n_head", "num_heads"), self.n_heads)
        kv_heads = dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_n_heads"), self.n_kv_heads)
        width = dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size"), self.d_ffn)
        gelu = dict.fromkeys(
            ("hidden_act", "hidden_activation", "activation_function", "activation", "act_fn"), ("gelu", "gelu_python")
        )
        eps = dict.fromkeys(("layer_norm_eps", "layernorm_eps", "layernorm_epsilon", "norm_epsilon"), self.norm_eps)
        bias = dict.fromkeys(
            ("attention_bias", "bias", "use_bias", "mlp_bias", "qkv_bias", "add_bias_linear"), has_bias
        )
        kind = "alibi" if attention["alibi"] else "learned" if self.has_wpe else "none"
        flat = {theirs: attention[ours] for theirs, ours in _MOSAIC_GPT_ATTENTION.items() if ours in _COMPUTED}
        same = {
            "is_causal": True,
            "causal": True,
            "scale_attn_weights": True,
            "use_alibi": attention["alibi"],
            "position_embedding_type": kind,
        }
        own = {key: attention[key] for key in ("qk_ln", "clip_qkv", "attn_type")}
        return {**sizes, **heads, **kv_heads, **width, **gelu, **eps, **bias, **flat, **same, **own}

    def _read_mosaic_gpt(self, others: dict[str, Any]) -> dict[str, Any]:
        """Move the flat keys of `mosaic_gpt` into today's places; other configs pass through."""
        if others.get("model_type") not in config_keys.FLAT_TYPES and "mlp_ratio" not in others:
            return others
        others = dict(others)
        self.expansion_ratio = others.pop("mlp_ratio", 4)
        if not others.pop("low_precision_layernorm", True):
            self.norm_type = "layernorm"
        attention = {new: others.pop(old) for old, new in _MOSAIC_GPT_ATTENTION.items() if old in others}
        self.attn_config = {**attention, **_table("attn_config", self.attn_config)}
        init = {key: others.pop(key) for key in _MOSAIC_GPT_INIT if key in others}
        if "param_init_fn" in others:
            init["name"] = others.pop("param_init_fn")
        self.init_config = {**init, **_table("init_config", self.init_config)}
        if self.attn_config.get("alibi", True) and self.n_heads & (self.n_heads - 1):
            # Its slopes were 2^(-8 i / H) for every H; no such checkpoint was published.
            raise UnsupportedConfig(
                f"`mosaic_gpt` with ALiBi and n_heads {self.n_heads}: only powers of two were released"
            )
        return others

    def _read_attention(self, raw: dict[str, Any], extends: str | None) -> dict[str, Any]:
        """`attn_config` with every key present and typed as transformers' strict reader wants it."""
        attention = dict(_ATTENTION_DEFAULTS)
        for key, value in raw.items():
            path = f"attn_config.{key}"
            if key in _ATTENTION_ONLY_AT:
                self._drop_unless(path, value, _ATTENTION_ONLY_AT[key])
            elif key in attention:
                if value is not None or key == "alibi":  # null is left out; of `alibi` it was false to llm-foundry
                    attention[key] = value
            elif key in _ATTENTION_IGNORED:
                self._drop(path, value, "means nothing without rotary positions")
            elif key not in _IGNORED | _ONLY_AT.keys() | _STOCK_JUNK:
                self._drop(path, value, config_keys.judge(path, value, {}, extends))
        _refuse_unless("attn_config.attn_type", attention["attn_type"], _ATTENTION_TYPES)
        for key in ("qk_ln", "alibi", "attn_uses_sequence_id"):
            _refuse_unless(f"attn_config.{key}", attention[key], (True, False))
        for key in ("clip_qkv", "softmax_scale"):  # 0, false and null all mean none
            if attention[key] not in (None, False):
                _refuse_outside(f"attn_config.{key}", attention[key], 0, math.inf)
            attention[key] = float(attention[key]) if attention[key] else None
        for key, low, high in (("alibi_bias_max", _TINY, math.inf), ("attn_pdrop", 0, 1)):
            _refuse_outside(f"attn_config.{key}", attention[key], low, high)
            attention[key] = int(attention[key]) if float(attention[key]).is_integer() else float(attention[key])
        return attention

    def _check_ffn(self, ffn: dict[str, Any] | None) -> None:
        for key, value in _table("ffn_config", ffn).items():
            if key == "ffn_type":
                _refuse_unless("ffn_config.ffn_type", value, ("mptmlp",))
            elif key == "ffn_hidden_size":
                if value is None:
                    continue
                _refuse_outside("ffn_config.ffn_hidden_size", value, 1, math.inf)
                _refuse_outside("expansion_ratio", self.expansion_ratio, *_RANGES["expansion_ratio"])
                if value != round(self.d_model * self.expansion_ratio):
                    self.expansion_ratio = value / self.d_model
            elif key == "ffn_act_fn":
                exact = (None, "gelu", {"name": "gelu", "approximate": "none"}, {"name": "gelu"})
                _refuse_unless("ffn_config.ffn_act_fn", value, exact)
            else:
                self._drop(f"ffn_config.{key}", value, config_keys.judge(f"ffn_config.{key}", value, {}))

    def _check_sizes(self) -> None:
        for key, most in _MOST.items():
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                is_too_large = isinstance(value, int | float) and value > most
                raise (ImpossibleConfig if is_too_large else UnsupportedConfig)(
                    f"config key `{key}` must be a whole number of 1 to {most}, not `{shown(value)}`"
                )

    def _check_numbers(self, head_dim: int | None) -> None:
        for key, (low, high) in _RANGES.items():
            _refuse_outside(key, getattr(self, key), low, high)
        for key in ("learned_pos_emb", "no_bias", "tie_word_embeddings", "use_cache"):
            _refuse_unless(key, getattr(self, key), (True, False))
        if self.d_model % self.n_heads:
            raise UnsupportedConfig(f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}")
        if head_dim is not None:
            _refuse_unless("head_dim", head_dim, (self.d_model // self.n_heads,))
        n_kv_heads = self.attention["kv_n_heads"]
        if self.attention["attn_type"] != "grouped_query_attention":
            _refuse_unless("attn_config.kv_n_heads", n_kv_heads, (None, self.n_kv_heads))
        elif isinstance(n_kv_heads, bool) or not isinstance(n_kv_heads, int) or n_kv_heads < 1:
            raise UnsupportedConfig(
                f"`grouped_query_attention` needs `attn_config.kv_n_heads`, not `{shown(n_kv_heads)}`"
            )
        if self.n_heads % self.n_kv_heads:
            raise UnsupportedConfig(f"n_heads {self.n_heads} is not a multiple of kv_n_heads {self.n_kv_heads}")
        if abs(self.d_model * self.expansion_ratio - self.d_ffn) > 1e-6:
            raise UnsupportedConfig(f"d_model {self.d_model} times expansion_ratio {self.expansion_ratio} is not whole")
        if float(self.expansion_ratio).is_integer():
            self.expansion_ratio = int(self.expansion_ratio)  # the in-tree class takes whole numbers only
        self.embedding_fraction = float(self.embedding_fraction)
        if isinstance(self.logit_scale, str):
            _refuse_unless("logit_scale", self.logit_scale, ("inv_sqrt_d_model",))
        elif self.logit_scale is not None:
            _refuse_outside("logit_scale", self.logit_scale, -math.inf, math.inf)

    # -- what the model reads ------------------------------------------------------------------------------------

    @property
    def attention(self) -> dict[str, Any]:
        """`attn_config`, complete: every key is there."""
        assert self.attn_config is not None
        return self.attn_config

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_heads

    @property
    def n_kv_heads(self) -> int:
        kind = self.attention["attn_type"]
        if kind == "multihead_attention":
            return self.n_heads
        return 1 if kind == "multiquery_attention" else self.attention["kv_n_heads"]

    @property
    def d_ffn(self) -> int:
        return round(self.d_model * self.expansion_ratio)

    @property
    def has_wpe(self) -> bool:
        """Whether positions are learned: never beside ALiBi, whatever `learned_pos_emb` says."""
        return self.learned_pos_emb and not self.attention["alibi"]

    @property
    def softmax_scale(self) -> float:
        return self.attention["softmax_scale"] or self.d_head**-0.5

    @property
    def logit_factor(self) -> float | None:
        """What logits are multiplied by, or None."""
        return self.d_model**-0.5 if self.logit_scale == "inv_sqrt_d_model" else self.logit_scale  # type: ignore[return-value]

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache a token needs in a 2-byte dtype: keys and values of every layer."""
        return 2 * 2 * self.n_layers * self.n_kv_heads * self.d_head

    def beyond_stock(self) -> list[str]:
        """What transformers' in-tree MPT would compute differently, one phrase each; empty where it is right."""
        attention = self.attention
        checks = {
            f"alibi_bias_max {attention['alibi_bias_max']} (it uses 8)": attention["alibi"]
            and attention["alibi_bias_max"] != 8,
            "no ALiBi (it always adds it)": not attention["alibi"],
            "qk_ln (it drops it)": attention["qk_ln"],
            f"{attention['attn_type']} (it builds full heads)": attention["attn_type"] != "multihead_attention",
            f"expansion_ratio {self.expansion_ratio} (it uses 4)": self.expansion_ratio != 4,
            f"logit_scale {self.logit_scale} (it drops it)": self.logit_scale is not None,
            "biases (it drops them)": not self.no_bias,
        }
        return [what for what, differs in checks.items() if differs]


def read_architecture(place: Path) -> Architecture:
    """What a folder or a GGUF file says of its model, checked. Raises what `read_keys` does, and UnsupportedConfig."""
    keys = own_keys(read_keys(place))
    ours = {field.name for field in fields(Architecture)}
    found = Architecture(**{key: value for key, value in keys.items() if key in ours})
    found.settle({key: value for key, value in keys.items() if key not in ours})
    return found


def read_keys(place: Path) -> dict[str, Any]:
    """The config of a folder, or of a GGUF file under the same keys, as it is written.

    Raises CheckpointNotFound, DamagedFile, UnsupportedConfig for what is no MPT.
    """
    if is_gguf(place):
        return gguf_config.read_keys(open_gguf(place))
    path = place / "config.json"
    if not path.is_file():
        raise CheckpointNotFound(f"`{place}` has no config.json; give the folder of a Hugging Face style checkpoint")
    refuse_ctranslate2(place)
    raw = read_json(path)
    if config_keys.language_model(raw) is None:
        kinds = ", ".join(f"`{kind}`" for kind in config_keys.READ_TYPES)
        raise UnsupportedConfig(
            f"`{path.name}` has model_type `{raw.get('model_type')}`; this reads MPT ({kinds}) and models whose config "
            "holds one of these"
        )
    return raw


def own_keys(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of an MPT in a config.json: an MPT's own, or those inside a larger model's."""
    inside = config_keys.language_model(raw)
    found = dict(raw if inside is None else inside)
    for key in ("use_cache", "resid_pdrop", "emb_pdrop", "embedding_fraction"):
        if key in found and found[key] is None:  # these change no answer, so null is as good as left out
            del found[key]
    return found


def _shown(value: object) -> str:
    """A value for a log line, cut where it is long."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


@functools.cache  # a server reads the same config several times
def _say_once(dropped: str) -> None:
    log.warning("config keys that change no answer were dropped: %s", dropped)


def _table(key: str, value: object) -> dict[str, Any]:
    if value is None:
        return {}
    if isinstance(value, dict):
        return value
    if hasattr(value, "to_dict"):  # the in-tree class's own sub-config
        return dict(value.to_dict())
    raise UnsupportedConfig(f"config key `{key}` must be an object with keys, not `{shown(value)}`")


def _refuse_outside(key: str, value: object, low: float, high: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if is_number and low <= value <= high:  # type: ignore[operator]
        return
    least = "" if low == -math.inf else " above 0" if low == _TINY else f" of at least {low:g}"
    most = "" if high == math.inf else f" and at most {high:g}"
    raise UnsupportedConfig(f"config key `{key}` must be a number{least}{most}, not `{shown(value)}`")


def _refuse_unless(key: str, value: object, supported: tuple[Any, ...]) -> None:
    if not any(value == good and isinstance(value, bool) == isinstance(good, bool) for good in supported):
        names = ", ".join(f"`{good!r}`" for good in supported)
        raise UnsupportedConfig(f"config key `{key}` is `{shown(value)}`; supported: {names}")
