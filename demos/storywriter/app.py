"""The StoryWriter page: a whole book goes in, the model reads it to the end and writes on.

A Gradio Space and a client of an OpenAI-style server (`MPT_URL`, `MPT_API_KEY`). The worked example is MosaicML's: all
of The Great Gatsby, then "EPILOGUE". What takes long is reading, so the page shows it; the server keeps what it has
read, so the second continuation begins at once. The book lives in this process only while the page is open, and an
uploaded file is deleted as soon as it is read.
"""

from typing import Any

import gradio as gr

try:
    from demos import mpt_page, mpt_space
    from demos.storywriter.layout import EXPORT, SHOW_STORY, Layout
    from demos.storywriter.presenter import StoryWriterPresenter
    from demos.storywriter.story import storywriters_first
except ImportError:  # a copied Space has the modules beside it
    import mpt_page  # type: ignore[no-redef]
    import mpt_space  # type: ignore[no-redef]
    from layout import EXPORT, SHOW_STORY, Layout  # type: ignore[no-redef]
    from presenter import StoryWriterPresenter  # type: ignore[no-redef]
    from story import storywriters_first  # type: ignore[no-redef]

QUIETLY: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


def build(server: mpt_space.Server) -> gr.Blocks:
    """The page, for the models of a server."""
    with gr.Blocks(title="MPT StoryWriter", analytics_enabled=False) as page:
        layout = Layout()
        layout.header.follow(page, server, storywriters_first)
        presenter = StoryWriterPresenter(server, layout)
        _take_books(layout, presenter)
        _write_when_asked(layout, presenter)
        layout.export.click(None, None, None, js=EXPORT)
        measured = [layout.measure, layout.keep_end]
        layout.model.input(presenter.measure_again, [layout.model, layout.book], measured, **QUIETLY)
    return page


def _take_books(layout: Layout, presenter: StoryWriterPresenter) -> None:
    story = [layout.book, layout.story, layout.paper, layout.measure, layout.keep_end]
    shown = [layout.upload, *story, layout.status, layout.is_writing, *layout.buttons]
    at_once: dict[str, Any] = {"concurrency_limit": mpt_page.N_AT_ONCE, **QUIETLY}
    state = [layout.model, layout.is_writing]
    layout.upload.upload(presenter.take_file, [layout.upload, *state], shown, **at_once)
    layout.paste.blur(presenter.take_paste, [layout.paste, *state, layout.book], shown, **at_once)
    layout.sample.click(presenter.take_sample, state, shown, **at_once)


def _write_when_asked(layout: Layout, presenter: StoryWriterPresenter) -> None:
    texts = [layout.book, layout.story, layout.paste, layout.ending]
    settings = [layout.keep_end, layout.model, layout.temperature, layout.top_p, layout.max_tokens]
    buttons = [layout.is_writing, *layout.buttons]
    running = layout.write.click(
        presenter.write_on, [*texts, *settings],
        [layout.book, layout.story, layout.paper, layout.status, layout.keep_end, *buttons],
        concurrency_limit=mpt_page.N_AT_ONCE, **QUIETLY,
    )  # fmt: skip
    # Through the queue: what was sent before a cancellation comes before the word "stopped" then.
    mpt_page.after(running, presenter.rest, [layout.story, layout.is_writing], [layout.status, *buttons], **QUIETLY)
    layout.write.click(None, None, None, js=SHOW_STORY)
    layout.stop.click(None, None, None, cancels=[running])
    taken_back = [layout.story, layout.paper, layout.status, *buttons]
    layout.undo.click(presenter.take_back, [layout.book, layout.story], taken_back, **QUIETLY)


if __name__ == "__main__":
    mpt_page.run(build(mpt_space.Server()))
