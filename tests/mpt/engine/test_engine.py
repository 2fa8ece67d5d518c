"""The engine's promises: the same answers as the naive loop whatever shares the batch, and memory that comes back."""

import asyncio
import contextlib
import random
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from mpt.backends import capabilities
from mpt.backends.backend import Work
from mpt.backends.torch_backend import TorchBackend
from mpt.engine.engine import Engine
from mpt.engine.errors import EngineFailed, EngineGone, Overloaded, PromptTooLong, RequestTimeout, ShuttingDown
from mpt.engine.request import Delta, Event, PromptScored, Sampling, Started
from mpt.engine.sequence import Request, Sequence
from mpt.engine.turns import Turns
from mpt.errors import DeviceLost
from mpt.generation import generate
from mpt.tokenizer import Tokenizer
from mpt.transformers_model import MPTForCausalLM
from tests.in_process import running_engine

CONTEXT = 2048


@pytest.fixture(autouse=True, params=[False, True], ids=["", "returns early"])
def returns_early(request, monkeypatch) -> bool:
    """Every promise is kept also where a step's text is made while the next step is computed, as on a GPU."""
    early = replace(capabilities.TORCH, returns_early=request.param)
    monkeypatch.setattr(capabilities, "TORCH", early)
    return bool(request.param)


@contextlib.contextmanager
def running(
    model: MPTForCausalLM, tokenizer: Tokenizer, *, kv_tokens: int = 1 << 16, **options: int
) -> Iterator[Engine]:
    backend = TorchBackend(model)
    kv_bytes = kv_tokens * backend.bytes_per_token
    with running_engine(backend, tokenizer, context_length=CONTEXT, kv_bytes=kv_bytes, **options) as engine:
        yield engine


async def collect(engine: Engine, prompt: list[int], sampling: Sampling, **options: object) -> list[Event]:
    return [event async for event in engine.generate(prompt, sampling, request_id="test", **options)]


def tokens_of(events: list[Event], index: int = 0) -> list[int]:
    return [t for e in events if isinstance(e, Delta) and e.index == index for t in e.token_ids]


def text_of(events: list[Event], index: int = 0) -> str:
    return "".join(e.text for e in events if isinstance(e, Delta) and e.index == index)


def last(events: list[Event]) -> Delta:
    assert isinstance(events[-1], Delta)
    return events[-1]


def prompts(n: int, longest: int = 90) -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(4, 260) for _ in range(rng.randrange(1, longest))] for _ in range(n)]


def greedy(max_tokens: int = 24, **options: object) -> Sampling:
    return Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("chunk", [7, 512])
async def test_greedy_tokens_equal_the_naive_loop_whatever_shares_the_batch(model, tokenizer, chunk):
    asked = prompts(12)
    with running(model, tokenizer, prefill_chunk=chunk, max_running=5) as engine:
        answers = await asyncio.gather(*(collect(engine, prompt, greedy()) for prompt in asked))
    for prompt, events in zip(asked, answers, strict=True):
        assert tokens_of(events) == generate(model, prompt, 24)


async def test_greedy_tokens_survive_preemption(model, tokenizer):
    """Room for two rows of 512 tokens and six that grow from 200 to 330: somebody must be sent back."""
    asked = [[random.Random(seed).randrange(4, 260) for _ in range(200)] for seed in range(6)]
    with running(model, tokenizer, kv_tokens=1024, max_running=6) as engine:
        answers = await asyncio.gather(*(collect(engine, prompt, greedy(130)) for prompt in asked))
        assert engine.stats().n_preemptions > 0
    for prompt, events in zip(asked, answers, strict=True):
        assert tokens_of(events) == generate(model, prompt, 130)


async def test_who_was_sent_back_goes_on_before_who_came_later(model, tokenizer):
    """All grow out of blocks of 256; the youngest, c, is sent back, and what a leaves fits c, or d and not c."""
    asked = {"a": 130, "b": 300, "c": 130, "d": 10}
    order: list[str] = []

    async def follow(name: str) -> None:
        prompt = [random.Random(name).randrange(4, 260) for _ in range(210 if name == "c" else 200)]
        async for event in engine.generate(prompt, greedy(asked[name]), request_id=name):
            if isinstance(event, Delta):
                order.append(name)

    with running(model, tokenizer, kv_tokens=1024, max_running=3) as engine:
        await asyncio.gather(*map(follow, asked))
        assert engine.stats().n_preemptions > 0
    last_of_c = len(order) - 1 - order[::-1].index("c")
    assert order.index("d") > last_of_c


async def order_of_admission(model, tokenizer, asked: list[tuple[str, str, int]]) -> str:
    """Names of requests (name, client, priority) in the order they leave the queue, all there before the first does."""
    held = threading.Event()

    class Held(TorchBackend):
        def forward(self, work: list[Work]) -> torch.Tensor:  # type: ignore[override]
            if any(item.tokens == [9] for item in work):
                held.wait()
            return super().forward(work)

    backend = Held(model)
    engine = Engine(backend, tokenizer, context_length=CONTEXT, kv_bytes=1 << 24, max_running=1)
    engine.start()
    order: list[str] = []

    async def follow(name: str, prompt: list[int], client: str, priority: int) -> None:
        async for event in engine.generate(prompt, greedy(2, priority=priority), request_id=name, salt=client):
            if isinstance(event, Started):
                order.append(name)

    try:
        tasks = [asyncio.create_task(follow("", [9], "", 0))]
        while engine.stats().n_running == 0:
            await asyncio.sleep(0.001)
        tasks += [asyncio.create_task(follow(name, [5], *rest)) for name, *rest in asked]
        await asyncio.sleep(0)  # each has been submitted
        held.set()
        await asyncio.gather(*tasks)
    finally:
        held.set()
        engine.close()
    return "".join(order)


async def test_the_queue_is_left_in_order_of_arrival_within_a_client_and_by_turns_between_them(model, tokenizer):
    alone = [(name, "", 0) for name in "abcd"]
    assert await order_of_admission(model, tokenizer, alone) == "abcd"
    burst = [*((name, "burst", 0) for name in "abcdef"), ("x", "other", 0), ("1", "third", 0), ("2", "third", 0)]
    assert await order_of_admission(model, tokenizer, burst) == "ax1b2cdef"


async def test_lower_priorities_go_first_and_turns_are_within_one(model, tokenizer):
    asked = [("a", "p", 0), ("b", "p", 5), ("c", "p", -1), ("d", "q", 5), ("e", "p", 0), ("f", "q", 0), ("g", "p", -1)]
    assert await order_of_admission(model, tokenizer, asked) == "cgfaedb"


async def test_what_was_sent_back_precedes_even_the_urgent(model, tokenizer):
    """Else an urgent stream would make the engine read the same prompts again and again."""
    loop = asyncio.get_running_loop()

    def waiting(name: str, priority: int) -> Sequence:
        request = Request(name, [5], greedy(1, priority=priority), "", None, None, loop, lambda _: None)
        return Sequence(request, 0, tokenizer, 260)

    turns, begun = Turns(), waiting("begun", 9)
    turns.take(begun)
    order = turns.order([begun, waiting("later", 0), waiting("urgent", -9)])
    assert [sequence.request.id for sequence in order] == ["begun", "urgent", "later"]


async def test_a_client_that_always_has_one_waiting_takes_turns_too(model, tokenizer):
    """It sends its next as soon as one has begun, against a burst; every other is the burst's."""
    order: list[str] = []
    with running(model, tokenizer, max_running=1) as engine:

        async def follow(name: str, client: str) -> None:
            async for event in engine.generate([5], greedy(20), request_id=name, salt=client):
                if isinstance(event, Started):
                    order.append(client)

        burst = [asyncio.create_task(follow("x", "burst")) for _ in range(12)]
        while not order:
            await asyncio.sleep(0.001)
        steady = []
        for _ in range(6):
            n = len(order)
            steady.append(asyncio.create_task(follow("y", "steady")))
            while "steady" not in order[n:]:
                await asyncio.sleep(0.001)
        await asyncio.gather(*burst, *steady)
    turns = order[order.index("steady") :]
    assert all(turns[k : k + 2].count("steady") < 2 for k in range(len(turns)))


async def test_a_second_question_about_a_long_text_is_written_behind_it(model, tokenizer):
    """Not behind a copy of it: only the short first answer is lost."""
    backend = TorchBackend(model)
    book = random.Random(0).choices(range(4, 250), k=1000)
    n_copies, copy = 0, backend.copy

    def counted(*args):
        nonlocal n_copies
        n_copies += 1
        return copy(*args)

    backend.copy = counted
    engine = Engine(backend, tokenizer, context_length=2048, kv_bytes=1 << 24)
    engine.start()
    greedy = Sampling(max_tokens=8, temperature=0, ignore_eos=True)
    found = []
    for question in ([], [5, 6, 7], [8] * 40):
        events = [e async for e in engine.generate([*book, *question], greedy, request_id="x")]
        found.append([t for e in events if isinstance(e, Delta) for t in e.token_ids])
        assert n_copies == 0
    # What the third question wrote is more than a hundredth: the book is copied away from it.
    events = [e async for e in engine.generate([*book, 9, 10], greedy, request_id="x")]
    assert n_copies == 1
    found.append([t for e in events if isinstance(e, Delta) for t in e.token_ids])
    engine.close()
    questions = ([], [5, 6, 7], [8] * 40, [9, 10])
    assert found == [generate(model, [*book, *question], 8) for question in questions]


async def test_prefix_reuse_gives_the_same_tokens_and_counts_them(model, tokenizer):
    book = prompts(1)[0] * 5
    first, second = [*book, 10, 11], [*book, 12, 13, 14]
    with running(model, tokenizer) as engine:
        a = await collect(engine, first, greedy())
        b = await collect(engine, second, greedy())
        other = await collect(engine, second, greedy(), salt="somebody else")
    assert a[0] == Started(len(first), 0)
    assert b[0] == Started(len(second), len(book))
    assert other[0] == Started(len(second), 0)
    assert tokens_of(b) == tokens_of(other) == generate(model, second, 24)


async def test_continuing_an_answer_reuses_all_of_it(model, tokenizer):
    prompt = prompts(1)[0] + [5] * 20
    with running(model, tokenizer) as engine:
        said = tokens_of(await collect(engine, prompt, greedy()))
        longer = [*prompt, *said, 9]
        events = await collect(engine, longer, greedy())
    assert events[0] == Started(len(longer), len(prompt) + len(said) - 1)  # the last token was never read
    assert tokens_of(events) == generate(model, longer, 24)


async def test_a_seed_repeats_its_sample_whatever_shares_the_batch(model, tokenizer):
    sampling = Sampling(max_tokens=30, temperature=1.0, top_p=0.95, top_k=50, seed=7, ignore_eos=True)
    prompt = prompts(1)[0]
    with running(model, tokenizer) as engine:
        alone = await collect(engine, prompt, sampling)
        crowd = [collect(engine, p, Sampling(max_tokens=30, temperature=1.0)) for p in prompts(9)[1:]]
        together, *_ = await asyncio.gather(collect(engine, prompt, sampling), *crowd)
    expected = generate(model, prompt, 30, temperature=1.0, top_p=0.95, top_k=50, seed=7)
    assert tokens_of(alone) == tokens_of(together) == expected


async def test_samples_of_one_prompt_share_its_cache_and_differ(model, tokenizer):
    prompt = prompts(1)[0] * 3
    sampling = Sampling(max_tokens=12, temperature=1.0, n=3, seed=5, ignore_eos=True)
    with running(model, tokenizer) as engine:
        events = await collect(engine, prompt, sampling)
    for k in range(3):
        assert tokens_of(events, k) == generate(model, prompt, 12, temperature=1.0, seed=5 + k)
    assert sum(isinstance(e, Started) for e in events) == 1


async def test_a_long_prompt_does_not_hold_up_a_running_answer(model, tokenizer):
    """While 1,900 tokens are read in chunks of 32, a running request gets a token at every step."""
    with running(model, tokenizer, prefill_chunk=32) as engine:
        order: list[str] = []

        async def follow(name: str, prompt: list[int], sampling: Sampling) -> None:
            async for event in engine.generate(prompt, sampling, request_id=name):
                if isinstance(event, Delta):
                    order.append(name)

        chat = asyncio.create_task(follow("chat", [5, 6, 7], greedy(200)))
        while not order:
            await asyncio.sleep(0.001)
        await asyncio.gather(chat, follow("book", [9] * 1900, greedy(1)))
    before_book = order.index("book")
    assert before_book >= 1900 // 32  # at least one chat token for each chunk of the book


async def test_a_long_prompt_does_not_hold_up_a_short_one(model, tokenizer):
    """The oldest prompt takes half of a step's reading, so that a greeting is answered beside it."""
    with running(model, tokenizer, prefill_chunk=32) as engine:
        order: list[str] = []

        async def follow(name: str, prompt: list[int], sampling: Sampling) -> None:
            async for event in engine.generate(prompt, sampling, request_id=name):
                order.append(name if isinstance(event, Delta) else f"{name} started")

        book = asyncio.create_task(follow("book", [9] * 1900, greedy(1)))
        while not order:
            await asyncio.sleep(0.001)
        await asyncio.gather(book, follow("greeting", list(range(5, 45)), greedy(3)))
    assert order == ["book started", "greeting started", *["greeting"] * 3, "book"]


async def test_a_running_request_shares_its_beginning_within_a_key_only(model, tokenizer):
    with running(model, tokenizer) as engine:
        prompt = prompts(1)[0] * 3

        async def cached(salt: str) -> int:
            return (await collect(engine, prompt, greedy(1), salt=salt))[0].cached_tokens  # type: ignore[union-attr]

        answer = engine.submit(prompt, greedy(400), request_id="long", salt="a")
        async for event in answer:
            if isinstance(event, Delta):
                break
        assert [await cached("b"), await cached("a")] == [0, len(prompt) - 1]
        answer.close()


@pytest.mark.parametrize("stop", ["\x00", None])
async def test_stop_string_split_across_tokens_never_shows(model, tokenizer, stop):
    prompt = prompts(1)[0]
    with running(model, tokenizer) as engine:
        whole = await collect(engine, prompt, greedy(40))
        text, ids = text_of(whole), tokens_of(whole)
        assert text == tokenizer.decode(ids)
        stop = stop or text[20:23]
        ended = await collect(engine, prompt, greedy(40, stop=(stop,)))
        included = await collect(engine, prompt, greedy(40, stop=(stop,), include_stop_str_in_output=True))
    if stop in text:
        assert text_of(ended) == text[: text.index(stop)]
        assert text_of(included) == text[: text.index(stop) + len(stop)]
        assert (last(ended).finish_reason, last(ended).stop_reason) == ("stop", stop)
    else:
        assert text_of(ended) == text and last(ended).finish_reason == "length"


async def test_stop_token_ends_and_min_tokens_delays_it(model, tokenizer):
    prompt = prompts(1)[0]
    free = generate(model, prompt, 30)
    stop = free[4]
    first = free.index(stop)
    with running(model, tokenizer) as engine:
        ended = await collect(engine, prompt, greedy(30, stop_token_ids=(stop,)))
        later = await collect(engine, prompt, greedy(30, stop_token_ids=(stop,), min_tokens=12))
    assert tokens_of(ended) == free[: first + 1] and last(ended).stop_reason == stop
    assert len(tokens_of(later)) >= 13 and stop not in tokens_of(later)[:12]


async def test_logprobs_are_those_of_one_forward_pass(model, tokenizer):
    prompt = prompts(2)[1]
    with running(model, tokenizer, prefill_chunk=8) as engine:
        events = await collect(engine, prompt, greedy(6, logprobs=3, prompt_logprobs=2))
    ids = prompt + tokens_of(events)
    with torch.no_grad():
        truth = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    scored = next(e for e in events if isinstance(e, PromptScored)).logprobs
    assert scored[0].logprob is None and [s.token_id for s in scored] == prompt
    given = [entry for e in events if isinstance(e, Delta) for entry in e.logprobs or ()]
    for at, entry in enumerate([*scored, *given]):
        if at:
            assert entry.logprob == pytest.approx(float(truth[at - 1, ids[at]]), abs=1e-4)
    assert all(entry.logprob == entry.top[0][1] and len(entry.top) == 3 for entry in given)  # greedy: the best is own


async def test_scoring_a_prompt_generates_nothing(model, tokenizer):
    with running(model, tokenizer) as engine:
        events = await collect(engine, [5, 6, 7], Sampling(max_tokens=0, prompt_logprobs=0))
    assert tokens_of(events) == [] and last(events).finish_reason == "length"
    assert len(next(e for e in events if isinstance(e, PromptScored)).logprobs) == 3


async def test_penalties_and_bias_steer_the_choice(model, tokenizer):
    prompt = prompts(1)[0]
    with running(model, tokenizer) as engine:
        forced = await collect(engine, prompt, greedy(5, logit_bias={77: 100.0}))
        unlike = await collect(engine, prompt, greedy(60, presence_penalty=2.0, frequency_penalty=2.0, logit_bias={}))
        varied = await collect(engine, prompt, greedy(60, repetition_penalty=100.0))
    assert tokens_of(forced) == [77] * 5
    assert len(set(tokens_of(varied))) == 60 and not set(tokens_of(varied)) & set(prompt)
    assert len(set(tokens_of(unlike))) > len(set(generate(model, prompt, 60)))


async def test_only_allowed_tokens_are_drawn_and_named_ones_are_told(model, tokenizer):
    """The allowed token that the model likes best, and every named one's own log-probability."""
    with running(model, tokenizer) as engine:
        with torch.no_grad():
            logprobs = model(torch.tensor([[5, 6]])).logits[0, -1].float().log_softmax(-1)
        for temperature in (0.0, 1.5):
            asked = replace(greedy(12, allowed_token_ids=(70, 80, 90), seed=3), temperature=temperature)
            assert set(tokens_of(await collect(engine, [5, 6], asked))) <= {70, 80, 90}
        asked = greedy(1, allowed_token_ids=(70, 80, 90), logprobs=1, logprob_token_ids=(3, 200))
        (told,) = last(await collect(engine, [5, 6], asked)).logprobs
    assert told.token_id == max((70, 80, 90), key=lambda token: logprobs[token])
    assert [token for token, _ in told.named] == [3, 200]
    assert [value for _, value in told.named] == pytest.approx([logprobs[3].item(), logprobs[200].item()], abs=1e-4)


async def test_a_cache_salt_keeps_prefixes_apart(model, tokenizer):
    with running(model, tokenizer) as engine:

        async def cached(salt: str) -> int:
            events = await collect(engine, [7] * 100, greedy(1, cache_salt=salt))
            return next(event.cached_tokens for event in events if isinstance(event, Started))

        assert [await cached(""), await cached("a"), await cached("a"), await cached("")] == [0, 0, 99, 99]


async def test_cancelled_requests_free_their_memory(model, tokenizer):
    with running(model, tokenizer, max_running=4) as engine:

        async def give_up() -> None:
            async for event in engine.generate([5] * 300, greedy(1000), request_id="x"):
                if isinstance(event, Delta):
                    return

        await asyncio.gather(*(give_up() for _ in range(12)))
        await collect(engine, [7], greedy(1))  # a step later everything is settled
        stats = engine.stats()
        assert (stats.n_running, stats.n_waiting, stats.kv_used_bytes) == (0, 0, 0)
        assert stats.kv_kept_bytes <= stats.kv_total_bytes


async def test_kept_prefixes_stay_within_the_budget(model, tokenizer):
    with running(model, tokenizer, kv_tokens=1024) as engine:
        for prompt in prompts(20, longest=300):
            await collect(engine, prompt, greedy(2))
            stats = engine.stats()
            assert stats.kv_used_bytes + stats.kv_kept_bytes <= stats.kv_total_bytes


async def test_a_full_queue_and_a_request_that_cannot_fit_are_refused(model, tokenizer):
    with running(model, tokenizer, kv_tokens=512, max_running=1, max_waiting=2) as engine:
        with pytest.raises(PromptTooLong, match=r"512 tokens.*600"):
            await collect(engine, [5] * 500, greedy(100))
        tasks = [asyncio.create_task(collect(engine, [5], greedy(400))) for _ in range(6)]
        done = await asyncio.gather(*tasks, return_exceptions=True)
        refused = [r for r in done if isinstance(r, Overloaded)]
        assert refused and all(isinstance(r, list | Overloaded) for r in done)


async def test_a_request_past_its_deadline_ends_with_an_error(model, tokenizer):
    with running(model, tokenizer) as engine:
        with pytest.raises(RequestTimeout):
            await collect(engine, [5], greedy(2000), deadline_s=0.05)
        assert tokens_of(await collect(engine, [5], greedy(3))) == generate(model, [5], 3)


async def test_one_failing_request_never_harms_another(model, tokenizer):
    """A step that raises for one row is run again for each row alone."""

    class Poisoned(TorchBackend):
        def forward(self, work: list[Work]) -> torch.Tensor:  # type: ignore[override]
            if any(13 in item.tokens for item in work):
                raise RuntimeError("poison")
            return super().forward(work)

    backend = Poisoned(model)
    engine = Engine(backend, tokenizer, context_length=CONTEXT, kv_bytes=1 << 24)
    engine.start()
    try:
        healthy = [5, 6, 7]
        good, bad = await asyncio.gather(
            collect(engine, healthy, greedy(8)), collect(engine, [4, 13, 4], greedy(8)), return_exceptions=True
        )
        assert isinstance(bad, EngineFailed)
        assert isinstance(good, list) and tokens_of(good) == generate(model, healthy, 8)
    finally:
        engine.close()


async def test_draining_finishes_what_runs_and_refuses_what_comes(model, tokenizer):
    with running(model, tokenizer) as engine:
        task = asyncio.create_task(collect(engine, [5], greedy(60)))
        await asyncio.sleep(0.02)
        drained = asyncio.create_task(engine.drain(30))
        await asyncio.sleep(0.01)
        with pytest.raises(ShuttingDown):
            await collect(engine, [5], greedy(1))
        assert len(tokens_of(await task)) == 60
        assert await drained


async def test_draining_ends_what_does_not_finish_in_time(model, tokenizer):
    with running(model, tokenizer) as engine:
        task = asyncio.create_task(collect(engine, [5], greedy(2000)))
        await asyncio.sleep(0.02)
        assert not await engine.drain(0.05)
        with pytest.raises(ShuttingDown):
            await task


# -- while the next step is computed ---------------------------------------------------------------------------------


def watched(engine: Engine, monkeypatch) -> list[str]:
    """What an engine without a thread does, in order."""
    seen: list[str] = []
    forward, say = engine._backend.forward, Sequence.say

    def noted_forward(work: list[Work]) -> torch.Tensor:
        seen.append("step")
        return forward(work)

    def noted_say(self: Sequence, taken, logprob) -> Delta:
        seen.append("text")
        return say(self, taken, logprob)

    monkeypatch.setattr(engine._backend, "forward", noted_forward)
    monkeypatch.setattr(Sequence, "say", noted_say)
    return seen


@pytest.mark.parametrize("stop", [(), ("never there",)])
async def test_text_is_made_while_the_next_step_is_computed_unless_it_may_end_the_answer(
    model, tokenizer, monkeypatch, returns_early, stop
):
    engine = Engine(TorchBackend(model), tokenizer, context_length=CONTEXT, kv_bytes=1 << 24)
    seen = watched(engine, monkeypatch)
    answer = engine.submit([5, 6], greedy(3, stop=stop), request_id="x")
    while not seen or engine._scheduler.running:
        engine.turn()
    if returns_early and not stop:
        assert seen == ["step", "step", "text", "step", "text", "text"]
    else:
        assert seen == ["step", "text"] * 3
    events = [event async for event in answer]
    assert tokens_of(events) == generate(model, [5, 6], 3) and last(events).finish_reason == "length"


async def test_a_token_is_told_though_the_next_step_is_lost(model, tokenizer, monkeypatch):
    """What was drawn before the device was lost reaches who asked; then comes the error."""
    backend = TorchBackend(model)
    forward, n_steps = backend.forward, 0

    def third_is_lost(work: list[Work]) -> torch.Tensor:
        nonlocal n_steps
        n_steps += 1
        if n_steps == 4:  # the first is the engine's own
            raise DeviceLost("gone")
        return forward(work)

    monkeypatch.setattr(backend, "forward", third_is_lost)
    with running_engine(backend, tokenizer, context_length=CONTEXT, kv_bytes=1 << 24) as engine:
        got: list[Event] = []

        async def follow() -> None:
            async for event in engine.generate([5, 6], greedy(9), request_id="x"):
                got.append(event)

        with pytest.raises(EngineGone):
            await follow()
    assert tokens_of(got) == generate(model, [5, 6], 2)


async def test_text_that_cannot_be_made_costs_its_request_only(model, tokenizer, monkeypatch):
    say = Sequence.say

    def fail_on_the_fourth(self: Sequence, taken, logprob) -> Delta:
        if self.request.id == "bad" and self.n_generated >= 4:
            raise ValueError("no such byte")
        return say(self, taken, logprob)

    monkeypatch.setattr(Sequence, "say", fail_on_the_fourth)
    with running(model, tokenizer) as engine:
        bad = engine.submit([9, 9], greedy(40), request_id="bad")
        good = collect(engine, [5, 6], greedy(12))

        async def all_of(answer) -> list[Event]:
            return [event async for event in answer]

        good_events, error = await asyncio.gather(good, all_of(bad), return_exceptions=True)
        assert isinstance(error, EngineFailed) and "text could not be made" in str(error)
        assert tokens_of(good_events) == generate(model, [5, 6], 12)
        while engine.stats().n_running:
            await asyncio.sleep(0.01)
        assert engine.stats().kv_used_bytes == 0
