"""One prompt, two models or two settings, side by side and at once, with their speeds."""

import gradio as gr

try:
    from demos import mpt_page, mpt_space
    from demos.compare.presenter import ComparePresenter
except ImportError:  # a copied Space has the modules beside it
    import mpt_page  # type: ignore[no-redef]
    import mpt_space  # type: ignore[no-redef]
    from presenter import ComparePresenter  # type: ignore[no-redef]

EXAMPLES = [
    "What is an alpaca? How is it different from a llama?",
    "Write an email that congratulates a colleague on her new post.",
    "Once upon a time there was a little fox",
]


class Column:
    """The components of one model."""

    def __init__(self, name: str) -> None:
        with gr.Column(min_width=300):
            self.model = gr.Dropdown([], label=f"Model {name}", value=None, filterable=False)
            self.licence = gr.Markdown("", elem_classes="quiet")
            self.answer = gr.Textbox(
                label=f"Answer of {name}", lines=10, max_lines=24, interactive=False,
                elem_id=f"answer-{name.lower()}",
            )  # fmt: skip
            self.numbers = gr.Markdown("", elem_classes="quiet", elem_id=f"numbers-{name.lower()}")
            with gr.Accordion(f"Settings of {name}", open=False):
                temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0: always the likeliest token")
                top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p")
                max_tokens = gr.Slider(8, 2048, 128, step=8, label="Longest answer, in tokens")
                repetition = gr.Slider(1, 2, 1, step=0.05, label="Repetition penalty")
                seed = gr.Number(None, label="Seed", info="Empty: another answer each time", precision=0)
        self.settings = [self.model, temperature, top_p, max_tokens, repetition, seed]


def build(server: mpt_space.Server) -> gr.Blocks:
    """The page, for the models of a server."""
    presenter = ComparePresenter(server)
    with gr.Blocks(title="MPT compared") as page:
        gr.Markdown("# Two models, one prompt")
        prompt = gr.Textbox(label="Prompt", lines=3, max_lines=12, value=EXAMPLES[0], elem_id="prompt")
        with gr.Row():
            go = gr.Button("Compare", variant="primary", scale=3, min_width=120)
            stop = gr.Button("Stop", variant="stop", scale=1, min_width=80)
        with gr.Row():
            a, b = Column("A"), Column("B")
        gr.Examples(EXAMPLES, [prompt], label="Examples", preload=False)
        gr.Markdown(mpt_page.privacy_note(), elem_classes="quiet")

        pickers, picked = [a.model, b.model], [a.model, a.licence, b.model, b.licence]
        page.load(presenter.look, pickers, picked, show_progress="hidden")
        gr.on([picker.input for picker in pickers], presenter.look, pickers, picked, show_progress="hidden")
        run = gr.on(
            [go.click, prompt.submit],
            presenter.answer,
            [prompt, *a.settings, *b.settings],
            [a.answer, a.numbers, b.answer, b.numbers],
            concurrency_limit=mpt_page.N_AT_ONCE,
            show_progress="minimal",
            api_visibility="private",
        )
        stop.click(None, None, None, cancels=[run])
    return page


if __name__ == "__main__":
    mpt_page.run(build(mpt_space.Server()))
