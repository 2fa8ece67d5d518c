"""Guesses change how many steps an answer takes, never the answer: against the same engine without them."""

import asyncio
import contextlib
import dataclasses
import functools
import random
import re
from collections.abc import Iterator

import pytest
import torch
from tokenizers import Tokenizer as Raw
from tokenizers import decoders, models, pre_tokenizers

import mpt
from mpt.backends import choose as choosing
from mpt.backends.native import library
from mpt.backends.paged_attention import PAGE
from mpt.backends.paged_backend import PagedBackend
from mpt.backends.torch_backend import TorchBackend
from mpt.engine.endpoint import open_endpoint
from mpt.engine.engine import Engine
from mpt.engine.errors import EngineFailed
from mpt.engine.grammar import Grammars
from mpt.engine.request import Delta, Sampling
from mpt.engine.speculation import MAX_GUESS, DraftModel, Pace, PromptLookup, Speculation
from mpt.errors import UserError
from mpt.lora import Adapter, adaptable
from mpt.options import ModelOptions
from mpt.tokenizer import Tokenizer
from tests.in_process import running_engine
from tests.mpt.repetitive import CONTEXT, repetitive_model

needs_native = pytest.mark.skipif(library.why_none() is not None, reason=str(library.why_none()))


@pytest.fixture(scope="module")
def small() -> mpt.MPTForCausalLM:
    return repetitive_model(n_heads=4)


@contextlib.contextmanager
def running(model, tokenizer, guesser=None, kv_tokens=1 << 14, **options) -> Iterator[Engine]:
    backend = model if isinstance(model, TorchBackend) else TorchBackend(model)
    options |= {"kv_bytes": kv_tokens * backend.bytes_per_token}
    options |= {"speculation": None if guesser is None else Speculation(guesser)}
    with running_engine(backend, tokenizer, context_length=CONTEXT, **options) as engine:
        yield engine


def texts(n: int) -> list[list[int]]:
    """Prompts that repeat themselves: lookups find something, right or wrong."""
    numbers = random.Random(5)
    made = []
    for k in range(n):
        phrase = numbers.choices(range(3, 480), k=12)
        made.append(phrase * 3 + numbers.choices(range(3, 480), k=k) + phrase[:4])
    return made


async def answers(engine: Engine, samplings: list[Sampling]) -> list[list[Delta]]:
    async def one(prompt: list[int], sampling: Sampling) -> list[Delta]:
        events = engine.generate(prompt, sampling, request_id="test")
        deltas = [event async for event in events if isinstance(event, Delta)]
        assert all(delta.token_ids for delta in deltas)
        samples = sorted({delta.index for delta in deltas})  # those of one prompt come as they are ready
        return [functools.reduce(Delta.then, (delta for delta in deltas if delta.index == k)) for k in samples]

    prompts = texts(len(samplings))
    return await asyncio.gather(*(one(p, s) for p, s in zip(prompts, samplings, strict=True)))


SAMPLINGS = [
    Sampling(max_tokens=60, temperature=0),
    Sampling(max_tokens=60, temperature=0, ignore_eos=True, logprobs=2),
    Sampling(max_tokens=50, temperature=0.7, seed=1, ignore_eos=True),
    Sampling(max_tokens=50, temperature=1.3, top_p=0.9, top_k=20, seed=2),
    Sampling(max_tokens=40, temperature=0, frequency_penalty=0.5, presence_penalty=0.3, repetition_penalty=1.2),
    Sampling(max_tokens=40, temperature=0, stop=("a", "e", "i")),
    Sampling(max_tokens=40, temperature=0.5, seed=3, min_tokens=10, logit_bias={7: 2.0}),
    Sampling(max_tokens=1, temperature=0),
    Sampling(max_tokens=30, temperature=0.8, seed=4, n=3, ignore_eos=True),
]


class Seer:
    """Knows some answers beforehand, and guesses that every tenth token is a wrong one."""

    def __init__(self, known: dict[tuple[int, ...], list[int]], wrong: int = 1) -> None:
        self._known, self._wrong = known, wrong

    def guess(self, rooms):
        found = {}
        for one, n in rooms.items():
            answer, at = self._known[tuple(one.request.prompt)], one.n_generated
            guess = [self._wrong if place % 10 == 9 else token for place, token in enumerate(answer)][at : at + n]
            if guess:
                found[one] = guess
        return found


@needs_native
@pytest.mark.parametrize("kind", ["lookup", "itself", "another"])
@pytest.mark.parametrize("kv_tokens", [1 << 14, 1024], ids=["roomy", "four_at_once"])
async def test_answers_are_those_without_guesses(small, tokenizer, kind, kv_tokens):
    if kind == "lookup":
        guesser = PromptLookup()
    elif kind == "itself":
        guesser = DraftModel(TorchBackend(small), 512)
    else:
        torch.manual_seed(9)
        config = mpt.MPTConfig(d_model=64, n_heads=2, n_layers=1, vocab_size=576, max_seq_len=CONTEXT)
        guesser = DraftModel(TorchBackend(mpt.MPTForCausalLM(config).eval()), 512)
    with running(small, tokenizer) as engine:
        expected = await answers(engine, SAMPLINGS)
    with running(small, tokenizer, guesser, kv_tokens) as engine:
        found = await answers(engine, SAMPLINGS)
        stats = engine.stats()
    assert found == expected  # tokens, texts, log-probabilities to the last bit, reasons
    assert stats.n_guessed > 0
    if kind == "itself":
        assert stats.n_guessed_right > 0.4 * stats.n_guessed  # samples at high temperature disagree with its best


@needs_native
async def test_guesses_change_no_answer_of_an_adapter(small, tokenizer):
    g = torch.Generator().manual_seed(0)
    adapters: list[Adapter | None] = [None]
    for rank in (3, 8):
        pairs = {
            name: (torch.randn(rank, each.in_features, generator=g), torch.randn(each.out_features, rank, generator=g))
            for name, each in adaptable(small)
        }
        pairs = {name: (a.bfloat16() / 8, b.bfloat16() / 8) for name, (a, b) in pairs.items()}
        adapters.append(Adapter(f"rank {rank}", pairs))

    async def answers(engine: Engine) -> list[list[Delta]]:
        async def one(prompt: list[int], adapter: Adapter | None) -> list[Delta]:
            sampling = Sampling(max_tokens=60, temperature=0, ignore_eos=True, logprobs=1)
            events = engine.submit(prompt, sampling, request_id="test", adapter=adapter)
            return [event async for event in events if isinstance(event, Delta)]

        found = await asyncio.gather(*(one(p, a) for p, a in zip(texts(3), adapters, strict=True)))
        return [functools.reduce(Delta.then, deltas) for deltas in found]

    with running(small, tokenizer) as engine:
        expected = await answers(engine)
    with running(small, tokenizer, PromptLookup()) as engine:
        assert await answers(engine) == expected
        assert engine.stats().n_guessed_right > 0
    assert len({whole.token_ids for whole in expected}) == 3


@needs_native
async def test_right_guesses_make_an_answer_take_few_steps(small, tokenizer):
    sampling = Sampling(max_tokens=100, temperature=0, ignore_eos=True)
    with running(small, tokenizer) as engine:
        [[expected]] = await answers(engine, [sampling])
    with running(small, tokenizer, Seer({tuple(texts(1)[0]): list(expected.token_ids)})) as engine:
        assert await answers(engine, [sampling]) == [[expected]]
        stats = engine.stats()
    # One step reads the prompt; of each ten tokens the guesses of nine are right.
    assert stats.n_steps <= 1 + 100 / 5
    assert stats.n_guessed_right > 60


@needs_native
async def test_an_answer_ends_inside_a_right_guess(small, tokenizer):
    endless = Sampling(max_tokens=100, temperature=0, ignore_eos=True, logprobs=1)
    with running(small, tokenizer) as engine:
        [[whole]] = await answers(engine, [endless])
    seer, tokens = Seer({tuple(texts(1)[0]): list(whole.token_ids)}), whole.token_ids
    new = [n for n, token in enumerate(tokens, 1) if n > 10 and token not in tokens[: n - 1]]
    assert len(new) > 4, "some must fall inside a guess"
    endings = [{"max_tokens": n} for n in range(25, 29)] + [{"stop_token_ids": (tokens[n - 1],)} for n in new]
    for n, ending in zip([*range(25, 29), *new], endings, strict=True):
        with running(small, tokenizer, seer) as engine:
            [[ended]] = await answers(engine, [dataclasses.replace(endless, **ending)])
            assert engine.stats().n_guessed_right > 10
        assert (ended.token_ids, ended.logprobs) == (tokens[:n], whole.logprobs[:n])
        assert ended.finish_reason == ("length" if "max_tokens" in ending else "stop")


@needs_native
async def test_a_step_is_one_delta_of_a_sample(small, tokenizer):
    sampling = Sampling(max_tokens=100, temperature=0, ignore_eos=True, logprobs=1)
    with running(small, tokenizer) as engine:
        [[expected]] = await answers(engine, [sampling])
    with running(small, tokenizer, Seer({tuple(texts(1)[0]): list(expected.token_ids)})) as engine:
        events = engine.generate(texts(1)[0], sampling, request_id="test")
        deltas = [event async for event in events if isinstance(event, Delta)]
        assert len(deltas) == engine.stats().n_steps < 50
    assert all(len(delta.logprobs) == len(delta.token_ids) for delta in deltas)


class Poisoned(TorchBackend):
    """Gives no finite logits behind one token, in a step that guesses at it."""

    def __init__(self, model: mpt.MPTForCausalLM, behind: int) -> None:
        super().__init__(model)
        self.behind = behind

    def forward(self, work):
        logits, at = super().forward(work).clone(), 0
        for item in work:
            for token in item.tokens[len(item.tokens) - item.n_logits :]:
                if token == self.behind and len(item.tokens) > 1:
                    logits[at] = torch.nan
                at += 1
        return logits


@needs_native
@pytest.mark.parametrize("temperature", [0, 0.5])
async def test_a_guess_that_cannot_be_computed_counts_once_it_is_right(small, tokenizer, temperature):
    sampling = Sampling(max_tokens=60, temperature=temperature, seed=1, ignore_eos=True)
    prompt = texts(1)[0]
    with running(small, tokenizer) as engine:
        [[expected]] = await answers(engine, [sampling])
    wrong = next(token for token in range(512) if token not in expected.token_ids)
    seer = Seer({tuple(prompt): list(expected.token_ids)}, wrong)
    with running(Poisoned(small, wrong), tokenizer, seer) as engine:
        assert await answers(engine, [sampling]) == [[expected]]
    with running(Poisoned(small, expected.token_ids[13]), tokenizer, seer) as engine:
        got: list[int] = []

        async def answer() -> None:
            async for event in engine.generate(prompt, sampling, request_id="test"):
                got.extend(event.token_ids if isinstance(event, Delta) else ())

        with pytest.raises(EngineFailed, match="no finite logits"):
            await answer()
        assert got == list(expected.token_ids[: len(got)])
        assert got[-1] == expected.token_ids[13]
        assert engine.stats().kv_kept_bytes == 0


@needs_native
async def test_a_grammar_is_followed_token_by_token(small, tokenizer):
    numbers = await Grammars(tokenizer).get("regex", r"([0-9]{3},){12}")
    samplings = [Sampling(max_tokens=80, temperature=t, seed=k, grammar=numbers) for k, t in enumerate((0, 0.7, 1.5))]
    with running(small, tokenizer) as engine:
        expected = await answers(engine, samplings)
    with running(small, tokenizer, DraftModel(TorchBackend(small), 512)) as engine:
        assert await answers(engine, samplings) == expected
        assert engine.stats().n_guessed > 0
    for [whole] in expected:
        assert re.fullmatch(r"([0-9]{3},){12}", whole.text)


@needs_native
@pytest.mark.parametrize("temperature", [0, 1.0])
async def test_what_a_grammar_leaves_no_choice_about_is_guessed(small, tokenizer, temperature):
    said = ("A sentence that nobody would copy from a prompt", "Or quite another one, which is not that much shorter")
    sampling = Sampling(
        max_tokens=80, temperature=temperature, seed=1, grammar=await Grammars(tokenizer).get("choice", list(said))
    )
    with running(small, tokenizer) as engine:
        expected = await answers(engine, [sampling])
    with running(small, tokenizer, Seer({tuple(texts(1)[0]): []})) as engine:
        assert await answers(engine, [sampling]) == expected
        stats = engine.stats()
    assert expected[0][0].text in said
    assert stats.n_guessed_right == stats.n_guessed
    assert stats.n_steps <= 3 + 5  # the prompt, `A` or `O`, the end; 4, 8, 15, 15 tokens and what is left


async def test_a_model_in_float32_gives_the_naive_loops_tokens(model, tokenizer):
    prompt = texts(1)[0]
    prompt = [token % model.config.vocab_size for token in prompt]
    expected = mpt.generate(model, prompt, 40)
    with running(model, tokenizer, PromptLookup()) as engine:
        sampling = Sampling(max_tokens=40, temperature=0, ignore_eos=True)
        events = [event async for event in engine.generate(prompt, sampling, request_id="test")]
    assert [t for event in events if isinstance(event, Delta) for t in event.token_ids] == expected


@dataclasses.dataclass(eq=False)
class Written:
    """As much of a sequence as lookup reads."""

    tokens: list[int]
    n_prompt: int


def looked_up(prompt: list[int], answer: list[int], n: int, lookup: PromptLookup | None = None) -> list[int]:
    one = Written([*prompt, *answer], len(prompt))
    return (lookup or PromptLookup()).guess({one: n}).get(one, [])


def test_lookup_copies_what_followed_the_last_time():
    assert looked_up([1, 2, 3, 4, 5, 1, 2, 3], [], 3) == [4, 5, 1]
    assert looked_up([1, 2, 3, 4, 9, 2, 3, 7, 8, 1, 2, 3], [], 3) == [4, 9, 2]  # three tokens alike before two
    assert looked_up([9, 2, 3, 7, 8, 1, 2, 3], [], 3) == [7, 8, 1]
    assert looked_up([2, 3, 5, 2, 3, 7, 2, 3], [], 3) == [7, 2, 3]  # the last time
    assert looked_up([3, 5, 1, 3], [], 3) == [5, 1, 3]
    assert looked_up([3, 5, 1, 3], [], 7) == [5, 1, 3, 5, 1, 3, 5]  # and on, through what it guesses
    assert looked_up([1, 2, 3, 4], [], 3) == []
    assert looked_up([1], [], 3) == []


def test_lookup_reads_only_what_is_new():
    lookup, one = PromptLookup(), Written([4, 5, 6, 7], 4)
    assert lookup.guess({one: 5}) == {}
    one.tokens += [4, 5]
    assert lookup.guess({one: 2}) == {one: [6, 7]}
    one.tokens += [8, 9, 4, 5]
    assert lookup.guess({one: 2}) == {one: [8, 9]}


COLON, LINE, INDENT = 1, 2, 3  # a line of YAML: 10 COLON 20 LINE INDENT, and of JSON: 10 IS 20 NEXT
IS, NEXT, LAST = 4, 5, 6
YAML = [10, COLON, 20, LINE, INDENT, 11, COLON, 21, LINE, INDENT, 12, COLON, 22, LINE, INDENT, 13, COLON, 23, LINE, 99]


def test_lookup_makes_the_edits_that_were_made_before():
    assert looked_up(YAML, [10], 2) == [COLON, 20]
    assert looked_up(YAML, [10, IS], 2) == []  # how much it replaces is not known
    assert looked_up(YAML, [10, IS, 20], 2) == [LINE, INDENT]
    first_line = [10, IS, 20, NEXT, 11]
    assert looked_up(YAML, first_line, 2) == [IS, 21]
    assert looked_up(YAML, first_line, 11) == [IS, 21, NEXT, 12, IS, 22, NEXT, 13, IS, 23, NEXT]
    assert looked_up(YAML, [*first_line, IS, 21, NEXT], 6) == [12, IS, 22, NEXT, 13, IS]


def test_lookup_forgets_an_edit_that_is_not_made_again():
    assert looked_up(YAML, [10, IS, 20, NEXT, 11, COLON, 21], 4) == [NEXT, 12, COLON, 22]


def test_lookup_goes_on_behind_a_token_that_was_put_in():
    text = [10, 11, 12, 13, 14, 12, 15, 16, 12, 17, 99]  # the answer has a 9 before each 12
    assert looked_up(text, [10, 11, 9, 12], 7) == [13, 14, 9, 12, 15, 16, 9]
    assert looked_up(text, [10, 11, 9, 12, 13, 14, 9], 4) == [12, 15, 16, 9]


def test_lookup_loses_its_source_at_the_prompts_end():
    assert looked_up([7, 8, 9, 8], [50, 51, 60, 50, 51], 1) == [60]  # 51 is no place that 50 led back to


def test_lookup_finds_another_source_where_it_has_lost_one():
    assert looked_up([*YAML, 30, 31, 32, 33], [10, IS, 20, LAST, 30, 31], 2) == [32, 33]


def test_wrong_guesses_grow_rare_and_right_ones_long():
    pace, tried = Pace(), 0
    for _ in range(1000):
        if n := pace.allowed():
            tried += 1
            pace.note(n, 0)
    assert tried <= 7 + 1000 / 64  # pauses of 0, 1, 3, 7, 15, 31, then 63 steps
    pace = Pace()
    for _ in range(4):
        n = pace.allowed()
        pace.note(n, n)
    assert pace.allowed() == MAX_GUESS


# -- as `mpt serve` sets it up ---------------------------------------------------------------------------------------


def opened(name: str, **options: object) -> Speculation | None:
    endpoint = open_endpoint(name, ModelOptions(name, kv_gb=0.016, **options))
    endpoint.engine.close()
    return endpoint.engine.speculation


@needs_native
def test_a_server_guesses_where_that_changes_no_answer():
    assert isinstance(opened("mpt-tiny", dtype="bfloat16").guesser, PromptLookup)
    assert isinstance(opened("mpt-tiny", dtype="float32").guesser, PromptLookup)
    assert opened("mpt-tiny", dtype="bfloat16", speculate=False) is None
    drafted = opened("mpt-tiny-chat", dtype="bfloat16", draft="mpt-tiny")
    assert isinstance(drafted.guesser, DraftModel)


def test_a_server_that_is_told_to_guess_does_so_where_steps_round_otherwise(monkeypatch):
    monkeypatch.setenv("MPT_NATIVE", "0")
    assert opened("mpt-tiny", dtype="float32") is None
    assert isinstance(opened("mpt-tiny", dtype="float32", speculate=True).guesser, PromptLookup)


def test_on_a_gpu_a_draft_shares_the_budget_with_its_model(monkeypatch):
    """As for a GPU, on this CPU: both have as many pages, and no more bytes together than were told."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda *_: (1 << 32, 1 << 32))
    monkeypatch.setattr("mpt.backends.flash.prompt_kernel", lambda dtype, d_head, int8_cache: ("FlexAttention", None))
    real = choosing.load_for_engine
    monkeypatch.setattr(
        choosing, "load_for_engine", lambda folder, dtype, device: real(folder, dtype=dtype, device="cpu")
    )
    options = ModelOptions("mpt-tiny-chat", dtype="float32", draft="mpt-tiny", kv_gb=0.2, max_running=4)
    engine = open_endpoint("m", options).engine
    engine.close()
    model, draft = engine._backend, engine.speculation.guesser.backend
    assert isinstance(model, PagedBackend) and isinstance(draft, PagedBackend)
    assert draft.n_free_pages == model.n_free_pages > 0
    taken = model.n_free_pages * PAGE * (model.bytes_per_token + draft.bytes_per_token)
    assert 0.2e9 - PAGE * (model.bytes_per_token + draft.bytes_per_token) < taken <= 0.2e9


@needs_native
def test_drafts_that_cannot_be_used_are_refused(small, tmp_path, monkeypatch):
    monkeypatch.setenv("MPT_NATIVE", "0")
    with pytest.raises(UserError, match=r"whose steps run in C.*MPT_NATIVE=0"):
        opened("mpt-tiny", dtype="float32", draft="mpt-tiny")
    monkeypatch.delenv("MPT_NATIVE")
    raw = Raw(models.BPE(vocab={"<|endoftext|>": 0, "a": 1}, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.add_special_tokens(["<|endoftext|>"])
    raw.save(str(tmp_path / "tokenizer.json"))
    other = mpt.save(small, tmp_path / "other", tokenizer=Tokenizer.from_file(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="another tokenizer"):
        opened("mpt-tiny", dtype="bfloat16", draft=str(other))
