"""A parameter of sampling is declared once: HTTP and C take it from there."""

from dataclasses import fields

import pytest

from mpt.backends.native import library
from mpt.engine.request import Sampling
from mpt.sampling import DrawParameters
from serving.errors import InvalidRequest
from serving.protocol.body import parse
from serving.protocol.generation import ChatRequest, CompletionRequest
from serving.protocol.sampling import sampling_of

BODIES = pytest.mark.parametrize(
    ("kind", "rest"),
    [(CompletionRequest, '"prompt": "x"'), (ChatRequest, '"messages": [{"role": "user", "content": "x"}]')],
    ids=["completion", "chat"],
)
# OpenAI's API reference, and vLLM's for what OpenAI does not have: a value at each end, and one beyond.
RANGES = {
    "temperature": (0, 2, 2.1), "top_p": (0, 1, 1.1), "top_k": (-1, 50, -2), "min_p": (0, 1, -0.1),
    "min_tokens": (0, 9, -1),
    "presence_penalty": (-2, 2, 2.1), "frequency_penalty": (-2, 2, -2.1), "repetition_penalty": (0.1, 2, 0),
    "seed": (-5, 7, 2**63), "priority": (-100, 100, 101),
}  # fmt: skip


def declared() -> dict[str, object]:
    return {field.name: field.default for field in fields(Sampling) if "http" in field.metadata}


def test_every_declared_parameter_has_a_range_here_or_is_a_switch():
    assert declared().keys() - RANGES.keys() == {"ignore_eos", "include_stop_str_in_output", "skip_special_tokens"}


@BODIES
@pytest.mark.parametrize("name", RANGES)
def test_a_body_takes_what_is_declared_within_its_range(kind, rest, name):
    low, high, beyond = RANGES[name]
    for value in (low, high):
        sampling = sampling_of(parse(kind, f'{{"model": "m", {rest}, "{name}": {value}}}'.encode()), 16, 260)
        assert getattr(sampling, name) == (max(value, 0) if name == "top_k" else value)  # -1 is vLLM's "off"
    with pytest.raises(InvalidRequest, match=name):
        parse(kind, f'{{"model": "m", {rest}, "{name}": {beyond}}}'.encode())


@BODIES
@pytest.mark.parametrize("given", ["", "null"])
def test_what_is_left_out_or_null_is_the_default(kind, rest, given):
    more = "".join(f', "{name}": null' for name in declared()) if given else ""
    sampling = sampling_of(parse(kind, f'{{"model": "m", {rest}{more}}}'.encode()), 16, 260)
    assert sampling == Sampling(max_tokens=16)


@pytest.mark.skipif(library.why_none() is not None, reason=str(library.why_none()))
def test_c_draws_by_what_python_declares():
    names = library.load().mpt_wish_names().decode().split()
    assert set(names) == {field.name for field in fields(DrawParameters)} | {"uniform"}
