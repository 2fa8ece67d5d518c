"""What happens on the page of two models: one prompt goes to both at once, both answers stream back and are compared.

No layout is here. A visitor's state is in the page, so one presenter serves all visitors.
"""

import asyncio
import html
import re
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby, takewhile
from typing import Any

import gradio as gr

try:
    from demos import mpt_page, mpt_space
except ImportError:  # a copied Space has the modules beside it
    import mpt_page  # type: ignore[no-redef]
    import mpt_space  # type: ignore[no-redef]

_MOST_PAIRS = 200_000  # of equal words, each of one answer with each of the other: the time to compare grows with them
Shown = tuple[str, str]  # an answer so far, and the note under it, as HTML


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

    async def answer(self, prompt: str, *settings: Any) -> AsyncGenerator[tuple[Any, ...], None]:
        """Both columns at once, in one event: of two events Gradio let the second wait for the first; and the buttons."""
        half = len(settings) // 2
        shown = [("", ""), ("", "")]
        arrived: asyncio.Queue[tuple[int, Shown | None]] = asyncio.Queue()  # None: the column is finished
        columns = (Settings(*settings[:half]), Settings(*settings[half:]))
        tasks = [asyncio.create_task(self._fill(arrived, n, prompt, each)) for n, each in enumerate(columns)]
        buttons: tuple[Any, Any] = mpt_page.busy()
        try:
            n_left = len(tasks)
            while n_left:
                column, part = await arrived.get()
                if part is None:
                    n_left -= 1
                    continue
                shown[column] = part
                yield *_columns(shown), *buttons
                buttons = gr.skip(), gr.skip()  # see ChatPresenter.answer
            await asyncio.gather(*tasks)
            marks = await asyncio.to_thread(with_differences_marked, shown[0][0], shown[1][0])
            yield *_columns(shown, marks), *buttons
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
        yield "", mpt_page.quiet("Waiting for the first token.")
        try:
            card = mpt_space.pick(await self.server.models(), settings.model)
            answer.begin(card)
            pieces, n_new = await self._asked(card, prompt, settings)
            async with aclosing(pieces):
                async for piece in pieces:
                    answer.add(piece)
                    if answer.is_due():
                        yield answer.text, mpt_page.quiet(answer.numbers.line())
            limit = "the longest answer" if n_new == int(settings.max_tokens) else "the end of the context"
            cut = f"cut at {limit}" if answer.numbers.finish_reason == "length" else ""
            way = "continues the prompt" if is_base(card) else "answers the prompt"
            yield answer.text, mpt_page.quiet(mpt_page.join([answer.numbers.line(), way, cut]))
        except mpt_space.SpaceError as error:
            yield answer.text, mpt_page.trouble(error.sentence)

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


def two_alike(cards: list[mpt_space.Card]) -> list[mpt_space.Card]:
    """The models, first those of the first prompt style that two of them share: side by side they do the same."""

    def rank(card: mpt_space.Card) -> int:
        return {"instruct": 1, "none": 2}.get(str(card.get("prompt_style")), 0)

    groups = [list(group) for _, group in groupby(sorted(cards, key=rank), key=rank)]
    return [card for group in sorted(groups, key=lambda group: len(group) < 2) for card in group]


def _columns(shown: list[Shown], marks: tuple[str, str] | None = None) -> tuple[str, str, str, str]:
    a, b = marks or (html.escape(shown[0][0]), html.escape(shown[1][0]))
    return answer_html("A", a), shown[0][1], answer_html("B", b), shown[1][1]


def answer_html(name: str, inside: str) -> str:
    """An answer in its box; what is inside is HTML."""
    return (
        f'<p class="answer-name" id="of-{name}">Answer of {name}</p>'
        f'<div class="answer" role="region" aria-labelledby="of-{name}" tabindex="0">{inside}</div>'
    )


def with_differences_marked(a: str, b: str) -> tuple[str, str]:
    """Two answers as HTML, with the words marked that the other one does not have at that place.

    Of answers that repeat themselves too much for that, all is marked from the first difference on.
    """
    words_a, words_b = (re.findall(r"\s*\w+|\s*[^\w\s]|\s+$", text) for text in (a, b))
    if not words_a or not words_b:
        return html.escape(a), html.escape(b)
    parts: tuple[list[str], list[str]] = ([], [])
    for kind, a1, a2, b1, b2 in _opcodes(words_a, words_b):
        for part, words in zip(parts, (words_a[a1:a2], words_b[b1:b2]), strict=True):
            text = html.escape("".join(words))
            part.append(text if kind == "equal" or not text else f"<mark>{text}</mark>")
    return "".join(parts[0]), "".join(parts[1])


def _opcodes(a: list[str], b: list[str]) -> Sequence[tuple[str, int, int, int, int]]:
    """What makes one list of the other, as `SequenceMatcher.get_opcodes` gives it."""
    n_times = Counter(b)
    if sum(n_times[word] for word in a) <= _MOST_PAIRS:
        # With `autojunk` the words of a text of 200 that come often would count as junk, and the text as different.
        return SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
    n_same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
    return [("equal", 0, n_same, 0, n_same), ("replace", n_same, len(a), n_same, len(b))]
