"""The routes that tell of models and tokenizers: OpenAI's, vLLM's and Ollama's lists."""

from collections.abc import Callable
from typing import Any

from fastapi import Request
from starlette.responses import Response

from mpt.engine.endpoint import Endpoint
from mpt.options import split_name
from serving.access import may_use
from serving.bodies import read
from serving.dialects import ollama
from serving.dialects.ollama import ShowRequest
from serving.endpoints import Serving
from serving.errors import InvalidRequest, NotFound
from serving.intake import chat_tokens, encoded, tokenizing
from serving.protocol.body import check_ids
from serving.protocol.messages import tool_use_of
from serving.replies import as_json
from serving.routes import DetokenizeRequest, TokenizeRequest

_MAX_TOKENS = 65_536  # of one text to be made: 20 ms in one call


def listing(serving: Serving) -> dict[str, Callable[..., Any]]:
    """What answers each of these routes, by its name in `routes.py`."""

    async def cards() -> list[dict[str, Any]]:
        found = []
        for name in serving.names():
            if name in serving.lifecycle.models or name in serving.endpoints:
                starting = {"state": "loading"} if name in serving.loading else {}
                shown = [card for card in await serving.lifecycle.cards(name) if may_use(card["id"])]
                found += [card | starting for card in shown]
        return found

    async def card_named(model: str) -> dict[str, Any]:
        base, adapter = split_name(model)
        serving.check_adapter(base, adapter)
        for card in await serving.lifecycle.cards(base):
            if card["id"] == model:
                return card
        raise NotFound(f"no adapter `{model[:100]}` here", code="model_not_found", param="model")

    async def models() -> Response:
        return as_json({"object": "list", "data": await cards()})

    async def model(model: str) -> Response:
        return as_json(await card_named(model))

    async def tokenize(request: Request) -> Response:
        asked = await read(request, TokenizeRequest, serving.options, serving.only_model)
        endpoint, _ = await serving.asked_for(asked.model, request)
        if (asked.prompt is None) == (asked.messages is None):
            raise InvalidRequest("give `prompt` or `messages`, one of the two", param="prompt")
        if asked.messages is not None:
            ids = await chat_tokens(endpoint, asked, tool_use_of(asked.tools, None, None))
        else:
            text, is_whole = asked.prompt or "", asked.parse_special
            ids = await tokenizing(request, lambda: encoded(endpoint, text, parse_special=is_whole) if text else [])
        answer: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": endpoint.context_length}
        if asked.return_token_strs:
            name = endpoint.tokenizer.token_text
            answer["token_strs"] = await tokenizing(request, lambda: [name(token) for token in ids])
        return as_json(answer)

    async def detokenize(request: Request) -> Response:
        asked = await read(request, DetokenizeRequest, serving.options, serving.only_model)
        endpoint, _ = await serving.asked_for(asked.model, request)

        most = max(endpoint.context_length, _MAX_TOKENS)
        if len(asked.tokens) > most:
            message = f"`tokens` has {len(asked.tokens)} token ids, at most {most}; send them in parts"
            raise InvalidRequest(message, param="tokens")

        def text() -> str:
            return endpoint.tokenizer.decode(check_ids(asked.tokens, endpoint.vocab_size, "tokens"), False)

        return as_json({"prompt": await tokenizing(request, text)})

    async def tokenizer_info(request: Request, model: str | None = None) -> Response:
        return as_json(_tokenizer_of(await serving.endpoint(model or _only_model(serving), request.state.hold)))

    async def ollama_tags() -> Response:
        return as_json(ollama.tags(await cards()))

    async def ollama_ps() -> Response:
        loaded = [card for card in await cards() if card["state"] == "loaded"]
        return as_json(ollama.running(loaded, {name: serving.lifecycle.idle_s_left(name) for name in serving.names()}))

    async def ollama_show(request: Request) -> Response:
        name = (await read(request, ShowRequest, serving.options)).model_name()
        return as_json(ollama.shown(await card_named(name)))

    async def load() -> Response:
        stats = [endpoint.engine.stats() for endpoint in serving.endpoints.values()]
        return as_json({"server_load": sum(each.n_running + each.n_waiting for each in stats)})

    return {
        "models": models, "model": model, "tokenize": tokenize, "detokenize": detokenize, "load": load,
        "tokenizer_info": tokenizer_info, "ollama_tags": ollama_tags, "ollama_ps": ollama_ps,
        "ollama_show": ollama_show,
    }  # fmt: skip


def _only_model(serving: Serving) -> str:
    name = serving.only_model
    if name is None:
        shown = ", ".join(f"`{name}`" for name in serving.names())
        message = f"say which model with `?model=NAME`: {shown}"
        raise InvalidRequest(message, code="missing_required_parameter", param="model")
    return name


def _tokenizer_of(endpoint: Endpoint) -> dict[str, Any]:
    """A tokenizer as transformers' tokenizer_config.json tells it, and lm-eval reads it."""
    tokenizer = endpoint.tokenizer
    end = tokenizer.decode([tokenizer.eos_id], skip_special_tokens=False)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": endpoint.context_length,
        "vocab_size": tokenizer.vocab_size,
        "bos_token": None,
        "eos_token": end,
        "pad_token": end,
        "added_tokens_decoder": {
            str(token): {"content": text, "special": token in tokenizer.special_ids}
            for text, token in tokenizer.added_tokens.items()
        },
        "chat_template": None if endpoint.template is None else endpoint.template.source,
    }
