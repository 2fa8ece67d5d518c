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
    from demos.mpt_text import html_of
except ImportError:  # a copied Space has the modules beside it
    import json_check  # type: ignore[no-redef]
    import mpt_page  # type: ignore[no-redef]
    import mpt_space  # type: ignore[no-redef]
    from layout import HINT, Layout  # type: ignore[no-redef]
    from mpt_text import html_of  # type: ignore[no-redef]

GREEDY_BELOW = 0.1  # as in the original Space
ANY_JSON = {  # of YAML: OpenAI's `json_object` is an object only
    "type": "json_schema",
    "json_schema": {"name": "answer", "schema": {"type": ["object", "array"]}},
}
Update = dict[Any, Any]  # a component of the layout: what it becomes


@dataclass(frozen=True)
class Settings:
    """The choices on the page, in its order."""

    grammar: bool
    temperature: float
    top_p: float
    top_k: float
    max_tokens: float

    def parameters(self, instruction: str) -> dict[str, Any]:
        """What goes to the server, but for the number of new tokens."""
        return {
            "response_format": ANY_JSON if self.grammar and json_check.asks_for_json(instruction) else None,
            "temperature": 0.0 if self.temperature < GREEDY_BELOW else self.temperature,
            "top_p": self.top_p if self.top_p < 1 else None,
            "top_k": int(self.top_k) or None,
        }


class InstructPresenter:
    """The event handlers of the page, for the models of a server."""

    def __init__(self, server: mpt_space.Server, layout: Layout) -> None:
        self.server, self.layout = server, layout

    async def answer(self, model: str | None, instruction: str, *settings: Any) -> AsyncGenerator[Update, None]:
        """Stream the answer to the instruction; what goes wrong becomes a sentence below it."""
        status = self.layout.status
        if not instruction.strip():
            yield {status: mpt_page.trouble("Write an instruction first, or take one of the examples.")}
            return
        yield self._begun()
        answer = mpt_page.Answer()
        try:
            async with aclosing(self._answered(answer, model, instruction, Settings(*settings))) as updates:
                async for update in updates:
                    yield update
        except mpt_space.SpaceError as error:
            yield {**self._shown(answer.text), status: mpt_page.trouble(error.sentence), **self._idle()}

    async def _answered(
        self, answer: mpt_page.Answer, model: str | None, instruction: str, settings: Settings
    ) -> AsyncGenerator[Update, None]:
        """The exact prompt, the answer as it grows, and the finished answer. Raises SpaceError."""
        card = mpt_space.pick(instruct_models(await self.server.models()), model)
        messages = [{"role": "user", "content": instruction}]
        prompt, n_prompt = await exact_prompt(self.server, card["id"], messages)
        yield {self.layout.prompt: prompt}
        answer.begin(card)
        wanted = int(settings.max_tokens)
        n_new = wanted if n_prompt is None else mpt_space.room(card, n_prompt, wanted)
        pieces = self.server.chat(card["id"], messages, max_tokens=n_new, **settings.parameters(instruction))
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

    def _begun(self) -> Update:
        send, stop = mpt_page.busy()
        reading = mpt_page.quiet("Reading the instruction ...")
        return {
            **self._shown(""),
            self.layout.status: reading,
            self.layout.send: send,
            self.layout.stop: stop,
            self.layout.clear: gr.update(interactive=False),
            self.layout.is_answering: True,
        }

    def _idle(self) -> Update:
        send, stop = mpt_page.idle()
        clear = gr.update(interactive=True)
        return {
            self.layout.send: send, self.layout.stop: stop, self.layout.clear: clear, self.layout.is_answering: False
        }  # fmt: skip

    def _shown(self, text: str) -> Update:
        """The answer so far, in the form its beginning asks for."""
        prose, code = self.layout.prose, self.layout.code
        if json_check.looks_like_json(text):
            return {prose: gr.update(visible=False), code: gr.update(value=text, visible=True)}
        return {prose: gr.update(value=html_of(text), visible=True), code: gr.update(visible=False)}

    def _finished(self, answer: mpt_page.Answer, instruction: str, n_new: int) -> Update:
        """The whole answer with its numbers; JSON is checked."""
        was_cut = answer.numbers.finish_reason == "length"
        line = mpt_page.quiet(answer.summary(f"cut at {n_new} new tokens" if was_cut else ""))
        if not answer.text.strip():
            return {**self._shown("*The model answered nothing.*"), self.layout.status: line}
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


def instruct_models(cards: list[mpt_space.Card]) -> list[mpt_space.Card]:
    """The models that follow instructions, the instruct template first."""
    refusal = "The server has base models only, which follow no instructions; start it with an instruct model."
    return mpt_space.models_that_answer(cards, "instruct", refusal)
