"""From an HTTP request to work for an engine: its body under a limit, its prompts as tokens, its fit in the context."""

import asyncio
import logging
from dataclasses import replace

from fastapi import Request

from mpt.engine.endpoint import Endpoint
from mpt.engine.grammar import BadGrammar
from mpt.errors import DamagedFile, UserError
from mpt.lora import Adapter
from mpt.prompts import Message, encode_chat
from serving import answers
from serving.errors import InvalidRequest, TooLarge, Unavailable, UnsupportedMediaType
from serving.protocol import ChatMessage, ChatRequest, CompletionRequest, sampling_of, structure_of

log = logging.getLogger(__name__)

_LONG_TEXT = 2_000  # characters; a longer text is tokenized in a thread, so that the loop goes on
_MAX_SCORES = 200_000  # log-probabilities of prompt tokens in one response: about 20 MB of JSON


async def read_body(request: Request, limit: int) -> bytes:
    """The request's body. Raises UnsupportedMediaType and TooLarge before it is parsed."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise UnsupportedMediaType(f"content-type is `{kind[:60]}`; send `application/json`")
    too_large = TooLarge(f"the body is over the limit of {limit} bytes; send less at once")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise too_large
    raw = bytearray()
    async for piece in request.stream():
        raw += piece
        if len(raw) > limit:
            raise too_large
    return bytes(raw)


async def prompt_tokens(endpoint: Endpoint, prompt: str | list[int], param: str = "prompt") -> list[int]:
    """A prompt's token ids, control tokens never made from text; an empty text begins a new one."""
    if not isinstance(prompt, str):
        return prompt
    check_size(endpoint, [prompt], param)
    if len(prompt) > _LONG_TEXT:
        ids = await asyncio.to_thread(endpoint.tokenizer.encode, prompt)
    else:
        ids = endpoint.tokenizer.encode(prompt)
    return ids or [endpoint.tokenizer.eos_id]


async def chat_tokens(endpoint: Endpoint, messages: list[ChatMessage]) -> list[int]:
    turns = [Message(role=message.role, content=message.text()) for message in messages]
    check_size(endpoint, [turn["content"] for turn in turns], "messages")
    try:
        return await asyncio.to_thread(
            encode_chat,
            endpoint.tokenizer,
            endpoint.prompt_style,
            turns,
            system_default=endpoint.system_prompt,
            template=endpoint.template,
        )
    except UserError as error:
        raise InvalidRequest(str(error), param="messages") from None
    except DamagedFile as error:  # it names a file of this machine
        log.warning("%s: %s", endpoint.name, error)
        raise InvalidRequest(
            f"the chat template of `{endpoint.name}` cannot render these messages; the server's log says why",
            param="messages",
        ) from None


def check_size(endpoint: Endpoint, texts: list[str], param: str) -> None:
    """Refuse what cannot fit the context however it is tokenized, before spending time on it."""
    n_bytes = sum(len(text.encode("utf-8", "replace")) for text in texts)
    if n_bytes > endpoint.max_prompt_bytes:
        least = n_bytes // endpoint.tokenizer.longest_token_bytes
        raise InvalidRequest(
            f"the prompt has {n_bytes} bytes, at least {least} tokens, over the {endpoint.context_length} tokens of "
            f"`{endpoint.name}`; shorten it",
            code="context_length_exceeded",
            param=param,
        )


def check_room(endpoint: Endpoint, n_prompt: int, max_tokens: int, param: str) -> None:
    if n_prompt + max_tokens > endpoint.context_length:
        raise InvalidRequest(
            f"the prompt has {n_prompt} tokens and max_tokens is {max_tokens}: {n_prompt + max_tokens} is over the "
            f"context of `{endpoint.name}`, {endpoint.context_length}; shorten the prompt or lower max_tokens",
            code="context_length_exceeded",
            param=param,
            n_prompt_tokens=n_prompt,
            n_ctx=endpoint.context_length,
        )


def check_scores(asked: CompletionRequest, prompts: list[list[int]]) -> None:
    """Bound the response of `echo` with `logprobs`, which grows with prompts and alternatives."""
    if not asked.echo or asked.logprobs is None:
        return
    n_scores = sum(map(len, prompts)) * max(1, asked.logprobs)
    if n_scores > _MAX_SCORES:
        raise InvalidRequest(
            f"`echo` with `logprobs` {asked.logprobs} would return {n_scores} log-probabilities, over the limit of "
            f"{_MAX_SCORES}; lower `logprobs` or send fewer prompts at once",
            param="logprobs",
        )


async def make_job(
    request: Request,
    asked: CompletionRequest | ChatRequest,
    endpoint: Endpoint,
    adapter: Adapter | None,
    prompts: list[list[int]],
    wanted: int,
) -> answers.Job:
    if asked.stream_options is not None and not asked.stream:
        raise InvalidRequest("`stream_options` needs `stream: true`", param="stream_options")
    options = asked.stream_options
    structure, grammar = structure_of(asked, wanted), None
    if structure is not None:
        try:
            grammar = await endpoint.grammars.get(structure.kind, structure.value, request.state.salt)
        except BadGrammar as error:
            raise InvalidRequest(f"`{structure.param}`: {error}", param=structure.param) from None
        except TimeoutError as error:
            raise Unavailable(str(error)) from None
    return answers.Job(
        id=request.state.request_id,
        model=asked.model,
        endpoint=endpoint,
        adapter=adapter,
        prompts=prompts,
        sampling=replace(
            sampling_of(asked, wanted, endpoint.vocab_size, grammar),
            progress=options is not None and options.include_progress,
        ),
        n=asked.n or 1,
        include_usage=options is not None and (options.include_usage or options.continuous_usage_stats),
        continuous_usage=options is not None and options.continuous_usage_stats,
    )
