"""A checkpoint answering in this process, text in and text out: what `mpt generate` and `mpt chat --model` run on.

One request at a time through the engine that serves many: as fast as a server, and the same answers.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TypeVar

from mpt.catalog import describe, resolve
from mpt.checkpoint import read_config
from mpt.checkpoint_text import open_tokenizer
from mpt.engine.endpoint import Endpoint, open_endpoint
from mpt.engine.engine import Engine
from mpt.engine.request import Delta, Progress, Sampling
from mpt.errors import UserError
from mpt.options import ModelOptions
from mpt.prompts import Message, encode_chat, open_format
from mpt.tokenizer import Tokenizer

T = TypeVar("T")


class LocalModel:
    """A checkpoint with its tokenizer and what the catalog knows of it; its weights are loaded when first needed."""

    def __init__(
        self,
        options: ModelOptions,
    ) -> None:
        """Raises MPTError for a checkpoint that is not there."""
        folder = resolve(options.root)
        self.entry = describe(options.root)
        self._config = read_config(folder)
        self.tokenizer: Tokenizer = open_tokenizer(folder, self._config.vocab_size)
        style = options.asked_style or self.entry.prompt_style
        self.style, self._template = open_format(folder, style, self.tokenizer, options.template_file)
        self._options = options
        self._endpoint: Endpoint | None = None

    def __enter__(self) -> "LocalModel":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def open(self, n_tokens: int = 0) -> Endpoint:
        """Load the weights and start the engine, if that has not been done, for a text of up to n_tokens.

        Beyond the trained context only with ALiBi, which needs no table of positions. Raises MPTError.
        """
        if self._endpoint is None:
            length = self._config.max_seq_len if self._config.has_wpe else max(n_tokens, self._config.max_seq_len)
            self._endpoint = open_endpoint(
                self.entry.name, replace(self._options, max_running=1, context_length=length)
            )
        return self._endpoint

    def close(self) -> None:
        """Stop the engine and let go of the weights."""
        if self._endpoint is not None:
            self._endpoint.engine.close()
            self._endpoint = None

    def encode_prompt(self, prompt: str) -> list[int]:
        """One prompt in this model's style; an empty one begins a new text."""
        if self.style == "none":
            return self.tokenizer.encode(prompt) or [self.tokenizer.eos_id]
        return self.encode_messages([Message(role="user", content=prompt)])

    def encode_messages(self, messages: Sequence[Message]) -> list[int]:
        """A conversation in this model's style, up to its next answer."""
        default = self.entry.system_prompt
        return encode_chat(self.tokenizer, self.style, messages, system_default=default, template=self._template)

    def stream(
        self,
        ids: Sequence[int],
        max_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        on_read: Callable[[int], None] = lambda _: None,
    ) -> Iterator[Delta]:
        """The continuation of `ids`, step by step; on_read is told how many of them have been read. Raises MPTError."""
        engine = self.open(len(ids) + max_tokens).engine
        assert isinstance(engine, Engine)  # the other kind is another server's
        sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, progress=True)
        for event in _in_this_thread(engine.generate(list(ids), sampling, request_id="local")):
            if isinstance(event, Progress):
                on_read(event.processed_tokens)
            elif isinstance(event, Delta):
                yield event

    def room_after(self, ids: Sequence[int]) -> int:
        """How many tokens the trained context still holds after `ids`. Raises UserError when it holds none."""
        room = self.entry.context_length - len(ids)
        if room <= 0:
            raise UserError(
                f"the conversation has {len(ids)} tokens, the context of `{self.entry.name}` holds "
                f"{self.entry.context_length}; start over or shorten it"
            )
        return room


def _in_this_thread(events: AsyncIterator[T]) -> Iterator[T]:
    """What an asynchronous iterator gives. Ctrl-C, and closing this one, close it."""

    async def following() -> T:
        return await anext(events)

    with asyncio.Runner() as runner:  # in which Ctrl-C cancels what is awaited
        try:
            while True:
                try:
                    yield runner.run(following())
                except StopAsyncIteration:
                    return
        finally:
            aclose = getattr(events, "aclose", None)
            if aclose is not None:
                runner.run(aclose())
