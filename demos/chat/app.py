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
        layout.header.follow(page, server, presenter.chat_models)
        _fill_when_opened(page, layout)
        runs = _answer_when_asked(layout, chat)
        layout.stop.click(None, None, None, cancels=runs)
        _take_back_and_empty(layout, runs)
        _open_and_export(layout, runs)
    return page


def _fill_when_opened(page: gr.Blocks, layout: Layout) -> None:
    # On a phone the open list would cover the conversation.
    page.load(
        lambda is_wide: gr.Sidebar(open=bool(is_wide)), [layout.download], [layout.sidebar], show_progress="hidden",
        queue=False, js="() => [window.innerWidth >= 900]",
    )  # fmt: skip
    read = page.load(None, None, [layout.saved], js=scripts.READ, **mpt_page.QUICK)
    read.then(presenter.listed, [layout.saved, layout.conversation_id], [layout.chosen], **mpt_page.QUICK)
    layout.model.change(presenter.suggested, [layout.model], [layout.suggestions], **mpt_page.QUICK)


def _answer_when_asked(layout: Layout, chat: presenter.ChatPresenter) -> list[Any]:
    """The events that stream an answer: to a message, a suggestion, a retry, an edited message."""
    quick, thread = mpt_page.QUICK, layout.thread
    to_take: tuple[Any, ...] = (
        presenter.take,
        [layout.message, thread, layout.conversation_id, layout.answering],
        [layout.message, thread, layout.conversation_id, layout.answering, layout.send],
    )
    taken = gr.on([layout.message.submit, layout.send.click], *to_take, **quick)
    chosen = layout.suggestions.click(mpt_page.text_of, [layout.suggestions], [layout.message], **quick)
    turns = [thread, layout.conversation_id]
    retried = thread.retry(presenter.again, turns, [*turns, layout.answering], **quick)
    edited = thread.edit(presenter.edit, turns, [*turns, layout.answering], **quick)
    layout.arrived.change(None, *_arrivals(layout), js=scripts.SHOW, **quick)
    return [_answer_after(asked, layout, chat) for asked in (taken, chosen.then(*to_take, **quick), retried, edited)]


def _answer_after(asked: Any, layout: Layout, chat: presenter.ChatPresenter) -> Any:
    """The event that streams an answer, and what follows it, after the event that asked."""
    _save_after(asked, layout)
    run = asked.then(
        chat.answer, [layout.thread, layout.answering, *layout.settings], [layout.arrived, layout.send, layout.stop],
        concurrency_limit=mpt_page.N_AT_ONCE, concurrency_id="answers", show_progress="hidden", api_visibility="private",
    )  # fmt: skip
    # The end of an answer may come before the change that it makes.
    _save_after(run.success(None, *_arrivals(layout), js=scripts.SHOW, **mpt_page.QUICK), layout)
    _save_after(run.failure(None, *_arrivals(layout), js=scripts.END, **mpt_page.QUICK), layout)
    return run


def _arrivals(layout: Layout) -> tuple[list[Any], list[Any]]:
    """What goes into SHOW and END, and what comes of them."""
    shown = [layout.thread, layout.numbers, layout.answering, layout.send, layout.stop]
    return [layout.arrived, layout.answering, layout.thread], shown


def _save_after(event: Any, layout: Layout) -> None:
    """Replace this conversation among the saved ones; an empty one leaves them."""
    conversation = [layout.thread, layout.conversation_id, layout.system]
    saved = event.then(None, conversation, [layout.saved], js=scripts.SAVE, **mpt_page.QUICK)
    saved.then(presenter.listed, [layout.saved, layout.conversation_id], [layout.chosen], **mpt_page.QUICK)


def _take_back_and_empty(layout: Layout, runs: list[Any]) -> None:
    """Undo, delete, bring back, and a new conversation; what empties the page also ends the answer that runs."""
    quick, thread = mpt_page.QUICK, layout.thread
    turns = [thread, layout.conversation_id]
    undone = thread.undo(presenter.undo, turns, [*turns, layout.message, layout.numbers], **quick)
    _save_after(undone, layout)
    conversation = [thread, layout.conversation_id, layout.system]
    line = [layout.numbers, layout.answering, layout.send, layout.stop]
    blank = [thread, layout.conversation_id, layout.chosen, *line]
    _keep_before(layout.new.click, layout)
    layout.new.click(None, None, blank, js=scripts.START_NEW, cancels=runs, **quick)
    emptied = [layout.deleted, layout.saved, *blank]
    deleted = layout.delete.click(None, conversation, emptied, js=scripts.DELETE, cancels=runs, **quick)
    deleted.then(presenter.listed, [layout.saved, layout.conversation_id], [layout.chosen], **quick)
    layout.deleted.change(presenter.can_be_brought_back, [layout.deleted], [layout.bring_back], **quick)
    back = layout.bring_back.click(
        presenter.bring_back, [layout.deleted], [*conversation, *line], cancels=runs, **quick
    )
    back.then(lambda: None, None, [layout.deleted], **quick)
    _save_after(back, layout)


def _keep_before(event: Any, layout: Layout) -> None:
    """Keep what has come of an answer before another conversation takes its place: events run as they were added."""
    event(None, [layout.thread, layout.conversation_id], None, js=scripts.KEEP, **mpt_page.QUICK)


def _open_and_export(layout: Layout, runs: list[Any]) -> None:
    conversation, line = [layout.thread, layout.conversation_id, layout.system], [layout.numbers, layout.answering]
    opened = [*conversation, *line, layout.send, layout.stop]
    _keep_before(layout.chosen.input, layout)
    layout.chosen.input(
        presenter.open_saved, [layout.chosen, layout.saved], opened, js=scripts.OPEN, cancels=runs, **mpt_page.QUICK
    )
    conversation = [layout.thread, layout.system, layout.model]
    for button, export in ((layout.as_json, export_json), (layout.as_markdown, export_markdown)):
        exported = button.click(export, conversation, [layout.download], **mpt_page.QUICK)
        exported.then(None, [layout.download], None, js=scripts.DOWNLOAD)


if __name__ == "__main__":
    mpt_page.run(build(mpt_space.Server()))
