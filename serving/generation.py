"""The routes that compute: completions, chats and embeddings, in OpenAI's shape and in those of the dialects.

Whatever a request is called, it is one of three: a text that is continued, a conversation that is answered, texts that
are embedded. A dialect's body becomes one of these, and its `Translation` gives the answer back in the dialect.
"""

import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel
from starlette.responses import Response

from mpt.engine.endpoint import Endpoint
from mpt.engine.request import Sampling
from mpt.engine.sequence import Answer
from mpt.lora import Adapter
from serving import answers, beam
from serving.aside import aside
from serving.bodies import read
from serving.dialects.anthropic import CountRequest, Messages, MessagesRequest
from serving.dialects.kept_responses import KeptResponses
from serving.dialects.ollama import (
    EmbedRequest,
    GenerateRequest,
    OldEmbedRequest,
    Ollama,
    OllamaChatRequest,
    did,
    is_forgetting,
)
from serving.dialects.responses import Responses, ResponsesRequest
from serving.dialects.translation import Chunks, Translation
from serving.endpoints import Serving
from serving.errors import InvalidRequest
from serving.intake import Prompt, chat_tokens, check_room, make_job, prompts_in, tokenizing, truncated
from serving.jobs import Events, Job, start
from serving.loading import may_load
from serving.metrics import Metrics
from serving.protocol.generation import (
    ALL_THERE_IS,
    DEFAULT_COMPLETION_TOKENS,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
)
from serving.replies import as_json
from serving.sse import EventStream, unless_disconnected

Whole = Callable[[Events], Coroutine[Any, Any, dict[str, Any]]]
Body = TypeVar("Body", bound=BaseModel)


@dataclass(frozen=True)
class _Prepared:
    """A job, and how its events become an answer, streamed or whole."""

    job: Job
    chunks: Callable[[Events], Chunks]
    whole: Whole


Prepare = Callable[[Endpoint, Adapter | None], Awaitable[_Prepared]]


class Generation:
    """The functions of these routes over the endpoints of one process."""

    def __init__(self, serving: Serving, metrics: Metrics) -> None:
        self._serving, self._metrics = serving, metrics
        self._kept = KeptResponses()

    def functions(self) -> dict[str, Callable[..., Any]]:
        """What answers each route, by its name in `routes.py`."""
        return {
            "completions": self.completions,
            "chat_completions": self.chat_completions,
            "embeddings": self.embeddings,
            "responses": self.responses,
            "response": self.response,
            "delete_response": self.delete_response,
            "messages": self.messages,
            "count_tokens": self.count_tokens,
            "ollama_chat": self.ollama_chat,
            "ollama_generate": self.ollama_generate,
            "ollama_embed": self.ollama_embed,
            "ollama_embeddings": self.ollama_embeddings,
        }

    # -- the routes ----------------------------------------------------------------------------------------------

    async def completions(self, request: Request) -> Response:
        return await self._complete(request, await self._body(request, CompletionRequest), Translation())

    async def chat_completions(self, request: Request) -> Response:
        return await self._chat(request, await self._body(request, ChatRequest), Translation())

    async def embeddings(self, request: Request) -> Response:
        asked = await self._body(request, EmbeddingRequest)
        return as_json(await self._embed(request, asked))

    async def responses(self, request: Request) -> Response:
        asked = await self._body(request, ResponsesRequest)
        salt, before = request.state.salt, list[dict[str, Any]]()
        if asked.previous_response_id is not None:
            before = self._kept.get(salt, asked.previous_response_id, "previous_response_id").messages
        is_stored = asked.store and self._serving.keeps_responses
        translation = Responses(asked, request.state.request_id, is_stored)

        def keep(response: dict[str, Any]) -> None:
            if is_stored and response["status"] in ("completed", "incomplete"):
                self._kept.add(salt, response, [*before, *asked.messages(), *translation.said()])

        return await self._chat(request, await aside(request, asked.as_chat, before), translation, keep)

    async def response(self, request: Request, response_id: str) -> Response:
        return as_json(self._kept.get(request.state.salt, response_id).response)

    async def delete_response(self, request: Request, response_id: str) -> Response:
        self._kept.delete(request.state.salt, response_id)
        return as_json({"id": response_id, "object": "response", "deleted": True})

    async def messages(self, request: Request) -> Response:
        asked = await self._body(request, MessagesRequest)
        return await self._chat(request, await aside(request, asked.as_chat), Messages())

    async def count_tokens(self, request: Request) -> Response:
        asked = await aside(request, (await self._body(request, CountRequest)).as_chat)
        endpoint, _ = await self._serving.asked_for(asked.model, request)
        return as_json({"input_tokens": len(await chat_tokens(endpoint, asked, asked.tool_use()))})

    async def ollama_chat(self, request: Request) -> Response:
        asked = await self._body(request, OllamaChatRequest)
        if not asked.messages:
            return as_json(did(await self._load_or_unload(request, asked), asked.model, is_chat=True))
        chat = await aside(request, asked.as_chat)
        return await self._chat(request, chat, Ollama(asked.model, is_chat=True))

    async def ollama_generate(self, request: Request) -> Response:
        asked = await self._body(request, GenerateRequest)
        translation = Ollama(asked.model, is_chat=False)
        if not asked.prompt:
            return as_json(did(await self._load_or_unload(request, asked), asked.model, is_chat=False))
        endpoint, _ = await self._serving.asked_for(asked.model_name(), request)
        if asked.raw or endpoint.prompt_style == "none":
            return await self._complete(request, await aside(request, asked.as_completion), translation)
        return await self._chat(request, await aside(request, asked.as_chat), translation)

    async def ollama_embed(self, request: Request) -> Response:
        asked = await self._body(request, EmbedRequest)
        found = await self._embed(request, asked.as_embedding())
        vectors = [each["embedding"] for each in found["data"]]
        count = found["usage"]["prompt_tokens"]
        return as_json({"model": asked.model, "embeddings": vectors, "prompt_eval_count": count})

    async def ollama_embeddings(self, request: Request) -> Response:
        asked = await self._body(request, OldEmbedRequest)
        found = await self._embed(request, asked.as_embedding())
        return as_json({"embedding": found["data"][0]["embedding"]})

    async def _load_or_unload(self, request: Request, asked: OllamaChatRequest | GenerateRequest) -> str:
        """What was done for a request without a text. Who may not unload models is told that nothing was."""
        serving, name = self._serving, asked.model_name()
        if not is_forgetting(asked.keep_alive):
            await serving.asked_for(name, request)
            return "load"
        serving.check(name)
        if name not in serving.lifecycle.models or not may_load(serving, request):
            return "stop"
        await serving.lifecycle.unload(name)
        return "unload"

    # -- what they have in common --------------------------------------------------------------------------------

    async def _body(self, request: Request, kind: type[Body]) -> Body:
        return await read(request, kind, self._serving.options, self._serving.only_model)

    async def _complete(self, request: Request, asked: CompletionRequest, translation: Translation) -> Response:
        return await self._answer(request, asked, translation, partial(_completion, request, asked, translation))

    async def _chat(
        self,
        request: Request,
        asked: ChatRequest,
        translation: Translation,
        keep: Callable[[dict[str, Any]], None] | None = None,
    ) -> Response:
        """keep: called with the response of a translation when it has ended."""
        return await self._answer(request, asked, translation, partial(_chat, request, asked, translation), keep)

    async def _embed(self, request: Request, asked: EmbeddingRequest) -> dict[str, Any]:
        endpoint, adapter = await self._serving.asked_for(asked.model, request)
        if not endpoint.engine.capabilities.gives_embeddings:
            message = f"`{endpoint.name}` gives no embeddings: it runs in another engine"
            raise InvalidRequest(message, code="unsupported_value", param="model")
        prompts = [each.ids for each in await prompts_in(request, endpoint, asked, asked.input, "input")]
        check_room(endpoint, max(map(len, prompts)), 0, "input")
        sampling = Sampling(max_tokens=0, embed=True)
        job = Job(request.state.request_id, asked.model, endpoint, adapter, prompts, sampling, n=1)
        return await self._whole(
            request, job, lambda events: answers.embeddings(job, events, encoding=asked.encoding_format)
        )

    async def _start(self, request: Request, job: Job) -> Events:
        if job.length_penalty is not None:
            beam.check(job)
        request.state.admission.reserve(job.n_tokens_at_most)
        await request.state.account.hold(job.n_tokens_at_most)
        request.state.work = job  # for the access log and the client's account, when the last byte has been sent
        left_s = max(0.0, self._serving.options.request_timeout_s - request.state.hold.waited_s)
        salt = request.state.salt
        if job.length_penalty is None:
            return start(job, self._metrics, deadline_s=left_s, salt=salt)
        until = time.monotonic() + left_s

        def submit(tokens: list[int], sampling: Sampling) -> Answer:
            left_s = max(0.0, until - time.monotonic())
            return job.endpoint.engine.submit(
                tokens, sampling, request_id=job.id, deadline_s=left_s, salt=salt, adapter=job.adapter
            )

        return beam.search(job, submit, job.length_penalty)

    async def _whole(self, request: Request, job: Job, whole: Whole) -> dict[str, Any]:
        return await unless_disconnected(request, whole(await self._start(request, job)))

    async def _answer(
        self,
        request: Request,
        asked: CompletionRequest | ChatRequest,
        translation: Translation,
        prepare: Prepare,
        keep: Callable[[dict[str, Any]], None] | None = None,
    ) -> Response:
        """Prepare a job, start it and answer with a stream or a whole response, whichever was asked for.

        A stream begins before its model is loaded, so that its silence can be filled; where its API fills none, after.
        """
        if asked.stream and translation.wire.keep_alive and self._serving.must_wait(asked.model):
            events = self._once_loaded(request, asked.model, translation, prepare)
        else:
            found = await self._serving.asked_for(asked.model, request)
            prepared = await _in_the_names_of(translation, prepare(*found))
            if not asked.stream:
                translation.begin(prepared.job)
                answer = translation.whole(await self._whole(request, prepared.job, prepared.whole))
                if keep is not None:
                    keep(answer)
                return as_json(answer)
            events = await self._events(request, translation, prepared)
        return EventStream(
            events if keep is None else _kept(events, keep),
            request_id=request.state.request_id,
            keep_alive_s=self._serving.options.keep_alive_s,
            wire=translation.wire,
        )

    async def _events(self, request: Request, translation: Translation, prepared: _Prepared) -> Chunks:
        translation.begin(prepared.job)
        return translation.events(prepared.chunks(await self._start(request, prepared.job)))

    async def _once_loaded(self, request: Request, model: str, translation: Translation, prepare: Prepare) -> Chunks:
        """The events of a stream that begins while its model is not there. Raises ApiError, as its last event."""
        found = await self._serving.chosen(model, request.state.hold)
        prepared = await _in_the_names_of(translation, prepare(*found))
        async with contextlib.aclosing(await self._events(request, translation, prepared)) as events:
            async for event in events:
                yield event


async def _in_the_names_of(translation: Translation, preparing: Awaitable[_Prepared]) -> _Prepared:
    """What is prepared. Raises InvalidRequest about fields as the client called them."""
    try:
        return await preparing
    except InvalidRequest as error:
        raise translation.in_its_names(error) from None


async def _completion(
    request: Request, asked: CompletionRequest, translation: Translation, endpoint: Endpoint, adapter: Adapter | None
) -> _Prepared:
    wanted = DEFAULT_COMPLETION_TOKENS if asked.max_tokens is None else asked.max_tokens
    special = {"parse_special": asked.parse_special}
    given = await prompts_in(request, endpoint, asked, asked.prompt, "prompt", max(wanted, 0), **special)
    prompts = [each.ids for each in given]
    longest = max(map(len, prompts))
    room = max(endpoint.context_length - longest, 1)
    if asked.max_tokens is None or wanted == ALL_THERE_IS or translation.shortens:
        wanted = room if wanted == ALL_THERE_IS else min(wanted, room)
    check_room(endpoint, longest, wanted, "prompt")
    job = await make_job(request, asked, endpoint, adapter, prompts, wanted)
    if asked.echo:
        is_whole = asked.truncate_prompt_tokens is None
        job.echo = await tokenizing(request, lambda: [_text_of(endpoint, each, is_whole) for each in given])
    return _Prepared(
        job,
        lambda events: answers.completion_chunks(job, events, logprobs=asked.logprobs),
        lambda events: answers.completion(job, events, logprobs=asked.logprobs),
    )


def _text_of(endpoint: Endpoint, prompt: Prompt, is_whole: bool) -> str:
    """What of a prompt was read, as text."""
    given = prompt.given
    return given if is_whole and isinstance(given, str) else endpoint.tokenizer.decode(prompt.ids, False)


async def _chat(
    request: Request, asked: ChatRequest, translation: Translation, endpoint: Endpoint, adapter: Adapter | None
) -> _Prepared:
    tools, wanted = asked.tool_use(), asked.wanted_tokens()
    prompt = truncated(endpoint, asked, await chat_tokens(endpoint, asked, tools), wanted or 1)
    room = max(endpoint.context_length - len(prompt), 1)
    wanted = room if wanted is None else min(wanted, room) if translation.shortens else wanted
    check_room(endpoint, len(prompt), wanted, "messages")
    job = await make_job(request, asked, endpoint, adapter, [prompt], wanted, tools)
    if asked.echo:
        job.echo = [asked.messages[-1].text()]
    return _Prepared(
        job,
        lambda events: answers.chat_chunks(job, events, logprobs=asked.logprobs),
        lambda events: answers.chat(job, events, logprobs=asked.logprobs),
    )


async def _kept(events: Chunks, keep: Callable[[dict[str, Any]], None]) -> Chunks:
    """Pass events through; the last one's response is kept."""
    async with contextlib.aclosing(events):
        async for event in events:
            if event["type"] in ("response.completed", "response.incomplete"):
                keep(event["response"])
            yield event
