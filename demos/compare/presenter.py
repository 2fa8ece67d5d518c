"""What happens on the page of two models: one prompt goes to both at once, and both answers stream back.

No layout is here. A visitor's state is in the page, so one presenter serves all visitors.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import gradio as gr

try:
    from demos import mpt_page, mpt_space
except ImportError:  # a copied Space has the modules beside it
    import mpt_page  # type: ignore[no-redef]
    import mpt_space  # type: ignore[no-redef]

Shown = tuple[str, str]  # an answer so far, and the note under it


@dataclass(frozen=True)
class Settings:
    """The choices of one column, in its order."""

    model: str | None
    temperature: float
    top_p: float
    max_tokens: float
    repetition_penalty: float
    seed: float | None

    def parameters(self) -> dict[str, Any]:
        """What goes to the server, but for the number of new tokens."""
        return mpt_space.sampling(
            self.temperature, self.top_p, repetition_penalty=self.repetition_penalty, seed=self.seed
        )


class ComparePresenter:
    """The event handlers of the page, for the models of a server."""

    def __init__(self, server: mpt_space.Server) -> None:
        self.server = server

    async def look(self, *chosen: str | None) -> list[Any]:
        """Both pickers and the notes below them; at first the base model stands against the one made from it."""
        try:
            cards = await self.server.models()
        except mpt_space.SpaceError as error:
            gr.Warning(error.sentence, title="No models")
            return [gr.skip(), error.sentence] * 2
        names = [card["id"] for card in cards]
        base = self.server.find(cards, "none") or cards[0]
        tuned = self.server.find(cards, "instruct") or self.server.find(cards, "chatml") or cards[-1]
        picked = [next((c for c in cards if c["id"] == id), d) for id, d in zip(chosen, (base, tuned), strict=True)]
        return [part for card in picked for part in (gr.Dropdown(names, value=card["id"]), mpt_page.licence_note(card))]

    async def answer(self, prompt: str, *settings: Any) -> AsyncGenerator[tuple[str, ...], None]:
        """Both columns at once, in one event: of two events Gradio let the second wait for the first."""
        half = len(settings) // 2
        shown = [("", ""), ("", "")]
        arrived: asyncio.Queue[tuple[int, Shown | None]] = asyncio.Queue()  # None: the column is finished
        columns = (Settings(*settings[:half]), Settings(*settings[half:]))
        tasks = [asyncio.create_task(self._fill(arrived, n, prompt, each)) for n, each in enumerate(columns)]
        try:
            n_left = len(tasks)
            while n_left:
                column, part = await arrived.get()
                if part is None:
                    n_left -= 1
                    continue
                shown[column] = part
                yield (*shown[0], *shown[1])
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _fill(
        self, arrived: "asyncio.Queue[tuple[int, Shown | None]]", column: int, prompt: str, settings: Settings
    ) -> None:
        """Put a column's parts into the queue, and its end however it ends."""
        try:
            async with aclosing(self.answers(prompt, settings)) as parts:
                async for part in parts:
                    arrived.put_nowait((column, part))
        finally:
            arrived.put_nowait((column, None))

    async def answers(self, prompt: str, settings: Settings) -> AsyncGenerator[Shown, None]:
        """One column: a base model continues the prompt, the others answer it."""
        answer = mpt_page.Answer()
        yield "", "Waiting for the first token."
        try:
            card = mpt_space.pick(await self.server.models(), settings.model)
            answer.begin(card)
            pieces, n_new = await self._asked(card, prompt, settings)
            async with aclosing(pieces):
                async for piece in pieces:
                    answer.add(piece)
                    if answer.is_due():
                        yield answer.text, answer.numbers.line()
            limit = "the longest answer" if n_new == int(settings.max_tokens) else "the end of the context"
            cut = f"cut at {limit}" if answer.numbers.finish_reason == "length" else ""
            way = "continues the prompt" if is_base(card) else "answers the prompt"
            yield answer.text, mpt_page.join([answer.numbers.line(), way, cut])
        except mpt_space.SpaceError as error:
            gr.Warning(error.sentence, title=f"{settings.model or 'No model'}")
            yield answer.text, error.sentence

    async def _asked(
        self, card: mpt_space.Card, prompt: str, settings: Settings
    ) -> tuple[AsyncGenerator[mpt_space.Piece, None], int]:
        """The stream of an answer, and how many tokens it may have."""
        messages: list[mpt_space.Message] = [{"role": "user", "content": prompt}]
        read = prompt if is_base(card) else messages
        n_new = await mpt_space.room_after(self.server, card, read, int(settings.max_tokens))
        parameters = {"max_tokens": n_new, **settings.parameters()}
        if is_base(card):
            return self.server.complete(card["id"], prompt, **parameters), n_new
        return self.server.chat(card["id"], messages, **parameters), n_new


def is_base(card: mpt_space.Card) -> bool:
    return card.get("prompt_style") == "none"
