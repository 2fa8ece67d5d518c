"""Fields of OpenAI's API and of servers like it that have no use here, and the values at which they ask for nothing.

null asks for nothing anywhere. A field with another value than these is refused by name. A field that is in no list
here and in no body is unknown, and refused too. Sources: the API references of OpenAI, vLLM, SGLang, llama.cpp's
server, Ollama and OpenRouter.
"""

from typing import Any

ANYTHING = object()  # whatever it says, a caller could not observe the difference


def _flags(*names: str) -> dict[str, tuple[Any, ...]]:
    return dict.fromkeys(names, (False,))


def _lists(*names: str) -> dict[str, tuple[Any, ...]]:
    return {name: ([], {}, "") for name in names}


def _observed_by_nobody(*names: str) -> dict[str, tuple[Any, ...]]:
    return dict.fromkeys(names, (ANYTHING,))


UNUSED: dict[str, tuple[Any, ...]] = {
    # Labels of the request, and wishes about caches and machines, which change no answer.
    **_observed_by_nobody(
        "user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
        "prompt_cache_options", "cache_prompt", "keep_alive", "ttl", "id_slot", "rid", "include_reasoning",
        "separate_reasoning", "stream_reasoning", "reasoning_format", "response_fields", "chat_id", "session_id",
    ),
    **_flags(
        "store", "early_stopping", "post_sampling_probs", "timings_per_token", "think",
        "thinking_forced_open", "no_stop_trim", "background", "return_hidden_states", "enable_response_messages",
    ),
    **_lists(
        "functions", "documents", "logits_processors", "bad_words", "plugins", "transforms", "lora", "samplers",
        "mm_processor_kwargs", "media_io_kwargs", "vllm_xargs", "options", "dry_sequence_breakers", "images", "format",
        "kv_transfer_params", "structural_tag", "models", "provider",
    ),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),  # these five where there are no tools and no chat
    "parallel_tool_calls": (ANYTHING,),
    "add_generation_prompt": (True,),
    "top_logprobs": (0,),
    "best_of": (1,),
    "function_call": ("none", "auto"),
    "modalities": (["text"], []),
    "audio": ({},),
    "prediction": ({},),
    "moderation": ({},),
    "web_search_options": ({},),
    "reasoning_effort": ("none",),
    "reasoning": ({}, {"effort": "none"}, {"enabled": False}, {"exclude": True}, {"summary": "auto"}),
    "thinking": ({"type": "disabled"}, {"type": "adaptive"}, False),  # adaptive: the model decides, and does not think
    "max_tool_calls": (ANYTHING,),  # of tools that run on a server
    "thinking_token_budget": (0,),
    "verbosity": ("medium",),
    "context_management": ([], {}, {"edits": []}, {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}),
    "truncation": ("disabled",),
    "spaces_between_special_tokens": (True,),
    "typical_p": (1,),
    "tfs_z": (1,),
    "mirostat": (0,),
    "mirostat_mode": (0,),
    # These say more of `mirostat`, `dry_multiplier` and `xtc_probability`, and nothing without them.
    "mirostat_tau": (ANYTHING,),
    "mirostat_eta": (ANYTHING,),
    "dry_multiplier": (0,),
    "dry_base": (ANYTHING,),
    "dry_allowed_length": (ANYTHING,),
    "dry_penalty_last_n": (ANYTHING,),
    "xtc_probability": (0,),
    "xtc_threshold": (ANYTHING,),
    "dynatemp_range": (0,),
    "dynatemp_exponent": (1,),
    "top_a": (0,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "repeat_penalty": (1,),
    "repeat_last_n": (ANYTHING,),  # how far back `repeat_penalty` looks
    "n_keep": (0,),
    "num_keep": (0,),
    "n_probs": (0,),
    "min_keep": (0,),
    "n_indent": (0,),
    "t_max_predict_ms": (0,),
    "dimensions": (),
    "prompt_embeds": (),
    "chat_template": ("",),
    "echo_prompt": (False,),
}  # fmt: skip

# What says the same under a name of ours.
RENAMED = {
    "guided_json": 'structured_outputs: {"json": ...}',
    "guided_regex": 'structured_outputs: {"regex": ...}',
    "guided_choice": 'structured_outputs: {"choice": ...}',
    "guided_grammar": 'structured_outputs: {"grammar": ...}',
    "json_schema": 'structured_outputs: {"json": ...}',
    "grammar": 'structured_outputs: {"grammar": ...}',
    "regex": 'structured_outputs: {"regex": ...}',
    "ebnf": 'structured_outputs: {"grammar": ...}',
    "repeat_penalty": "repetition_penalty",
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "functions": "tools",
    "function_call": "tool_choice",
    "lora_path": "model",
}


def asks_nothing(name: str, value: Any) -> bool:
    """Whether a field of this table has a value that asks for nothing. 5.0 is 5, true is not 1, null is left out."""
    if value is None:
        return True
    if isinstance(value, dict):
        value = {key: inner for key, inner in value.items() if inner is not None}
    return any(
        neutral is ANYTHING or (value == neutral and isinstance(value, bool) == isinstance(neutral, bool))
        for neutral in UNUSED.get(name, ())
    )
