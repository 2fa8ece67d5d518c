"""A Triton model behind the same API: the checkpoint's own answers, and clear refusals. Needs `make triton`."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

import mpt.checkpoint
from conversion.convert import Options, convert
from mpt.engine.address import Address
from mpt.engine.endpoint import Endpoint, open_endpoint
from mpt.engine.errors import EngineFailed, PromptTooLong, RequestTimeout, ShuttingDown, Unsupported
from mpt.engine.request import Event, Sampling
from mpt.errors import MachineRefused, UserError
from mpt.generation import generate
from mpt.options import ModelOptions
from tests.conversion import triton_server
from tests.conversion.conftest import make
from tests.mpt.engine.test_engine import last, text_of, tokens_of

ROWS = [[5, 6, 7, 8, 9], [100, 200, 300], list(range(10, 40))]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("triton") / "source", "mpt-7b")


@pytest.fixture(scope="module", params=["stream", "whole"])
def address(source, tmp_path_factory, request) -> Iterator[str]:
    if not triton_server.is_there():
        pytest.skip("needs `make triton`")
    work = tmp_path_factory.mktemp(request.param)
    convert(source, work / "onnx", Options(to="onnx", triton=request.param, verify=False))
    with triton_server.running(work / "onnx" / "triton", work) as server:
        yield f"triton://{server.grpc}/fastertransformer?checkpoint={source}"


@pytest.fixture
def endpoint(address) -> Endpoint:
    return open_endpoint("base", ModelOptions(address))


async def collect(engine, prompt, sampling, **options) -> list[Event]:
    answer = engine.submit(prompt, sampling, request_id="test", **options)
    try:
        return [event async for event in answer]
    finally:
        answer.close()


def greedy(max_tokens: int, **more) -> Sampling:
    return Sampling(max_tokens=max_tokens, temperature=0.0, **more)


async def test_the_checkpoints_answers_whoever_else_asks(endpoint, source):
    answers = await asyncio.gather(*(collect(endpoint.engine, row, greedy(12)) for row in ROWS * 2))
    model = mpt.checkpoint.load(source)
    for row, events in zip(ROWS * 2, answers, strict=True):
        expected = generate(model, row, 12, end_ids=(0,))
        assert tokens_of(events) == expected
        assert last(events).finish_reason == ("stop" if expected[-1] == 0 else "length")
    assert await endpoint.engine.drain(5)
    with pytest.raises(ShuttingDown):
        endpoint.engine.submit(ROWS[0], greedy(1), request_id="late")


async def test_stop_strings_samples_and_seeds(endpoint):
    whole = await collect(endpoint.engine, ROWS[0], greedy(12))
    text = text_of(whole)
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    stopped = await collect(endpoint.engine, ROWS[0], greedy(12, stop=(stop,)))
    assert text_of(stopped) == text[: text.index(stop)] and last(stopped).stop_reason == stop
    drawn = Sampling(max_tokens=8, temperature=1.5, n=2, seed=3)
    one, two = [await collect(endpoint.engine, ROWS[0], drawn) for _ in range(2)]
    assert [tokens_of(one, k) for k in (0, 1)] == [tokens_of(two, k) for k in (0, 1)]
    assert tokens_of(one, 0) != tokens_of(one, 1)
    assert text_of(await collect(endpoint.engine, ROWS[0], greedy(0))) == ""
    await endpoint.engine.drain(5)


async def test_what_the_tensors_cannot_say_is_refused_by_name(endpoint):
    for field, value in (("logprobs", 2), ("presence_penalty", 0.5), ("logit_bias", {3: 1.0}), ("min_tokens", 2)):
        with pytest.raises(Unsupported, match=f"`{field}` cannot be passed"):
            endpoint.engine.submit(ROWS[0], greedy(4, **{field: value}), request_id="x")
    with pytest.raises(PromptTooLong):
        endpoint.engine.submit(ROWS[0], greedy(512), request_id="x")


async def test_a_deadline_and_a_lost_server_end_the_request(endpoint, address, source):
    with pytest.raises(RequestTimeout):
        await collect(endpoint.engine, ROWS[0], greedy(400), deadline_s=0.001)
    await endpoint.engine.drain(5)
    gone = open_endpoint("base", ModelOptions(address))
    gone.engine._address = Address("127.0.0.1:1", "fastertransformer", str(source))
    with pytest.raises(EngineFailed, match="is lost: failed to connect"):
        await collect(gone.engine, ROWS[0], greedy(4))
    await gone.engine.drain(5)


@pytest.mark.parametrize(
    "text", ["triton://", "triton://host/m?checkpoint=x", "triton://host:1/m", "triton://h:1/m?checkpoint=x&colour=red"]
)
def test_addresses_that_are_none(text):
    with pytest.raises(UserError, match="is no Triton address"):
        Address.parse(text)


def test_no_server_and_no_model(source):
    with pytest.raises(MachineRefused, match=r"no Triton server answers at `127\.0\.0\.1:1`"):
        open_endpoint("base", ModelOptions(f"triton://127.0.0.1:1/m?checkpoint={source}"))


def test_options_of_the_server_are_refused(source):
    with pytest.raises(UserError, match="--dtype"):
        open_endpoint("base", ModelOptions(f"triton://127.0.0.1:1/m?checkpoint={source}", dtype="bfloat16"))
