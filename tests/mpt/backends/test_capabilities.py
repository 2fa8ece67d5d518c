"""Every backend claims or refuses by name every option of a model, field of a request and option of attention."""

from dataclasses import fields, make_dataclass, replace

import pytest

from mpt.attention import AttentionSpec
from mpt.backends import capabilities
from mpt.backends.capabilities import Capabilities, asked_for
from mpt.engine.request import Sampling
from mpt.errors import UnsupportedConfig, UserError
from mpt.options import ModelOptions

# For each field, a value at which it asks for something.
OPTIONS = {
    "device": "cpu", "dtype": "bfloat16", "quantize": "int8", "kv_cache": "int8", "speculate": False,
    "draft": "mpt-tiny", "tensor_parallel": 2, "kv_gb": 1.0, "max_running": 3, "max_waiting": 5, "prefill_chunk": 64,
    "context_length": 99, "prompt_style": "chatml", "adapters": "folder", "named_adapters": {"a": "folder"},
    "threads": 1, "chat_template": "file", "profile": "folder", "prefix_cache": "folder", "prefix_cache_gb": 2.0,
}  # fmt: skip
NEEDS = {"prefix_cache_gb": {"prefix_cache": "folder"}}  # options that mean nothing without another
SAMPLING = {
    "temperature": 0.5, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "min_tokens": 2, "n": 2, "presence_penalty": 0.5,
    "frequency_penalty": 0.5, "repetition_penalty": 1.5, "logit_bias": {3: 1.0}, "seed": 0, "stop": ("x",),
    "stop_token_ids": (4,), "ignore_eos": True, "include_stop_str_in_output": True, "skip_special_tokens": False,
    "logprobs": 0, "prompt_logprobs": 0, "grammar": "a grammar", "priority": 1, "embed": True, "progress": True,
    "allowed_token_ids": (5,), "logprob_token_ids": (6,), "cache_salt": "mine",
}  # fmt: skip
ATTENTION = {"alibi_bias_max": 8.0, "clip_qkv": 6.0, "qk_ln": True}
PLAIN = AttentionSpec(n_heads=4, n_kv_heads=4, d_head=16, scale=0.25)
BACKENDS = pytest.mark.parametrize("backend", capabilities.ALL, ids=lambda backend: backend.what)


def test_the_values_above_leave_no_field_out():
    assert OPTIONS.keys() | {"root"} == {field.name for field in fields(ModelOptions)}
    assert SAMPLING.keys() | {"max_tokens"} == {field.name for field in fields(Sampling)}
    assert ATTENTION.keys() | {"n_heads", "n_kv_heads", "d_head", "scale"} == {f.name for f in fields(AttentionSpec)}


@BACKENDS
def test_every_field_is_claimed_or_refused_and_not_both(backend: Capabilities):
    for row, listed in (
        (ModelOptions, backend.options),
        (Sampling, backend.request),
        (AttentionSpec, backend.attention),
    ):
        assert listed.claimed | listed.refused.keys() == {field.name for field in fields(row)}
        assert not listed.claimed & listed.refused.keys()


@BACKENDS
@pytest.mark.parametrize("field", OPTIONS)
def test_an_option_is_honoured_or_refused_by_name(backend: Capabilities, field: str):
    options = ModelOptions("x", **{field: OPTIONS[field]}, **NEEDS.get(field, {}))
    if field in backend.options.claimed:
        backend.check_options("base", options)
        return
    first = next(iter(NEEDS.get(field, {field: None})))  # which is what the refusal names
    flag = "--adapter" if "adapter" in field else f"--{first.replace('_', '-')}"
    with pytest.raises(UserError, match=f"`base` is .*cannot take `{flag}.*`: .+"):
        backend.check_options("base", options)


@BACKENDS
@pytest.mark.parametrize("field", SAMPLING)
def test_a_field_of_a_request_is_honoured_or_refused_by_name(backend: Capabilities, field: str):
    found = backend.refusal(Sampling(max_tokens=1, **{field: SAMPLING[field]}))
    if field in backend.request.claimed:
        assert found is None
    else:
        assert found is not None
        assert found.startswith(f"`{'response_format' if field == 'grammar' else field}`") and backend.what in found


@BACKENDS
@pytest.mark.parametrize("field", ATTENTION)
def test_an_option_of_attention_is_computed_or_refused_by_name(backend: Capabilities, field: str):
    spec = replace(PLAIN, **{field: ATTENTION[field]})
    if field in backend.attention.claimed:
        backend.check_attention(spec)
    else:
        with pytest.raises(UnsupportedConfig, match=f"`{field}` is {ATTENTION[field]}, which .* cannot compute"):
            backend.check_attention(spec)


@BACKENDS
def test_a_field_nobody_has_listed_is_refused(backend: Capabilities):
    """What becomes of a field that is declared tomorrow."""
    asked = make_dataclass("Asked", [("mirostat", float, 0.0)], frozen=True)
    assert backend.refusal(asked()) is None
    assert "`mirostat`" in (backend.refusal(asked(mirostat=0.1)) or "")
    with pytest.raises(UserError, match="--mirostat"):
        backend.check_options("base", asked(mirostat=0.1))
    with pytest.raises(UnsupportedConfig, match="mirostat"):
        backend.check_attention(asked(mirostat=0.1))


def test_what_is_asked_for_is_what_is_not_at_its_default():
    assert asked_for(ModelOptions("x", kv_gb=2.0)) == {"root": "x", "kv_gb": 2.0}
    assert asked_for(Sampling(max_tokens=3)) == {"max_tokens": 3}
