"""What stands on the chat page: its components, in the order of the page. What they do is in `presenter.py`."""

import gradio as gr

try:
    from demos import mpt_page
except ImportError:  # a copied Space has the module beside it
    import mpt_page  # type: ignore[no-redef]

EXAMPLES = [
    "Hi, my name is Greta",
    "What is an alpaca? How is it different from a llama?",
    "Write a short poem about the moon landing.",
    "Explain to a 6-year-old how a candle burns.",
]


class Layout:
    """The components of one page."""

    def __init__(self) -> None:
        self.conversation_id = gr.Textbox("", visible="hidden")  # no State: those are not known to the browser
        self.saved = gr.JSON([], visible="hidden")
        self.is_busy = gr.Checkbox(False, visible="hidden")
        self.download = gr.JSON(visible="hidden")
        self._lay_out_sidebar()
        gr.Markdown("# Chat with MPT")
        with gr.Row(equal_height=True):
            self.model = gr.Dropdown([], label="Model", value=None, filterable=False, scale=1, min_width=200)
            self.licence = gr.Markdown("", elem_classes="quiet", container=False)
        self._lay_out_conversation()
        self._lay_out_settings()
        gr.Markdown(mpt_page.privacy_note(), elem_classes="quiet")

    def _lay_out_sidebar(self) -> None:
        with gr.Sidebar(label="Conversations", open=False, width=280) as self.sidebar:
            self.new = gr.Button("New conversation", variant="primary", size="md")
            self.chosen = gr.Radio([], label="Saved in this browser", elem_id="saved")
            self.delete = gr.Button("Delete this conversation", size="sm")
            with gr.Row():
                self.as_json = gr.Button("Export JSON", size="sm", min_width=60)
                self.as_markdown = gr.Button("Export Markdown", size="sm", min_width=60)

    def _lay_out_conversation(self) -> None:
        self.chatbot = gr.Chatbot(
            label="Conversation", height="60vh", min_height=260, editable="user",
            allow_tags=False, sanitize_html=True,  # what a model writes is not trusted
            buttons=["copy", "copy_all"], feedback_options=None, examples=[{"text": text} for text in EXAMPLES],
            placeholder="Ask something, or begin with one of these.",
            latex_delimiters=[{"left": "$$", "right": "$$", "display": True}], elem_id="conversation",
        )  # fmt: skip
        self.numbers = gr.Markdown("", elem_classes="quiet", elem_id="numbers", container=False)
        with gr.Row(equal_height=True):
            self.message = gr.Textbox(
                label="Message", value="", show_label=False, container=False, placeholder="Ask something",
                lines=1, max_lines=8, scale=6, min_width=200, autofocus=True, elem_id="message",
            )  # fmt: skip
            self.send = gr.Button("Send", variant="primary", scale=1, min_width=80)
            self.stop = gr.Button("Stop", variant="stop", scale=1, min_width=80, visible=False)

    def _lay_out_settings(self) -> None:
        with gr.Accordion("Settings", open=False):
            self.system = gr.Textbox(
                label="System prompt", value="", info="Empty: the model's own.", lines=2, max_lines=8, elem_id="system"
            )
            with gr.Row():
                temperature = gr.Slider(0, 2, 0.1, step=0.05, label="Temperature", info="0: always the likeliest token")
                top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p")
                top_k = gr.Slider(0, 200, 0, step=1, label="Top-k", info="0: off")
            with gr.Row():
                max_tokens = gr.Slider(16, 4096, 512, step=16, label="Longest answer, in tokens")
                repetition = gr.Slider(1, 2, 1, step=0.05, label="Repetition penalty")
                seed = gr.Number(None, label="Seed", info="Empty: another answer each time", precision=0)
        self.settings = [self.model, self.system, temperature, top_p, top_k, max_tokens, repetition, seed]
