"""What happens on the page of the base model: a text is continued in place, with the probabilities of its tokens.

No layout is here. A visitor's state is in the page, so one presenter serves all visitors.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import gradio as gr

try:
    from demos import mpt_page, mpt_space
    from demos.base.tokens import Score, Token, table_html, tokens_of
except ImportError:  # a copied Space has the modules beside it
    import mpt_page  # type: ignore[no-redef]
    import mpt_space  # type: ignore[no-redef]
    from tokens import Score, Token, table_html, tokens_of  # type: ignore[no-redef]

N_ALTERNATIVES = 5
N_UNDO = 50  # continuations that can be taken back
Coloured = dict[str, Any]  # {"text": ..., "tokens": ...}: what the box holds


class BasePresenter:
    """The event handlers that ask the server."""

    def __init__(self, server: mpt_space.Server) -> None:
        self.server = server

    async def write(
        self, now: Coloured, model: str | None, max_tokens: float, temperature: float, top_p: float, seed: float | None
    ) -> AsyncGenerator[tuple[Coloured, str, str], None]:
        """The text so far with the probabilities of its tokens, the line of numbers, and the new tokens as a table."""
        answer, scores, text = mpt_page.Answer(), list[Score](), now["text"]
        wanted, sampling = int(max_tokens), mpt_space.sampling(temperature, top_p, seed=seed)

        def written() -> tuple[Coloured, list[Token]]:
            new = tokens_of(text + answer.text, len(text), scores)
            return {"text": text + answer.text, "tokens": [*now["tokens"], *new]}, new

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
                        yield written()[0], mpt_page.quiet(answer.numbers.line()), ""
            end = why_it_ended(answer.numbers.finish_reason, is_context_full=n_new < wanted)
            line = mpt_page.quiet(answer.summary(end))
        except mpt_space.SpaceError as error:
            line = mpt_page.trouble(error.sentence)
        shown, new = written()
        yield shown, line, table_html(new)


def remember(now: Coloured, before: list[Coloured], is_writing: bool) -> Any:
    """What was before each continuation, newest last; that one is written, and the buttons during it.

    Enter does nothing while one is written.
    """
    return gr.skip() if is_writing else ([*before, now][-N_UNDO:], True, *mpt_page.busy(), gr.update(interactive=False))


def rest() -> tuple[Any, ...]:
    """That none is written, and the buttons then."""
    return False, *mpt_page.idle(), gr.update(interactive=True)


def take_back(now: Coloured, before: list[Coloured]) -> tuple[Coloured, list[Coloured], str, str]:
    """The box, what was in it before, the line of numbers and the table, without the last continuation."""
    if not before:
        return now, [], mpt_page.quiet("Nothing to take back."), ""
    return before[-1], before[:-1], "", ""


def example(sample: list[str], is_writing: bool) -> Any:
    """An example in place of the text, unless that is being continued."""
    return gr.skip() if is_writing else {"text": sample[0], "tokens": []}


def why_it_ended(finish_reason: str | None, is_context_full: bool) -> str:
    """Empty when the model wrote as much as was asked for."""
    if finish_reason == "stop":
        return "the model ended the text here"
    return "the model's context is full" if is_context_full and finish_reason == "length" else ""


def base_models_first(cards: list[mpt_space.Card]) -> list[mpt_space.Card]:
    """The others can continue a text too."""
    return sorted(cards, key=lambda card: card.get("prompt_style") not in (None, "none"))
