"""What stands on the chat page: its components, in the order of the page. What they do is in `presenter.py`."""

import gradio as gr

try:
    from demos import mpt_page
    from demos.chat.scripts import ID
    from demos.chat.thread import thread
except ImportError:  # a copied Space has the modules beside it
    import mpt_page  # type: ignore[no-redef]
    from scripts import ID  # type: ignore[no-redef]
    from thread import thread  # type: ignore[no-redef]

SUGGESTIONS = [
    "What is an alpaca? How is it different from a llama?",
    "Write a short poem about the moon landing.",
    "Explain to a 6-year-old how a candle burns.",
    "What does `list<int>` mean in C#?",
]
SUGGESTIONS_OF = {  # by the model's name: what it can answer
    "mpt-tiny-chat": ["What can you do?", "Hi, my name is Greta", "What is the capital of Norway?", "What is ALiBi?"],
}

# The thread takes what the rest leaves of the window and scrolls by itself, so the box to write in is always in view.
CSS = """
.gradio-container:has(#conversation) {height: 100dvh; min-height: 32rem; display: flex; flex-direction: column}
.fillable.main:has(#conversation), .fillable:has(#conversation) .wrap:has(#conversation), main:has(#conversation),
main:has(#conversation) > .column {flex: 1; min-height: 0; display: flex; flex-direction: column; flex-wrap: nowrap}
main:has(#conversation) > .column {gap: 0.6rem}
#conversation {flex: 1 1 0; min-height: 8rem; overflow: hidden}
#conversation > *, #conversation .html-container, #conversation .html-container > div {height: 100%}
#conversation .thread {height: 100%; overflow-y: auto; box-sizing: border-box; padding: 0.5rem; display: flex;
  flex-direction: column; gap: 0.25rem; border: 1px solid var(--border-color-primary); border-radius: 8px;
  overscroll-behavior: contain}
.turn {max-width: min(46rem, 94%); color: var(--text)}
.turn {align-self: flex-start} .turn.user {align-self: flex-end}
.turn .said {padding: 0.5rem 0.85rem; border-radius: 12px; line-height: 1.55; overflow-wrap: anywhere;
  border: 1px solid var(--border-color-primary)}
.turn.user .said {background: color-mix(in srgb, #1d4ed8 14%, var(--background-fill-primary))}
.turn .typed {white-space: pre-wrap; margin: 0}
.turn .actions {display: flex; min-height: 40px} .turn.user .actions {justify-content: flex-end}
.turn .actions button {min-width: 44px; padding: 0 0.6rem; font-size: 0.8125rem; color: var(--soft); border-radius: 6px}
.turn .actions button:hover {color: var(--text); background: var(--background-fill-secondary)}
.turn form {width: min(40rem, 80vw)}
.turn form textarea {width: 100%; min-height: 5rem; padding: 0.5rem 0.75rem; border-radius: 8px; font: inherit;
  color: var(--text); background: var(--background-fill-primary); border: 1px solid var(--border-color-accent)}
.turn form button {padding: 0 0.75rem; color: var(--text); text-decoration: underline}
body:has(#stop) .turn .actions {visibility: hidden}
#conversation:not(:has(.turn)) {flex-grow: 0.0001; min-height: 0} #conversation:not(:has(.turn)) .thread {border: 0}
main:not(:has(.turn)) #suggestions {flex: 1; align-content: end}
main:has(.turn) #suggestions {display: none}
#numbers:not(:has(p)) {display: none}
#composer {align-items: flex-end; flex-wrap: nowrap; gap: 0.5rem}
#composer button {max-width: 7rem}
@media (max-width: 900px) {  /* where the list of conversations is opened */
  .gradio-container:has(#conversation) nav.fillable {padding-left: 2.2rem !important}
  .gradio-container:not(:has(.nav-holder)) main:has(#conversation) .mpt-header {padding-left: 2.2rem}
}
"""


class Layout:
    """The components of one page."""

    def __init__(self) -> None:
        # No State: those are not known to the browser.
        self.conversation_id = gr.Textbox("", visible="hidden", elem_id=ID)
        self.saved = gr.JSON([], visible="hidden")
        self.deleted = gr.JSON(visible="hidden")
        self.answering = gr.Textbox("", visible="hidden")  # the id of the answer under way
        self.arrived = gr.JSON(visible="hidden")  # what has come of one
        self.download = gr.JSON(visible="hidden")
        self.header = mpt_page.Header("Chat", "A conversation with a chat model.", CSS)
        self.model = self.header.pickers[0]
        self._lay_out_sidebar()
        self._lay_out_conversation()

    def _lay_out_sidebar(self) -> None:
        with gr.Sidebar(label="Conversations and settings", open=False, width=300) as self.sidebar:
            self.new = gr.Button("New conversation", variant="primary", size="md")
            self.chosen = gr.Radio([], label="Saved in this browser", elem_id="saved")
            self.delete = gr.Button("Delete this conversation", size="sm")
            self.bring_back = gr.Button("Bring the deleted one back", size="sm", visible=False)
            with gr.Row():
                self.as_json = gr.Button("Export JSON", size="sm", min_width=60)
                self.as_markdown = gr.Button("Export Markdown", size="sm", min_width=60)
            self._lay_out_settings()
            mpt_page.footnote()

    def _lay_out_settings(self) -> None:
        with gr.Accordion("Settings", open=False):
            self.system = gr.Textbox(
                label="System prompt", value="", info="Empty: the model's own.", lines=2, max_lines=8, elem_id="system"
            )
            temperature = gr.Slider(0, 2, 0.1, step=0.05, label="Temperature", info="0: always the likeliest token")
            top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p")
            top_k = gr.Slider(0, 200, 0, step=1, label="Top-k", info="0: off")
            max_tokens = gr.Slider(16, 4096, 512, step=16, label="Longest answer, in tokens")
            repetition = gr.Slider(1, 2, 1, step=0.05, label="Repetition penalty")
            seed = gr.Number(None, label="Seed", info="Empty: another answer each time", precision=0)
        self.settings = [self.model, self.system, temperature, top_p, top_k, max_tokens, repetition, seed]

    def _lay_out_conversation(self) -> None:
        self.thread = thread()
        self.suggestions = gr.Dataset(
            components=["textbox"], samples=[[text] for text in SUGGESTIONS], label="Begin with one of these",
            elem_id="suggestions", layout="gallery",
        )  # fmt: skip
        self.numbers = gr.HTML("", elem_id="numbers", **mpt_page.BARE)
        with gr.Row(equal_height=False, elem_id="composer"):
            self.message = gr.Textbox(
                label="Message", value="", show_label=False, container=False, placeholder="Ask something",
                lines=1, max_lines=8, scale=6, min_width=160, autofocus=True, elem_id="message",
            )  # fmt: skip
            self.send = gr.Button("Send", variant="primary", scale=1, min_width=80)
            self.stop = gr.Button("Stop", variant="stop", scale=1, min_width=80, visible=False, elem_id="stop")
