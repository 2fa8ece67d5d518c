"""What stands on the StoryWriter page: its components, in the order of the page. What they do is in `presenter.py`."""

import gradio as gr

try:
    from demos import mpt_page
    from demos.storywriter.book_html import paper
    from demos.storywriter.books import FORMATS, MAX_TEXT_CHARACTERS
    from demos.storywriter.story import Story
except ImportError:  # a copied Space has the modules beside it
    import mpt_page  # type: ignore[no-redef]
    from book_html import paper  # type: ignore[no-redef]
    from books import FORMATS, MAX_TEXT_CHARACTERS  # type: ignore[no-redef]
    from story import Story  # type: ignore[no-redef]

CSS = """
.mpt-measure {margin: 0 0 0.4rem; line-height: 1.5; color: var(--body-text-color); overflow-wrap: anywhere}
#upload button .wrap {visibility: hidden}
#upload button::after {content: "Click, or drop a file here"; position: absolute; inset: 50% 0 auto; color: var(--text)}
.mpt-label {margin: 0 0 0.2rem; font-size: 0.8125rem; color: var(--soft)}
.mpt-bar {display: flex; height: 10px; border-radius: 5px; overflow: hidden; background: var(--border-color-primary)}
.mpt-bar .fits {background: var(--color-accent); transition: width 0.2s}
.mpt-bar .over {background: repeating-linear-gradient(45deg, #dc2626 0 5px, #fca5a5 5px 8px)}
.mpt-bar .waits {width: 25%; background: var(--color-accent); animation: mpt-waits 1.6s ease-in-out infinite alternate}
@keyframes mpt-waits {to {margin-left: 75%}}
@media (prefers-reduced-motion: reduce) {.mpt-bar .waits {animation: none}}
.paper {background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary); border-radius: 8px;
  padding: 1.25rem 1.5rem; min-height: 16rem; max-height: min(32rem, 48vh); overflow-y: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; font: 1.05rem/1.65 Georgia, "Iowan Old Style", "DejaVu Serif", serif;
  color: var(--body-text-color)}
.paper .before {opacity: 0.7}
.paper .hint {opacity: 0.7; font-style: italic}
@media (max-width: 600px) {
  .paper {padding: 0.9rem 1rem; font-size: 1rem; max-height: 26rem}
  #writing {position: fixed; inset: auto 0 0 0; z-index: 10; padding: 0.5rem 0.75rem; gap: 0.5rem; flex-wrap: nowrap;
    background: var(--body-background-fill); border-top: 1px solid var(--border-color-primary)}
  main:has(#writing) {padding-bottom: 5rem !important}
}
"""
PRIVACY = (
    "This page logs nothing. An uploaded file is deleted as soon as it is read; its text stays in this page's memory "
    "until you close it, and goes to the server only to be continued. What a language model writes can be wrong or offensive."
)

# The text is in the page already: nothing is written on the server to export it.
EXPORT = """() => {
  const written = document.querySelector("#story .written");
  if (!written || !written.textContent) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([written.textContent.trim() + "\\n"], {type: "text/plain;charset=utf-8"}));
  link.download = written.dataset.name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}"""
# On a phone it lies below the book.
SHOW_STORY = """() => {
  if (innerWidth <= 600) document.getElementById("story").scrollIntoView({block: "center", behavior: "smooth"});
}"""
FOLLOW = """
const follow = () => {
  const paper = element.querySelector(".paper");
  if (paper) paper.scrollTop = paper.scrollHeight;
};
follow(); watch("value", follow);
"""


class Layout:
    """The components of one page."""

    def __init__(self) -> None:
        self.header = mpt_page.Header(
            "StoryWriter", "Give it a whole book. It reads to the last page, and writes on.", CSS
        )
        self.model = self.header.pickers[0]
        self.book, self.story = gr.State(None), gr.State(Story())
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                self._lay_out_book()
            with gr.Column(scale=3, min_width=320):
                self._lay_out_story()
        self._lay_out_settings()
        mpt_page.footnote(PRIVACY)
        self.is_writing = gr.State(False)  # still true after a continuation: it was stopped
        self.buttons = [self.write, self.stop, self.undo, self.export]

    def _lay_out_book(self) -> None:
        self.sample = gr.Button("Take a sample: the end of Alice in Wonderland", size="md")
        self.upload = gr.File(
            label=f"A book: {', '.join(FORMATS)}, up to 8 MB", file_types=list(FORMATS), height=96, elem_id="upload"
        )
        self.paste = gr.Textbox(
            label="Or paste one", placeholder="The whole text, or its last chapters", lines=3, max_lines=6,
            max_length=MAX_TEXT_CHARACTERS,
        )  # fmt: skip
        self.ending = gr.Textbox(
            "EPILOGUE", label="Then comes", info="put after the book; empty to go on where it stops", max_length=500
        )

    def _lay_out_settings(self) -> None:
        with gr.Accordion("Settings", open=False):
            self.temperature = gr.Slider(0, 2, value=0.8, step=0.05, label="Temperature", info="0 is greedy")
            self.top_p = gr.Slider(0.01, 1, value=1, step=0.01, label="Top-p", info="1 is off")
            self.max_tokens = gr.Slider(16, 2048, value=256, step=16, label="New tokens for each continuation")

    def _lay_out_story(self) -> None:
        self.measure = gr.HTML("", **mpt_page.BARE)
        self.keep_end = gr.Checkbox(
            label="Cut the beginning and keep the end", value=False, visible=False, interactive=True
        )
        self.status = gr.HTML("", **mpt_page.BARE)
        self.paper = gr.HTML(paper(None, Story()), elem_id="story", js_on_load=FOLLOW, **mpt_page.BARE)
        with gr.Row(elem_id="writing"):
            self.write = gr.Button("Write on", variant="primary", min_width=100, size="md", scale=3)
            self.stop = gr.Button("Stop", variant="stop", min_width=100, size="md", scale=3, visible=False)
            self.undo = gr.Button("Undo", min_width=64, size="md", interactive=False)
            self.export = gr.Button("Export", min_width=64, size="md", interactive=False)
