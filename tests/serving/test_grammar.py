"""Structured output: what comes is what was asked, as `json`, `jsonschema` and `re` see it; what is hostile is refused.

The random model would write anything: every token that fits is the mask's doing.
"""

import asyncio
import contextlib
import json
import random
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest
import torch

from mpt.catalog import find_local
from mpt.config import MPTConfig
from mpt.engine import grammar as grammars
from mpt.engine.endpoint import open_endpoint
from mpt.engine.errors import EngineError, Unsupported
from mpt.engine.grammar import BadGrammar, Grammars
from mpt.engine.request import Delta, Sampling
from mpt.generation import generate
from mpt.options import ModelOptions
from mpt.transformers_model import MPTForCausalLM
from serving.app import make_app
from serving.endpoints import Serving
from serving.options import ServeOptions
from tests.in_process import running_endpoint
from tests.mpt.engine.test_engine import collect, greedy, last, prompts, running, text_of, tokens_of

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "ü"]}, "maxItems": 3},
        "nested": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/point"}]},
    },
    "required": ["name", "age", "tags", "nested"],
    "additionalProperties": False,
    "$defs": {
        "point": {
            "type": "object",
            "properties": {"x": {"type": "boolean"}},
            "required": ["x"],
            "additionalProperties": False,
        }
    },
}


@pytest.fixture(scope="module")
def serving(model, tokenizer) -> Iterator[Serving]:
    with running_endpoint(model, tokenizer, context_length=2048, kv_bytes=1 << 26) as endpoint:
        yield Serving(ServeOptions(models={}), endpoints={"base": endpoint})


async def post(serving: Serving, path: str = "/v1/completions", **body: Any) -> httpx.Response:
    transport = httpx.ASGITransport(make_app(serving))
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=100) as client:
        return await client.post(path, json={"model": "base", "max_tokens": 400, **body})


async def ask(serving: Serving, **body: Any) -> list[dict[str, Any]]:
    answer = await post(serving, prompt="x", **body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


@pytest.mark.parametrize("temperature", [0, 1, 2])
async def test_json_of_a_schema_validates(serving, temperature):
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    choices = await ask(serving, response_format=form, temperature=temperature, seed=5, n=4, max_tokens=1500)
    for choice in choices:
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(choice["text"]), PERSON)
    assert len({choice["text"] for choice in choices}) == (4 if temperature else 1)


async def test_both_ways_to_ask_for_json_and_a_schema_as_text_are_the_same(serving):
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    ways = (
        {"response_format": form},
        {"structured_outputs": {"json": PERSON}},
        {"structured_outputs": {"json": json.dumps(PERSON)}},
    )
    texts = [(await ask(serving, seed=3, **way))[0]["text"] for way in ways]
    assert len(set(texts)) == 1
    jsonschema.validate(json.loads(texts[0]), PERSON)


async def test_any_object_is_json_or_cut_at_max_tokens(serving):
    for way in ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}):
        for choice in await ask(serving, seed=1, n=8, max_tokens=300, **way):
            assert choice["text"].lstrip().startswith("{")
            if choice["finish_reason"] == "stop":
                assert isinstance(json.loads(choice["text"]), dict)
    cut = (await ask(serving, max_tokens=3, structured_outputs={"json": PERSON}))[0]
    assert cut["finish_reason"] == "length" and re.fullmatch(r'\s*(\{\s*"?n?)?', cut["text"])


@pytest.mark.parametrize(
    "pattern",
    [
        r"\d{3}-[0-9]{4}",
        r"(yes|no), (a|bc)+!",
        r"[^@\n]{1,9}@[a-z]{1,9}\.com",
        r"[äöü日本]{2,5}",
        "^abc$",
        "(😀|é)+x",
    ],
)
async def test_a_regular_expression_is_matched_in_full(serving, pattern):
    for choice in await ask(serving, structured_outputs={"regex": pattern}, seed=1, n=6):
        if choice["finish_reason"] == "stop":
            assert re.fullmatch(pattern, choice["text"]), choice["text"]
    ended = await ask(serving, structured_outputs={"regex": pattern}, seed=1, n=2, max_tokens=1500)
    assert all(choice["finish_reason"] == "stop" for choice in ended)


async def test_a_choice_is_one_of_them_whatever_its_characters(serving):
    given = ["yes", 'q"u\\o|te', "two\nlines", "日本 é😀", "<|im_end|>", "(a|b)*", "/x/"]
    seen = {choice["text"] for seed in range(5) for choice in await ask(
        serving, structured_outputs={"choice": given}, seed=100 * seed, n=8, skip_special_tokens=False
    )}  # fmt: skip
    assert seen <= set(given) and len(seen) > 3
    for each in given:
        assert [c["text"] for c in await ask(serving, structured_outputs={"choice": [each]})] == [each]


async def test_a_grammar_of_lark_is_followed(serving):
    sums = 'start: n ("+" n)*\nn: /[0-9]{1,3}/'
    for choice in await ask(serving, structured_outputs={"grammar": sums}, seed=1, n=6):
        assert re.fullmatch(r"[0-9]{1,3}(\+[0-9]{1,3})*", choice["text"].rstrip("+"))


async def test_chat_and_streams_are_bound_too(serving):
    said = {"messages": [{"role": "user", "content": "hello"}], "seed": 4}
    form = {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}
    whole = (await post(serving, "/v1/chat/completions", response_format=form, **said)).json()["choices"][0]
    assert whole["finish_reason"] == "stop"
    jsonschema.validate(json.loads(whole["message"]["content"]), PERSON)
    stream = (await post(serving, "/v1/chat/completions", response_format=form, stream=True, **said)).text
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    pieces = [event["choices"][0]["delta"].get("content", "") for event in events]
    assert "".join(pieces) == whole["message"]["content"] and len(pieces) > 10
    assert stream.endswith("data: [DONE]\n\n")


async def test_the_end_costs_one_token_and_logprobs_are_of_the_raw_distribution(serving, model, tokenizer):
    body = {"structured_outputs": {"choice": ["abc"]}, "logprobs": 1, "temperature": 0, "skip_special_tokens": False}
    answer = (await post(serving, prompt="x", **body)).json()
    assert answer["usage"]["completion_tokens"] == 4  # a token a byte, and the end
    given = answer["choices"][0]["logprobs"]["token_logprobs"]
    ids = tokenizer.encode("xabc")
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits
    truth = logits[0].double().log_softmax(-1)
    assert given[:3] == pytest.approx([float(truth[at, ids[at + 1]]) for at in range(3)], abs=1e-4)


async def test_stop_strings_penalties_and_biases_go_together_with_it(serving, tokenizer):
    asked = {"structured_outputs": {"regex": "[ab]{40}"}}
    (stopped,) = await ask(serving, stop=["b"], seed=1, **asked)
    assert stopped["finish_reason"] == "stop" and set(stopped["text"]) <= {"a"}
    a, z = tokenizer.encode("az")
    (biased,) = await ask(serving, logit_bias={str(a): 100, str(z): 100}, **asked)
    assert biased["text"] == "a" * 40
    (punished,) = await ask(serving, logit_bias={str(a): 50}, frequency_penalty=2.0, temperature=0, **asked)
    assert 20 < punished["text"].count("a") < 40  # the lead of 50 is used up after 25


async def test_no_control_token_and_no_padded_id_comes_through(tokenizer):
    """A model of 320 ids above a tokenizer of 260, its best tokens those that must not come."""
    torch.manual_seed(1)
    config = MPTConfig(d_model=64, n_heads=4, n_layers=2, vocab_size=320, max_seq_len=2048)
    padded = MPTForCausalLM(config).eval()
    kept = Grammars(tokenizer)
    pushed = dict.fromkeys((1, 2, 270, 319), 100.0)
    with running(padded, tokenizer) as engine:
        for kind, value in (("regex", "[a-z]{5}"), ("grammar", 'start: "ab" (<[2]> | <[3]> | "c") /d?/')):
            asked = greedy(20, grammar=await kept.get(kind, value), logit_bias=pushed)
            events = await collect(engine, [5, 6], Sampling(**{**asked.__dict__, "ignore_eos": False}))
            *text, end = tokens_of(events)
            assert end in tokenizer.end_ids and last(events).finish_reason == "stop"
            assert all(4 <= token < 260 for token in text)
            assert re.fullmatch("[a-z]{5}" if kind == "regex" else "abcd?", text_of(events))
    with pytest.raises(BadGrammar, match="no token"):
        await kept.get("grammar", "start: <[2]>")


async def test_a_sample_that_was_sent_back_goes_on_in_its_grammar(model, tokenizer):
    """Room for two rows of 512 tokens and six that grow from 200 to 400; compared with the same ones alone."""
    digits = await Grammars(tokenizer).get("regex", r"([0-9]{3},){60}")
    asked = [[random.Random(seed).randrange(4, 260) for _ in range(200)] for seed in range(6)]
    sampling = Sampling(max_tokens=160, seed=7, grammar=digits)
    with running(model, tokenizer, kv_tokens=1024, max_running=6) as engine:
        crowded = await asyncio.gather(*(collect(engine, prompt, sampling) for prompt in asked))
        assert engine.stats().n_preemptions > 0
        alone = [await collect(engine, prompt, sampling) for prompt in asked]
    assert [tokens_of(events) for events in crowded] == [tokens_of(events) for events in alone]
    for events in crowded:
        assert re.fullmatch(r"([0-9]{3},)*[0-9]{0,3}", text_of(events))


async def test_who_asks_for_nothing_pays_nothing_and_gets_the_same(model, tokenizer, monkeypatch):
    kept = await Grammars(tokenizer).get("regex", "[0-9]+")
    adjusted = []
    allowed = grammars.GrammarState.allowed
    monkeypatch.setattr(grammars.GrammarState, "allowed", lambda self, n: adjusted.append(1) or allowed(self, n))
    asked = prompts(4)
    with running(model, tokenizer) as engine:
        alone = [tokens_of(await collect(engine, prompt, greedy())) for prompt in asked]
        assert not adjusted
        beside = asyncio.gather(*(collect(engine, prompt, greedy()) for prompt in asked))
        await collect(engine, [5], Sampling(max_tokens=30, grammar=kept))
        assert [tokens_of(events) for events in await beside] == alone
    assert alone == [generate(model, prompt, 24) for prompt in asked] and adjusted


async def test_a_grammar_that_fails_on_its_way_ends_its_own_request_only(model, tokenizer, monkeypatch):
    kept = await Grammars(tokenizer).get("regex", "[0-9]{30}")
    allowed, n_masks = grammars.GrammarState.allowed, 0

    def failing(self: grammars.GrammarState, vocab_size: int) -> np.ndarray:
        nonlocal n_masks
        n_masks += 1
        if n_masks > 5:
            raise BadGrammar("too complex")
        return allowed(self, vocab_size)

    monkeypatch.setattr(grammars.GrammarState, "allowed", failing)
    with running(model, tokenizer) as engine:
        other = asyncio.create_task(collect(engine, [7, 8], greedy(60)))
        with pytest.raises(Unsupported, match="too complex"):
            await collect(engine, [5], Sampling(max_tokens=30, grammar=kept))
        assert tokens_of(await other) == generate(model, [7, 8], 60)
        assert engine.stats().kv_used_bytes == 0


def nested(n: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(n):
        schema = {"type": "array", "items": schema}
    return schema


HOSTILE = {
    "deep": ({"json": nested(200)}, "nested"),
    "very deep": ({"json": nested(400)}, "nested"),
    "deep text": ({"json": json.dumps(nested(200))}, "nested"),
    "no object": ({"json": "[1]"}, "object"),
    "no JSON": ({"json": "{"}, "not valid JSON"),
    "megabyte": ({"json": {"const": "x" * (1 << 20)}}, "bytes"),
    "huge enum": ({"json": {"enum": [f"item {n}" for n in range(20_000)]}}, "bytes"),
    "huge choice": ({"choice": [f"item {n}" for n in range(20_000)]}, "bytes"),
    "loop": ({"json": {"$ref": "#"}}, "no text"),
    "loop of two": ({"json": {"$ref": "#/x/a", "x": {"a": {"$ref": "#/x/b"}, "b": {"$ref": "#/x/a"}}}}, ""),
    "a request elsewhere": ({"json": {"$ref": "http://127.0.0.1:1/x.json"}}, "not present"),
    "a file": ({"json": {"$ref": "file:///etc/passwd"}}, "not present"),
    "intersections": ({"json": {"allOf": [{"pattern": f".*{chr(97 + n)}.*"} for n in range(20)]}}, "compile"),
    "remainders": ({"json": {"type": "integer", "multipleOf": 9_999_991}}, "compile"),
    "long run": ({"regex": "a{1000000}"}, "compile"),
    "lookahead": ({"regex": "(?=a)b"}, "look-around"),
    "backreference": ({"regex": r"(a)\1"}, "backreferences"),
    "control": ({"grammar": "start: <[1]>"}, "no token"),
    "endless": ({"grammar": "start: s\ns: s"}, "no text"),
    "nonsense": ({"grammar": "::= a"}, ""),
    "unknown keyword": ({"json": {"if": {"type": "string"}}}, "if"),
    "lenient": ({"json": {"x-guidance": {"lenient": True}, "if": {}}}, "x-guidance"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_grammar_is_refused_soon_and_others_go_on(serving, name):
    asked, words = HOSTILE[name]
    n_tokens, begun, ended = 0, asyncio.Event(), asyncio.Event()

    async def stream() -> None:
        nonlocal n_tokens
        while not ended.is_set():
            events = serving.endpoints["base"].engine.generate([5], greedy(500), request_id="other")
            async with contextlib.aclosing(events):
                async for event in events:
                    n_tokens += isinstance(event, Delta)
                    begun.set()
                    if ended.is_set():
                        return

    other = asyncio.create_task(stream())
    await begun.wait()
    n_before, started = n_tokens, time.perf_counter()
    answer = await post(serving, prompt="x", structured_outputs=asked)
    took_s, n_meanwhile = time.perf_counter() - started, n_tokens - n_before
    ended.set()
    await other
    error = answer.json()["error"]
    is_refused_unread = name in ("deep", "very deep")  # by the depth of the body
    assert answer.status_code == 400
    assert error["param"] == (None if is_refused_unread else f"structured_outputs.{next(iter(asked))}")
    assert words in error["message"] and len(error["message"]) < 400 and "\n" not in error["message"]
    assert took_s < 15  # 1 s of CPU time, however busy the machine that tests is
    if words == "compile":
        assert n_meanwhile > 20


async def test_a_step_that_takes_long_ends_its_request(tokenizer, monkeypatch):
    kept = (await Grammars(tokenizer).get("regex", "[0-9]+")).begin()
    monkeypatch.setattr(grammars, "_MAX_MASK_S", -1.0)
    with pytest.raises(BadGrammar, match="a step of it took"):
        kept.allowed(260)


async def test_grammars_are_kept_and_the_least_used_let_go(tokenizer, monkeypatch):
    tried: list[str] = []
    monkeypatch.setattr(grammars, "_try_out", tried.append)
    monkeypatch.setattr(grammars, "_MAX_KEPT", 2)
    kept = Grammars(tokenizer)
    first, same = await asyncio.gather(kept.get("regex", "a"), kept.get("regex", "a"))  # at the same time: once
    assert first is same and len(tried) == 1
    await kept.get("regex", "b")
    assert await kept.get("regex", "a") is first and len(tried) == 2
    await kept.get("regex", "c")
    await kept.get("regex", "a")
    assert len(tried) == 3
    await kept.get("regex", "b")
    assert len(tried) == 4
    with pytest.raises(BadGrammar):
        await kept.get("regex", "(")
    with pytest.raises(BadGrammar):
        await kept.get("regex", "(")
    assert len(tried) == 5  # refusals too


async def test_a_plain_json_object_is_compiled_before_anybody_asks(tokenizer, monkeypatch):
    """Without a trial, which is for what clients write; and for every client, since it is no secret."""
    tried: list[str] = []
    monkeypatch.setattr(grammars, "_try_out", tried.append)
    kept = Grammars(tokenizer)
    await kept.prepare()
    monkeypatch.setattr(Grammars, "_compile_here", None)  # nothing more is compiled
    assert await kept.get("json", {"type": "object"}, "ann") is await kept.get("json", '{"type":"object"}', "bob")
    assert tried == []


async def test_a_minute_without_time_is_503_and_is_not_remembered(serving, monkeypatch):
    asked = {"prompt": "x", "structured_outputs": {"choice": ["only here"]}}
    with monkeypatch.context() as busy:
        busy.setattr(grammars, "_TRIAL_WALL_S", 0.001)
        answer = await post(serving, **asked)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
    assert (await post(serving, **asked)).json()["choices"][0]["text"] == "only here"


@pytest.fixture(scope="module")
def tiny() -> Iterator[Serving]:
    if find_local("mpt-tiny-instruct") is None:
        pytest.skip("the mpt-tiny weights are not in mpt/tiny; run `make tiny`")
    endpoint = open_endpoint("base", ModelOptions("mpt-tiny-instruct", kv_gb=0.25))
    yield Serving(ServeOptions(models={}), endpoints={"base": endpoint})
    endpoint.engine.close()


async def test_the_tiny_instruct_model_writes_valid_json_at_temperature_1(tiny):
    question = "Convert the following YAML to JSON:\n\nname: John\nage: 30\ntags: [a, b]\nnested: null"
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    for seed in range(4):
        answer = await post(
            tiny, "/v1/chat/completions", messages=[{"role": "user", "content": question}], response_format=form,
            seed=100 * seed, n=4, temperature=1,
        )  # fmt: skip
        for choice in answer.json()["choices"]:
            assert choice["finish_reason"] == "stop"
            jsonschema.validate(json.loads(choice["message"]["content"]), PERSON)


async def test_every_word_of_a_real_tokenizer_is_spelt_as_it_is(tiny):
    """What a regular expression lets through is decided by bytes, those of halves of characters too."""
    tokenizer = tiny.endpoints["base"].tokenizer
    state = (await Grammars(tokenizer).get("regex", "[a-c]{0,3}")).begin()
    allowed = set(np.flatnonzero(state.allowed(tokenizer.vocab_size)).tolist())
    words = {t for t in range(tokenizer.vocab_size) if re.fullmatch(b"[a-c]{1,3}", tokenizer.token_bytes(t))}
    assert allowed == words | set(tokenizer.end_ids)


def test_engine_errors_of_a_grammar_are_the_clients(serving):
    from serving.errors import InvalidRequest, from_engine

    error: EngineError = Unsupported("the grammar cannot be followed any further")
    assert isinstance(from_engine(error, started=True), InvalidRequest)
