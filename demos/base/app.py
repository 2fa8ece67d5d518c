"""A base model continues the text in place, and shows how likely each of its tokens was."""

import gradio as gr

try:
    from demos import mpt_page, mpt_space
    from demos.base.presenter import BasePresenter, remember, take_back
except ImportError:  # a copied Space has the modules beside it
    import mpt_page  # type: ignore[no-redef]
    import mpt_space  # type: ignore[no-redef]
    from presenter import BasePresenter, remember, take_back  # type: ignore[no-redef]

EXAMPLES = [
    "Once upon a time there was a little fox who",
    "The three most common misconceptions about birds are:\n1.",
    "def fibonacci(n):\n",
]


class Layout:
    """The components of one page, in its order."""

    def __init__(self) -> None:
        self.before = gr.State([])  # the text before each continuation, newest last
        gr.Markdown("# Let a base model write on")
        with gr.Row(equal_height=True):
            self.model = gr.Dropdown([], label="Model", value=None, filterable=False, scale=1, min_width=200)
            self.licence = gr.Markdown("", elem_classes="quiet")
        self.text = gr.Textbox(
            label="Text", lines=10, max_lines=24, value=EXAMPLES[0], elem_id="text",
            info="A base model answers nothing: it writes on where you stop.",
        )  # fmt: skip
        with gr.Row():
            self.go = gr.Button("Continue", variant="primary", scale=3, min_width=110)
            self.undo = gr.Button("Undo", scale=1, min_width=70)
            self.stop = gr.Button("Stop", variant="stop", scale=1, min_width=70)
        self.numbers = gr.Markdown("", elem_classes="quiet", elem_id="numbers")
        self.tokens = gr.HTML("", label="Token probabilities", elem_id="tokens")
        self._lay_out_settings()
        gr.Examples(EXAMPLES, [self.text], label="Examples", preload=False)
        gr.Markdown(mpt_page.privacy_note(), elem_classes="quiet")

    def _lay_out_settings(self) -> None:
        with gr.Accordion("Settings", open=False), gr.Row():
            self.max_tokens = gr.Slider(1, 1024, 64, step=1, label="Tokens to write")
            self.temperature = gr.Slider(
                0, 2, 0.8, step=0.05, label="Temperature", info="0: always the likeliest token"
            )
            self.top_p = gr.Slider(0.05, 1, 0.95, step=0.05, label="Top-p")
            self.seed = gr.Number(None, label="Seed", info="Empty: another text each time", precision=0)


def build(server: mpt_space.Server) -> gr.Blocks:
    """The page, for the models of a server."""
    presenter = BasePresenter(server)
    with gr.Blocks(title="MPT base model") as page:
        layout = Layout()
        for event in (page.load, layout.model.input):
            event(presenter.look, [layout.model], [layout.model, layout.licence], show_progress="hidden")
        settings = [layout.model, layout.max_tokens, layout.temperature, layout.top_p, layout.seed]
        shown = [layout.text, layout.numbers, layout.tokens]
        remembered = layout.go.click(remember, [layout.text, layout.before], [layout.before], **mpt_page.QUICK)
        run = remembered.then(
            presenter.write, [layout.text, *settings], shown, concurrency_limit=mpt_page.N_AT_ONCE,
            show_progress="minimal", api_visibility="private",
        )  # fmt: skip
        layout.stop.click(None, None, None, cancels=[run])
        kept = [layout.text, layout.before, layout.numbers, layout.tokens]
        layout.undo.click(take_back, [layout.text, layout.before], kept, cancels=[run], **mpt_page.QUICK)
    return page


if __name__ == "__main__":
    mpt_page.run(build(mpt_space.Server()))
