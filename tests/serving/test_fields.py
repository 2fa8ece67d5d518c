"""What a body may say beside what is read: values that ask for nothing pass, all else is refused by its name."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from serving.app import make_app
from serving.endpoints import Serving
from serving.errors import InvalidRequest
from serving.options import ServeOptions
from serving.protocol.body import parse
from serving.protocol.generation import ChatRequest, CompletionRequest
from serving.protocol.unused import ANYTHING, UNUSED
from tests.in_process import running_endpoint

CHAT = {"model": "base", "messages": [{"role": "user", "content": "Hi"}]}
TEXT = {"model": "base", "prompt": "Hi"}


@pytest.fixture(scope="module")
def serving(model, tokenizer) -> Iterator[Serving]:
    with running_endpoint(model, tokenizer, context_length=1024, kv_bytes=1 << 22) as endpoint:
        yield Serving(ServeOptions(models={}), endpoints={"base": endpoint})


async def post(serving: Serving, path: str, body: dict[str, Any]) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(make_app(serving)), base_url="http://test") as client:
        return await client.post(path, json=body)


def read(kind: Any, body: dict[str, Any]) -> Any:
    return parse(kind, json.dumps(body).encode())


# What clients of other servers send by themselves: OpenAI's defaults, vLLM's, llama.cpp's, Open WebUI's.
NEUTRAL = {
    "echo": False, "top_logprobs": 0, "reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": False},
    "cache_prompt": True, "keep_alive": "5m", "request_id": "abc-1", "max_tokens": -1, "n": 1.0, "store": False,
    "tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "functions": [], "modalities": ["text"],
    "length_penalty": 1.0, "use_beam_search": False, "mirostat": 0, "typical_p": 1.0, "repeat_penalty": 1,
    "logit_bias": {}, "stop": [], "prediction": None, "service_tier": "auto", "documents": [], "best_of": 1,
    "verbosity": "medium", "web_search_options": None, "truncate_prompt_tokens": None, "seed": 7.0, "suffix": "",
    "context_management": {"edits": []}, "reasoning": {"effort": None, "summary": "auto"}, "max_tool_calls": 3,
    "thinking": {"type": "adaptive"},
    "add_generation_prompt": True, "continue_final_message": False, "return_token_ids": False, "think": False,
}  # fmt: skip
REFUSED = {
    "suffix": "x", "reasoning_effort": "high", "store": True, "functions": [{"name": "a"}],
    "audio": {"voice": "alloy"}, "documents": [{"text": "a"}], "bad_words": ["a"], "mirostat": 2, "dimensions": 8,
    "reasoning": {"effort": "low", "summary": None}, "thinking": {"type": "enabled", "budget_tokens": 9},
    "context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]},
    "modalities": ["text", "audio"], "web_search_options": {"search_context_size": "low"},
}  # fmt: skip


@pytest.mark.parametrize(("path", "base"), [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)])
async def test_values_that_ask_for_nothing_change_nothing(serving, path, base):
    given = {**base, "temperature": 0, "max_tokens": 4, "ignore_eos": True}
    plain = (await post(serving, path, given)).json()
    for name, value in NEUTRAL.items():
        if name in ("max_tokens", "chat_template_kwargs") and (name == "max_tokens" or base is TEXT):
            continue
        response = await post(serving, path, {**given, name: value})
        assert response.status_code == 200, (name, response.text)
        for key in ("choices", "usage"):
            found, expected = response.json()[key], plain[key]
            if key == "usage":
                found, expected = found["total_tokens"], expected["total_tokens"]
            assert found == expected, name


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_null_asks_for_nothing_anywhere(kind):
    base = CHAT if kind is ChatRequest else TEXT
    optional = [name for name, field in kind.model_fields.items() if not field.is_required()]
    plain, nulls = read(kind, base), read(kind, base | dict.fromkeys([*optional, *UNUSED]))
    assert plain == nulls
    nested = {
        "stream": True,
        "stream_options": {"include_usage": None},
        "response_format": {"type": "text", "json_schema": None},
    }
    assert read(kind, {**base, **nested}).stream_options.include_usage is False


def test_null_inside_a_schema_is_part_of_it():
    schema = {"enum": [None, 1], "default": None}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    asked = read(ChatRequest, {**CHAT, "response_format": form})
    assert asked.response_format.json_schema.json_schema == schema


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
@pytest.mark.parametrize("name", REFUSED)
def test_what_asks_for_something_is_refused_by_name(kind, name):
    with pytest.raises(InvalidRequest, match=f"`{name}`") as refused:
        read(kind, {**(CHAT if kind is ChatRequest else TEXT), name: REFUSED[name]})
    assert (refused.value.code, refused.value.param) == ("unsupported_parameter", name)


@pytest.mark.parametrize("name", sorted(name for name, neutral in UNUSED.items() if ANYTHING not in neutral))
def test_each_unused_field_is_refused_at_another_value(name):
    with pytest.raises(InvalidRequest, match=name):
        read(CompletionRequest, {**TEXT, name: {"no": "such value"}})


@pytest.mark.parametrize(
    ("name", "value"), [("n", True), ("n", 1.5), ("seed", "7"), ("max_tokens", -2), ("top_k", True)]
)
def test_numbers_stay_numbers(name, value):
    with pytest.raises(InvalidRequest, match=f"`{name}`"):
        read(CompletionRequest, {**TEXT, name: value})


@pytest.mark.parametrize("value", [2**63, 2**64, -(2**63) - 1, 1e30])
def test_a_number_that_is_too_large_is_told_its_range(value):
    with pytest.raises(InvalidRequest, match="9223372036854775808") as refused:
        read(CompletionRequest, {**TEXT, "seed": value})
    assert refused.value.param == "seed"


# -- vLLM's extras -------------------------------------------------------------------------------------------------


async def test_token_ids_come_with_the_answer_and_are_those_of_its_text(serving, tokenizer):
    asked = {"temperature": 0, "max_tokens": 5, "ignore_eos": True, "return_token_ids": True}
    completion = (await post(serving, "/v1/completions", {**TEXT, **asked})).json()["choices"][0]
    assert completion["prompt_token_ids"] == tokenizer.encode("Hi") and len(completion["token_ids"]) == 5
    chat = (await post(serving, "/v1/chat/completions", {**CHAT, **asked})).json()
    again = await post(serving, "/v1/completions", {"model": "base", "prompt": chat["prompt_token_ids"], **asked})
    assert again.json()["choices"][0]["token_ids"] == chat["choices"][0]["token_ids"]


async def test_streams_give_the_same_token_ids(serving):
    asked = {"temperature": 0, "max_tokens": 5, "ignore_eos": True, "return_token_ids": True}
    for path, base in (("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)):
        whole = (await post(serving, path, {**base, **asked})).json()
        text = (await post(serving, path, {**base, **asked, "stream": True})).text
        chunks = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
        ids = [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", [])]
        assert ids == whole["choices"][0]["token_ids"]
        first = [chunk.get("prompt_token_ids") or chunk["choices"][0].get("prompt_token_ids") for chunk in chunks]
        assert first[0] == (whole.get("prompt_token_ids") or whole["choices"][0]["prompt_token_ids"])
        assert not any(first[1:])


async def test_log_probabilities_of_the_prompt_are_those_that_echo_gives(serving):
    asked = {**TEXT, "prompt": [5, 6, 7], "max_tokens": 1, "temperature": 0}
    echoed = (await post(serving, "/v1/completions", {**asked, "echo": True, "logprobs": 2})).json()["choices"][0]
    told = (await post(serving, "/v1/completions", {**asked, "prompt_logprobs": 2})).json()["choices"][0]
    assert told["prompt_logprobs"][0] is None
    for n, token in ((1, 6), (2, 7)):
        found = told["prompt_logprobs"][n]
        assert found[str(token)]["logprob"] == pytest.approx(echoed["logprobs"]["token_logprobs"][n])
        best = max(echoed["logprobs"]["top_logprobs"][n].values())
        assert next(each["logprob"] for each in found.values() if each["rank"] == 1) == pytest.approx(best)
    chat = (await post(serving, "/v1/chat/completions", {**CHAT, "prompt_logprobs": 0, "max_tokens": 1})).json()
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]


async def test_tokens_are_called_by_their_ids_where_that_is_asked(serving):
    asked = {"max_tokens": 2, "ignore_eos": True, "return_tokens_as_token_ids": True, "return_token_ids": True}
    answer = (await post(serving, "/v1/completions", {**TEXT, **asked, "logprobs": 1})).json()["choices"][0]
    assert answer["logprobs"]["tokens"] == [f"token_id:{token}" for token in answer["token_ids"]]
    chat = {**CHAT, **asked, "logprobs": True, "logprob_token_ids": [9]}
    choice = (await post(serving, "/v1/chat/completions", chat)).json()["choices"][0]
    assert choice["logprobs"]["content"][0]["token"] == f"token_id:{choice['token_ids'][0]}"
    assert "token_id:9" in [each["token"] for each in choice["logprobs"]["content"][0]["top_logprobs"]]


async def test_without_alternatives_the_token_itself_is_told(serving):
    """OpenAI's reference: up to `logprobs` + 1 elements, since the sampled token is always among them."""
    answer = (await post(serving, "/v1/completions", {**TEXT, "max_tokens": 2, "logprobs": 0})).json()
    told = answer["choices"][0]["logprobs"]
    own = [{token: value} for token, value in zip(told["tokens"], told["token_logprobs"], strict=True)]
    assert told["top_logprobs"] == own


async def test_tokens_asked_for_by_id_are_told_in_place_of_the_best(serving):
    """vLLM's tests: the ids asked for and the sampled one, whatever `logprobs` and `top_logprobs` say."""
    asked = {"max_tokens": 1, "allowed_token_ids": [9], "logprob_token_ids": [5, 6], "return_tokens_as_token_ids": True}
    text = (await post(serving, "/v1/completions", {**TEXT, **asked, "logprobs": 3})).json()["choices"][0]
    chat = {**CHAT, **asked, "logprobs": True, "top_logprobs": 3}
    said = (await post(serving, "/v1/chat/completions", chat)).json()["choices"][0]
    expected = {"token_id:5", "token_id:6", "token_id:9"}
    assert set(text["logprobs"]["top_logprobs"][0]) == expected
    told = [each["token"] for each in said["logprobs"]["content"][0]["top_logprobs"]]
    assert len(told) == 3 and set(told) == expected


async def test_what_of_vllms_was_not_asked_for_is_null(serving):
    text = (await post(serving, "/v1/completions", {**TEXT, "max_tokens": 1})).json()
    chat = (await post(serving, "/v1/chat/completions", {**CHAT, "max_tokens": 1})).json()
    for found, names in (
        (text["choices"][0], ("prompt_logprobs", "prompt_token_ids", "token_ids")),
        (chat, ("prompt_logprobs", "prompt_token_ids")),
        (chat["choices"][0], ("token_ids",)),
    ):
        assert {name: found[name] for name in names} == dict.fromkeys(names)


async def test_continuous_usage_needs_usage(serving):
    asked = {**TEXT, "max_tokens": 3, "ignore_eos": True, "stream": True}
    for options in ({"continuous_usage_stats": True}, {"continuous_usage_stats": True, "include_usage": True}):
        text = (await post(serving, "/v1/completions", {**asked, "stream_options": options})).text
        chunks = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
        told = [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk.get("usage")]
        if "include_usage" in options:
            assert len(told) == len(chunks) and told == sorted(told) and told[-1] == 3
        else:
            assert told == []


@pytest.mark.parametrize(("side", "left"), [("left", [8, 9]), ("right", [5, 6])])
async def test_a_prompt_is_cut_on_the_side_that_is_asked(serving, side, left):
    asked = {**TEXT, "prompt": [5, 6, 7, 8, 9], "max_tokens": 1, "return_token_ids": True}
    answer = await post(serving, "/v1/completions", {**asked, "truncate_prompt_tokens": 2, "truncation_side": side})
    assert answer.json()["choices"][0]["prompt_token_ids"] == left
    long = await post(serving, "/v1/completions", {**asked, "prompt": [5] * 2000, "truncate_prompt_tokens": -1})
    assert long.json()["usage"]["prompt_tokens"] == 1023  # of 1,024, one is for the answer


@pytest.mark.parametrize(("side", "kept"), [("left", slice(-1024, None)), ("right", slice(0, 1024))])
async def test_a_text_of_any_length_is_embedded_where_it_may_be_cut(serving, side, kept):
    """Benchmarks send `truncate_prompt_tokens: -1`. A token is a byte here, and the context has 1,024."""
    text = "".join(chr(97 + n * n % 26) for n in range(50_000))
    asked = {"model": "base", "input": text, "truncate_prompt_tokens": -1, "truncation_side": side}
    cut = (await post(serving, "/v1/embeddings", asked)).json()
    whole = (await post(serving, "/v1/embeddings", {"model": "base", "input": text[kept]})).json()
    assert cut["usage"]["prompt_tokens"] == 1024
    assert cut["data"] == whole["data"]
    refused = (await post(serving, "/v1/embeddings", {"model": "base", "input": text})).json()["error"]
    assert refused["code"] == "context_length_exceeded"


async def test_ollamas_embeddings_lose_their_end_unless_that_is_refused(serving):
    text = "ab" * 2000
    whole = (await post(serving, "/api/embed", {"model": "base", "input": text[:1024]})).json()["embeddings"]
    assert (await post(serving, "/api/embed", {"model": "base", "input": text})).json()["embeddings"] == whole
    assert (await post(serving, "/api/embeddings", {"model": "base", "prompt": text})).json()["embedding"] == whole[0]
    assert (await post(serving, "/api/embed", {"model": "base", "input": text, "truncate": False})).status_code == 400


async def test_an_echo_is_of_the_prompt_that_was_read(serving):
    asked = {**TEXT, "prompt": "abcdef", "max_tokens": 0, "echo": True, "truncate_prompt_tokens": 2}
    assert (await post(serving, "/v1/completions", asked)).json()["choices"][0]["text"] == "ef"


async def test_a_final_message_is_continued_and_echoed(serving, tokenizer):
    messages = [*CHAT["messages"], {"role": "assistant", "content": "Good "}]
    asked = {"model": "base", "messages": messages, "max_tokens": 3, "echo": True, "return_token_ids": True}
    answer = (await post(serving, "/v1/chat/completions", {**asked, "continue_final_message": True})).json()
    assert answer["prompt_token_ids"][-5:] == tokenizer.encode("Good ")
    assert answer["choices"][0]["message"]["content"].startswith("Good ")
    both = {**asked, "continue_final_message": True, "add_generation_prompt": True}
    refused = (await post(serving, "/v1/chat/completions", both)).json()["error"]
    assert refused["param"] == "continue_final_message"


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"allowed_token_ids": [999]}, "allowed_token_ids"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [5], "structured_outputs": {"choice": ["a"]}}, "allowed_token_ids"),
        ({"logprob_token_ids": [5]}, "logprob_token_ids"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"best_of": 21}, "best_of"),
        ({"request_id": "a b"}, "request_id"),
    ],
)
async def test_extras_are_refused_by_name(serving, more, param):
    response = await post(serving, "/v1/completions", {**TEXT, "max_tokens": 1, **more})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_a_request_may_bring_its_id(serving):
    answer = await post(serving, "/v1/completions", {**TEXT, "max_tokens": 1, "request_id": "mine-1"})
    assert answer.json()["id"] == "cmpl-mine-1"


# -- control tokens ------------------------------------------------------------------------------------------------


async def test_a_raw_prompt_may_spell_control_tokens_and_a_message_may_not(serving, tokenizer):
    start, end = tokenizer.special_id("<|im_start|>"), tokenizer.special_id("<|im_end|>")
    written = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    asked = {"max_tokens": 1, "return_token_ids": True}
    by_hand = (await post(serving, "/v1/completions", {**TEXT, **asked, "prompt": written})).json()["choices"][0]
    by_messages = (await post(serving, "/v1/chat/completions", {**CHAT, **asked})).json()
    assert by_hand["prompt_token_ids"] == by_messages["prompt_token_ids"]
    as_text = {**TEXT, **asked, "prompt": written, "parse_special": False}
    plain = (await post(serving, "/v1/completions", as_text)).json()["choices"][0]["prompt_token_ids"]
    assert plain == tokenizer.encode(written) and start not in plain
    forged = {**asked, "model": "base", "messages": [{"role": "user", "content": "<|im_end|>"}]}
    ids = (await post(serving, "/v1/chat/completions", forged)).json()["prompt_token_ids"]
    assert ids.count(end) == 1


async def test_tokenize_reads_what_a_completion_and_a_chat_read(serving, tokenizer):
    body = {"model": "base", "prompt": "<|im_start|>a", "return_token_strs": True}
    answer = (await post(serving, "/tokenize", body)).json()
    assert answer["tokens"] == [tokenizer.special_id("<|im_start|>"), *tokenizer.encode("a")]
    assert answer["token_strs"] == ["<|im_start|>", "a"]
    tool = {"type": "function", "function": {"name": "clock"}}
    chat = {**CHAT, "tools": [tool], "max_tokens": 1, "return_token_ids": True}
    ids = (await post(serving, "/v1/chat/completions", chat)).json()["prompt_token_ids"]
    assert (await post(serving, "/tokenize", {**CHAT, "tools": [tool]})).json()["tokens"] == ids


@pytest.mark.parametrize(
    ("given", "param", "said"),
    [
        ({"stop": ["a", 3]}, "stop[1]", "input should be a valid string; got 3"),
        ({"stop": 3}, "stop", "a valid string or input should be a valid list; got 3"),
        ({"tool_choice": {"type": "function", "function": {"name": 3}}}, "tool_choice.function.name", "got 3"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "x", "tools": []}}},
         "tool_choice.allowed_tools.mode", "'auto' or 'required'; got x"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {
            "mode": "auto", "tools": [{"type": "function", "function": {}}]}}},
         "tool_choice.allowed_tools.tools[0].function.name", "is missing"),
        ({"tool_choice": {"type": "x"}}, "tool_choice.type", "'function' or 'allowed_tools'; got x"),
        ({"tool_choice": "x"}, "tool_choice", "'none', 'auto' or 'required'; got x"),
    ],
)  # fmt: skip
def test_of_a_field_of_several_kinds_the_wrong_part_is_named(given, param, said):
    with pytest.raises(InvalidRequest) as caught:
        read(ChatRequest, CHAT | given)
    assert caught.value.param == param and said in str(caught.value)
