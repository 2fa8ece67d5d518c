"""One prompt, two models or two settings, side by side and at once, with their speeds and where they differ."""

import gradio as gr

try:
    from demos import mpt_page, mpt_space
    from demos.compare.presenter import ComparePresenter, answer_html, two_alike
except ImportError:  # a copied Space has the modules beside it
    import mpt_page  # type: ignore[no-redef]
    import mpt_space  # type: ignore[no-redef]
    from presenter import ComparePresenter, answer_html, two_alike  # type: ignore[no-redef]

EXAMPLES = [
    "Once upon a time there was a little fox",
    "What is an alpaca? How is it different from a llama?",
    "Write an email that congratulates a colleague on her new post.",
]
CSS = """
.answer {white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.6; min-height: 8rem; max-height: 60vh; overflow-y: auto;
  padding: 0.75rem; border: 1px solid var(--border-color-primary); border-radius: 8px; color: var(--text)}
.answer mark {background: rgb(234 179 8 / 0.35); color: inherit; border-radius: 3px; text-decoration: underline;
  text-decoration-thickness: 1px}
.answer-name {font-weight: 600; margin: 0 0 0.3rem; color: var(--text)}
"""


class Column:
    """The components of one model."""

    def __init__(self, name: str, model: gr.Dropdown) -> None:
        with gr.Column(min_width=300):
            self.answer = gr.HTML(answer_html(name, ""), elem_id=f"answer-{name.lower()}", **mpt_page.BARE)
            self.numbers = gr.HTML("", elem_id=f"numbers-{name.lower()}", **mpt_page.BARE)
            with gr.Accordion(f"Settings of {name}", open=False):
                temperature = gr.Slider(0, 2, 0.7, step=0.05, label="Temperature", info="0: always the likeliest token")
                top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p")
                max_tokens = gr.Slider(8, 2048, 128, step=8, label="Longest answer, in tokens")
                repetition = gr.Slider(1, 2, 1, step=0.05, label="Repetition penalty")
                seed = gr.Number(1, label="Seed", info="Empty: another answer each time", precision=0)
        self.settings = [model, temperature, top_p, max_tokens, repetition, seed]


def build(server: mpt_space.Server) -> gr.Blocks:
    """The page, for the models of a server."""
    presenter = ComparePresenter(server)
    with gr.Blocks(title="MPT compared") as page:
        header = mpt_page.Header("Compare", "One prompt, two models.", CSS, ("Model A", "Model B"))
        prompt = gr.Textbox(
            label="Prompt", info=mpt_page.ENTER, lines=1, max_lines=12, value=EXAMPLES[0], elem_id="prompt"
        )
        go = gr.Button("Compare", variant="primary")
        stop = gr.Button("Stop", variant="stop", visible=False)
        with gr.Row():
            a, b = (Column(name, model) for name, model in zip("AB", header.pickers, strict=True))
        examples = gr.Dataset(components=["textbox"], samples=[[text] for text in EXAMPLES], label="Examples")
        mpt_page.footnote()

        header.follow(page, server, two_alike)
        run = gr.on(
            [go.click, prompt.submit],
            presenter.answer,
            [prompt, *a.settings, *b.settings],
            [a.answer, a.numbers, b.answer, b.numbers, go, stop],
            concurrency_limit=mpt_page.N_AT_ONCE,
            show_progress="hidden",
            api_visibility="private",
        )
        mpt_page.after(run, mpt_page.idle, None, [go, stop], **mpt_page.QUICK)
        stop.click(None, None, None, cancels=[run])
        examples.click(mpt_page.text_of, [examples], [prompt], **mpt_page.QUICK)
    return page


if __name__ == "__main__":
    mpt_page.run(build(mpt_space.Server()))
