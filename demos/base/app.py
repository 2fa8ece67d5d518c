"""A base model continues the text in place, and shows how likely each of its tokens was."""

import gradio as gr

try:
    from demos import mpt_page, mpt_space
    from demos.base.coloured_text import coloured_text
    from demos.base.presenter import BasePresenter, base_models_first, example, remember, rest, take_back
except ImportError:  # a copied Space has the modules beside it
    import mpt_page  # type: ignore[no-redef]
    import mpt_space  # type: ignore[no-redef]
    from coloured_text import coloured_text  # type: ignore[no-redef]
    from presenter import BasePresenter, base_models_first, example, remember, rest, take_back  # type: ignore[no-redef]

EXAMPLES = [
    "Once upon a time there was a little fox who",
    "The three most common misconceptions about birds are:\n1.",
    "def fibonacci(n):\n",
]
CSS = """
.token-table {max-height: 300px; overflow: auto}
.token-table summary {min-height: 32px; cursor: pointer}
.token-table table {border-collapse: collapse; width: 100%}
.token-table :is(th, td) {text-align: left; padding: 2px 12px 2px 0; overflow-wrap: anywhere}
"""


class Layout:
    """The components of one page, in its order."""

    def __init__(self) -> None:
        self.before = gr.State([])  # the text before each continuation, newest last
        self.is_writing = gr.State(False)
        self.header = mpt_page.Header("Base model", "It answers nothing: it writes on where you stop.", CSS)
        self.model = self.header.pickers[0]
        self.text = coloured_text(
            EXAMPLES[0],
            "Text",
            f"Darker: the model was surer. Tap a token for what else it thought of. <span class='mpt-keys'>{mpt_page.ENTER}.</span>",
        )
        with gr.Row():
            self.go = gr.Button("Continue", variant="primary", scale=3, min_width=110)
            self.stop = gr.Button("Stop", variant="stop", scale=3, min_width=110, visible=False)
            self.undo = gr.Button("Undo", scale=1, min_width=70)
        self.numbers = gr.HTML("", elem_id="numbers", **mpt_page.BARE)
        self.table = gr.HTML("", elem_id="tokens", **mpt_page.BARE)
        self.examples = gr.Dataset(components=["textbox"], samples=[[text] for text in EXAMPLES], label="Examples")
        self._lay_out_settings()
        mpt_page.footnote()

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
        layout.header.follow(page, server, base_models_first)
        settings = [layout.model, layout.max_tokens, layout.temperature, layout.top_p, layout.seed]
        at_work = [layout.is_writing, layout.go, layout.stop, layout.undo]
        asked = gr.on(
            [layout.go.click, layout.text.submit], remember, [layout.text, layout.before, layout.is_writing],
            [layout.before, *at_work], **mpt_page.QUICK,
        )  # fmt: skip
        run = asked.then(
            presenter.write, [layout.text, *settings], [layout.text, layout.numbers, layout.table],
            concurrency_limit=mpt_page.N_AT_ONCE, show_progress="hidden", api_visibility="private",
        )  # fmt: skip
        mpt_page.after(run, rest, None, at_work, **mpt_page.QUICK)
        layout.stop.click(None, None, None, cancels=[run])
        shown = [layout.text, layout.before, layout.numbers, layout.table]
        layout.undo.click(take_back, [layout.text, layout.before], shown, **mpt_page.QUICK)
        layout.examples.click(example, [layout.examples, layout.is_writing], [layout.text], **mpt_page.QUICK)
    return page


if __name__ == "__main__":
    mpt_page.run(build(mpt_space.Server()))
