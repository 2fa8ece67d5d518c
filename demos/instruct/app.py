"""The instruct page: one instruction, one answer, the exact prompt between them, and a check of answers in JSON.

A Gradio Space and a client of an OpenAI-style server (`MPT_URL`, `MPT_API_KEY`). It follows the mpt-7b-instruct Space:
its template (which the server applies), its sliders and its kinds of examples.
"""

from typing import Any

import gradio as gr

try:
    from demos import mpt_page, mpt_space
    from demos.instruct.layout import Layout
    from demos.instruct.presenter import InstructPresenter, instruct_models
except ImportError:  # a copied Space has the modules beside it
    import mpt_page  # type: ignore[no-redef]
    import mpt_space  # type: ignore[no-redef]
    from layout import Layout  # type: ignore[no-redef]
    from presenter import InstructPresenter, instruct_models  # type: ignore[no-redef]


def build(server: mpt_space.Server) -> gr.Blocks:
    """The page, for the models of a server."""
    with gr.Blocks(title="MPT instruct", analytics_enabled=False) as page:
        layout = Layout()
        layout.header.follow(page, server, instruct_models)
        presenter = InstructPresenter(server, layout)
        running = _answer_when_asked(layout, presenter)
        idle = [layout.status, layout.send, layout.stop, layout.clear, layout.is_answering]
        private: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        # Through the queue: what was sent before a cancellation comes before the word "stopped" then.
        mpt_page.after(running, presenter.rest, [layout.is_answering], idle, **private)
        layout.stop.click(None, None, None, cancels=[running])
        shown = [layout.instruction, layout.prose, layout.code, layout.prompt, *idle]
        layout.clear.click(presenter.clear, None, shown, queue=False, api_visibility="private")
    return page


def _answer_when_asked(layout: Layout, presenter: InstructPresenter) -> Any:
    """The event that streams an answer."""
    shown = [layout.prose, layout.code, layout.status, layout.prompt]
    return gr.on(
        [layout.send.click, layout.instruction.submit],
        presenter.answer,
        [layout.model, layout.instruction, *layout.settings],
        [*shown, layout.send, layout.stop, layout.clear, layout.is_answering],
        concurrency_limit=mpt_page.N_AT_ONCE,
        show_progress="hidden",
        api_name="instruct",
    )


if __name__ == "__main__":
    mpt_page.run(build(mpt_space.Server()))
