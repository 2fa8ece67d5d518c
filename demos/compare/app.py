"""One prompt, two models or two settings, side by side and at once, with their speeds."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import gradio as gr

try:
    from demos import mpt_space as space
except ImportError:  # a copied Space has the module beside it
    import mpt_space as space  # type: ignore[no-redef]

EXAMPLES = [
    "What is an alpaca? How is it different from a llama?",
    "Write an email that congratulates a colleague on her new post.",
    "Once upon a time there was a little fox",
]


def build(server: space.Server) -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="MPT compared") as page:
        gr.Markdown("# Two models, one prompt")
        prompt = gr.Textbox(label="Prompt", lines=3, max_lines=12, value=EXAMPLES[0], elem_id="prompt")
        with gr.Row():
            go = gr.Button("Compare", variant="primary", scale=3, min_width=120)
            stop = gr.Button("Stop", variant="stop", scale=1, min_width=80)
        with gr.Row():
            columns = [_column(name) for name in ("A", "B")]
        gr.Examples(EXAMPLES, [prompt], label="Examples", preload=False)
        gr.Markdown(space.privacy_note(), elem_classes="quiet")

        async def answer(prompt: str, *settings: Any) -> AsyncIterator[tuple[str, ...]]:
            """Both columns at once, in one event: of two events Gradio let the second wait for the first."""
            half = len(settings) // 2
            shown = [("", ""), ("", "")]
            arrived: asyncio.Queue[tuple[int, tuple[str, str] | None]] = asyncio.Queue()

            async def fill(column: int) -> None:
                async with aclosing(answers(server, prompt, *settings[column * half : (column + 1) * half])) as parts:
                    async for part in parts:
                        arrived.put_nowait((column, part))
                arrived.put_nowait((column, None))

            tasks = [asyncio.create_task(fill(column)) for column in range(2)]
            try:
                n_left = 2
                while n_left:
                    column, part = await arrived.get()
                    if part is None:
                        n_left -= 1
                        continue
                    shown[column] = part
                    yield (*shown[0], *shown[1])
                for task in tasks:
                    await task
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        async def look(*chosen: str | None) -> list[Any]:
            """Both pickers and the notes below them; at first the base model stands against the one made from it."""
            try:
                cards = await server.models()
            except space.SpaceError as error:
                gr.Warning(error.sentence, title="No models")
                return [gr.skip(), error.sentence] * 2
            names = [card["id"] for card in cards]
            base = server.find(cards, "none") or cards[0]
            tuned = server.find(cards, "instruct") or server.find(cards, "chatml") or cards[-1]
            picked = [next((c for c in cards if c["id"] == id), d) for id, d in zip(chosen, (base, tuned), strict=True)]
            return [
                part for card in picked for part in (gr.Dropdown(names, value=card["id"]), space.licence_note(card))
            ]

        pickers = [column["model"] for column in columns]
        both = [part for column in columns for part in (column["model"], column["licence"])]
        page.load(look, pickers, both, show_progress="hidden")
        gr.on([picker.input for picker in pickers], look, pickers, both, show_progress="hidden")
        run = gr.on(
            [go.click, prompt.submit],
            answer,
            [prompt, *(setting for column in columns for setting in column["settings"])],
            [part for column in columns for part in (column["answer"], column["numbers"])],
            concurrency_limit=32,
            show_progress="minimal",
            api_visibility="private",
        )
        stop.click(None, None, None, cancels=[run])
    return page


def _column(name: str) -> dict[str, Any]:
    with gr.Column(min_width=300):
        model = gr.Dropdown([], label=f"Model {name}", value=None, filterable=False)
        licence = gr.Markdown("", elem_classes="quiet")
        answer = gr.Textbox(
            label=f"Answer of {name}", lines=10, max_lines=24, interactive=False,
            elem_id=f"answer-{name.lower()}",
        )  # fmt: skip
        numbers = gr.Markdown("", elem_classes="quiet", elem_id=f"numbers-{name.lower()}")
        with gr.Accordion(f"Settings of {name}", open=False):
            temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0: always the likeliest token")
            top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p")
            max_tokens = gr.Slider(8, 2048, 128, step=8, label="Longest answer, in tokens")
            repetition = gr.Slider(1, 2, 1, step=0.05, label="Repetition penalty")
            seed = gr.Number(None, label="Seed", info="Empty: another answer each time", precision=0)
    settings = [model, temperature, top_p, max_tokens, repetition, seed]
    return {"model": model, "licence": licence, "answer": answer, "numbers": numbers, "settings": settings}


async def answers(
    server: space.Server,
    prompt: str,
    model: str | None,
    temperature: float,
    top_p: float,
    max_tokens: int,
    repetition_penalty: float,
    seed: int | None,
) -> AsyncGenerator[tuple[str, str], None]:
    """One column's answer so far, and the note under it: a base model continues the prompt, the others answer it."""
    text = ""
    yield "", "Waiting for the first token."
    try:
        cards = await server.models()
        card = space.pick(cards, model)
        numbers, pace = space.Numbers(space.context_length(card)), space.Pace()
        is_base = card.get("prompt_style") == "none"
        messages: list[space.Message] = [{"role": "user", "content": prompt}]
        n_new = await space.room_after(server, card, prompt if is_base else messages, int(max_tokens))
        parameters = {
            "max_tokens": n_new,
            "temperature": temperature,
            "top_p": top_p,
            "repetition_penalty": None if repetition_penalty == 1 else repetition_penalty,
            "seed": None if seed is None else int(seed),
        }
        if is_base:
            pieces = server.complete(card["id"], prompt, **parameters)
        else:
            pieces = server.chat(card["id"], messages, **parameters)
        async with aclosing(pieces):
            async for piece in pieces:
                numbers.add(piece)
                text += piece.text
                if pace.is_due():
                    yield text, numbers.line()
        way = "continues the prompt" if is_base else "answers the prompt"
        limit = "the longest answer" if n_new == int(max_tokens) else "the end of the context"
        cut = f"cut at {limit}" if numbers.finish_reason == "length" else ""
        yield text, space.join([numbers.line(), way, cut])
    except space.SpaceError as error:
        gr.Warning(error.sentence, title=f"{model or 'No model'}")
        yield text, error.sentence


if __name__ == "__main__":
    build(space.Server()).queue(max_size=128).launch(**space.launch_options())
