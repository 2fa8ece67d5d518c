"""Metrics mean what they say: times are those of the engine's events, by a clock that the test moves."""

import asyncio
import platform
import resource
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import Tensor

import mpt
from mpt.backends.backend import Work
from mpt.backends.torch_backend import TorchBackend
from mpt.build import commit
from mpt.engine import clock
from mpt.engine.engine import Engine
from mpt.engine.errors import RequestTimeout
from mpt.engine.request import Delta, Event, Sampling, Started
from mpt.engine.sequence import Answer
from serving.cluster.relay import RouterMetrics
from serving.metrics import Metrics

STEP_S = 10.0
READ_LATE_S = 1000.0


class Clock:
    """Moves only when it is told to, and by ten seconds in each step of the model."""

    def __init__(self) -> None:
        self.at = 50.0


@pytest.fixture
def hands(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(clock, "time", SimpleNamespace(monotonic=lambda: made.at))
    return made


class SlowBackend(TorchBackend):
    hands: Clock

    def forward(self, work: list[Work]) -> Tensor:
        self.hands.at += STEP_S
        return super().forward(work)


@pytest.fixture
def engine(hands, model, tokenizer) -> Engine:
    """Without its thread: the test makes its turns."""
    backend = SlowBackend(model)
    backend.hands = hands
    made = Engine(backend, tokenizer, context_length=2048, kv_bytes=4096 * backend.bytes_per_token, prefill_chunk=16)
    return made


def test_every_process_says_what_it_takes_and_which_commit_it_is_of():
    """The router's registry too. The truth about memory is the kernel's, in pages."""
    for made in (Metrics(list), RouterMetrics()):
        read_now = made.registry.get_sample_value
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        memory = read_now("process_resident_memory_bytes")
        assert memory is not None and abs(memory / resource.getpagesize() - pages) < 0.2 * pages
        parts = dict(zip(("major", "minor", "patchlevel"), map(str, sys.version_info[:3]), strict=True))
        about = {"implementation": platform.python_implementation(), "version": platform.python_version(), **parts}
        assert read_now("python_info", about) == 1
        assert read_now("python_gc_collections_total", {"generation": "2"}) is not None
        assert read_now("mpt_build_info", {"version": mpt.__version__, "commit": commit()}) == 1


def ask(engine: Engine, n_prompt: int, n_tokens: int, **options) -> Answer:
    sampling = Sampling(max_tokens=n_tokens, temperature=0.0, ignore_eos=True, **options)
    return engine.submit([7] * n_prompt, sampling, request_id="r", deadline_s=200.0)


async def turns(engine: Engine, n: int) -> None:
    for _ in range(n):
        engine.turn()
    await asyncio.sleep(0)  # what the engine handed over arrives


async def read(answer: Answer | AsyncIterator[Event]) -> list[Event]:
    return [event async for event in answer]


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"mpt_{name}", {"model_name": "m", **labels})


async def test_the_queue_ends_where_the_first_step_begins(engine, hands):
    """Of three prompts and a budget for two, the third waits one step more; none has its own step in its queue time."""
    answers = [ask(engine, n, 1) for n in (40, 20, 24)]
    hands.at += 3.0
    await turns(engine, 12)
    hands.at += READ_LATE_S
    waits, prefills = [], []
    for answer in answers:
        events = await read(answer)
        assert isinstance(events[0], Started) and isinstance(events[-1], Delta)
        waits.append(events[0].at - answer.request.arrived)
        prefills.append(events[-1].at - events[0].at)
    # Steps of 16 tokens, half of them the oldest's, then the shortest's: 8 8 0, 8 8 0, 8 4 4, 8 0 8, 8 0 8, 0 0 4
    assert waits == [3.0, 3.0, 3.0 + 2 * STEP_S]
    assert prefills == [5 * STEP_S, 3 * STEP_S, 4 * STEP_S]


async def test_times_are_of_what_happened_not_of_reading(engine, hands):
    """3 s in the queue, a step of 10 s to the first token, and one for each of the three behind it."""
    metrics = Metrics(list)
    answer = ask(engine, 5, 4)
    hands.at += 3.0
    await turns(engine, 4)
    hands.at += READ_LATE_S
    await read(metrics.observe("m", answer))
    assert value(metrics, "request_queue_time_seconds_sum") == 3.0
    assert value(metrics, "request_prefill_time_seconds_sum") == 10.0
    assert value(metrics, "time_to_first_token_seconds_sum") == 13.0
    assert value(metrics, "request_decode_time_seconds_sum") == 30.0
    assert value(metrics, "request_inference_time_seconds_sum") == 40.0
    assert value(metrics, "e2e_request_latency_seconds_sum") == 43.0
    assert value(metrics, "inter_token_latency_seconds_sum") == 30.0
    assert value(metrics, "inter_token_latency_seconds_count") == 3
    assert value(metrics, "request_time_per_output_token_seconds_sum") == 10.0
    assert value(metrics, "request_success_total", finished_reason="length") == 1
    assert value(metrics, "request_params_max_tokens_sum") == 4


async def test_a_request_that_draws_nothing_is_all_prefill(engine, hands):
    metrics = Metrics(list)
    answer = ask(engine, 5, 0, embed=True)
    hands.at += 3.0
    await turns(engine, 1)
    hands.at += READ_LATE_S
    await read(metrics.observe("m", answer))
    assert value(metrics, "request_prefill_time_seconds_sum") == value(metrics, "request_inference_time_seconds_sum")
    assert value(metrics, "request_prefill_time_seconds_sum") == 10.0
    assert value(metrics, "time_to_first_token_seconds_count") is None
    assert value(metrics, "request_decode_time_seconds_count") is None


async def test_samples_are_counted_by_how_they_ended(engine, hands):
    """A late request is an error and its client has not gone; one that is closed has been cancelled."""
    metrics = Metrics(list)
    late, left = ask(engine, 5, 50, n=2), ask(engine, 5, 50)
    await turns(engine, 1)
    hands.at += 500.0
    await turns(engine, 1)
    with pytest.raises(RequestTimeout):
        await read(metrics.observe("m", late))
    assert value(metrics, "request_success_total", finished_reason="error") == 2
    assert value(metrics, "requests_cancelled_total", phase="running") is None
    events = metrics.observe("m", left)
    await anext(events)
    await events.aclose()
    assert value(metrics, "request_success_total", finished_reason="abort") == 1
    assert value(metrics, "requests_cancelled_total", phase="running") == 1


async def test_prompt_tokens_are_told_by_where_they_came_from(engine):
    metrics = Metrics(list)
    for _ in range(2):
        answer = ask(engine, 40, 1)
        await turns(engine, 4)
        await read(metrics.observe("m", answer))
    # the second finds all but its last token, which must be read for its logits
    assert value(metrics, "prompt_tokens_total") == 80
    assert value(metrics, "prompt_tokens_by_source_total", source="local_cache_hit") == 39
    assert value(metrics, "prompt_tokens_cached_total") == 39
    assert value(metrics, "prompt_tokens_by_source_total", source="local_compute") == 41
    assert value(metrics, "request_prefill_kv_computed_tokens_sum") == 41


async def test_steps_are_counted_by_their_tokens(engine):
    """13 tokens of a prompt in one step and a token in each of the two after it."""
    ask(engine, 13, 3)
    await turns(engine, 3)
    stats = engine.stats()
    assert (stats.n_steps, stats.n_step_tokens, stats.steps_by_tokens) == (3, 15, {16: 1, 1: 2})
