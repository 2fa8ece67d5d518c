"""What happens on the instruct page: an instruction goes to the server, its answer and the exact prompt come back.

No layout is here. A visitor's state is in the page, so one presenter serves all visitors.
"""

import html
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import gradio as gr

try:
    from demos import mpt_page, mpt_space
    from demos.instruct import json_check
    from demos.instruct.layout import HINT, Layout
except ImportError:  # a copied Space has the modules beside it
    import json_check  # type: ignore[no-redef]
    import mpt_page  # type: ignore[no-redef]
    import mpt_space  # type: ignore[no-redef]
    from layout import HINT, Layout  # type: ignore[no-redef]

GREEDY_BELOW = 0.1  # as in the original Space
Update = dict[Any, Any]  # a component of the layout: what it becomes


@dataclass(frozen=True)
class Settings:
    """The sliders of the page, in its order."""

    temperature: float
    top_p: float
    top_k: float
    max_tokens: float

    def parameters(self) -> dict[str, Any]:
        """What goes to the server, but for the number of new tokens."""
        return {
            "temperature": 0.0 if self.temperature < GREEDY_BELOW else self.temperature,
            "top_p": self.top_p if self.top_p < 1 else None,
            "top_k": int(self.top_k) or None,
        }


class InstructPresenter:
    """The event handlers of the page, for the models of a server."""

    def __init__(self, server: mpt_space.Server, layout: Layout) -> None:
        self.server, self.layout = server, layout

    async def greet(self) -> Update:
        try:
            cards = await self._models()
        except mpt_space.SpaceError as error:
            return {self.layout.status: mpt_page.trouble(error.sentence)}
        return {**self._about_model(cards, cards[0]), self.layout.status: ""}

    async def name_licence(self, model: str | None) -> str:
        try:
            return note(next((card for card in await self._models() if card["id"] == model), None))
        except mpt_space.SpaceError:
            return note(None)

    async def answer(self, model: str | None, instruction: str, *sliders: float) -> AsyncGenerator[Update, None]:
        """Stream the answer to the instruction; what goes wrong becomes a sentence below it."""
        status = self.layout.status
        if not instruction.strip():
            yield {status: mpt_page.trouble("Write an instruction first, or take one of the examples.")}
            return
        yield self._begun()
        answer = mpt_page.Answer()
        try:
            async with aclosing(self._answered(answer, model, instruction, Settings(*sliders))) as updates:
                async for update in updates:
                    yield update
        except mpt_space.SpaceError as error:
            yield {**self._shown(answer.text), status: mpt_page.trouble(error.sentence), **self._idle()}

    async def _answered(
        self, answer: mpt_page.Answer, model: str | None, instruction: str, settings: Settings
    ) -> AsyncGenerator[Update, None]:
        """The exact prompt, the answer as it grows, and the finished answer. Raises SpaceError."""
        cards = await self._models()
        card = mpt_space.pick(cards, model)
        messages = [{"role": "user", "content": instruction}]
        prompt, n_prompt = await exact_prompt(self.server, card["id"], messages)
        yield {self.layout.prompt: prompt, **self._about_model(cards, card)}
        answer.begin(card)
        wanted = int(settings.max_tokens)
        n_new = wanted if n_prompt is None else mpt_space.room(card, n_prompt, wanted)
        pieces = self.server.chat(card["id"], messages, max_tokens=n_new, **settings.parameters())
        async with aclosing(pieces):
            async for piece in pieces:
                answer.add(piece)
                if piece == mpt_space.Piece():  # Gradio sees that a tab is closed only when it is handed something
                    yield {self.layout.status: gr.skip()}
                if piece.notice:
                    yield {self.layout.status: mpt_page.quiet(piece.notice)}
                if piece.text and answer.is_due():
                    line = mpt_page.quiet(f"{answer.numbers.line()} ...")
                    yield {**self._shown(answer.text), self.layout.status: line}
        yield {**self._finished(answer, instruction, n_new), **self._idle()}

    def rest(self, was_answering: bool) -> Update:
        """After an answer: say so if it was stopped."""
        if not was_answering:
            return {self.layout.is_answering: False}
        return {self.layout.status: mpt_page.quiet("Stopped."), **self._idle()}

    def clear(self) -> Update:
        return {
            self.layout.instruction: "",
            self.layout.prose: gr.update(value=HINT, visible=True),
            self.layout.code: gr.update(value="", visible=False),
            self.layout.status: "",
            self.layout.prompt: "",
            **self._idle(),
        }

    async def _models(self) -> list[mpt_space.Card]:
        """The models that follow instructions, the instruct template first."""
        refusal = "The server has base models only, which follow no instructions; start it with an instruct model."
        return mpt_space.models_that_answer(await self.server.models(), "instruct", refusal)

    def _about_model(self, cards: list[mpt_space.Card], card: mpt_space.Card) -> Update:
        choices = gr.update(choices=[each["id"] for each in cards], value=card["id"])
        return {self.layout.model: choices, self.layout.note: note(card)}

    def _begun(self) -> Update:
        return {
            **self._shown(""),
            self.layout.status: mpt_page.quiet("Reading the instruction ..."),
            self.layout.send: gr.update(interactive=False),
            self.layout.stop: gr.update(interactive=True),
            self.layout.is_answering: True,
        }

    def _idle(self) -> Update:
        return {
            self.layout.send: gr.update(interactive=True),
            self.layout.stop: gr.update(interactive=False),
            self.layout.is_answering: False,
        }

    def _shown(self, text: str) -> Update:
        """The answer so far, in the form its beginning asks for."""
        if json_check.looks_like_json(text):
            return {self.layout.prose: gr.update(visible=False), self.layout.code: gr.update(value=text, visible=True)}
        return {self.layout.prose: gr.update(value=text, visible=True), self.layout.code: gr.update(visible=False)}

    def _finished(self, answer: mpt_page.Answer, instruction: str, n_new: int) -> Update:
        """The whole answer with its numbers; JSON is checked."""
        was_cut = answer.numbers.finish_reason == "length"
        line = mpt_page.quiet(answer.summary(f"cut at {n_new} new tokens" if was_cut else ""))
        if not answer.text.strip():
            return {self.layout.prose: "*The model answered nothing.*", self.layout.status: line}
        if not json_check.looks_like_json(answer.text):
            return {**self._shown(answer.text), self.layout.status: line}
        checked = json_check.check(answer.text, instruction)
        return {**self._shown(checked.text), self.layout.status: verdict(checked, was_cut) + line}


async def exact_prompt(
    server: mpt_space.Server, model: str, messages: list[mpt_space.Message]
) -> tuple[str, int | None]:
    """The text the model is given for the messages, and its tokens; the text says so where the server cannot tell."""
    try:
        tokens = await server.tokenize(model, messages)
        text = await server.detokenize(model, tokens)
    except mpt_space.SpaceError as error:
        if error.code in ("context_length_exceeded", "unreachable", "invalid_api_key"):
            raise
        return "This server does not show the prompts it makes.", None
    return text, len(tokens)


def verdict(checked: json_check.Check, was_cut: bool) -> str:
    """What the check of an answer in JSON found, as HTML."""
    hint = " Raise max new tokens: the answer was cut." if was_cut and checked.verdict == "invalid" else ""
    sentence = html.escape(checked.sentence + hint)
    return f'<p class="mpt-box mpt-verdict {checked.verdict}" role="status">{sentence}</p>'


def note(card: mpt_space.Card | None) -> str:
    """The lines at the foot of the page."""
    tiny = "This tiny model has learned one thing, turning YAML into JSON; of the other examples it makes nonsense."
    return mpt_page.notes(card, tiny, mpt_page.privacy_note())
