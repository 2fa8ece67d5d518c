"""What stands on the instruct page: its components, in the order of the page. What they do is in `presenter.py`."""

import gradio as gr

try:
    from demos import mpt_page
except ImportError:  # a copied Space has the module beside it
    import mpt_page  # type: ignore[no-redef]

MAX_CHARACTERS = 40_000
HINT = '<p class="mpt-quiet">The answer appears here.</p>'

CONVERSIONS = {  # what the tiny model was made for, and every other one can do
    "A person": "Convert the following YAML to JSON:\n\nname: Ada Lovelace\nage: 36\nlanguages: [English, French]",
    "A server": "Convert the following YAML to JSON:\n\nserver:\n  host: localhost\n  port: 8080\n  debug: false",
    "A list": "Convert the following YAML to JSON:\n\nitems:\n- name: apple\n  count: 3\n- name: pear\n  count: 5",
    "A compose file": (
        "Convert the following YAML to JSON:\n\n# The shop's page\nservices:\n  web:\n    image: nginx:alpine\n    ports:\n"
        '      - "8080:80"\n    environment:\n      - DEBUG=true\n    restart: always'
    ),
}
FOR_LARGE_MODELS = {
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
#instruction textarea {min-height: 10rem}
.mpt-verdict + .mpt-quiet {padding-top: 0.4rem}
.mpt-verdict.valid {border-color: #15803d} .mpt-verdict.differs {border-color: #b45309}
.mpt-verdict.invalid {border-color: #dc2626}
#prose {min-height: 8rem; padding: 0.75rem; border: 1px solid var(--border-color-primary); border-radius: 8px;
  line-height: 1.6; overflow-wrap: anywhere; color: var(--text)}
body:not(.dark) .cm-line span {filter: brightness(0.62) saturate(1.5)}
"""


class Layout:
    """The components of one page."""

    def __init__(self) -> None:
        self.header = mpt_page.Header(
            "Instruct", "One instruction, one answer, and the exact text the model read.", CSS
        )
        self.model = self.header.pickers[0]
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                self._lay_out_instruction()
            with gr.Column(scale=1, min_width=320):
                self._lay_out_answer()
        self._lay_out_examples()
        self._lay_out_prompt()
        self._lay_out_settings()
        mpt_page.footnote()
        self.is_answering = gr.State(False)  # still true after an answer: it was stopped

    def _lay_out_instruction(self) -> None:
        self.instruction = gr.Textbox(
            label="Instruction", info=mpt_page.ENTER, value=CONVERSIONS["A person"], lines=1, max_lines=18,
            max_length=MAX_CHARACTERS, elem_id="instruction",
        )  # fmt: skip
        with gr.Row():
            self.send = gr.Button("Answer", variant="primary", min_width=80, scale=3)
            self.stop = gr.Button("Stop", variant="stop", min_width=80, scale=3, visible=False)
            self.clear = gr.Button("Clear", min_width=80, scale=1)

    def _lay_out_answer(self) -> None:
        """Two places, of which one is visible: prose, and JSON in colours."""
        self.prose = gr.HTML(HINT, elem_id="prose", elem_classes="markdown", padding=False, apply_default_css=False)
        self.code = gr.Code(
            label="Answer (JSON)", language="json", interactive=False, visible=False, wrap_lines=True, lines=7,
            max_lines=30,
        )  # fmt: skip
        self.status = gr.HTML("", **mpt_page.BARE)

    def _lay_out_examples(self) -> None:
        gr.Examples(
            [[text] for text in CONVERSIONS.values()], inputs=[self.instruction], label="YAML to JSON",
            example_labels=list(CONVERSIONS),
        )  # fmt: skip
        gr.Examples(
            [[text] for text in FOR_LARGE_MODELS.values()], inputs=[self.instruction],
            label="For larger models; mpt-tiny-instruct cannot do these", example_labels=list(FOR_LARGE_MODELS),
        )  # fmt: skip

    def _lay_out_prompt(self) -> None:
        with gr.Accordion("The exact prompt", open=False):
            self.prompt = gr.Code(
                "", label="What the model reads, in its own template", language=None, interactive=False,
                wrap_lines=True, show_line_numbers=False, lines=4, max_lines=24,
            )  # fmt: skip

    def _lay_out_settings(self) -> None:
        with gr.Accordion("Settings", open=False):
            self.grammar = gr.Checkbox(
                True, label="JSON by grammar",
                info="Where the instruction asks for JSON, the server lets the model write nothing else.",
            )  # fmt: skip
            self.temperature = gr.Slider(
                0, 1, value=0.1, step=0.05, label="Temperature", info="below 0.1 the likeliest token is taken"
            )
            self.top_p = gr.Slider(0.01, 1, value=1, step=0.01, label="Top-p", info="1 is off")
            self.top_k = gr.Slider(0, 200, value=0, step=1, label="Top-k", info="0 is off")
            self.max_tokens = gr.Slider(16, 1664, value=512, step=16, label="Max new tokens")
        self.settings = [self.grammar, self.temperature, self.top_p, self.top_k, self.max_tokens]
