"""A conversation with a chat model: streaming, stop, retry, edit, undo, saved conversations, export.

This file joins the components of `layout.py`, the handlers of `presenter.py` and what `scripts.py` does in the browser.
"""

from typing import Any

import gradio as gr

try:
    from demos import mpt_page, mpt_space
    from demos.chat import presenter, scripts
    from demos.chat.layout import Layout
    from demos.chat.turns import export_json, export_markdown
except ImportError:  # a copied Space has the modules beside it
    import mpt_page  # type: ignore[no-redef]
    import mpt_space  # type: ignore[no-redef]
    import presenter  # type: ignore[no-redef]
    import scripts  # type: ignore[no-redef]
    from layout import Layout  # type: ignore[no-redef]
    from turns import export_json, export_markdown  # type: ignore[no-redef]


def build(server: mpt_space.Server) -> gr.Blocks:
    """The page, for the models of a server."""
    chat = presenter.ChatPresenter(server)
    with gr.Blocks(title="MPT chat", fill_height=True) as page:
        layout = Layout()
        _look_when_opened(page, layout, chat)
        runs = _answer_when_asked(layout, chat)
        layout.stop.click(None, None, None, cancels=runs)
        _take_back_and_empty(layout, runs)
        _open_and_export(layout, runs)
    return page


def _look_when_opened(page: gr.Blocks, layout: Layout, chat: presenter.ChatPresenter) -> None:
    page.load(chat.look, [layout.model], [layout.model, layout.licence], show_progress="hidden")
    # On a phone the open list would cover the conversation.
    page.load(
        lambda is_wide: gr.Sidebar(open=bool(is_wide)), [layout.download], [layout.sidebar], show_progress="hidden",
        queue=False, js="() => [window.innerWidth >= 900]",
    )  # fmt: skip
    read = page.load(None, None, [layout.saved], js=scripts.READ, **mpt_page.QUICK)
    read.then(presenter.listed, [layout.saved, layout.conversation_id], [layout.chosen], **mpt_page.QUICK)
    layout.model.input(chat.look, [layout.model], [layout.model, layout.licence], show_progress="hidden")


def _answer_when_asked(layout: Layout, chat: presenter.ChatPresenter) -> list[Any]:
    """The events that stream an answer: to a message, an example, a retry, an edited message."""
    quick, chatbot = mpt_page.QUICK, layout.chatbot
    to_take: tuple[Any, ...] = (
        presenter.take,
        [layout.message, chatbot, layout.conversation_id, layout.is_busy],
        [layout.message, chatbot, layout.conversation_id, layout.is_busy, layout.send],
    )
    taken = gr.on([layout.message.submit, layout.send.click], *to_take, **quick)
    exampled = chatbot.example_select(presenter.example_text, None, [layout.message], **quick).then(*to_take, **quick)
    retried = chatbot.retry(presenter.again, [chatbot], [chatbot], **quick)
    edited = chatbot.edit(presenter.edit, [chatbot], [chatbot], **quick)
    return [_answer_after(asked, layout, chat) for asked in (taken, exampled, retried, edited)]


def _answer_after(asked: Any, layout: Layout, chat: presenter.ChatPresenter) -> Any:
    """The event that streams an answer, and what follows it, after the event that asked."""
    shown = [layout.chatbot, layout.numbers, layout.is_busy, layout.send, layout.stop]
    run = asked.then(
        chat.answer, [layout.chatbot, *layout.settings], shown, concurrency_limit=mpt_page.N_AT_ONCE,
        concurrency_id="answers", show_progress="minimal", api_visibility="private",
    )  # fmt: skip
    finished = run.then(None, [layout.chatbot], shown, js=scripts.FINISH, **mpt_page.QUICK)
    # A cancelled event leaves its progress over the chatbot.
    finished.then(gr.skip, None, [layout.chatbot], **mpt_page.QUICK)
    _save_after(finished, layout)
    return run


def _save_after(event: Any, layout: Layout) -> None:
    """Replace this conversation among the saved ones; an empty one leaves them."""
    conversation = [layout.chatbot, layout.conversation_id, layout.system]
    saved = event.then(None, conversation, [layout.saved], js=scripts.SAVE, **mpt_page.QUICK)
    saved.then(presenter.listed, [layout.saved, layout.conversation_id], [layout.chosen], **mpt_page.QUICK)


def _take_back_and_empty(layout: Layout, runs: list[Any]) -> None:
    """Undo, clear, delete, and a new conversation; what empties the page also ends the answer that runs."""
    quick, chatbot = mpt_page.QUICK, layout.chatbot
    undone = chatbot.undo(presenter.undo, [chatbot], [chatbot, layout.message, layout.numbers], **quick)
    _save_after(undone, layout)
    blank = [chatbot, layout.conversation_id, layout.chosen, layout.numbers, layout.send, layout.stop]
    cleared = gr.on([chatbot.clear, layout.delete.click], list, None, [chatbot], cancels=runs, **quick)
    _save_after(cleared, layout)
    cleared.then(presenter.start_new, None, blank, **quick)
    layout.new.click(presenter.start_new, None, blank, cancels=runs, **quick)


def _open_and_export(layout: Layout, runs: list[Any]) -> None:
    opened = [layout.chatbot, layout.conversation_id, layout.system, layout.numbers, layout.send, layout.stop]
    layout.chosen.input(
        presenter.open_saved, [layout.chosen, layout.saved], opened, js=scripts.OPEN, cancels=runs, **mpt_page.QUICK
    )
    conversation = [layout.chatbot, layout.system, layout.model]
    for button, export in ((layout.as_json, export_json), (layout.as_markdown, export_markdown)):
        exported = button.click(export, conversation, [layout.download], **mpt_page.QUICK)
        exported.then(None, [layout.download], None, js=scripts.DOWNLOAD)


if __name__ == "__main__":
    mpt_page.run(build(mpt_space.Server()))
