"""Beam search over HTTP gives what transformers' beam search gives."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch

from serving.app import make_app
from serving.beam import Beam
from serving.endpoints import Serving
from serving.options import ServeOptions
from tests.in_process import running_endpoint


@pytest.fixture(scope="module")
def serving(model, tokenizer) -> Iterator[Serving]:
    with running_endpoint(model, tokenizer, context_length=256, kv_bytes=1 << 24) as endpoint:
        yield Serving(ServeOptions(models={}), endpoints={"base": endpoint})


async def ask(serving: Serving, **more: Any) -> httpx.Response:
    body = {"model": "base", "prompt": [5, 6, 7], "use_beam_search": True, "return_token_ids": True, **more}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(make_app(serving)), base_url="http://test") as client:
        return await client.post("/v1/completions", json=body)


async def test_the_beams_are_those_of_transformers(serving, model):
    """Without an end all beams have one length, so that the penalty, which each counts in its own way, is none."""
    expected = model.generate(
        torch.tensor([[5, 6, 7]]), num_beams=4, num_return_sequences=4, max_new_tokens=6, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )[:, 3:].tolist()  # fmt: skip
    answer = (await ask(serving, n=4, max_tokens=6, ignore_eos=True)).json()
    assert [choice["token_ids"] for choice in answer["choices"]] == expected
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    assert answer["usage"]["completion_tokens"] == 24


def test_a_longer_answer_is_better_the_higher_the_penalty_and_its_end_has_no_length():
    short, long = Beam((1,), -2.0), Beam((1, 2, 3, 4), -3.0)
    assert short.score(4, 0.0) > long.score(4, 0.0)  # -2 and -3
    assert short.score(4, 2.0) < long.score(4, 2.0)  # -2 / 5**2 and -3 / 8**2
    assert Beam((1, 0), -2.0, has_ended=True).score(4, 1.0) == short.score(4, 1.0)


async def test_an_answer_that_ends_is_among_the_beams(serving, model, tokenizer):
    """One token is the likeliest by far after the prompt: end-of-text, by a bias on the model's own logits."""
    endpoint = serving.endpoints["base"]
    forward, eos = endpoint.engine._backend.forward, tokenizer.eos_id

    def ending(work):
        logits = forward(work).clone()
        logits[:, eos] += 30
        return logits

    endpoint.engine._backend.forward = ending
    try:
        choices = (await ask(serving, n=2, max_tokens=3)).json()["choices"]
    finally:
        endpoint.engine._backend.forward = forward
    assert (choices[0]["finish_reason"], choices[0]["token_ids"], choices[0]["text"]) == ("stop", [eos], "")


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"stream": True}, "stream"),
        ({"top_p": 0.5}, "top_p"),
        ({"stop": "a"}, "stop"),
        ({"logprobs": 1}, "logprobs"),
        ({"use_beam_search": False, "length_penalty": 2.0}, "length_penalty"),
    ],
)
async def test_what_beams_cannot_honour_is_refused_by_name(serving, more, param):
    response = await ask(serving, **more)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
