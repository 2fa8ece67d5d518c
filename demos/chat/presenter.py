"""What happens on the chat page: messages are taken, answered, retried, edited and taken back.

No layout is here. A visitor's state is in the page, so one presenter serves all visitors.
"""

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import gradio as gr

try:
    from demos import mpt_page, mpt_space
    from demos.chat.context import fitted
    from demos.chat.layout import SUGGESTIONS, SUGGESTIONS_OF
    from demos.chat.turns import Turn, answered, asked, last_question, note_of, restored, said_in, title_of
except ImportError:  # a copied Space has the modules beside it
    import mpt_page  # type: ignore[no-redef]
    import mpt_space  # type: ignore[no-redef]
    from context import fitted  # type: ignore[no-redef]
    from layout import SUGGESTIONS, SUGGESTIONS_OF  # type: ignore[no-redef]
    from turns import Turn, answered, asked, last_question, note_of, restored, said_in, title_of  # type: ignore[no-redef]


@dataclass(frozen=True)
class Settings:
    """The choices around the conversation, in the order of the page."""

    model: str | None
    system: str
    temperature: float
    top_p: float
    top_k: float
    max_tokens: float
    repetition_penalty: float
    seed: float | None

    def parameters(self) -> dict[str, Any]:
        """What goes to the server, but for the number of new tokens."""
        return mpt_space.sampling(
            self.temperature, self.top_p, top_k=self.top_k, repetition_penalty=self.repetition_penalty, seed=self.seed
        )


class ChatPresenter:
    """The event handlers that ask the server."""

    def __init__(self, server: mpt_space.Server) -> None:
        self.server = server

    async def answer(self, turns: list[Turn], answering: str, *settings: Any) -> AsyncGenerator[Any, None]:
        """Stream the answer to the last message: what has come of it, for `scripts.SHOW`, and Send and Stop.

        answering: its id. Stop appears with the first piece: pressed before the event has begun it would cancel nothing.
        """
        if not answering or not turns or turns[-1]["role"] != "user":
            yield gr.skip()
            return
        buttons: tuple[Any, Any] = mpt_page.busy()
        async with aclosing(self._answered(turns, Settings(*settings))) as parts:
            async for text, note, is_last in parts:
                said = answered(text, note if is_last else "") if text or is_last else None
                under = mpt_page.quiet(note) if note and (text or not is_last) else ""
                yield {"of": answering, "said": said, "under": under, "is_last": is_last}, *buttons
                buttons = gr.skip(), gr.skip()

    async def _answered(self, turns: list[Turn], settings: Settings) -> AsyncGenerator[tuple[str, str, bool], None]:
        """The answer so far, the note under it, and whether that is all; what goes wrong becomes the note."""
        answer = mpt_page.Answer()
        yield "", "", False
        try:
            card = mpt_space.pick(chat_models(await self.server.models()), settings.model)
            wanted = int(settings.max_tokens)
            messages, n_dropped, room = await fitted(self.server, card, settings.system, said_in(turns), wanted)
            left_out = left_out_note(n_dropped)
            answer.begin(card)
            is_ours = card.get("prompt_style") is not None
            pieces = self.server.chat(card["id"], messages, max_tokens=room, progress=is_ours, **settings.parameters())
            async with aclosing(pieces):
                async for piece in pieces:
                    answer.add(piece)
                    if answer.is_due():
                        yield answer.text, mpt_page.join([left_out, answer.numbers.notice], " "), False
            cut = "cut at the longest answer allowed" if answer.numbers.finish_reason == "length" else ""
            yield answer.text, mpt_page.join([left_out, answer.summary(cut)], " "), True
        except mpt_space.SpaceError as error:
            yield answer.text, error.sentence, True


# -- events that ask nobody -------------------------------------------------------------------------------------------
# Each gives the conversation's id back with its turns: another one may have been opened meanwhile.


def take(text: str, turns: list[Turn], conversation: str, answering: str) -> Any:
    """Put the message into the conversation; one that comes during an answer stays in its box."""
    if answering or not text.strip():
        return gr.skip()
    return "", [*turns, asked(text.strip())], conversation or _new_id(), _new_id(), gr.Button(interactive=False)


def again(turns: list[Turn], conversation: str, at: gr.RetryData) -> tuple[list[Turn], str, str]:
    """The conversation up to the question, which is then answered anew, and the answer's id."""
    return turns[: last_question(turns, int(at.index)) + 1], conversation, _new_id()


def edit(turns: list[Turn], conversation: str, at: gr.EditData) -> tuple[list[Turn], str, str]:
    """The conversation up to the edited message, which is then answered anew, and the answer's id."""
    return [*turns[: int(at.index)], asked(str(at.value))], conversation, _new_id()


def _new_id() -> str:
    return uuid.uuid4().hex


def undo(turns: list[Turn], conversation: str, at: gr.UndoData) -> tuple[list[Turn], str, str, str]:
    """The conversation without the last question, which goes back into the box."""
    place = last_question(turns, int(at.index))
    return turns[:place], conversation, turns[place]["content"], under(turns[:place])


def open_saved(conversation: str, saved: list[dict[str, Any]]) -> tuple[Any, ...]:
    """The turns, id and system prompt of a saved conversation, the note under it, no answer, and the buttons at rest."""
    found = next((each for each in saved if each["id"] == conversation), None)
    if found is None:
        return (gr.skip(),) * 7
    turns = [restored(turn) for turn in found["turns"]]
    return turns, found["id"], found["system"], under(turns), "", *mpt_page.idle()


def bring_back(deleted: dict[str, Any]) -> tuple[Any, ...]:
    """The conversation that was deleted last, as `open_saved` gives it."""
    return open_saved(deleted["id"], [deleted])


def can_be_brought_back(deleted: dict[str, Any] | None) -> Any:
    return gr.Button(visible=bool(deleted and deleted["turns"]))


def suggested(model: str | None) -> Any:
    """Questions that a model can answer."""
    return gr.update(samples=[[text] for text in SUGGESTIONS_OF.get(str(model), SUGGESTIONS)])


def listed(saved: list[dict[str, Any]], current: str) -> gr.Radio:
    """The saved conversations by their first words."""
    titles = [(title_of(each["turns"]), each["id"]) for each in saved]
    return gr.Radio(choices=titles, value=current if current in [each["id"] for each in saved] else None)


def under(turns: list[Turn]) -> str:
    """The line under a conversation, as HTML."""
    note = note_of(turns)
    return mpt_page.quiet(note) if note else ""


def left_out_note(n_dropped: int) -> str:
    if not n_dropped:
        return ""
    return f"The oldest {n_dropped} messages no longer fit into the model's context and were left out."


def chat_models(cards: list[mpt_space.Card]) -> list[mpt_space.Card]:
    """Those that can be talked to, ChatML first."""
    refusal = "The server serves base models only, which continue text and do not chat."
    return mpt_space.models_that_answer(cards, "chatml", refusal)
