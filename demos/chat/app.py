"""A conversation with a chat model: streaming, stop, retry, edit, undo, saved conversations, export.

What a finished answer took, or why there is none, is the message's metadata and stands under the conversation, so that
copying a message copies what was said. Conversations are saved in the browser and nowhere else.
"""

import json
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import gradio as gr

try:
    from demos import mpt_space as space
except ImportError:  # a copied Space has the module beside it
    import mpt_space as space  # type: ignore[no-redef]

EXAMPLES = [
    "Hi, my name is Greta",
    "What is an alpaca? How is it different from a llama?",
    "Write a short poem about the moon landing.",
    "Explain to a 6-year-old how a candle burns.",
]
# Made in the browser: the conversation needs no file on the server to become one here.
DOWNLOAD = """([name, text]) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], {type: "text/plain;charset=utf-8"}));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}"""
# In the browser too, as a part of each function below. gr.BrowserState would write what this tab once read: of two tabs
# the last would delete what the other has saved. `localStorage` is read and written in one step here.
STORE = """
    const read = () => {
        try { return JSON.parse(localStorage.getItem("mpt-chat")) || []; } catch { return []; }
    };
    const write = (kept) => {  // a browser keeps about 5 MB for a site: the oldest make room, all where it keeps none
        for (;;) {
            try { localStorage.setItem("mpt-chat", JSON.stringify(kept)); return; } catch { if (!kept.pop()) return; }
        }
    };"""
READ = f"() => {{{STORE} return [read()]; }}"
OPEN = f"(chosen) => {{{STORE} return [chosen, read()]; }}"
SAVE = f"""(turns, conversation, system) => {{{STORE}
    const others = read().filter((each) => each.id !== conversation);
    const kept = conversation && turns.length ? [{{ id: conversation, system, turns }}, ...others] : others;
    kept.length = Math.min(kept.length, 30);
    write(kept);
    return [kept];
}}"""
# After an answer, also a cancelled one. In the browser, because a function of this process could come back after "New
# conversation" has emptied the page, and bring the old one back.
FINISH = """(turns) => {
    const last = turns.at(-1);
    let note = last?.metadata?.log ?? "";
    if (last?.role === "assistant" && !note) {
        note = "Stopped.";
        turns = [...turns.slice(0, -1), { ...last, metadata: { log: note } }];
    } else if (last?.role === "user") {
        note = "Stopped before the first word.";
        turns = [...turns, { role: "assistant", content: [{ type: "text", text: note }], metadata: { log: note } }];
        note = "";
    }
    const send = { __type__: "update", visible: true, interactive: true };
    return [turns, note, false, send, { __type__: "update", visible: false }];
}"""
Turn = dict[str, Any]  # a message of gr.Chatbot


def build(server: space.Server) -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="MPT chat", fill_height=True) as page:
        conversation_id = gr.Textbox("", visible="hidden")  # no State: those are not known to the browser
        saved = gr.JSON([], visible="hidden")
        is_busy = gr.Checkbox(False, visible="hidden")
        download = gr.JSON(visible="hidden")
        with gr.Sidebar(label="Conversations", open=False, width=280) as sidebar:
            new = gr.Button("New conversation", variant="primary", size="md")
            chosen = gr.Radio([], label="Saved in this browser", elem_id="saved")
            delete = gr.Button("Delete this conversation", size="sm")
            with gr.Row():
                as_json = gr.Button("Export JSON", size="sm", min_width=60)
                as_markdown = gr.Button("Export Markdown", size="sm", min_width=60)
        gr.Markdown("# Chat with MPT")
        with gr.Row(equal_height=True):
            model = gr.Dropdown([], label="Model", value=None, filterable=False, scale=1, min_width=200)
            licence = gr.Markdown("", elem_classes="quiet", container=False)
        chatbot = gr.Chatbot(
            label="Conversation",
            height="60vh",
            min_height=260,
            editable="user",
            allow_tags=False,  # what a model writes is not trusted
            sanitize_html=True,
            buttons=["copy", "copy_all"],
            feedback_options=None,
            examples=[{"text": text} for text in EXAMPLES],
            placeholder="Ask something, or begin with one of these.",
            latex_delimiters=[{"left": "$$", "right": "$$", "display": True}],
            elem_id="conversation",
        )
        numbers = gr.Markdown("", elem_classes="quiet", elem_id="numbers", container=False)
        with gr.Row(equal_height=True):
            message = gr.Textbox(
                label="Message", value="", show_label=False, container=False, placeholder="Ask something",
                lines=1, max_lines=8, scale=6, min_width=200, autofocus=True, elem_id="message",
            )  # fmt: skip
            send = gr.Button("Send", variant="primary", scale=1, min_width=80)
            stop = gr.Button("Stop", variant="stop", scale=1, min_width=80, visible=False)
        with gr.Accordion("Settings", open=False):
            system = gr.Textbox(
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
        gr.Markdown(space.privacy_note(), elem_classes="quiet")
        settings = [model, system, temperature, top_p, top_k, max_tokens, repetition, seed]

        # -- what happens --------------------------------------------------------------------------------------

        async def look(model: str | None) -> tuple[Any, str]:
            """The picker and the note below it, from what the server serves now."""
            try:
                cards = chat_models(await server.models())
            except space.SpaceError as error:
                gr.Warning(error.sentence, title="No models")
                return gr.skip(), error.sentence
            card = space.pick(cards, model)
            return gr.Dropdown(choices=[card["id"] for card in cards], value=card["id"]), space.licence_note(card)

        def take(text: str, turns: list[Turn], conversation: str, is_busy: bool) -> Any:
            """Put the message into the conversation; one that comes during an answer stays in its box."""
            if is_busy:
                return gr.skip()
            if text.strip():
                turns = [*turns, {"role": "user", "content": text.strip()}]
            return "", turns, conversation or uuid.uuid4().hex, True, gr.Button(interactive=False)

        async def answer(turns: list[Turn], *settings: Any) -> AsyncIterator[Any]:
            """Stream the answer to the last message under it.

            Stop appears with the first piece: pressed before the event has begun it would cancel nothing.
            """
            if not turns or turns[-1]["role"] != "user":
                yield gr.skip()
                return
            async for text, note, is_done in answers(server, turns, *settings):
                said = [answered(text, note)] if is_done else [{"role": "assistant", "content": text}] if text else []
                yield [*turns, *said], note if text or not is_done else "", True, *busy()

        def again(turns: list[Turn], at: gr.RetryData) -> list[Turn]:
            return turns[: last_question(turns, at.index) + 1]

        def edit(turns: list[Turn], at: gr.EditData) -> list[Turn]:
            """The conversation up to the edited message, which is then answered anew."""
            place = place_of(at.index)
            return [*turns[:place], {"role": "user", "content": str(at.value)}]

        def undo(turns: list[Turn], at: gr.UndoData) -> tuple[list[Turn], str, str]:
            """The conversation without the last question, which goes back into the box."""
            place = last_question(turns, at.index)
            return turns[:place], text_of(turns[place]), note_of(turns[:place])

        def busy() -> tuple[Any, Any]:
            return gr.Button(visible=False), gr.Button(visible=True)

        def idle() -> tuple[Any, Any]:
            return gr.Button(visible=True, interactive=True), gr.Button(visible=False)

        def open_saved(conversation: str, saved: list[dict[str, Any]]) -> tuple[Any, ...]:
            found = next((each for each in saved if each["id"] == conversation), None)
            if found is None:
                return gr.skip(), gr.skip(), gr.skip(), gr.skip(), *idle()
            return found["turns"], found["id"], found["system"], note_of(found["turns"]), *idle()

        def start_new() -> tuple[Any, ...]:
            return [], "", gr.Radio(value=None), "", *idle()

        page.load(look, [model], [model, licence], show_progress="hidden")
        # On a phone the open list would cover the conversation.
        page.load(
            lambda is_wide: gr.Sidebar(open=bool(is_wide)), [download], [sidebar], show_progress="hidden", queue=False,
            js="() => [window.innerWidth >= 900]",
        )  # fmt: skip
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}

        def then_save(event: Any) -> None:
            """Replace this conversation among the saved ones; an empty one leaves them."""
            event.then(None, [chatbot, conversation_id, system], [saved], js=SAVE, **quick).then(
                listed, [saved, conversation_id], [chosen], **quick
            )

        page.load(None, None, [saved], js=READ, **quick).then(listed, [saved, conversation_id], [chosen], **quick)
        model.input(look, [model], [model, licence], show_progress="hidden")

        to_take: tuple[Any, ...] = (
            take, [message, chatbot, conversation_id, is_busy], [message, chatbot, conversation_id, is_busy, send]
        )  # fmt: skip
        taken = gr.on([message.submit, send.click], *to_take, **quick)
        exampled = chatbot.example_select(example_text, None, [message], **quick).then(*to_take, **quick)
        retried = chatbot.retry(again, [chatbot], [chatbot], **quick)
        edited = chatbot.edit(edit, [chatbot], [chatbot], **quick)
        runs = []
        for asked in (taken, exampled, retried, edited):
            run = asked.then(
                answer, [chatbot, *settings], [chatbot, numbers, is_busy, send, stop], concurrency_limit=32,
                concurrency_id="answers", show_progress="minimal", api_visibility="private",
            )  # fmt: skip
            finished = run.then(None, [chatbot], [chatbot, numbers, is_busy, send, stop], js=FINISH, **quick)
            finished.then(gr.skip, None, [chatbot], **quick)  # a cancelled event leaves its progress over the chatbot
            then_save(finished)
            runs.append(run)
        stop.click(None, None, None, cancels=runs)
        then_save(chatbot.undo(undo, [chatbot], [chatbot, message, numbers], **quick))
        blank = [chatbot, conversation_id, chosen, numbers, send, stop]
        cleared = gr.on([chatbot.clear, delete.click], list, None, [chatbot], cancels=runs, **quick)
        then_save(cleared)
        cleared.then(start_new, None, blank, **quick)
        new.click(start_new, None, blank, cancels=runs, **quick)
        chosen.input(
            open_saved, [chosen, saved], [chatbot, conversation_id, system, numbers, send, stop], js=OPEN, cancels=runs,
            **quick,
        )  # fmt: skip
        for button, export in ((as_json, export_json), (as_markdown, export_markdown)):
            button.click(export, [chatbot, system, model], [download], **quick).then(
                None, [download], None, js=DOWNLOAD
            )
    return page


# -- one answer ------------------------------------------------------------------------------------------------------


async def answers(
    server: space.Server,
    turns: list[Turn],
    model: str | None,
    system: str,
    temperature: float,
    top_p: float,
    top_k: int,
    max_tokens: int,
    repetition_penalty: float,
    seed: int | None,
) -> AsyncIterator[tuple[str, str, bool]]:
    """The answer so far, the note under it, and whether that is all; what goes wrong becomes note and warning."""
    text = ""
    yield text, "", False
    try:
        card = space.pick(chat_models(await server.models()), model)
        messages, n_dropped, room = await fitted(server, card, system, said_in(turns), int(max_tokens))
        left_out = (
            f"The oldest {n_dropped} messages no longer fit into the model's context and were left out."
            if n_dropped
            else ""
        )
        numbers, pace = space.Numbers(space.context_length(card)), space.Pace()
        pieces = server.chat(
            card["id"], messages, max_tokens=room, temperature=temperature, top_p=top_p, top_k=int(top_k) or None,
            repetition_penalty=None if repetition_penalty == 1 else repetition_penalty,
            seed=None if seed is None else int(seed), progress=card.get("prompt_style") is not None,
        )  # fmt: skip
        async with aclosing(pieces):
            async for piece in pieces:
                numbers.add(piece)
                text += piece.text
                if pace.is_due():
                    yield text, space.join([left_out, numbers.notice], " "), False
        cut = "cut at the longest answer allowed" if numbers.finish_reason == "length" else ""
        note = space.join([numbers.line(), numbers.context_line(), cut])
        yield text, space.join([left_out, note], " "), True
    except space.SpaceError as error:
        gr.Warning(error.sentence, title="No answer" if not text else "The answer broke off")
        yield text, error.sentence, True


async def fitted(
    server: space.Server, card: space.Card, system: str, said: list[space.Message], wanted: int
) -> tuple[list[space.Message], int, int]:
    """The messages that fit into the context, how many of the oldest were left out, and room for the answer.

    A quarter of the context is kept free for a long answer. Raises SpaceError when the last message alone is too long.
    """
    head = [{"role": "system", "content": system.strip()}] if system.strip() else []
    context = space.context_length(card)
    if context is None:  # a server that does not say how much its models hold
        return [*head, *said], 0, wanted
    starts = [n for n, message in enumerate(said) if message["role"] == "user"]

    async def count(k: int) -> int:
        return await space.count_or_guess(server, card, [*head, *said[starts[k] :]])

    limit = context - min(wanted, context // 4)
    low, n_tokens = 0, await count(0)
    if n_tokens > limit:
        high = len(starts) - 1  # the last message stays, whatever its length
        low = min(1, high)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if await count(middle) <= limit else (middle + 1, high)
        n_tokens = await count(low)
    return [*head, *said[starts[low] :]], starts[low], space.room(card, n_tokens, wanted)


def chat_models(cards: list[space.Card]) -> list[space.Card]:
    """Those that can be talked to, ChatML first; servers other than ours do not say, so all of theirs."""
    able = [card for card in cards if card.get("prompt_style") != "none"]
    if not able:
        raise space.SpaceError(
            "The server serves base models only, which continue text and do not chat.", None, "no_server"
        )
    return sorted(able, key=lambda card: card.get("prompt_style") != "chatml")


# -- messages --------------------------------------------------------------------------------------------------------


def answered(text: str, note: str) -> Turn:
    """A finished answer; where nothing came, the note alone."""
    return {"role": "assistant", "content": text or note, "metadata": {"log": note}}


def text_of(turn: Turn) -> str:
    """What a message says; the chatbot hands back a list of blocks."""
    content = turn["content"]
    return content if isinstance(content, str) else "".join(block["text"] for block in content)


def note_in(turn: Turn) -> str:
    return str((turn.get("metadata") or {}).get("log") or "")


def note_of(turns: list[Turn]) -> str:
    """What stands under a conversation."""
    return note_in(turns[-1]) if turns and is_said(turns[-1]) else ""


def is_said(turn: Turn) -> bool:
    """Whether somebody said it, and it is not the note that stands where an answer never came."""
    return turn["role"] == "user" or text_of(turn) != note_in(turn)


def said_in(turns: list[Turn]) -> list[space.Message]:
    """What goes to the server, and into exports."""
    return [{"role": turn["role"], "content": text_of(turn)} for turn in turns if is_said(turn)]


def place_of(index: int | tuple[int, int] | list[int]) -> int:
    """Gradio counts a message of several blocks in pairs."""
    return index if isinstance(index, int) else index[0]


def last_question(turns: list[Turn], index: int | tuple[int, int]) -> int:
    """The place of the user's message at or before an index."""
    return max((n for n, turn in enumerate(turns[: place_of(index) + 1]) if turn["role"] == "user"), default=0)


def example_text(at: gr.SelectData) -> str:
    return str(at.value["text"])


def listed(saved: list[dict[str, Any]], current: str) -> gr.Radio:
    """The saved conversations by their first words."""
    titles = [(" ".join(text_of(each["turns"][0]).split())[:40] or "Empty", each["id"]) for each in saved]
    return gr.Radio(choices=titles, value=current if current in [each["id"] for each in saved] else None)


def export_json(turns: list[Turn], system: str, model: str | None) -> list[str]:
    head = [{"role": "system", "content": system.strip()}] if system.strip() else []
    body = {"model": model, "messages": [*head, *said_in(turns)]}
    return ["conversation.json", json.dumps(body, indent=2, ensure_ascii=False) + "\n"]


def export_markdown(turns: list[Turn], system: str, model: str | None) -> list[str]:
    names = {"user": "You", "assistant": model or "Assistant"}
    parts = [f"**System**\n\n{system.strip()}"] if system.strip() else []
    parts += [f"**{names[message['role']]}**\n\n{message['content']}" for message in said_in(turns)]
    return ["conversation.md", "\n\n---\n\n".join(parts) + "\n"]


if __name__ == "__main__":
    build(space.Server()).queue(max_size=128).launch(**space.launch_options())
