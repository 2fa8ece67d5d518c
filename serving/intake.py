"""From a body to work for an engine: its prompts as tokens, their fit in the context, what is to be drawn."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fastapi import Request

from mpt.engine.endpoint import Endpoint
from mpt.engine.errors import too_long
from mpt.engine.grammar import BadGrammar, Grammar
from mpt.engine.request import Sampling
from mpt.errors import DamagedFile, UserError
from mpt.lora import Adapter
from mpt.prompts import encode_chat
from mpt.tools import ToolUse, describe
from serving.aside import SMALL, aside
from serving.errors import InvalidRequest, Unavailable
from serving.jobs import Job
from serving.protocol.body import prompts_of
from serving.protocol.generation import ChatRequest, CompletionRequest
from serving.protocol.messages import ChatMessage, check_messages
from serving.protocol.sampling import sampling_of
from serving.protocol.structure import Structure, structure_of

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_MAX_SCORES = 200_000  # log-probabilities of prompt tokens in one response: about 20 MB of JSON


@dataclass(frozen=True)
class Prompt:
    """A prompt as it was given, and its token ids."""

    given: str | list[int]
    ids: list[int]


async def prompts_in(
    request: Request, endpoint: Endpoint, asked: Any, given: Any, param: str, wanted: int = 0, **options: bool
) -> list[Prompt]:
    """What a field of prompts holds, cut as `asked` says. options: as of `encoded`. Raises InvalidRequest."""

    def understood() -> list[Prompt]:
        texts = [may_be_read(endpoint, asked, each) for each in prompts_of(given, endpoint.vocab_size, param)]
        ids = [truncated(endpoint, asked, encoded(endpoint, each, param, **options), wanted) for each in texts]
        return [Prompt(*each) for each in zip(texts, ids, strict=True)]

    return await tokenizing(request, understood)


async def tokenizing(request: Request, work: Callable[[], Result]) -> Result:
    """In a thread of its own, since tokenizers compute without the interpreter; what is small, at once."""
    return work() if request.state.body_bytes <= SMALL else await asyncio.to_thread(work)


def encoded(
    endpoint: Endpoint, prompt: str | list[int], param: str = "prompt", *, parse_special: bool = False
) -> list[int]:
    """A prompt's token ids; an empty text begins a new one.

    parse_special: control tokens spelled in the text are control tokens, as for people who write a prompt whole.
    """
    if not isinstance(prompt, str):
        return prompt
    check_size(endpoint, [prompt], param)
    try:
        ids = endpoint.tokenizer.encode(prompt, parse_special)
    except UserError as error:
        raise InvalidRequest(f"`{param}`: {error}", param=param) from None
    return ids or [endpoint.tokenizer.eos_id]


async def chat_tokens(endpoint: Endpoint, asked: Any, tools: ToolUse | None = None) -> list[int]:
    """The token ids of a conversation. asked: `messages`, and what a ChatRequest says of the prompt."""
    return await asyncio.to_thread(_encoded_chat, endpoint, asked, tools)


def _encoded_chat(endpoint: Endpoint, asked: Any, tools: ToolUse | None) -> list[int]:
    messages: list[ChatMessage] = asked.messages
    check_messages(messages)
    turns = [message.as_message() for message in messages]
    check_size(endpoint, [turn["content"] for turn in turns], "messages")
    check_size(endpoint, [call.arguments for turn in turns for call in turn.get("calls", ())], "messages")
    if tools is not None:
        check_size(endpoint, [describe(tools.tools)], "tools")
    if asked.continue_final_message and asked.add_generation_prompt:
        message = "`continue_final_message` contradicts `add_generation_prompt: true`; send one of them"
        raise InvalidRequest(message, param="continue_final_message")
    try:
        return encode_chat(
            endpoint.tokenizer,
            endpoint.prompt_style,
            turns,
            add_generation_prompt=asked.add_generation_prompt is not False,
            system_default=endpoint.system_prompt,
            template=endpoint.template,
            tools=() if tools is None else tools.tools,
            continue_final_message=asked.continue_final_message,
            template_arguments=_arguments(endpoint, asked.chat_template_kwargs or {}),
        )
    except UserError as error:
        raise InvalidRequest(str(error), param="messages") from None
    except DamagedFile as error:  # it names a file of this machine
        log.warning("%s: %s", endpoint.name, error)
        raise InvalidRequest(
            f"the chat template of `{endpoint.name}` cannot render these messages; the server's log says why",
            param="messages",
        ) from None


def _arguments(endpoint: Endpoint, given: dict[str, Any]) -> dict[str, Any]:
    """Variables for a template; without one, only those that ask for something."""
    if endpoint.template is not None:
        return given
    return {name: value for name, value in given.items() if value not in (None, False, "", [], {})}


def check_size(endpoint: Endpoint, texts: list[str], param: str) -> None:
    """Refuse what cannot fit the context however it is tokenized, before spending time on it."""
    n_bytes = sum(len(text.encode("utf-8", "replace")) for text in texts)
    if n_bytes > endpoint.max_prompt_bytes:
        least = n_bytes // endpoint.tokenizer.longest_token_bytes
        raise InvalidRequest(
            f"This model's maximum context length is {endpoint.context_length} tokens. However, your prompt has "
            f"{n_bytes} bytes, which are at least {least} tokens. Please shorten it.",
            code="context_length_exceeded",
            param=param,
        )


def check_room(endpoint: Endpoint, n_prompt: int, max_tokens: int, param: str) -> None:
    if n_prompt + max_tokens > endpoint.context_length:
        raise InvalidRequest(
            too_long(n_prompt, max_tokens, endpoint.context_length),
            code="context_length_exceeded",
            param=param,
            n_prompt_tokens=n_prompt,
            n_ctx=endpoint.context_length,
        )


def may_be_read(endpoint: Endpoint, asked: Any, prompt: str | list[int]) -> str | list[int]:
    """What of a text can be among the tokens that `truncate_prompt_tokens` leaves of it, however it is tokenized."""
    if asked.truncate_prompt_tokens is None or not isinstance(prompt, str):
        return prompt
    raw = prompt.encode("utf-8", "replace")
    if len(raw) <= endpoint.max_prompt_bytes:
        return prompt
    is_end_lost = asked.truncation_side == "right"
    kept = raw[: endpoint.max_prompt_bytes] if is_end_lost else raw[-endpoint.max_prompt_bytes :]
    return kept.decode("utf-8", "ignore")


def truncated(endpoint: Endpoint, asked: Any, prompt: list[int], wanted: int) -> list[int]:
    """A prompt cut to `truncate_prompt_tokens`, -1 being what leaves room for the answer."""
    limit: int | None = asked.truncate_prompt_tokens
    if limit is None:
        return prompt
    if limit == -1:
        limit = endpoint.context_length - wanted
    if limit < 1:
        raise InvalidRequest(
            f"`truncate_prompt_tokens` leaves {limit} tokens of the prompt; give 1 or more, or lower max_tokens",
            param="truncate_prompt_tokens",
        )
    return prompt[:limit] if asked.truncation_side == "right" else prompt[-limit:]


def check_scores(sampling: Sampling, prompts: list[list[int]]) -> None:
    """Bound a response that tells log-probabilities of the prompt, which grows with prompts and alternatives."""
    if sampling.prompt_logprobs is None:
        return
    n_scores = sum(map(len, prompts)) * max(1, sampling.prompt_logprobs)
    if n_scores > _MAX_SCORES:
        raise InvalidRequest(
            f"log-probabilities of the prompt with {sampling.prompt_logprobs} alternatives would be {n_scores}, over "
            f"the limit of {_MAX_SCORES}; lower `logprobs` or send fewer prompts at once",
            param="logprobs",
        )


async def make_job(
    request: Request,
    asked: CompletionRequest | ChatRequest,
    endpoint: Endpoint,
    adapter: Adapter | None,
    prompts: list[list[int]],
    wanted: int,
    tools: ToolUse | None = None,
) -> Job:
    """What an endpoint is to do for a completion or a chat. Raises ApiError."""
    if asked.stream_options is not None and not asked.stream:
        raise InvalidRequest("`stream_options` needs `stream: true`", param="stream_options")
    options = asked.stream_options
    structure = await aside(request, structure_of, asked, wanted, tools)
    grammar = None if structure is None else await _compiled(endpoint, structure, request.state.salt)
    sampling = replace(
        await aside(request, sampling_of, asked, wanted, endpoint.vocab_size, grammar),
        progress=options is not None and options.include_progress,
        cache_salt=asked.cache_salt or "",
    )
    if sampling.min_tokens and {*endpoint.tokenizer.end_ids}.issuperset(sampling.allowed_token_ids or {-1}):
        message = "`min_tokens` and `allowed_token_ids` leave no token that may come first"
        raise InvalidRequest(message, param="allowed_token_ids")
    check_scores(sampling, prompts)
    if asked.use_beam_search and asked.stream:
        raise InvalidRequest("`use_beam_search` ends with the best answers; set stream to false", param="stream")
    if asked.length_penalty != 1 and not asked.use_beam_search:
        raise InvalidRequest("`length_penalty` needs `use_beam_search: true`", param="length_penalty")
    return Job(
        id=asked.request_id or request.state.request_id,
        model=asked.model,
        endpoint=endpoint,
        adapter=adapter,
        prompts=prompts,
        sampling=sampling,
        n=asked.n,
        length_penalty=asked.length_penalty if asked.use_beam_search else None,
        tools=tools,
        include_usage=options is not None and options.include_usage,
        continuous_usage=options is not None and options.continuous_usage_stats,
        shows_token_ids=asked.return_token_ids,
        names_by_id=asked.return_tokens_as_token_ids,
        prompt_logprobs=asked.prompt_logprobs,
    )


async def _compiled(endpoint: Endpoint, structure: Structure, salt: str) -> Grammar:
    try:
        return await endpoint.grammars.get(structure.kind, structure.value, salt)
    except BadGrammar as error:
        raise InvalidRequest(f"`{structure.param}`: {error}", param=structure.param) from None
    except TimeoutError as error:
        raise Unavailable(str(error)) from None
