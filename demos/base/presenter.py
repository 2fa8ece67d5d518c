"""What happens on the page of the base model: a text is continued in place, with the probabilities of its tokens.

No layout is here. A visitor's state is in the page, so one presenter serves all visitors.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import gradio as gr

try:
    from demos import mpt_page, mpt_space
    from demos.base.tokens import Score, tokens_html
except ImportError:  # a copied Space has the modules beside it
    import mpt_page  # type: ignore[no-redef]
    import mpt_space  # type: ignore[no-redef]
    from tokens import Score, tokens_html  # type: ignore[no-redef]

N_ALTERNATIVES = 5
N_UNDO = 50  # continuations that can be taken back


class BasePresenter:
    """The event handlers that ask the server."""

    def __init__(self, server: mpt_space.Server) -> None:
        self.server = server

    async def look(self, model: str | None) -> tuple[Any, str]:
        """The picker and the note beside it, from what the server serves now."""
        return await mpt_page.picker_and_note(self.server, base_models_first, model)

    async def write(
        self, text: str, model: str | None, max_tokens: float, temperature: float, top_p: float, seed: float | None
    ) -> AsyncGenerator[tuple[str, str, str], None]:
        """The text so far, the line of numbers, and the new tokens with their probabilities as HTML."""
        answer, scores = mpt_page.Answer(), list[Score]()
        wanted, sampling = int(max_tokens), mpt_space.sampling(temperature, top_p, seed=seed)
        try:
            card = mpt_space.pick(base_models_first(await self.server.models()), model)
            answer.begin(card)
            n_new = await mpt_space.room_after(self.server, card, text, wanted)
            pieces = self.server.complete(card["id"], text, max_tokens=n_new, logprobs=N_ALTERNATIVES, **sampling)
            async with aclosing(pieces):
                async for piece in pieces:
                    answer.add(piece)
                    scores += piece.logprobs or []
                    if answer.is_due():
                        yield text + answer.text, answer.numbers.line(), tokens_html(scores)
            end = why_it_ended(answer.numbers.finish_reason, is_context_full=n_new < wanted)
            yield text + answer.text, answer.summary(end), tokens_html(scores, with_table=True)
        except mpt_space.SpaceError as error:
            gr.Warning(error.sentence, title="Not continued")
            yield text + answer.text, error.sentence, tokens_html(scores, with_table=True)


def remember(text: str, before: list[str]) -> list[str]:
    """The text before each continuation, newest last."""
    return [*before, text][-N_UNDO:]


def take_back(text: str, before: list[str]) -> tuple[str, list[str], str, str]:
    """The text, the texts before it, the line of numbers and the tokens, without the last continuation."""
    if not before:
        return text, [], "Nothing to take back.", ""
    return before[-1], before[:-1], "", ""


def why_it_ended(finish_reason: str | None, is_context_full: bool) -> str:
    """Empty when the model wrote as much as was asked for."""
    if finish_reason == "stop":
        return "the model ended the text here"
    return "the model's context is full" if is_context_full and finish_reason == "length" else ""


def base_models_first(cards: list[mpt_space.Card]) -> list[mpt_space.Card]:
    """The others can continue a text too."""
    return sorted(cards, key=lambda card: card.get("prompt_style") not in (None, "none"))
