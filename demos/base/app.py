"""A base model continues the text in place, and shows how likely each of its tokens was."""

import html
import math
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import gradio as gr

try:
    from demos import mpt_space as space
except ImportError:  # a copied Space has the module beside it
    import mpt_space as space  # type: ignore[no-redef]

N_ALTERNATIVES = 5
EXAMPLES = [
    "Once upon a time there was a little fox who",
    "The three most common misconceptions about birds are:\n1.",
    "def fibonacci(n):\n",
]
CSS = """<style>
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.9; font-family: var(--font-mono); }
.tokens span { border-radius: 3px; padding: 2px 0; border-bottom: 2px solid transparent; }
.tokens span:hover { border-bottom-color: var(--body-text-color); }
.token-table { max-height: 300px; overflow: auto; }
.token-table table { border-collapse: collapse; width: 100%; }
.token-table th, .token-table td { text-align: left; padding: 2px 12px 2px 0; overflow-wrap: anywhere; }
</style>"""
Score = tuple[str, float | None, dict[str, float]]  # a token, its log-probability, the likeliest there


def build(server: space.Server) -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="MPT base model") as page:
        before = gr.State([])  # the text before each continuation, newest last
        gr.Markdown("# Let a base model write on")
        with gr.Row(equal_height=True):
            model = gr.Dropdown([], label="Model", value=None, filterable=False, scale=1, min_width=200)
            licence = gr.Markdown("", elem_classes="quiet")
        text = gr.Textbox(
            label="Text", lines=10, max_lines=24, value=EXAMPLES[0], elem_id="text",
            info="A base model answers nothing: it writes on where you stop.",
        )  # fmt: skip
        with gr.Row():
            go = gr.Button("Continue", variant="primary", scale=3, min_width=110)
            undo = gr.Button("Undo", scale=1, min_width=70)
            stop = gr.Button("Stop", variant="stop", scale=1, min_width=70)
        numbers = gr.Markdown("", elem_classes="quiet", elem_id="numbers")
        tokens = gr.HTML("", label="Token probabilities", elem_id="tokens")
        with gr.Accordion("Settings", open=False), gr.Row():
            max_tokens = gr.Slider(1, 1024, 64, step=1, label="Tokens to write")
            temperature = gr.Slider(0, 2, 0.8, step=0.05, label="Temperature", info="0: always the likeliest token")
            top_p = gr.Slider(0.05, 1, 0.95, step=0.05, label="Top-p")
            seed = gr.Number(None, label="Seed", info="Empty: another text each time", precision=0)
        gr.Examples(EXAMPLES, [text], label="Examples", preload=False)
        gr.Markdown(space.privacy_note(), elem_classes="quiet")

        async def look(model: str | None) -> tuple[Any, str]:
            try:
                cards = base_models(await server.models())
            except space.SpaceError as error:
                gr.Warning(error.sentence, title="No models")
                return gr.skip(), error.sentence
            card = space.pick(cards, model)
            return gr.Dropdown([card["id"] for card in cards], value=card["id"]), space.licence_note(card)

        async def write(text: str, *settings: Any) -> AsyncIterator[tuple[str, str, str]]:
            async for parts in continued(server, text, *settings):
                yield parts

        def remember(text: str, before: list[str]) -> list[str]:
            return [*before, text][-50:]

        def take_back(text: str, before: list[str]) -> tuple[str, list[str], str, str]:
            if not before:
                return text, [], "Nothing to take back.", ""
            return before[-1], before[:-1], "", ""

        page.load(look, [model], [model, licence], show_progress="hidden")
        model.input(look, [model], [model, licence], show_progress="hidden")
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        run = go.click(remember, [text, before], [before], **quick).then(
            write, [text, model, max_tokens, temperature, top_p, seed], [text, numbers, tokens],
            concurrency_limit=32, show_progress="minimal", api_visibility="private",
        )  # fmt: skip
        stop.click(None, None, None, cancels=[run])
        undo.click(take_back, [text, before], [text, before, numbers, tokens], cancels=[run], **quick)
    return page


async def continued(
    server: space.Server,
    text: str,
    model: str | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
) -> AsyncIterator[tuple[str, str, str]]:
    """The text so far, the line of numbers, and the new tokens with their probabilities as HTML."""
    scores: list[Score] = []
    try:
        card = space.pick(base_models(await server.models()), model)
        numbers, pace = space.Numbers(space.context_length(card)), space.Pace()
        n_new = await space.room_after(server, card, text, int(max_tokens))
        pieces = server.complete(
            card["id"], text, max_tokens=n_new, temperature=temperature, top_p=top_p,
            seed=None if seed is None else int(seed), logprobs=N_ALTERNATIVES,
        )  # fmt: skip
        async with aclosing(pieces):
            async for piece in pieces:
                numbers.add(piece)
                text += piece.text
                scores += piece.logprobs or []
                if pace.is_due():
                    yield text, numbers.line(), shown(scores)
        ended = "the model ended the text here" if numbers.finish_reason == "stop" else ""
        if n_new < int(max_tokens) and numbers.finish_reason == "length":
            ended = "the model's context is full"
        yield text, space.join([numbers.line(), numbers.context_line(), ended]), shown(scores, with_table=True)
    except space.SpaceError as error:
        gr.Warning(error.sentence, title="Not continued")
        yield text, error.sentence, shown(scores, with_table=True)


def base_models(cards: list[space.Card]) -> list[space.Card]:
    """Base models first; the others can continue a text too."""
    return sorted(cards, key=lambda card: card.get("prompt_style") not in (None, "none"))


def shown(scores: list[Score], with_table: bool = False) -> str:
    """The tokens as HTML, darker where the model was surer; what else it thought of on hover, and in a table.

    Text of a model is not trusted: everything is escaped.
    """
    if not scores:
        return ""
    spans = "".join(
        f'<span style="background: rgb(59 130 246 / {0.06 + 0.5 * _probability(value):.2f})" '
        f'title="{html.escape(_odds(token, value, tops))}">{html.escape(token)}</span>'
        for token, value, tops in scores
    )
    parts = [CSS, '<p class="quiet">Darker: the model was surer. Hover over a token for what else it thought of.</p>']
    parts.append(f'<div class="tokens">{spans}</div>')
    if with_table:  # for keyboards, screen readers and fingers, which do not hover
        rows = "".join(
            f"<tr><td><code>{html.escape(_visible(token))}</code></td><td>{_percent(value)}</td>"
            f"<td>{html.escape(_others(token, tops))}</td></tr>"
            for token, value, tops in scores
        )
        parts.append(
            '<details class="token-table"><summary>As a table</summary><table><thead><tr><th scope="col">Token</th>'
            f'<th scope="col">Probability</th><th scope="col">Others</th></tr></thead>'
            f"<tbody>{rows}</tbody></table></details>"
        )
    return "".join(parts)


def _odds(token: str, value: float | None, tops: dict[str, float]) -> str:
    return f"{_visible(token)} {_percent(value)}\n{_others(token, tops)}".strip()


def _others(token: str, tops: dict[str, float]) -> str:
    others = sorted((each for each in tops.items() if each[0] != token), key=lambda each: -each[1])
    return ", ".join(f"{_visible(other)} {_percent(value)}" for other, value in others)


def _visible(token: str) -> str:
    return token.replace("\n", "⏎").replace(" ", "␣").replace("\t", "⇥")


def _probability(value: float | None) -> float:
    return 0.0 if value is None else math.exp(min(value, 0.0))


def _percent(value: float | None) -> str:
    share = 100 * _probability(value)
    return f"{share:.0f} %" if share >= 9.95 else f"{share:.1f} %" if share >= 0.1 else "under 0.1 %"


if __name__ == "__main__":
    build(space.Server()).queue(max_size=128).launch(**space.launch_options())
