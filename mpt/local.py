"""A checkpoint answering on this machine, text in and text out, one request at a time.

What `mpt generate` and `mpt chat --model` run on: the naive loop of `mpt/generation.py`. Many requests at once are the
engine's (`serving/`).
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from mpt import generation
from mpt.catalog import describe, resolve
from mpt.checkpoint import load
from mpt.errors import MachineRefused, UserError
from mpt.prompts import Message, PromptStyle, encode_chat
from mpt.tokenizer import DetokenizeStream, Tokenizer

DeviceChoice = Literal["auto", "cpu", "cuda"]
DtypeChoice = Literal["auto", "float32", "bfloat16", "float16"]


class LocalModel:
    """A loaded checkpoint with its tokenizer and what the catalog knows of it."""

    def __init__(
        self,
        name_or_path: str,
        *,
        device: DeviceChoice = "auto",
        dtype: DtypeChoice = "auto",
        style: PromptStyle | None = None,
    ) -> None:
        """Load it. dtype `auto` keeps the checkpoint's; device `auto` is CUDA where there is one."""
        folder = resolve(name_or_path)
        self.entry = describe(name_or_path)
        self.style: PromptStyle = style or self.entry.prompt_style
        self.tokenizer = Tokenizer.from_folder(folder)
        self.model = load(
            folder, dtype=None if dtype == "auto" else getattr(torch, dtype), device=choose_device(device)
        )

    def encode_prompt(self, prompt: str) -> list[int]:
        """One prompt in this model's style; an empty one begins a new text."""
        if self.style == "none":
            return self.tokenizer.encode(prompt) or [self.tokenizer.eos_id]
        return self.encode_messages([Message(role="user", content=prompt)])

    def encode_messages(self, messages: Sequence[Message]) -> list[int]:
        """A conversation in this model's style, up to its next answer."""
        return encode_chat(self.tokenizer, self.style, messages, system_default=self.entry.system_prompt)

    def stream(
        self,
        ids: Sequence[int],
        max_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[str]:
        """The continuation of `ids`, a piece of text for every token (often empty), then what was left over."""
        detokenize = DetokenizeStream(self.tokenizer)
        end_ids = self.tokenizer.end_ids
        for token_id in generation.stream(
            self.model, ids, max_tokens, temperature=temperature, top_p=top_p, seed=seed, end_ids=end_ids
        ):
            if token_id not in end_ids:
                yield detokenize.push(token_id)
        yield detokenize.flush()

    def room_after(self, ids: Sequence[int]) -> int:
        """How many tokens the trained context still holds after `ids`. Raises UserError when it holds none."""
        room = self.entry.context_length - len(ids)
        if room <= 0:
            raise UserError(
                f"the conversation has {len(ids)} tokens, the context of `{self.entry.name}` holds "
                f"{self.entry.context_length}; start over or shorten it"
            )
        return room


def choose_device(device: DeviceChoice) -> str:
    """`cuda` or `cpu`. Raises MachineRefused where CUDA was asked for and is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise MachineRefused("no CUDA device is available to torch; use `--device cpu`")
    return device
