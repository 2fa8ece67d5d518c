"""The instruct page: one instruction, one answer, the exact prompt between them, and a check of answers in JSON.

A Gradio Space and a client of an OpenAI-style server (`MPT_URL`, `MPT_API_KEY`). It follows the mpt-7b-instruct Space:
its template (which the server applies), its sliders and its kinds of examples.
"""

import html
import time
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

try:
    from demos.instruct.json_check import Check, check, looks_like_json
    from demos.mpt_space import (
        Card,
        Numbers,
        Server,
        SpaceError,
        context_length,
        join,
        launch_options,
        licence_note,
        privacy_note,
        room,
    )
except ModuleNotFoundError:  # this folder, copied alone as a Space
    from json_check import Check, check, looks_like_json  # type: ignore[no-redef]
    from mpt_space import (  # type: ignore[no-redef]
        Card,
        Numbers,
        Server,
        SpaceError,
        context_length,
        join,
        launch_options,
        licence_note,
        privacy_note,
        room,
    )

_GREEDY_BELOW = 0.1  # as in the original Space
_DRAW_EVERY_S = 0.05
_MAX_CHARACTERS = 40_000

EXAMPLES = {
    "YAML to JSON": "Convert the following YAML to JSON:\n\nname: Ada Lovelace\nage: 36\nlanguages: [English, French]",
    "Travel diary": "Write a diary of three days in Lisbon, one paragraph a day: what we saw and what we ate.",
    "A robot's day off": "Tell a short story in which a robot has the best day of its life.",
    "Congratulations": "Write an email that congratulates a colleague on her new post, warmly and in under 80 words.",
    "For a six-year-old": "Explain to a six-year-old why a candle goes out under a glass.",
    "Wrong about birds": "List three things many people believe about birds that are not true, and say what is true.",
    "What is an alpaca": "What is an alpaca, and how does it differ from a llama?",
    "Poem": "Write a poem of eight lines about the first steps on the moon.",
}

# The last rule: Gradio's colours of code are too pale to read on white.
CSS = """
.bare, .bare .html-container {padding: 0 !important}
.mpt-quiet {font-size: 0.875rem; color: color-mix(in srgb, var(--body-text-color) 72%, transparent);
  overflow-wrap: anywhere; line-height: 1.5; margin: 0 0 0.25rem}
.mpt-verdict, .mpt-trouble {margin: 0; padding: 0.5rem 0.75rem; border-left: 4px solid; border-radius: 4px;
  line-height: 1.45; background: var(--background-fill-secondary); color: var(--body-text-color);
  overflow-wrap: anywhere}
.mpt-verdict + .mpt-quiet {padding-top: 0.4rem}
.mpt-verdict.valid {border-color: #15803d} .mpt-verdict.differs {border-color: #b45309}
.mpt-verdict.invalid, .mpt-trouble {border-color: #dc2626}
body:not(.dark) .cm-line span {filter: brightness(0.62) saturate(1.5)}
"""


def build(server: Server) -> gr.Blocks:
    """The page, for the models of a server."""
    bare: dict[str, Any] = {"padding": False, "apply_default_css": False, "elem_classes": "bare"}
    with gr.Blocks(title="MPT instruct", analytics_enabled=False) as page:
        gr.HTML(f"<style>{CSS}</style>", **bare)
        gr.Markdown("# MPT instruct\nOne instruction, one answer, and the exact text the model read.")
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                instruction = gr.Textbox(
                    label="Instruction",
                    info="Shift+Enter sends it",
                    placeholder="Convert the following YAML to JSON: ...",
                    lines=7,
                    max_lines=18,
                    max_length=_MAX_CHARACTERS,
                    autofocus=True,
                )
                with gr.Row():
                    send = gr.Button("Answer", variant="primary", min_width=80, size="md")
                    stop = gr.Button("Stop", variant="stop", min_width=80, size="md", interactive=False)
                    clear = gr.Button("Clear", min_width=80, size="md")
                gr.Examples(
                    [[text] for text in EXAMPLES.values()],
                    inputs=[instruction],
                    label="Examples",
                    example_labels=list(EXAMPLES),
                )
                with gr.Accordion("Model and settings", open=False):
                    model = gr.Dropdown(label="Model", choices=[], interactive=True)
                    temperature = gr.Slider(
                        0, 1, value=0.1, step=0.05, label="Temperature", info="below 0.1 the likeliest token is taken"
                    )
                    top_p = gr.Slider(0.01, 1, value=1, step=0.01, label="Top-p", info="1 is off")
                    top_k = gr.Slider(0, 200, value=0, step=1, label="Top-k", info="0 is off")
                    max_tokens = gr.Slider(16, 1664, value=256, step=16, label="Max new tokens")
            with gr.Column(scale=1, min_width=320):
                prose = gr.Markdown(
                    "*The answer appears here.*",
                    label="Answer",
                    show_label=True,
                    container=True,
                    min_height=160,
                    buttons=["copy"],
                    sanitize_html=True,
                )
                code = gr.Code(
                    label="Answer (JSON)",
                    language="json",
                    interactive=False,
                    visible=False,
                    wrap_lines=True,
                    lines=7,
                    max_lines=30,
                )
                status = gr.HTML("", **bare)
                with gr.Accordion("The exact prompt", open=False):
                    prompt = gr.Code(
                        "",
                        label="What the model reads, in its own template",
                        language=None,
                        interactive=False,
                        wrap_lines=True,
                        show_line_numbers=False,
                        lines=4,
                        max_lines=24,
                    )
        note = gr.HTML(_note(None), **bare)

        is_answering = gr.State(False)  # still true after an answer: it was stopped
        outputs = [prose, code, status, prompt, note, model, send, stop, is_answering]

        async def answer(
            model_id: str | None, text: str, temperature: float, top_p: float, top_k: float, max_tokens: float
        ) -> AsyncIterator[dict[Any, Any]]:
            if not text.strip():
                yield {status: _trouble("Write an instruction first, or take one of the examples.")}
                return
            yield {
                prose: gr.update(value="", visible=True),
                code: gr.update(value="", visible=False),
                status: _quiet("Reading the instruction ..."),
                send: gr.update(interactive=False),
                stop: gr.update(interactive=True),
                is_answering: True,
            }
            idle = {send: gr.update(interactive=True), stop: gr.update(interactive=False), is_answering: False}
            answered = ""
            try:
                cards = await _models(server)
                card = next((each for each in cards if each["id"] == model_id), cards[0])
                messages = [{"role": "user", "content": text}]
                exact, n_prompt = await _exact_prompt(server, card["id"], messages)
                yield {
                    prompt: exact,
                    note: _note(card),
                    model: gr.update(choices=[each["id"] for each in cards], value=card["id"]),
                }
                numbers = Numbers(context_length(card))
                n_new = int(max_tokens) if n_prompt is None else room(card, n_prompt, int(max_tokens))
                drawn_at = 0.0
                async for piece in server.chat(
                    card["id"],
                    messages,
                    temperature=0.0 if temperature < _GREEDY_BELOW else temperature,
                    top_p=top_p if top_p < 1 else None,
                    top_k=int(top_k) or None,
                    max_tokens=n_new,
                ):
                    numbers.add(piece)
                    answered += piece.text
                    if piece.notice:
                        yield {status: _quiet(piece.notice)}
                    if piece.text and time.monotonic() - drawn_at > _DRAW_EVERY_S:
                        drawn_at = time.monotonic()
                        yield {**_shown(answered), status: _quiet(f"{numbers.line()} ...")}
                was_cut = numbers.finish_reason == "length"
                cut = f"cut at {n_new} new tokens" if was_cut else ""
                line = _quiet(join([numbers.line(), numbers.context_line(), cut]))
                if not answered.strip():
                    yield {prose: "*The model answered nothing.*", status: line, **idle}
                elif looks_like_json(answered):
                    checked = check(answered, text)
                    yield {
                        prose: gr.update(visible=False),
                        code: gr.update(value=checked.text, visible=True),
                        status: _verdict(checked, was_cut) + line,
                        **idle,
                    }
                else:
                    yield {**_shown(answered), status: line, **idle}
            except SpaceError as error:
                shown = _shown(answered) if answered else {prose: gr.update(value="", visible=True)}
                yield {**shown, status: _trouble(str(error)), **idle}

        def _shown(answered: str) -> dict[Any, Any]:
            """The answer so far, in the form its beginning asks for."""
            is_json = looks_like_json(answered)
            if is_json:
                return {prose: gr.update(visible=False), code: gr.update(value=answered, visible=True)}
            return {prose: gr.update(value=answered, visible=True), code: gr.update(visible=False)}

        async def greet() -> dict[Any, Any]:
            try:
                cards = await _models(server)
            except SpaceError as error:
                return {status: _trouble(str(error))}
            return {
                model: gr.update(choices=[card["id"] for card in cards], value=cards[0]["id"]),
                note: _note(cards[0]),
                status: "",
            }

        async def name_licence(model_id: str | None) -> str:
            try:
                return _note(next((card for card in await _models(server) if card["id"] == model_id), None))
            except SpaceError:
                return _note(None)

        inputs = [model, instruction, temperature, top_p, top_k, max_tokens]
        running = gr.on(
            [send.click, instruction.submit],
            answer,
            inputs,
            outputs,
            concurrency_limit=32,
            show_progress="hidden",
            api_name="instruct",
        )

        def rest(was_answering: bool) -> dict[Any, Any]:
            """After an answer: say so if it was stopped."""
            if not was_answering:
                return {is_answering: False}
            idle = {send: gr.update(interactive=True), stop: gr.update(interactive=False), is_answering: False}
            return {status: _quiet("Stopped."), **idle}

        # Only once the event has ended: what it had sent before it was cancelled would come after the word "stopped".
        running.then(
            rest, [is_answering], [status, send, stop, is_answering], show_progress="hidden", api_visibility="private"
        )
        stop.click(None, None, None, cancels=[running])
        clear.click(
            lambda: (
                "",
                gr.update(value="*The answer appears here.*", visible=True),
                gr.update(value="", visible=False),
                "",
                "",
                gr.update(interactive=True),
                gr.update(interactive=False),
                False,
            ),
            None,
            [instruction, prose, code, status, prompt, send, stop, is_answering],
            cancels=[running],
            queue=False,
            api_visibility="private",
        )
        model.input(name_licence, [model], [note], show_progress="hidden", api_visibility="private")
        page.load(greet, None, [model, note, status], show_progress="hidden", api_visibility="private")
    page.queue(max_size=128, default_concurrency_limit=32)
    return page


async def _models(server: Server) -> list[Card]:
    """The models that follow instructions, the instruct template first; all, where the server does not say."""
    cards = await server.models()
    able = [card for card in cards if card.get("prompt_style") != "none"]
    if not able:
        raise SpaceError(
            "The server has base models only, which follow no instructions; start it with an instruct model."
        )
    return sorted(able, key=lambda card: card.get("prompt_style") != "instruct")


async def _exact_prompt(server: Server, model: str, messages: list[dict[str, Any]]) -> tuple[str, int | None]:
    """The text the model is given for the messages, and its tokens; the text says so where the server cannot tell."""
    try:
        tokens = await server.tokenize(model, messages)
        text = await server.detokenize(model, tokens)
    except SpaceError as error:
        if error.code in ("context_length_exceeded", "unreachable", "invalid_api_key"):
            raise
        return "This server does not show the prompts it makes.", None
    return text, len(tokens)


def _verdict(checked: Check, was_cut: bool) -> str:
    hint = " Raise max new tokens: the answer was cut." if was_cut and checked.verdict == "invalid" else ""
    return f'<p class="mpt-verdict {checked.verdict}" role="status">{html.escape(checked.sentence + hint)}</p>'


def _quiet(line: str) -> str:
    return f'<p class="mpt-quiet" role="status">{html.escape(line)}</p>'


def _trouble(sentence: str) -> str:
    return f'<p class="mpt-trouble" role="alert">{html.escape(sentence)}</p>'


def _note(card: Card | None) -> str:
    lines = [licence_note(card)] if card else []
    if card and str(card["id"]).startswith("mpt-tiny"):
        lines.append(
            "This tiny model has learned one thing, turning YAML into JSON; of the other examples it makes nonsense."
        )
    lines.append(privacy_note())
    return "".join(f'<p class="mpt-quiet">{html.escape(line)}</p>' for line in lines)


if __name__ == "__main__":
    build(Server()).launch(**launch_options())
