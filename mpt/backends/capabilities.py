"""What each backend can do, field by field.

Every field of `ModelOptions` (what a model is told), of `Sampling` (what a request asks) and of `AttentionSpec` (what a
config asks of attention) is either claimed by a backend or refused by name. Nothing is ignored: a field that a backend
does not list is refused too, and `tests/mpt/backends/test_capabilities.py` goes through all of them.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from mpt.attention import AttentionSpec
from mpt.errors import UnsupportedConfig, UserError
from mpt.options import ModelOptions


@dataclass(frozen=True)
class Fields:
    """Of one dataclass: the names of fields that are honoured, and why the others are not, with what to do instead."""

    claimed: frozenset[str]
    refused: Mapping[str, str]


@dataclass(frozen=True)
class Capabilities:
    """One backend's answer to every field. exact_guesses: a step of several tokens rounds as steps of one do, so that
    guesses change no answer and are made unasked. returns_early: a step returns before it is computed, so other work
    can be done meanwhile.
    """

    what: str  # how a refusal calls a model that runs so: "an ONNX folder"
    options: Fields
    request: Fields
    attention: Fields
    exact_guesses: bool = False
    returns_early: bool = False

    @property
    def takes_adapters(self) -> bool:
        return "adapters" in self.options.claimed

    @property
    def gives_embeddings(self) -> bool:
        return "embed" in self.request.claimed

    def check_options(self, name: str, options: ModelOptions) -> None:
        """Raises UserError for the first option that is set and not honoured."""
        for field, value in asked_for(options).items():
            if field not in self.options.claimed:
                shown = _FLAGS.get(field, f"--{field.replace('_', '-')} {value}")
                why = self.options.refused.get(field, "it is not made for this option")
                raise UserError(f"`{name}` is {self.what}, which cannot take `{shown}`: {why}")

    def check_attention(self, spec: AttentionSpec) -> None:
        """Raises UnsupportedConfig for the first option of attention that is not honoured."""
        for field, value in asked_for(spec).items():
            if field not in self.attention.claimed:
                why = self.attention.refused.get(field, "it is not made for this option")
                raise UnsupportedConfig(f"`{field}` is {value!r}, which {self.what} cannot compute: {why}")

    def refusal(self, sampling: Any) -> str | None:
        """Why a request cannot be answered, None if it can. sampling: `mpt.engine.request.Sampling`."""
        for field in asked_for(sampling):
            if field not in self.request.claimed:
                name = _HTTP_NAMES.get(field, field)
                return f"`{name}` cannot be passed to {self.what}: {self.request.refused.get(field, 'leave it out')}"
        return None


def asked_for(row: Any) -> dict[str, Any]:
    """Name and value of each field that has no default, or is not at it."""
    values = {field.name: (field, getattr(row, field.name)) for field in fields(row)}
    return {name: value for name, (field, value) in values.items() if value != _default(field)}


def _default(field: Any) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


_FLAGS = {"adapters": "--adapter", "named_adapters": "--adapter"}  # options that are not called as their field
_HTTP_NAMES = {"grammar": "response_format` or `structured_outputs"}

# -- what the engine makes of the logits of any backend in this process ------------------------------------------------

_ENGINE_OPTIONS = frozenset(
    {"root", "device", "dtype", "speculate", "kv_gb", "max_running", "max_waiting", "prefill_chunk", "context_length",
     "prompt_style", "chat_template", "profile", "threads"}
)  # fmt: skip
_ON_DISK = frozenset({"prefix_cache", "prefix_cache_gb"})
_ENGINE_REQUEST = frozenset(
    {"max_tokens", "min_tokens", "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
     "repetition_penalty", "logit_bias", "allowed_token_ids", "seed", "stop", "stop_token_ids", "ignore_eos",
     "include_stop_str_in_output",
     "skip_special_tokens", "logprobs", "logprob_token_ids", "prompt_logprobs", "grammar", "priority", "progress",
     "cache_salt"}
)  # fmt: skip
_EVERY_ATTENTION = Fields(
    frozenset({"n_heads", "n_kv_heads", "d_head", "scale", "alibi_bias_max", "clip_qkv", "qk_ln"}), {}
)
_NO_ADAPTERS = "serve a Hugging Face style folder of it in one process"
_NO_HIDDEN_STATES = "it gives logits and no hidden states; serve a Hugging Face style folder of it in one process"
_NOT_SHARED = "prefixes are kept on disk by a model in one process; leave `--prefix-cache` out"
_NO_FILES = "onnxruntime owns its KV cache; leave `--prefix-cache` out"
_ONE_PROCESS = "a draft guesses for a model that one process computes, in C on CPU or on one GPU; leave `--draft` out"

# -- the backends ------------------------------------------------------------------------------------------------------

TORCH = Capabilities(
    what="a model that this process computes on CPU",
    options=Fields(
        _ENGINE_OPTIONS | _ON_DISK | {"quantize", "kv_cache", "draft", "adapters", "named_adapters"},
        {"tensor_parallel": "the model is shared over processes then"},
    ),
    request=Fields(_ENGINE_REQUEST | {"embed"}, {}),
    attention=_EVERY_ATTENTION,
)
PAGED = Capabilities(
    what="a model that this process computes on a GPU",
    options=Fields(
        _ENGINE_OPTIONS | _ON_DISK | {"quantize", "kv_cache", "draft", "adapters", "named_adapters"},
        {
            "tensor_parallel": "the model is shared over processes then",
        },
    ),
    request=Fields(_ENGINE_REQUEST | {"embed"}, {}),
    attention=_EVERY_ATTENTION,
    returns_early=True,
)
SHARDED = Capabilities(
    what="shared by several processes (`tensor_parallel`)",
    options=Fields(
        _ENGINE_OPTIONS | {"tensor_parallel"},
        {
            "quantize": "rounded weights are for a model in one process; leave `--quantize` out",
            "kv_cache": "an int8 KV cache is for a model in one process; leave `--kv-cache` out",
            **dict.fromkeys(sorted(_ON_DISK), _NOT_SHARED),
            "draft": _ONE_PROCESS,
            "adapters": _NO_ADAPTERS,
            "named_adapters": _NO_ADAPTERS,
        },
    ),
    request=Fields(_ENGINE_REQUEST, {"embed": _NO_HIDDEN_STATES}),
    attention=Fields(
        _EVERY_ATTENTION.claimed - {"qk_ln"},
        {"qk_ln": "it normalizes over all heads, which tensor parallelism cuts apart; use one GPU"},
    ),
)
ONNX = Capabilities(
    what="an ONNX folder",
    options=Fields(
        _ENGINE_OPTIONS,
        {
            "quantize": "choose its precision with `mpt convert --dtype int8` (or int4)",
            "kv_cache": "an int8 KV cache is for Hugging Face style folders in bfloat16; leave `--kv-cache` out",
            **dict.fromkeys(sorted(_ON_DISK), _NO_FILES),
            "draft": _ONE_PROCESS,
            "tensor_parallel": "onnxruntime runs in one process; leave it out",
            "adapters": _NO_ADAPTERS,
            "named_adapters": _NO_ADAPTERS,
        },
    ),
    request=Fields(_ENGINE_REQUEST, {"embed": _NO_HIDDEN_STATES}),
    attention=_EVERY_ATTENTION,
)
_SERVERS = "the Triton server decides it; leave it out"
_NOT_IN_TENSORS = "FasterTransformer's tensors cannot say it; leave it out"
_TENSORS = frozenset(
    {"max_tokens", "n", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "stop", "stop_token_ids",
     "include_stop_str_in_output", "skip_special_tokens"}
)  # fmt: skip
TRITON = Capabilities(
    what="a model of a Triton server",
    options=Fields(
        frozenset({"root", "speculate", "max_waiting", "context_length", "prompt_style", "chat_template"}),
        {
            **dict.fromkeys(("device", "dtype", "quantize", "kv_cache", "draft", "tensor_parallel", "kv_gb"), _SERVERS),
            **dict.fromkeys(("max_running", "prefill_chunk", "threads", *sorted(_ON_DISK)), _SERVERS),
            "adapters": _NO_ADAPTERS,
            "named_adapters": _NO_ADAPTERS,
            "profile": "only steps of this process can be recorded; leave it out",
        },
    ),
    request=Fields(
        _TENSORS,
        {
            **dict.fromkeys(("min_tokens", "min_p", "presence_penalty", "frequency_penalty"), _NOT_IN_TENSORS),
            **dict.fromkeys(("logit_bias", "allowed_token_ids", "ignore_eos"), _NOT_IN_TENSORS),
            **dict.fromkeys(("logprobs", "prompt_logprobs", "embed"), "it returns tokens only; leave it out"),
            "logprob_token_ids": "it returns tokens only; leave it out",
            "grammar": "its draws cannot be bound to a grammar; leave it out",
            "progress": "it does not say how far it has read; leave it out",
            "priority": "its queue is its own; leave it out",
            "cache_salt": "its cache is its own; leave it out",
        },
    ),
    attention=_EVERY_ATTENTION,  # its engine was built for the checkpoint, or not built
)
ALL = (TORCH, PAGED, SHARDED, ONNX, TRITON)
